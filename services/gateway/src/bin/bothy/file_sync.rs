//! `[[file_sync]]`: files of the user's own that their machines get at create and start, as the user's configuration
//! (`$XDG_CONFIG_HOME/bothy/config.toml`) says. They are read here, as the user, before anything is begun, and go over the
//! machine's own channel to its guest: no service, bus, log or file of the host's sees what is in them.

use crate::{dirs, exec, printer::Printer};
use bothy_contract::{Code, Error, vm::VmRecord};
use bothy_guest_proto::v1::{File, WriteFilesRequest};
use fs_err as fs;
use nix::libc;
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    fmt::Display,
    io::{self, Read as _},
    path::{Component, Path, PathBuf},
};

/// The largest file, the most bytes and the most files of all entries together: keys and configuration, not data.
const MAX_FILE: u64 = 1 << 20;
const MAX_BYTES: u64 = 16 << 20;
const MAX_FILES: usize = 1000;
/// How much goes in one message.
const BATCH: usize = 2 << 20;
/// The largest configuration.
const MAX_CONFIG: u64 = 1 << 20;
const DEFAULT_MODE: &str = "0600";

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Config {
    file_sync: Vec<Entry>,
}

/// One file or directory.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    /// Here: `~/...`, or absolute.
    host: String,
    /// In the guest: `~/...`, or relative to the home.
    guest: String,
    /// The mode that the files get there, in octal digits.
    #[serde(default)]
    mode: Option<String>,
}

/// Files on their way. What is in them is never shown.
pub(crate) struct Files {
    /// By their path below the guest's home.
    files: BTreeMap<String, (Vec<u8>, u32)>,
}

/// Reads all that the user's configuration names. What is missing, or no file, is told and left out.
///
/// # Errors
/// The configuration makes no sense, a file cannot be read, or they are too large or too many.
pub(crate) fn read(printer: Printer) -> Result<Files, Error> {
    let warn = |text: String| printer.note(format!("file_sync: {text}"));
    let Ok(path) = dirs::config() else { return Ok(Files { files: BTreeMap::new() }) };
    let path = path.join("config.toml");
    let failed = |e: &dyn Display| {
        Error::new(Code::FailedPrecondition, format!("cannot take {}: {e}", path.display()))
    };
    let text = match open(&path, 0) {
        Ok(file) => content(file, MAX_CONFIG).map_err(|e| failed(&e))?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Files { files: BTreeMap::new() }),
        Err(e) => return Err(failed(&e)),
    };
    let text = String::from_utf8(text).map_err(|e| failed(&e))?;
    let config: Config = toml::from_str(&text).map_err(|e| failed(&e.to_string().trim_end()))?;
    collect(&config.file_sync, dirs::home().as_deref(), warn).map_err(|e| e.context(path.display()))
}

fn collect(entries: &[Entry], home: Option<&Path>, warn: impl Fn(String)) -> Result<Files, Error> {
    let mut taken = Taken { files: BTreeMap::new(), bytes: 0, warn };
    for entry in entries {
        let host = host_path(&entry.host, home)?;
        let guest = guest_path(&entry.guest)?;
        let mode = mode(entry.mode.as_deref().unwrap_or(DEFAULT_MODE))?;
        // The entry itself may be a link: its user has named it.
        match fs::metadata(&host) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                (taken.warn)(format!("{} is not there, and left out", entry.host));
            }
            Err(e) => return Err(unreadable(&e)),
            Ok(meta) if meta.is_dir() => taken.directory(&host, &guest, mode)?,
            Ok(_) => taken.file(&host, 0, guest, mode)?,
        }
    }
    Ok(Files { files: taken.files })
}

struct Taken<W> {
    files: BTreeMap<String, (Vec<u8>, u32)>,
    bytes: u64,
    warn: W,
}

