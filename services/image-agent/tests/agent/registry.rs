//! A registry that does what a bad one, or a bad line to a good one, does: it sends too much, too little, something else, or
//! nothing more.

use fs_err as fs;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Write as _},
    net::{TcpListener, TcpStream},
    process::Command,
    sync::{Arc, Mutex},
    time::Duration,
};

/// What is behind a path.
#[derive(Debug, Clone)]
pub(crate) enum Behind {
    /// This.
    All(Vec<u8>),
    /// The first so many bytes of it, whatever was asked for, and then the end.
    Cut(Vec<u8>, usize),
    /// It up to there, and then nothing more, on a connection that stays.
    Stuck(Vec<u8>, usize),
    /// It again and again, as one that never ends.
    Endless(Vec<u8>),
}

#[derive(Debug, Default)]
struct State {
    paths: BTreeMap<String, Behind>,
    /// What was asked for: its path, and from which byte on.
    asked: Vec<(String, usize)>,
    sent: usize,
}

/// A registry on loopback, with one repository `team/x`.
#[derive(Debug, Clone)]
pub(crate) struct Registry {
    state: Arc<Mutex<State>>,
    pub(crate) at: String,
}

pub(crate) fn sha256(data: &[u8]) -> String {
    hex::encode(Sha256::digest(data))
}

impl Registry {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap().to_string();
        let registry = Self { state: Arc::default(), at };
        let of = registry.clone();
        // It ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let of = of.clone();
                // Whoever asked may go at any time.
                std::thread::spawn(move || drop(of.serve(stream.unwrap())));
            }
        });
        registry
    }

    fn serve(&self, mut stream: TcpStream) -> std::io::Result<()> {
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let first = lines.next().unwrap_or_else(|| Ok(String::new()))?;
        let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
        let mut from = 0;
        for line in lines.by_ref() {
            let line = line?.to_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some(range) = line.strip_prefix("range: bytes=") {
                from = range.trim_end_matches('-').parse().unwrap();
            }
        }
        let behind = {
            let mut state = self.state.lock().unwrap();
            state.asked.push((path.clone(), from));
            state.paths.get(&path).cloned()
        };
        let head = |status: &str, length: Option<usize>| {
            let length = length.map(|n| format!("Content-Length: {n}\r\n")).unwrap_or_default();
            format!(
                "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Type: application/octet-stream\r\n{length}\r\n"
            )
        };
        let part = if from > 0 { "206 Partial Content" } else { "200 OK" };
        match behind {
            None if path == "/v2/" => stream.write_all(head("200 OK", Some(0)).as_bytes()),
            None => stream.write_all(head("404 Not Found", Some(0)).as_bytes()),
            Some(Behind::All(data)) => {
                stream.write_all(head(part, Some(data.len() - from)).as_bytes())?;
                self.send(&mut stream, &data[from..])
            }
            Some(Behind::Cut(data, to)) => {
                stream.write_all(head(part, Some(data.len() - from)).as_bytes())?;
                self.send(&mut stream, &data[from.min(to)..to])
            }
            Some(Behind::Stuck(data, to)) => {
                stream.write_all(head(part, Some(data.len() - from)).as_bytes())?;
                self.send(&mut stream, &data[from.min(to)..to])?;
                std::thread::sleep(Duration::from_secs(600));
                Ok(())
            }
            Some(Behind::Endless(data)) => {
                stream.write_all(head(part, None).as_bytes())?;
                loop {
                    self.send(&mut stream, &data)?;
                }
            }
        }
    }

    fn send(&self, stream: &mut TcpStream, data: &[u8]) -> std::io::Result<()> {
        for piece in data.chunks(64 << 10) {
            stream.write_all(piece)?;
            self.state.lock().unwrap().sent += piece.len();
        }
        Ok(())
    }

    /// How many bytes it has sent.
    pub(crate) fn sent(&self) -> usize {
        self.state.lock().unwrap().sent
    }

    /// From which bytes on it was asked for the blob.
    pub(crate) fn asked(&self, sha256: &str) -> Vec<usize> {
        let state = self.state.lock().unwrap();
        let path = format!("/v2/team/x/blobs/sha256:{sha256}");
        state.asked.iter().filter(|(asked, _)| *asked == path).map(|(_, from)| *from).collect()
    }

    pub(crate) fn manifest(&self, tag: &str, behind: Behind) {
        let path = format!("/v2/team/x/manifests/{tag}");
        self.state.lock().unwrap().paths.insert(path, behind);
    }

    pub(crate) fn blob(&self, sha256: &str, behind: Behind) {
        let path = format!("/v2/team/x/blobs/sha256:{sha256}");
        self.state.lock().unwrap().paths.insert(path, behind);
    }

    /// Has an image as `tag` whose one layer is `layer`; the layer's digest.
    pub(crate) fn image(&self, tag: &str, layer: &[u8]) -> String {
        let digest = sha256(layer);
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": {},
            "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{digest}")] },
        });
        let config = config.to_string().into_bytes();
        let describe = |kind: &str, data: &[u8]| -> Value {
            let kind = format!("application/vnd.oci.image.{kind}");
            json!({ "mediaType": kind, "digest": format!("sha256:{}", sha256(data)), "size": data.len() })
        };
        let manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": describe("config.v1+json", &config), "layers": [describe("layer.v1.tar", layer)],
        });
        self.manifest(tag, Behind::All(manifest.to_string().into_bytes()));
        self.blob(&sha256(&config), Behind::All(config));
        self.blob(&digest, Behind::All(layer.to_vec()));
        digest
    }
}

/// The tar of a small root file system with so many MiB of data.
pub(crate) fn tar(mib: usize) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    fs::create_dir_all(root.join("etc")).unwrap();
    fs::write(root.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\n").unwrap();
    let data: Vec<u8> = (0..mib << 20).map(|i| (i % 251) as u8).collect();
    fs::write(root.join("data"), data).unwrap();
    let made = Command::new("tar").arg("-C").arg(&root).args(["-c", "."]).output().unwrap();
    assert!(made.status.success());
    made.stdout
}
