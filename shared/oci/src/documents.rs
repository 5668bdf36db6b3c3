//! What OCI's documents say: indexes, manifests and configurations, as far as an image of ours has a place for it.
//! Format: the OCI image specification, 1.1.

use bothy_contract::{Code, Error, image::Defaults};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

/// The largest document that is read.
pub const MAX_DOCUMENT: u64 = 4 << 20;
/// The most layers.
const MAX_LAYERS: usize = 1024;

/// Leads to a blob.
#[derive(Debug, Clone, Deserialize)]
pub struct Descriptor {
    /// Of what kind the blob is.
    #[serde(rename = "mediaType", default)]
    pub media_type: String,
    /// Its digest.
    pub digest: String,
    /// Its size in bytes, as the document has it.
    #[serde(default)]
    pub size: u64,
    #[serde(default)]
    platform: Option<Platform>,
    #[serde(default)]
    annotations: std::collections::BTreeMap<String, String>,
}

impl Descriptor {
    /// The SHA-256 that it names, in lower-case hex.
    ///
    /// # Errors
    /// It names none.
    pub fn sha256(&self) -> Result<&str, Error> {
        sha256(&self.digest)
    }

    /// Whether what it leads to is an index again.
    pub fn is_index(&self) -> bool {
        self.media_type.ends_with(".index.v1+json") || self.media_type.ends_with(".manifest.list.v2+json")
    }
}

/// The SHA-256 in a digest's text.
///
/// # Errors
/// It is no such digest.
pub fn sha256(digest: &str) -> Result<&str, Error> {
    digest
        .strip_prefix("sha256:")
        .filter(|d| d.len() == 64 && d.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')))
        .ok_or_else(|| Error::invalid(format!("{digest:?} is not a digest by SHA-256")))
}

#[derive(Debug, Clone, Deserialize)]
struct Platform {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
}

#[derive(Debug, Deserialize)]
struct Index {
    #[serde(default)]
    manifests: Vec<Descriptor>,
}

/// A manifest: a configuration and layers.
#[derive(Debug, Deserialize)]
pub struct Manifest {
    /// The configuration.
    pub config: Descriptor,
    /// The lowest first.
    #[serde(default)]
    pub layers: Vec<Descriptor>,
}

#[derive(Debug, Deserialize)]
struct Config {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    config: Option<Process>,
    rootfs: RootFs,
}

#[derive(Debug, Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Process {
    user: Option<String>,
    env: Option<Vec<String>>,
    working_dir: Option<String>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
}

/// This machine's architecture, as OCI calls it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn parse<T: serde::de::DeserializeOwned>(what: &str, text: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(text).map_err(|e| Error::invalid(format!("its {what} makes no sense: {e}")))
}

/// Checks that a document is the one that a descriptor leads to.
///
/// # Errors
/// It is another one.
pub fn check(what: &str, text: &[u8], expected: &str) -> Result<(), Error> {
    let found = hex::encode(Sha256::digest(text));
    if found == expected {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "its {what} has the digest sha256:{found}, and should have sha256:{expected}"
    ))
    .hint("it was damaged or altered on its way: get it again"))
}

/// Whether a document is an index, and no manifest.
///
/// # Errors
/// It is neither.
pub fn is_index(text: &[u8]) -> Result<bool, Error> {
    #[derive(Deserialize)]
    struct Either {
        manifests: Option<serde::de::IgnoredAny>,
    }
    Ok(parse::<Either>("manifest", text)?.manifests.is_some())
}

/// The one image of an index that this machine can run.
///
/// # Errors
/// There is none, or more than one.
pub fn choose(text: &[u8]) -> Result<Descriptor, Error> {
    let index: Index = parse("index", text)?;
    let ours = |d: &&Descriptor| match &d.platform {
        Some(p) => p.architecture == architecture() && p.os == "linux",
        // Nothing said of it: the configuration will tell.
        None => true,
    };
    let mut found: Vec<_> = index.manifests.iter().filter(ours).collect();
    // One that says it is ours is better than one that says nothing: attestations say nothing, or "unknown".
    if found.iter().any(|d| d.platform.is_some()) {
        found.retain(|d| d.platform.is_some());
    }
    match found.as_slice() {
        [] => {
            let all: Vec<_> = index
                .manifests
                .iter()
                .filter_map(|d| d.platform.as_ref())
                .map(|p| format!("{}/{}", p.os, p.architecture))
                .collect();
            Err(Error::new(
                Code::FailedPrecondition,
                format!("it has no image for linux/{}; it has: {}", architecture(), all.join(", ")),
            ))
        }
        [one] => Ok((*one).clone()),
        [first, others @ ..] if others.iter().all(|d| d.digest == first.digest) => Ok((*first).clone()),
        several => {
            let names: Vec<_> = several
                .iter()
                .filter_map(|d| d.annotations.get("org.opencontainers.image.ref.name").map(String::as_str))
                .collect();
            Err(Error::invalid(format!("it holds {} images: {}", several.len(), names.join(", ")))
                .hint("copy the one that you want into a layout of its own, as `skopeo copy` does"))
        }
    }
}