impl<W: Fn(String)> Taken<W> {
    fn directory(&mut self, host: &Path, guest: &str, mode: u32) -> Result<(), Error> {
        let entries = fs::read_dir(host).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        let mut entries = entries.map_err(|e| unreadable(&e))?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let path = entry.path();
            let kind = entry.file_type().map_err(|e| unreadable(&e))?;
            let Ok(name) = entry.file_name().into_string() else {
                (self.warn)(format!("{} has a name that is no text, and is left out", path.display()));
                continue;
            };
            let guest = format!("{guest}/{name}");
            if kind.is_dir() {
                self.directory(&path, &guest, mode)?;
            } else if kind.is_file() {
                self.file(&path, libc::O_NOFOLLOW, guest, mode)?;
            } else {
                let what = if kind.is_symlink() { "a symbolic link" } else { "no file" };
                (self.warn)(format!("{} is {what}, and left out", path.display()));
            }
        }
        Ok(())
    }

    fn file(&mut self, host: &Path, flags: i32, guest: String, mode: u32) -> Result<(), Error> {
        let file = open(host, flags).map_err(|e| unreadable(&e))?;
        if !file.metadata().map_err(|e| unreadable(&e))?.is_file() {
            (self.warn)(format!("{} is no file, and left out", host.display()));
            return Ok(());
        }
        let content = content(file, MAX_FILE).map_err(|e| unreadable(&e))?;
        self.bytes += content.len() as u64;
        let too_many = |what: String| {
            Error::new(Code::ResourceExhausted, format!("file_sync names {what}, with {}", host.display()))
                .hint("it is for keys and configuration; take larger things along with a workspace")
        };
        if self.bytes > MAX_BYTES {
            return Err(too_many(format!("more than {} MiB", MAX_BYTES >> 20)));
        }
        if self.files.len() == MAX_FILES {
            return Err(too_many(format!("more than {MAX_FILES} files")));
        }
        if self.files.insert(guest.clone(), (content, mode)).is_some() {
            return Err(Error::invalid(format!("file_sync has two files for ~/{guest} in the guest")));
        }
        Ok(())
    }
}

impl Files {
    /// Puts them into the guest of `vm`, which is ready. What was there under these names is replaced, each file whole.
    ///
    /// # Errors
    /// The guest does not take them; some may be there.
    pub(crate) async fn send(
        &self,
        gateway: &crate::http::Gateway,
        printer: Printer,
        vm: &VmRecord,
    ) -> Result<(), Error> {
        if self.files.is_empty() {
            return Ok(());
        }
        let failed = |e: Error| {
            e.context(format!("{} is ready, and lacks files of file_sync", vm.name))
                .hint(format!("`bothy vm restart {}` brings them again", vm.name))
        };
        let mut client =
            exec::connect(gateway, &vm.id.to_string(), vm.name.as_str()).await.map_err(failed)?;
        let (mut batch, mut size) = (Vec::new(), 0);
        let mut left = self.files.iter().peekable();
        while let Some((path, (content, mode))) = left.next() {
            size += content.len();
            batch.push(File { path: format!("/{path}"), content: content.clone(), mode: *mode });
            if left.peek().is_some_and(|(_, (next, _))| size + next.len() <= BATCH) {
                continue;
            }
            size = 0;
            let request = WriteFilesRequest { files: std::mem::take(&mut batch), below_home: true };
            client.write_files(request).await.map_err(|status| {
                failed(Error::new(Code::Unavailable, format!("the guest: {}", status.message())))
            })?;
        }
        let count = self.files.len();
        printer.note(format!(
            "file_sync: {count} {} in {}",
            if count == 1 { "file" } else { "files" },
            vm.name
        ));
        Ok(())
    }
}

/// Opens without waiting for whoever may write to a pipe.
fn open(path: &Path, flags: i32) -> io::Result<fs::File> {
    let mut options = fs::OpenOptions::new();
    fs::os::unix::fs::OpenOptionsExt::custom_flags(options.read(true), libc::O_NONBLOCK | flags).open(path)
}

fn content(file: fs::File, most: u64) -> io::Result<Vec<u8>> {
    let path = file.path().to_owned();
    let mut content = Vec::new();
    file.take(most + 1).read_to_end(&mut content)?;
    if content.len() as u64 > most {
        return Err(io::Error::other(format!("{} is larger than {} KiB", path.display(), most >> 10)));
    }
    Ok(content)
}

fn unreadable(error: &io::Error) -> Error {
    Error::new(Code::FailedPrecondition, format!("file_sync: {error}"))
        .hint("make it readable for you, or take it out of the configuration")
}

/// Where an entry's file is here.
fn host_path(text: &str, home: Option<&Path>) -> Result<PathBuf, Error> {
    let wrong = |why: &str| {
        Error::invalid(format!("file_sync: `host = {text:?}` {why}"))
            .hint("write `~/...` for a file of your home, or an absolute path")
    };
    let path = match (text.strip_prefix("~/"), home) {
        (Some(rest), Some(home)) => home.join(rest),
        (Some(_), None) => return Err(wrong("is in your home, and HOME is not set")),
        (None, _) if text.starts_with('/') => PathBuf::from(text),
        (None, _) => return Err(wrong("is neither below `~/` nor absolute")),
    };
    if Path::new(text).components().any(|part| part == Component::ParentDir) {
        return Err(wrong("has a `..`"));
    }
    Ok(path)
}

