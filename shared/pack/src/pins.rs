//! Which tools a repository pins, and to which versions: read from the tracked files at its top by which others know it. What
//! cannot be read as such pins nothing: these files are other tools' to judge.

use crate::{Repository, git};
use bothy_contract::Error;
use fs_err::os::unix::fs::OpenOptionsExt;
use rustix::fs::OFlags;
use std::{collections::BTreeSet, io::Read};

/// The files, in the order in which they count: of two that name a tool the first does.
pub const PIN_FILES: [&str; 6] =
    ["mise.toml", ".tool-versions", "rust-toolchain.toml", "package.json", "go.mod", ".python-version"];

/// The most that is read of one, in bytes.
const MAX: u64 = 256 << 10;
/// The most pins of one repository.
const MOST: usize = 64;

/// A tool of a version.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct Pin {
    /// `rust`, `node`, `go`, `python`, or as the file calls it.
    pub tool: String,
    /// `1.95`, `stable`.
    pub version: String,
    /// Which file says so.
    pub file: &'static str,
}

impl Repository {
    /// What the repository pins, as its files are now.
    ///
    /// # Errors
    /// What git says. A file that cannot be read pins nothing.
    pub fn pins(&self) -> Result<Vec<Pin>, Error> {
        let args = ["ls-files", "--cached", "-z", "--"];
        let tracked = git::output(self.root(), args.iter().chain(&PIN_FILES))?.stdout;
        let tracked: BTreeSet<_> = tracked.split(|b| *b == 0).collect();
        let mut pins: Vec<Pin> = Vec::new();
        for file in PIN_FILES.into_iter().filter(|file| tracked.contains(file.as_bytes())) {
            let Some(text) = self.text(file) else { continue };
            for (tool, version) in named(file, &text) {
                let known = pins.iter().any(|pin| pin.tool == tool);
                if !known && is_tool(&tool) && is_version(&version) && pins.len() < MOST {
                    pins.push(Pin { tool, version, file });
                }
            }
        }
        Ok(pins)
    }

    /// A file at the top: a regular one, of a size that a person could have written.
    fn text(&self, name: &str) -> Option<String> {
        // No symbolic link, and no waiting for the other end of a pipe.
        let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32;
        let file = fs_err::OpenOptions::new().read(true).custom_flags(flags).open(self.root().join(name));
        let file = file.ok().filter(|file| file.metadata().is_ok_and(|m| m.is_file() && m.len() <= MAX))?;
        let mut text = String::new();
        file.take(MAX).read_to_string(&mut text).ok()?;
        Some(text)
    }
}

/// The tools that `file` names, whatever their names look like.
fn named(file: &str, text: &str) -> Vec<(String, String)> {
    match file {
        "mise.toml" => mise(text),
        ".tool-versions" => tool_versions(text),
        "rust-toolchain.toml" => {
            let channel =
                |table: toml::Table| Some(table.get("toolchain")?.get("channel")?.as_str()?.to_owned());
            one("rust", text.parse().ok().and_then(channel))
        }
        "package.json" => package(text),
        "go.mod" => go(text),
        ".python-version" => one("python", python(text)),
        _ => Vec::new(),
    }
}

fn one(tool: &str, version: Option<String>) -> Vec<(String, String)> {
    version.map(|version| (tool.to_owned(), version)).into_iter().collect()
}

/// The first line that is no comment, if it is one word.
fn python(text: &str) -> Option<String> {
    let mut lines = text.lines().map(|line| line.split('#').next().unwrap_or_default().trim());
    let line = lines.find(|line| !line.is_empty())?;
    (!line.contains(char::is_whitespace)).then(|| line.to_owned())
}

/// `[tools]`: a version, several of which the first counts, or a table with one.
fn mise(text: &str) -> Vec<(String, String)> {
    let Ok(table) = text.parse::<toml::Table>() else { return Vec::new() };
    let Some(tools) = table.get("tools").and_then(toml::Value::as_table) else { return Vec::new() };
    let version = |value: &toml::Value| {
        let value = value.as_array().and_then(|several| several.first()).unwrap_or(value);
        let value = value.get("version").unwrap_or(value);
        match value {
            toml::Value::String(version) => Some(version.clone()),
            toml::Value::Integer(version) => Some(version.to_string()),
            toml::Value::Float(version) => Some(version.to_string()),
            _ => None,
        }
    };
    tools.iter().filter_map(|(tool, value)| Some((tool.clone(), version(value)?))).collect()
}