/// A manifest whose layers are all of a kind that is known here.
///
/// # Errors
/// It makes no sense, or has layers of another kind.
pub fn manifest(text: &[u8]) -> Result<Manifest, Error> {
    let manifest: Manifest = parse("manifest", text)?;
    if manifest.layers.len() > MAX_LAYERS {
        return Err(Error::new(Code::ResourceExhausted, format!("it has more than {MAX_LAYERS} layers")));
    }
    for layer in &manifest.layers {
        layer.sha256()?;
        let kind = layer.media_type.as_str();
        let known = kind.contains("layer") || kind.contains("rootfs.diff");
        if !known || kind.contains("encrypted") || kind.contains("foreign") {
            return Err(Error::invalid(format!("it has a layer of the unknown kind {kind:?}"))
                .hint("is it the image of a container? Other artifacts cannot be booted"));
        }
    }
    Ok(manifest)
}

/// What a configuration says: the digests of the `layers` layers once decompressed, and what processes get.
///
/// # Errors
/// It is for another machine or another image.
pub fn config(text: &[u8], layers: usize) -> Result<(Vec<String>, Defaults), Error> {
    let config: Config = parse("configuration", text)?;
    let right = |is: &str, ours: &str| is.is_empty() || is == ours;
    if !right(&config.architecture, architecture()) || !right(&config.os, "linux") {
        return Err(Error::new(
            Code::FailedPrecondition,
            format!(
                "it is an image for {}/{}, and this machine is linux/{}",
                config.os,
                config.architecture,
                architecture()
            ),
        ));
    }
    let diff_ids = config.rootfs.diff_ids;
    if diff_ids.len() != layers {
        let has = format!("it has {layers} layers, and its configuration speaks of {}", diff_ids.len());
        return Err(Error::invalid(has));
    }
    let diff_ids = diff_ids.iter().map(|d| sha256(d).map(str::to_owned)).collect::<Result<_, _>>()?;
    let process = config.config.unwrap_or_default();
    let said = |text: Option<String>| text.filter(|t| !t.is_empty());
    let defaults = Defaults {
        user: said(process.user),
        env: process.env.unwrap_or_default(),
        working_dir: said(process.working_dir),
        entrypoint: process.entrypoint.unwrap_or_default(),
        command: process.cmd.unwrap_or_default(),
    };
    Ok((diff_ids, defaults))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(n: u8, platform: Option<(&str, &str)>) -> serde_json::Value {
        let mut d = serde_json::json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": format!("sha256:{}", hex::encode([n; 32])),
            "annotations": { "org.opencontainers.image.ref.name": format!("tag{n}") },
        });
        if let Some((os, arch)) = platform {
            d["platform"] = serde_json::json!({ "os": os, "architecture": arch });
        }
        d
    }

    #[test]
    fn the_image_of_this_machine_is_chosen() {
        let choose = |manifests: &[serde_json::Value]| {
            super::choose(serde_json::json!({ "manifests": manifests }).to_string().as_bytes())
        };
        let ours = ("linux", architecture());
        let (one, two) = (descriptor(1, Some(("linux", "s390x"))), descriptor(2, Some(ours)));
        let attested = descriptor(3, Some(("unknown", "unknown")));
        let chosen = choose(&[one.clone(), two.clone(), attested]).unwrap();
        assert_eq!(chosen.sha256().unwrap(), hex::encode([2; 32]));
        assert_eq!(choose(&[descriptor(4, None)]).unwrap().sha256().unwrap(), hex::encode([4; 32]));
        let none = choose(&[one]).unwrap_err();
        assert!(none.message.contains("it has: linux/s390x"), "{none}");
        let several = choose(&[two, descriptor(5, Some(ours))]).unwrap_err();
        assert!(several.message.contains("2 images: tag2, tag5"), "{several}");
        let mut evil = descriptor(6, None);
        evil["digest"] = "sha256:../../../etc/passwd".into();
        assert!(choose(&[evil]).unwrap().sha256().is_err());
    }

    #[test]
    fn a_configuration_is_held_against_its_image() {
        let text = |arch: &str, diffs: usize| {
            serde_json::json!({
                "architecture": arch, "os": "linux",
                "config": { "User": "dev", "Env": ["A=b"], "WorkingDir": "", "Cmd": ["sh"], "Entrypoint": null },
                "rootfs": { "type": "layers", "diff_ids": vec![format!("sha256:{}", hex::encode([7; 32])); diffs] },
            })
            .to_string()
        };
        let (diffs, defaults) = config(text(architecture(), 2).as_bytes(), 2).unwrap();
        assert_eq!((diffs.len(), defaults.user.as_deref()), (2, Some("dev")));
        assert_eq!(
            (defaults.env, defaults.command, defaults.working_dir),
            (vec!["A=b".into()], vec!["sh".into()], None)
        );
        assert!(config(text(architecture(), 2).as_bytes(), 3).unwrap_err().message.contains("3 layers"));
        assert!(config(text("riscv64", 1).as_bytes(), 1).unwrap_err().message.contains("linux/riscv64"));
        assert!(config(b"[]", 0).unwrap_err().message.contains("makes no sense"));
    }
}
