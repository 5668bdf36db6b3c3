//! An OCI image without an init system, sshd or anything else of a distribution, to be imported or pulled.
#![expect(clippy::unwrap_used, reason = "a test's helper: a failed step is a failed test")]

use fs_err as fs;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// A blob of the layout in `dir`: its descriptor.
fn blob(dir: &Path, kind: &str, data: &[u8]) -> serde_json::Value {
    let digest = hex::encode(Sha256::digest(data));
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join(&digest), data).unwrap();
    serde_json::json!({
        "mediaType": format!("application/vnd.oci.image.{kind}"),
        "digest": format!("sha256:{digest}"),
        "size": data.len(),
    })
}

/// A layer: this machine's own shell and what it is linked with.
///
/// # Panics
/// If this machine's shell cannot be read.
pub fn shell() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    tar.follow_symlinks(true);
    let ldd = std::process::Command::new("ldd").arg("/bin/dash").output().unwrap();
    let libraries = String::from_utf8(ldd.stdout).unwrap();
    for library in libraries.split_whitespace().filter(|w| w.starts_with('/')) {
        tar.append_path_with_name(library, library.trim_start_matches('/')).unwrap();
    }
    tar.append_path_with_name("/bin/dash", "bin/sh").unwrap();
    file(&mut tar, "etc/gone", "hidden by the layer above");
    file(&mut tar, "etc/kept", "below");
    tar.into_inner().unwrap()
}

fn file(tar: &mut tar::Builder<Vec<u8>>, path: &str, text: &str) {
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o640);
    header.set_size(text.len() as u64);
    tar.append_data(&mut header, path, text.as_bytes()).unwrap();
}

/// An OCI layout below `dir`, of two layers.
///
/// # Panics
/// If it cannot be written.
pub fn layout(dir: &Path) -> PathBuf {
    let dir = dir.join("layout");
    let mut upper = tar::Builder::new(Vec::new());
    file(&mut upper, "etc/.wh.gone", "");
    file(&mut upper, "etc/above", "above");
    let layers = [shell(), upper.into_inner().unwrap()];
    let diff_ids: Vec<_> =
        layers.iter().map(|l| format!("sha256:{}", hex::encode(Sha256::digest(l)))).collect();
    let layers: Vec<_> = layers.iter().map(|l| blob(&dir, "layer.v1.tar", l)).collect();
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux",
        "config": { "User": "12:7", "Env": ["GREETING=hello"], "WorkingDir": "/etc", "Cmd": ["sh"] },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let config = blob(&dir, "config.v1+json", config.to_string().as_bytes());
    let manifest = serde_json::json!({ "schemaVersion": 2, "config": config, "layers": layers });
    let manifest = blob(&dir, "manifest.v1+json", manifest.to_string().as_bytes());
    let index = serde_json::json!({ "schemaVersion": 2, "manifests": [manifest] });
    fs::write(dir.join("index.json"), index.to_string()).unwrap();
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    dir
}
