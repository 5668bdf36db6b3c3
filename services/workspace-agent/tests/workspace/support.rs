//! A guest that is a directory of the host: the very same scripts, real git, no VM.

use bothy_contract::{
    Error, VmId,
    workspace::{ExportFormat, ExportReport, ImportReport, OpenExport, OpenImport, SyncReport},
};
use bothy_guest_proto::v1::File;
use bothy_pack::{PackOptions, PackSummary, Repository};
use bothy_tickets::{Frame, FrameReader, FrameWriter};
use bothy_workspace_agent::{
    export::export,
    guest::Guest,
    import::import,
    script::{Finished, Script},
};
use bytes::Bytes;
use std::{
    collections::BTreeMap,
    io::Read,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};
use tokio::{io::AsyncReadExt, sync::mpsc};
use tokio_util::sync::CancellationToken;

tokio::task_local! {
    /// A directory of programs that come before all others in the guest, where a test has one.
    pub(crate) static TOOLS: PathBuf;
}

pub(crate) struct HostGuest;

impl HostGuest {
    fn command(script: &Script, args: &[&str]) -> tokio::process::Command {
        let mut cmd = tokio::process::Command::new("/bin/sh");
        cmd.args(["-c", script.text, script.name]).args(args).stdin(Stdio::null()).kill_on_drop(true);
        if let Ok(tools) = TOOLS.try_with(Clone::clone) {
            cmd.env("PATH", format!("{}:{}", tools.display(), std::env::var("PATH").unwrap()));
        }
        cmd
    }
}

impl Guest for HostGuest {
    async fn run(&self, script: &Script, args: &[&str]) -> Result<Finished, Error> {
        let out = Self::command(script, args).output().await.unwrap();
        Ok(Finished { status: out.status.code().unwrap_or(255), stdout: out.stdout, stderr: out.stderr })
    }

    async fn read(
        &self,
        script: &Script,
        args: &[&str],
        out: mpsc::Sender<Bytes>,
    ) -> Result<Finished, Error> {
        let mut child = Self::command(script, args).stdout(Stdio::piped()).spawn().unwrap();
        let mut stdout = child.stdout.take().unwrap();
        let mut buf = vec![0; 10_000];
        loop {
            let n = stdout.read(&mut buf).await.unwrap();
            if n == 0 || out.send(Bytes::copy_from_slice(&buf[..n])).await.is_err() {
                break;
            }
        }
        Ok(Finished { status: child.wait().await.unwrap().code().unwrap(), ..Finished::default() })
    }

    async fn put_tar(&self, dir: &str, data: mpsc::Receiver<Bytes>) -> Result<(), Error> {
        struct Reader(mpsc::Receiver<Bytes>, Bytes);
        impl Read for Reader {
            fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
                while self.1.is_empty() {
                    match self.0.blocking_recv() {
                        Some(data) => self.1 = data,
                        None => return Ok(0),
                    }
                }
                let n = buf.len().min(self.1.len());
                buf[..n].copy_from_slice(&self.1.split_to(n));
                Ok(n)
            }
        }
        let dir = dir.to_owned();
        tokio::task::spawn_blocking(move || {
            let mut reader = Reader(data, Bytes::new());
            let done = tar::Archive::new(&mut reader).unpack(dir);
            done.map_err(|e| Error::internal("unpacking", &e))
        })
        .await
        .unwrap()
    }

    async fn write_files(&self, files: Vec<File>) -> Result<(), Error> {
        for file in files {
            fs_err::create_dir_all(Path::new(&file.path).parent().unwrap()).unwrap();
            fs_err::write(&file.path, file.content).unwrap();
            fs_err::set_permissions(&file.path, PermissionsExt::from_mode(file.mode)).unwrap();
        }
        Ok(())
    }

    async fn exists(&self, path: &str) -> Result<bool, Error> {
        Ok(Path::new(path).exists())
    }
}

/// Packs `repo`, as the CLI does, into frames.
pub(crate) fn packed(repo: &Path, include_untracked: bool) -> (Vec<u8>, PackSummary) {
    packed_as(repo, &PackOptions { include_untracked, ..PackOptions::default() })
}

pub(crate) fn packed_as(repo: &Path, options: &PackOptions) -> (Vec<u8>, PackSummary) {
    let mut pack = Vec::new();
    let summary = Repository::open(repo).unwrap().pack(options, &mut pack).unwrap();
    assert_eq!(summary.bytes, pack.len() as u64);
    (pack, summary)
}

pub(crate) async fn framed(pack: &[u8], end: bool) -> Vec<u8> {
    let mut frames = FrameWriter::new(Vec::new());
    frames.data(pack).await.unwrap();
    if end {
        frames.end(&()).await.unwrap();
    }
    frames.into_inner()
}

pub(crate) async fn import_frames(guest_path: &Path, frames: &[u8]) -> Result<ImportReport, Error> {
    import_with(guest_path, frames, false).await
}

pub(crate) async fn import_with(
    guest_path: &Path,
    frames: &[u8],
    force: bool,
) -> Result<ImportReport, Error> {
    let guest_path = guest_path.to_str().unwrap().into();
    let request = OpenImport { vm: VmId::new(), guest_path, force, readonly: false };
    import(&HostGuest, &request, &mut FrameReader::new(frames), &CancellationToken::new()).await
}

pub(crate) async fn import_repo(repo: &Path, guest_path: &Path, include_untracked: bool) -> ImportReport {
    let (pack, _) = packed(repo, include_untracked);
    import_frames(guest_path, &framed(&pack, true).await).await.unwrap()
}

