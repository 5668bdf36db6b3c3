//! The package sources of the host, as apt reads them.
//!
//! No file of this project names a mirror: an image is built, and a newer package found, from where the host's own
//! packages come. [`of_host`] reads both formats of sources.list(5), one line per source and deb822, and [`Source`]
//! writes deb822 again. Only `deb` sources that are enabled are kept; what is not understood is passed on as it is.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io,
    path::{Path, PathBuf},
};

/// One package source: a stanza of deb822, or one line of a `.list`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Source {
    /// Base addresses of the archive.
    pub uris: Vec<String>,
    /// `bookworm`, `bookworm-updates`.
    pub suites: Vec<String>,
    /// `main`, `contrib`.
    pub components: Vec<String>,
    /// All other fields, with deb822's names in lower case: `signed-by`. Lines of a value are joined by `\n`.
    pub options: BTreeMap<String, String>,
}

/// Why the sources could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The message of `fs_err` names the path.
    #[error("cannot read the host's package sources")]
    Read(#[source] io::Error),
    /// There is nothing to install from.
    #[error("{dir} has no enabled package source for {codename}")]
    NoneFor {
        /// apt's configuration directory.
        dir: PathBuf,
        /// The release that was looked for.
        codename: String,
    },
}

impl Source {
    /// The source as a deb822 stanza, with an empty line at the end.
    pub fn to_deb822(&self) -> String {
        let mut out = String::from("Types: deb\n");
        for (field, values) in
            [("URIs", &self.uris), ("Suites", &self.suites), ("Components", &self.components)]
        {
            if !values.is_empty() {
                let _ = writeln!(out, "{field}: {}", values.join(" "));
            }
        }
        for (field, value) in &self.options {
            let _ = writeln!(out, "{field}: {}", value.replace('\n', "\n "));
        }
        out.push('\n');
        out
    }

    /// The same archive and keys, with only those of its suites that `keep` takes. None where none is left.
    fn filtered(&self, keep: impl Fn(&str) -> bool) -> Option<Self> {
        let suites: Vec<_> = self.suites.iter().filter(|s| keep(s)).cloned().collect();
        (!suites.is_empty()).then(|| Self { suites, ..self.clone() })
    }
}