/// Where an entry's file goes, below the guest's home.
fn guest_path(text: &str) -> Result<String, Error> {
    let path = text.strip_prefix("~/").unwrap_or(text);
    let parts: Option<Vec<&str>> = Path::new(path)
        .components()
        .filter(|part| *part != Component::CurDir)
        .map(|part| match part {
            Component::Normal(name) => name.to_str(),
            _ => None,
        })
        .collect();
    match parts {
        Some(parts) if !parts.is_empty() && !path.contains('\0') && path != "~" => Ok(parts.join("/")),
        _ => Err(Error::invalid(format!("file_sync: `guest = {text:?}` is no path below the guest's home"))
            .hint("write `~/...`, without `..`")),
    }
}

fn mode(text: &str) -> Result<u32, Error> {
    u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777).ok_or_else(|| {
        Error::invalid(format!("file_sync: `mode = {text:?}` is no mode")).hint("write it as in \"0600\"")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    fn entries(text: &str) -> Vec<Entry> {
        toml::from_str::<Config>(text).unwrap().file_sync
    }

    #[test]
    fn what_is_there_is_taken_and_the_rest_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path();
        fs::create_dir_all(home.join("conf/sub")).unwrap();
        fs::write(home.join("token"), "geheim").unwrap();
        fs::write(home.join("conf/a"), "a").unwrap();
        fs::write(home.join("conf/sub/b"), "b").unwrap();
        fs::os::unix::fs::symlink("/etc/passwd", home.join("conf/link")).unwrap();
        fs::os::unix::fs::symlink(home.join("token"), home.join("named")).unwrap();
        nix::unistd::mkfifo(&home.join("conf/pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let told = RefCell::new(Vec::new());
        let entries = entries(
            r#"
            [[file_sync]]
            host = "~/token"
            guest = "~/.config/token"
            [[file_sync]]
            host = "~/conf"
            guest = "conf/"
            mode = "0644"
            [[file_sync]]
            host = "~/named"
            guest = "~/./named"
            [[file_sync]]
            host = "~/nothing"
            guest = "~/nothing"
            "#,
        );
        let files = collect(&entries, Some(home), |text| told.borrow_mut().push(text)).unwrap().files;
        let taken: Vec<_> =
            files.iter().map(|(path, (content, mode))| (path.as_str(), content.len(), *mode)).collect();
        assert_eq!(
            taken,
            [
                (".config/token", 6, 0o600),
                ("conf/a", 1, 0o644),
                ("conf/sub/b", 1, 0o644),
                ("named", 6, 0o600)
            ]
        );
        let told = told.into_inner().join("\n");
        for what in ["conf/link is a symbolic link", "conf/pipe is no file", "~/nothing is not there"] {
            assert!(told.contains(what), "{told}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let refused = |host: &str, guest: &str, mode: &str| {
            let entry = Entry { host: host.into(), guest: guest.into(), mode: Some(mode.into()) };
            collect(&[entry], Some(dir.path()), |_| {}).err().map(|e| e.message).unwrap_or_default()
        };
        for host in ["token", "~", "../x", "~/../x", "/etc/../x", ""] {
            assert!(refused(host, "~/x", "600").contains("host ="), "{host}");
        }
        for guest in ["/root/x", "~/../x", "..", "~", "", "~/", "a/../../b", "."] {
            assert!(refused("/nowhere", guest, "600").contains("guest ="), "{guest}");
        }
        for mode in ["", "8", "1777", "rw", "-1"] {
            assert!(refused("/nowhere", "x", mode).contains("mode ="), "{mode}");
        }
        fs::write(dir.path().join("large"), vec![0; 1 + usize::try_from(MAX_FILE).unwrap()]).unwrap();
        assert!(refused("~/large", "x", "600").contains("larger than 1024 KiB"));
        let twice = r#"file_sync = [{ host = "~/a", guest = "x" }, { host = "~/a", guest = "~/x" }]"#;
        fs::write(dir.path().join("a"), "a").unwrap();
        let twice = collect(&entries(twice), Some(dir.path()), |_| {}).err().unwrap();
        assert!(twice.message.contains("two files for ~/x"), "{twice}");
        assert!(toml::from_str::<Config>("[[file_syncs]]").is_err());
    }
}
