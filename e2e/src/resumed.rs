//! The same tests on resumed machines. With `BOTHY_E2E_RESUMED=1` every host keeps templates, and a template of the right
//! shape is made before each create that a test asks for: what holds for a machine that booted is to hold for one that was
//! resumed. Without it hosts make none, since each costs a boot; the tests of templates ask for theirs.

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    sync::{Mutex, PoisonError},
};

/// How many templates a host keeps then: as many as one test has shapes of machines, with some to spare.
pub const TEMPLATES: u32 = 8;

/// Options of a create that a template's key depends on, besides the image.
const SHAPE: [&str; 3] = ["--cpus", "--memory", "--system-disk"];

/// Whether this run is on resumed machines.
pub fn wanted() -> bool {
    std::env::var_os("BOTHY_E2E_RESUMED").is_some_and(|v| v == "1")
}

/// What has a template on one host, by the arguments that it was made with, and the creates that must have been resumed.
#[derive(Debug, Default)]
pub struct Warmed {
    made: Mutex<BTreeMap<Vec<OsString>, bool>>,
    creates: Mutex<u64>,
}

impl Warmed {
    /// Makes the template for a command with `args` by `warm`, if it is a create and has none yet. Whether one is there: where it
    /// cannot be made, what is asked for cannot be created either, and the test sees that from the create.
    pub fn before(&self, args: &[OsString], warm: impl FnOnce(&[OsString]) -> bool) -> bool {
        let Some(shape) = shape(args) else { return false };
        // Held while it is made: two creates of a shape at once wait for one template.
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        match made.get(&shape) {
            Some(there) => *there,
            None => *made.entry(shape.clone()).or_insert(warm(&shape)),
        }
    }

    /// Takes down that a create that had a template ended well.
    pub fn created(&self) {
        *self.creates.lock().unwrap_or_else(PoisonError::into_inner) += 1;
    }

    /// How many creates must have been resumed.
    pub fn creates(&self) -> u64 {
        *self.creates.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The arguments of `bothy image warm` that fit a create with `args`; nothing if that is no create, or one that is to boot.
fn shape(args: &[OsString]) -> Option<Vec<OsString>> {
    let words: Vec<&str> = args.iter().map_while(|a| a.to_str()).take_while(|a| *a != "--").collect();
    let creates = matches!(words.as_slice(), ["vm", "create", ..] | ["run", ..]);
    if !creates || words.iter().any(|word| ["--cold", "--help", "--dry-run", "--vm"].contains(word)) {
        return None;
    }
    let value = |option: &str| {
        let at = words
            .iter()
            .position(|word| word.strip_prefix(option).is_some_and(|v| v.is_empty() || v.starts_with('=')))?;
        let same = words.get(at)?.strip_prefix(option)?.strip_prefix('=');
        same.or(words.get(at + 1).copied())
    };
    let options = SHAPE.iter().filter_map(|option| Some([*option, value(option)?])).flatten();
    let all = value("--image").into_iter().chain(options);
    Some(all.map(|word| OsStr::new(word).to_owned()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(line: &str) -> Option<String> {
        let args: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        Some(shape(&args)?.join(OsStr::new(" ")).into_string().unwrap())
    }

    #[test]
    fn a_create_has_the_shape_of_its_template() {
        assert_eq!(of("vm create --name a").as_deref(), Some(""));
        assert_eq!(
            of("vm create --memory 1G --name a --image quick --cpus=1").as_deref(),
            Some("quick --cpus 1 --memory 1G")
        );
        assert_eq!(of("run . --cpus 1 -- make --memory 2").as_deref(), Some("--cpus 1"));
        assert_eq!(of("vm create --cold --name a"), None);
        assert_eq!(of("vm show a"), None);
    }
}