/// The enabled `deb` sources in `/etc/apt`, or another directory of that shape.
///
/// # Errors
/// A file or directory that is there and cannot be read.
pub fn of_host(apt_dir: &Path) -> Result<Vec<Source>, Error> {
    let mut files = vec![apt_dir.join("sources.list")];
    match fs_err::read_dir(apt_dir.join("sources.list.d")) {
        Ok(entries) => {
            let mut parts = Vec::new();
            for entry in entries {
                parts.push(entry.map_err(Error::Read)?.path());
            }
            parts.sort();
            files.extend(parts);
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(Error::Read(e)),
    }
    let mut sources = Vec::new();
    for file in files {
        let parse = match file.extension().and_then(|e| e.to_str()) {
            Some("list") => parse_list,
            Some("sources") => parse_deb822,
            _ => continue,
        };
        match fs_err::read_to_string(&file) {
            Ok(text) => sources.extend(parse(&text)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::Read(e)),
        }
    }
    Ok(sources)
}

/// Of `sources`, those of the release itself: `<codename>`, its `-updates` and its `-security` (`/updates`) suites.
/// Other vendors' suites and backports are left out.
///
/// # Errors
/// [`Error::NoneFor`] where the release's main suite is not among them; `dir` is for its message.
pub fn of_release(sources: &[Source], codename: &str, dir: &Path) -> Result<Vec<Source>, Error> {
    let own = |suite: &str| {
        suite.strip_prefix(codename).is_some_and(|rest| {
            matches!(rest, "" | "-updates" | "-security" | "/updates" | "-proposed-updates")
        })
    };
    let found: Vec<_> = sources.iter().filter_map(|s| s.filtered(own)).collect();
    if found.iter().any(|s| s.suites.iter().any(|suite| suite == codename)) {
        Ok(found)
    } else {
        Err(Error::NoneFor { dir: dir.to_owned(), codename: codename.to_owned() })
    }
}

/// The `<codename>-backports` suite of the archive that the release's main suite comes from.
///
/// # Errors
/// [`Error::NoneFor`] where there is no such archive.
pub fn backports(sources: &[Source], codename: &str, dir: &Path) -> Result<Source, Error> {
    let main = of_release(sources, codename, dir)?.into_iter().find_map(|s| s.filtered(|x| x == codename));
    let none = || Error::NoneFor { dir: dir.to_owned(), codename: codename.to_owned() };
    let main = main.ok_or_else(none)?;
    Ok(Source { suites: vec![format!("{codename}-backports")], ..main })
}

/// The sources of a deb822 file.
pub fn parse_deb822(text: &str) -> Vec<Source> {
    let mut out = Vec::new();
    let mut fields: BTreeMap<String, String> = BTreeMap::new();
    let mut last: Option<String> = None;
    for line in text.lines().chain([""]) {
        if line.starts_with('#') {
            continue;
        }
        if line.trim().is_empty() {
            out.extend(from_fields(std::mem::take(&mut fields)));
            last = None;
        } else if line.starts_with([' ', '\t']) {
            if let Some(value) = last.as_ref().and_then(|k| fields.get_mut(k)) {
                value.push('\n');
                value.push_str(line.trim());
            }
        } else if let Some((name, value)) = line.split_once(':') {
            let name = name.trim().to_ascii_lowercase();
            fields.insert(name.clone(), value.trim().to_owned());
            last = Some(name);
        }
    }
    out
}

fn from_fields(mut fields: BTreeMap<String, String>) -> Option<Source> {
    let mut words = |name: &str| -> Vec<String> {
        fields.remove(name).unwrap_or_default().split_whitespace().map(str::to_owned).collect()
    };
    let (types, uris, suites, components) =
        (words("types"), words("uris"), words("suites"), words("components"));
    let disabled = words("enabled").first().is_some_and(|v| v.eq_ignore_ascii_case("no"));
    (types.iter().any(|t| t == "deb") && !disabled && !uris.is_empty() && !suites.is_empty())
        .then_some(Source { uris, suites, components, options: fields })
}

/// The sources of a file with one per line.
pub fn parse_list(text: &str) -> Vec<Source> {
    text.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Source> {
    let line = line.split('#').next().unwrap_or_default().trim();
    let mut rest = line.strip_prefix("deb")?.strip_prefix([' ', '\t'])?.trim_start();
    let mut options = BTreeMap::new();
    if let Some(bracket) = rest.strip_prefix('[') {
        let (inner, after) = bracket.split_once(']')?;
        for option in inner.split_whitespace() {
            let (name, value) = option.split_once('=')?;
            // The names of the two formats differ only in these (sources.list(5)).
            let name = match name {
                "arch" => "architectures",
                "lang" => "languages",
                "target" => "targets",
                other => other,
            };
            options.insert(name.to_ascii_lowercase(), value.replace(',', " "));
        }
        rest = after;
    }
    let mut words = rest.split_whitespace().map(str::to_owned);
    Some(Source {
        uris: vec![words.next()?],
        suites: vec![words.next()?],
        components: words.collect(),
        options,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEB822: &str = "\
# a comment
Types: deb deb-src
URIs: http://mirror.test/debian
Suites: bookworm bookworm-updates bookworm-backports
Components: main
Signed-By:
 -----BEGIN PGP-----
 .
 abc

Types: deb
URIs: http://mirror.test/security
Suites: bookworm-security
Components: main
Enabled: yes

Types: deb
URIs: http://vendor.test/x
Suites: stable
Components: main

Types: deb
Enabled: no
URIs: http://off.test/x
Suites: bookworm
";

    #[test]
    fn stanzas_are_read_and_written_back_the_same() {
        let read = parse_deb822(DEB822);
        assert_eq!(read.len(), 3);
        assert_eq!(read[0].options["signed-by"], "\n-----BEGIN PGP-----\n.\nabc");
        let text: String = read.iter().map(Source::to_deb822).collect();
        assert_eq!(parse_deb822(&text), read);
    }

    #[test]
    fn one_line_sources_give_the_same_as_stanzas() {
        let text = "# deb http://no.test x main\n\
            deb [arch=amd64,arm64 signed-by=/k.gpg] http://m.test/debian bookworm main contrib # why\n\
            deb-src http://m.test/debian bookworm main\ndeb\ndeb http://half.test\n";
        let read = parse_list(text);
        assert_eq!(read.len(), 1);
        assert_eq!(read[0].components, ["main", "contrib"]);
        assert_eq!(read[0].options["architectures"], "amd64 arm64");
        assert_eq!(parse_deb822(&read[0].to_deb822()), read);
    }

    #[test]
    fn a_release_takes_its_own_suites_and_no_vendor() {
        let all = parse_deb822(DEB822);
        let dir = Path::new("/etc/apt");
        let own = of_release(&all, "bookworm", dir).unwrap();
        let suites: Vec<_> = own.iter().flat_map(|s| s.suites.clone()).collect();
        assert_eq!(suites, ["bookworm", "bookworm-updates", "bookworm-security"]);
        assert!(of_release(&all, "trixie", dir).is_err());
        let back = backports(&all, "bookworm", dir).unwrap();
        assert_eq!((back.uris, back.suites), (all[0].uris.clone(), vec!["bookworm-backports".to_owned()]));
    }

    #[test]
    fn both_formats_of_a_directory_are_found() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(of_host(dir.path()).unwrap(), []);
        fs_err::create_dir(dir.path().join("sources.list.d")).unwrap();
        fs_err::write(dir.path().join("sources.list"), "deb http://a.test/d bookworm main\n").unwrap();
        fs_err::write(dir.path().join("sources.list.d/b.sources"), DEB822).unwrap();
        fs_err::write(dir.path().join("sources.list.d/c.list.off"), "deb http://c.test/d x y\n").unwrap();
        assert_eq!(of_host(dir.path()).unwrap().len(), 4);
    }
}