/// asdf's: a tool and its versions on a line, of which the first counts. It has names of its own for some.
fn tool_versions(text: &str) -> Vec<(String, String)> {
    let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default());
    lines
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let tool = match words.next()? {
                "nodejs" => "node",
                "golang" => "go",
                tool => tool,
            };
            Some((tool.to_owned(), words.next()?.to_owned()))
        })
        .collect()
}

/// `packageManager` and an exact `engines.node`; a range is no pin.
fn package(text: &str) -> Vec<(String, String)> {
    let Ok(package) = serde_json::from_str::<serde_json::Value>(text) else { return Vec::new() };
    let node = package.pointer("/engines/node").and_then(serde_json::Value::as_str);
    let mut found = one("node", node.map(|version| version.trim().trim_start_matches('v').to_owned()));
    let manager = package.get("packageManager").and_then(serde_json::Value::as_str);
    if let Some((name, version)) = manager.and_then(|manager| manager.split_once('@')) {
        // What follows a `+` is a checksum.
        let version = version.split('+').next().unwrap_or_default();
        found.push((name.to_owned(), version.to_owned()));
    }
    found
}

/// `toolchain go1.25.1`, else `go 1.25`.
fn go(text: &str) -> Vec<(String, String)> {
    let directive = |name: &str| {
        text.lines().find_map(|line| {
            let mut words = line.split("//").next().unwrap_or_default().split_whitespace();
            (words.next() == Some(name)).then(|| words.next().map(str::to_owned)).flatten()
        })
    };
    let toolchain = directive("toolchain").and_then(|word| Some(word.strip_prefix("go")?.to_owned()));
    one("go", toolchain.or_else(|| directive("go")))
}

/// Whether that may be a tool's name on a command line.
fn is_tool(name: &str) -> bool {
    name.len() <= 128
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "._:/@-".contains(c))
}

/// Whether that may be a version on a command line: no range, and no option.
fn is_version(version: &str) -> bool {
    version.len() <= 64
        && version.starts_with(|c: char| c.is_ascii_alphanumeric())
        && version.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(file: &str, text: &str) -> Vec<(String, String)> {
        named(file, text).into_iter().filter(|(tool, version)| is_tool(tool) && is_version(version)).collect()
    }

    fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
    }

    #[test]
    fn every_kind_of_file_is_read() {
        let mise = "[tools]\nnode = '22'\npython = ['3.13', '3.12']\n'npm:prettier' = { version = '3' }\ngo = 1.25\nx = true\n";
        assert_eq!(
            of("mise.toml", mise),
            pairs(&[("go", "1.25"), ("node", "22"), ("npm:prettier", "3"), ("python", "3.13")])
        );
        let asdf = "# all\nnodejs 22.1.0 20.0.0\ngolang 1.25 # why\nlonely\n";
        assert_eq!(of(".tool-versions", asdf), pairs(&[("node", "22.1.0"), ("go", "1.25")]));
        assert_eq!(of("rust-toolchain.toml", "[toolchain]\nchannel = '1.95'\n"), pairs(&[("rust", "1.95")]));
        let package = r#"{"engines":{"node":"v22.1.0"},"packageManager":"pnpm@9.1.0+sha512.abc"}"#;
        assert_eq!(of("package.json", package), pairs(&[("node", "22.1.0"), ("pnpm", "9.1.0")]));
        assert_eq!(of("package.json", r#"{"engines":{"node":">=18 <21"}}"#), []);
        assert_eq!(
            of("go.mod", "module x\n\ngo 1.25\n\ntoolchain go1.25.3 // newest\n"),
            pairs(&[("go", "1.25.3")])
        );
        assert_eq!(of("go.mod", "module x\ngo 1.25\n"), pairs(&[("go", "1.25")]));
        assert_eq!(of(".python-version", "# ours\n3.13.1\n3.12\n"), pairs(&[("python", "3.13.1")]));
    }

    #[test]
    fn what_is_no_such_file_pins_nothing() {
        for file in PIN_FILES {
            for text in [
                "",
                "\0\u{1}",
                "{",
                "[tools",
                "[tools]\nx = '--help'",
                "--help x",
                "go -x",
                "tools = 3",
                "[]",
                "{\"engines\":3}",
            ] {
                assert_eq!(of(file, text), [], "{file}: {text:?}");
            }
        }
    }
}
