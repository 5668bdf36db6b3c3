//! Images from elsewhere: an OCI image without an init system, sshd or anything else of a distribution is imported, booted
//! and worked in. Its two layers are made here, of this machine's own shell.
#![expect(clippy::unwrap_used, reason = "a test's helper: a failed step is a failed test")]

use bothy_e2e::host::Host;
use bothy_testkit::require_root;
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

/// The shell and what it is linked with.
fn shell() -> Vec<u8> {
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

/// An OCI layout below `dir`.
fn layout(dir: &Path) -> PathBuf {
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
        "config": { "Env": ["GREETING=hello"], "WorkingDir": "/etc", "Cmd": ["sh"] },
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

#[test]
fn an_oci_image_is_imported_booted_and_worked_in() {
    require_root!();
    let host = Host::start();
    let dir = tempfile::tempdir().unwrap();
    let layout = layout(dir.path());
    let path = layout.to_str().unwrap();

    let made = host.bothy(["image", "import", "tiny", path, "--json"]);
    assert_eq!(made.status, 0, "{made:?}\n{}", host.logs());
    let made = made.json();
    assert_eq!(made["result"]["init"], "agent", "{made:#}");
    assert_eq!(made["result"]["defaults"]["env"][0], "GREETING=hello");
    assert_eq!(made["result"]["defaults"]["working_dir"], "/etc");
    let taken = host.bothy(["image", "import", "tiny", path]);
    assert!(taken.status != 0 && taken.stderr.contains("there is an image tiny already"), "{taken:?}");

    host.bothy(["vm", "create", "--name", "t", "--image", "tiny", "--memory", "256M", "--cpus", "1"]).ok();
    let said =
        host.sh("t", "read -r a < /etc/above; read -r k < /etc/kept; echo $a $k; test ! -e /etc/gone").status;
    // Neither file ends in a line's end, so `read` says that it came to the file's end; `test` has the last word.
    assert_eq!(said, 0);
    let said = host.sh("t", "read -r a < /etc/above; read -r k < /etc/kept; echo $a $k");
    assert_eq!(said.ok().stdout, "above below\n");
    let written =
        host.sh("t", "echo new > /etc/new && read -r n < /etc/new && echo $n $$ > /root/home && echo ok");
    assert_eq!(written.ok().stdout, "ok\n");
    host.bothy(["vm", "delete", "--force", "t"]).ok();

    // A root file system's archive, through standard input's place as a file; and what is refused leaves nothing.
    let tar = dir.path().join("root.tar");
    fs::write(&tar, shell()).unwrap();
    let root = host.bothy(["image", "import", "root", tar.to_str().unwrap(), "--json"]).json();
    assert_eq!(root["result"]["origin"], "root.tar");
    for damaged in fs::read_dir(layout.join("blobs/sha256")).unwrap() {
        let damaged = damaged.unwrap();
        if damaged.metadata().unwrap().len() > 100_000 {
            let mut data = fs::read(damaged.path()).unwrap();
            data[5000] ^= 1;
            fs::write(damaged.path(), data).unwrap();
        }
    }
    for (path, why) in [
        (path, "should be sha256:"),
        ("/no/such/file", "cannot open the archive"),
        ("/etc", "is not the directory of an OCI layout"),
        ("/etc/passwd", "no tar archive"),
    ] {
        let refused = host.bothy(["image", "import", "bad", path]);
        assert!(refused.status != 0 && refused.stderr.contains(why), "{path}: {refused:?}");
    }
    let agent = host.config.service_dir(bothy_contract::Service::Image);
    let left = |dir: PathBuf| -> Vec<_> {
        let names = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        names.filter(|n| n.starts_with('.') || n.len() == 32 || n == "bad").collect()
    };
    assert_eq!(left(agent.join("incoming")), Vec::<String>::new());
    assert_eq!(left(agent.join("store/images")), Vec::<String>::new());
    host.finish();
}