pub(crate) async fn export_repo(guest_path: &Path, scratch: &Path) -> Result<(Vec<u8>, ExportReport), Error> {
    export_as(guest_path, scratch, ExportFormat::Patch, None).await
}

pub(crate) async fn export_as(
    guest_path: &Path,
    scratch: &Path,
    format: ExportFormat,
    base: Option<&str>,
) -> Result<(Vec<u8>, ExportReport), Error> {
    let guest_path = guest_path.to_str().unwrap().into();
    let request = OpenExport { vm: VmId::new(), guest_path, format, base: base.map(str::to_owned) };
    let mut out = FrameWriter::new(Vec::new());
    let report =
        export(&HostGuest, &request, scratch.to_str().unwrap(), &mut out, &CancellationToken::new()).await?;
    out.end(&report).await.unwrap();
    let frames = out.into_inner();
    let mut reader = FrameReader::new(frames.as_slice());
    let mut patch = Vec::new();
    while let Frame::Data(data) = reader.next().await.unwrap() {
        patch.extend_from_slice(&data);
    }
    assert_eq!(patch.len() as u64, report.bytes);
    Ok((patch, report))
}

/// Brings the tracked files of `host` into the guest, as the CLI does.
pub(crate) async fn sync_repo(
    host: &Path,
    guest: &Path,
    scratch: &Path,
    force: bool,
) -> Result<SyncReport, Error> {
    let standing = export_as(guest, scratch, ExportFormat::Status, None).await?.1.guest;
    let repository = Repository::open(host)?;
    let Some(sync) = repository.sync(&repository.tracked()?, &standing.base, standing.tracked.as_deref())?
    else {
        return Ok(SyncReport::default());
    };
    let mut pack = Vec::new();
    sync.write(&mut pack)?;
    let report = import_with(guest, &framed(&pack, true).await, force).await?;
    Ok(report.sync.unwrap())
}

/// A git of ours, free of the configuration of whoever runs the tests.
pub(crate) fn git(dir: &Path, args: &[&str]) -> String {
    let out = git_with(dir, args, b"");
    assert!(out.status.success(), "git {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).trim_end_matches('\n').to_owned()
}

pub(crate) fn git_with(dir: &Path, args: &[&str], stdin: &[u8]) -> std::process::Output {
    use std::io::Write;
    let mut cmd = Command::new("git");
    cmd.current_dir(dir)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap())
        .envs([("GIT_CONFIG_NOSYSTEM", "1"), ("GIT_CONFIG_GLOBAL", "/dev/null"), ("HOME", "/nonexistent")])
        .envs([("GIT_AUTHOR_NAME", "t"), ("GIT_AUTHOR_EMAIL", "t@t"), ("GIT_COMMITTER_NAME", "t")])
        .envs([("GIT_COMMITTER_EMAIL", "t@t"), ("GIT_ALLOW_PROTOCOL", "file")])
        .args(["-c", "protocol.file.allow=always"])
        .args(args);
    let mut child = cmd.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    let stdin = stdin.to_vec();
    let feed = std::thread::spawn(move || drop(input.write_all(&stdin)));
    let out = child.wait_with_output().unwrap();
    feed.join().unwrap();
    out
}

/// Every file below `dir` with type, mode, time and content: for "byte-identical".
///
/// Not the times of objects and packs: git sets them when it meets an object that is there already.
pub(crate) fn fingerprint(dir: &Path) -> BTreeMap<PathBuf, (u32, i64, i64, Vec<u8>)> {
    use std::os::unix::{ffi::OsStrExt, fs::MetadataExt};
    let mut found = BTreeMap::new();
    let mut todo = vec![dir.to_owned()];
    while let Some(path) = todo.pop() {
        let meta = fs_err::symlink_metadata(&path).unwrap();
        let content = if meta.is_dir() {
            todo.extend(fs_err::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
            Vec::new()
        } else if meta.is_symlink() {
            fs_err::read_link(&path).unwrap().as_os_str().as_bytes().to_vec()
        } else {
            fs_err::read(&path).unwrap()
        };
        let object = path.to_str().is_some_and(|p| p.contains("/.git/objects/")) && meta.is_file();
        let (s, ns) = if object { (0, 0) } else { (meta.mtime(), meta.mtime_nsec()) };
        found.insert(path, (meta.mode(), s, ns, content));
    }
    found
}

/// Says which files are not what they were.
pub(crate) fn assert_untouched(dir: &Path, before: &BTreeMap<PathBuf, (u32, i64, i64, Vec<u8>)>) {
    let now = fingerprint(dir);
    let differ = |p: &&PathBuf| now.get(*p) != before.get(*p);
    let changed: Vec<_> = now.keys().chain(before.keys()).filter(differ).collect();
    assert!(changed.is_empty(), "touched: {changed:?}");
}

/// The tree of all that a working tree holds, ignored files too. The index stays as it is.
pub(crate) fn tree_of(repo: &Path, scratch: &Path) -> String {
    let index = scratch.join("tree-index");
    drop(fs_err::remove_file(&index));
    let env = format!("GIT_INDEX_FILE={}", index.display());
    let run = |args: &[&str]| {
        let out = Command::new("env")
            .current_dir(repo)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap())
            .args([env.as_str(), "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null", "git"])
            .args(args)
            .output()
            .unwrap();
        assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap().trim().to_owned()
    };
    run(&["add", "-A", "-f", "."]);
    run(&["write-tree"])
}
