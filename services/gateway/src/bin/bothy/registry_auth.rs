//! Who the user is logged in as at a registry: the files that `docker login` and `podman login` write, read here, as the user
//! (containers-auth.json(5)). What these files leave to a helper program is not asked for: no program of anybody's choosing is
//! run for a pull.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bothy_contract::{Code, Error, intake::Credentials};
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    env,
    ffi::OsString,
    io,
    path::{Path, PathBuf},
};

/// The registry of a reference that names none, and what files call it.
const HUB: &str = "docker.io";
const HUBS: [&str; 3] = ["index.docker.io", "registry-1.docker.io", HUB];
/// The largest such file.
const MAX_FILE: u64 = 1 << 20;

/// What the user's files say of a registry.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Login {
    /// The user is logged in.
    As(Credentials),
    /// They say nothing.
    Anybody,
    /// The user may be logged in, in a way that is of no use here: for people.
    Elsewhere(String),
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct File {
    auths: BTreeMap<String, Entry>,
    cred_helpers: BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Entry {
    auth: String,
}

/// Who asks for `reference`: the first file that says something of it decides.
///
/// # Errors
/// A file is there and cannot be read, or makes no sense.
pub(crate) fn login(reference: &str) -> Result<Login, Error> {
    for path in files(|name| env::var_os(name)) {
        let failed = |e: &dyn std::fmt::Display| {
            Error::new(Code::FailedPrecondition, format!("cannot read {}: {e}", path.display()))
                .hint("it says who you are logged in as at registries; mend or move it")
        };
        let text = match read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(failed(&e)),
        };
        // Its text stays out of the message: that would quote secrets.
        let file: File = serde_json::from_str(&text).map_err(|_| failed(&"it is not what it should be"))?;
        match of(&file, reference).map_err(|e| failed(&e))? {
            Login::Anybody => {}
            Login::Elsewhere(why) => {
                return Ok(Login::Elsewhere(format!("{} {why}; asking as anybody", path.display())));
            }
            login => return Ok(login),
        }
    }
    Ok(Login::Anybody)
}

/// Where they are, the first one first.
fn files(env: impl Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    let named = |name: &str| env(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let below = |name: &str, rest: &str| named(name).map(|dir| dir.join(rest));
    [
        named("REGISTRY_AUTH_FILE"),
        below("XDG_RUNTIME_DIR", "containers/auth.json"),
        below("XDG_CONFIG_HOME", "containers/auth.json")
            .or_else(|| below("HOME", ".config/containers/auth.json")),
        below("DOCKER_CONFIG", "config.json").or_else(|| below("HOME", ".docker/config.json")),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn read(path: &Path) -> io::Result<String> {
    let file = fs_err::File::open(path)?;
    let mut text = String::new();
    io::Read::read_to_string(&mut io::Read::take(file, MAX_FILE), &mut text)?;
    Ok(text)
}

/// The registry and the repository of a reference, as they are written.
fn parts(reference: &str) -> (&str, &str) {
    let path = reference.split('@').next().unwrap_or_default();
    // A tag's colon comes after the last slash; a port's before.
    let path = match path.rsplit_once(':') {
        Some((path, tag)) if !tag.contains('/') => path,
        _ => path,
    };
    match path.split_once('/') {
        Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => (first, rest),
        _ => (HUB, path),
    }
}

/// The repository of a reference.
pub(crate) fn repository(reference: &str) -> &str {
    parts(reference).1
}

/// What one file says.
fn of(file: &File, reference: &str) -> Result<Login, &'static str> {
    let (registry, repository) = parts(reference);
    // `registry/a/b`, `registry/a`, `registry`: the narrowest that is there counts.
    let mut place = format!("{registry}/{repository}");
    loop {
        let found = file.auths.iter().find(|(key, _)| is(key, &place));
        match found {
            Some((_, Entry { auth })) if !auth.is_empty() => return decode(auth).map(Login::As),
            // What `docker login` writes beside a helper.
            Some(_) => {
                return Ok(Login::Elsewhere(format!(
                    "leaves the password for {place} to a helper, which is not run"
                )));
            }
            None => {}
        }
        match place.rfind('/') {
            Some(end) => place.truncate(end),
            None => break,
        }
    }
    if file.cred_helpers.keys().any(|key| is(key, registry)) {
        return Ok(Login::Elsewhere(format!(
            "leaves the password for {registry} to a helper, which is not run"
        )));
    }
    Ok(Login::Anybody)
}

/// Whether `key` of a file is that place.
fn is(key: &str, place: &str) -> bool {
    let key = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    let key = key.trim_end_matches('/');
    let key = key.strip_suffix("/v1").or_else(|| key.strip_suffix("/v2")).unwrap_or(key);
    key == place || (place == HUB && HUBS.contains(&key))
}

fn decode(auth: &str) -> Result<Credentials, &'static str> {
    const WRONG: &str = "an `auth` of it is not base64 of `name:password`";
    let plain = BASE64_STANDARD.decode(auth).map_err(|_| WRONG)?;
    let plain = String::from_utf8(plain).map_err(|_| WRONG)?;
    let (username, secret) = plain.split_once(':').ok_or(WRONG)?;
    Ok(Credentials { username: username.to_owned(), secret: secret.trim_end_matches('\0').to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> File {
        serde_json::from_str(text).unwrap()
    }

    fn user(login: Result<Login, &'static str>) -> String {
        match login.unwrap() {
            Login::As(Credentials { username, secret }) => format!("{username}/{secret}"),
            Login::Anybody => "anybody".to_owned(),
            Login::Elsewhere(why) => why,
        }
    }

    #[test]
    fn the_narrowest_entry_counts_and_the_hub_has_many_names() {
        let auth = |text: &str| BASE64_STANDARD.encode(text);
        let text = serde_json::json!({ "auths": {
            "https://index.docker.io/v1/": { "auth": auth("hub:p:w") },
            "example.org/team": { "auth": auth("team:x") },
            "example.org": { "auth": auth("all:y") },
            "stored.example": {},
        }, "credHelpers": { "helped.example": "pass" }, "credsStore": "desktop" });
        let file = file(&text.to_string());
        for (reference, who) in [
            ("debian:12", "hub/p:w"),
            ("docker.io/library/debian", "hub/p:w"),
            ("example.org/team/a@sha256:00", "team/x"),
            ("example.org/teams/a", "all/y"),
            ("example.org:5000/a", "anybody"),
            ("localhost/a", "anybody"),
        ] {
            assert_eq!(user(of(&file, reference)), who, "{reference}");
        }
        for reference in ["stored.example/a", "helped.example/a"] {
            assert!(user(of(&file, reference)).contains("helper"), "{reference}");
        }
        assert!(of(&self::file(r#"{"auths":{"a.b":{"auth":"!"}}}"#), "a.b/c").is_err());
        assert!(!format!("{:?}", decode(&auth("me:geheim")).unwrap()).contains("geheim"));
    }

    #[test]
    fn files_are_looked_at_in_their_order() {
        let env = |name: &str| match name {
            "HOME" => Some("/h".into()),
            "XDG_RUNTIME_DIR" => Some("/r".into()),
            "REGISTRY_AUTH_FILE" => Some("/f".into()),
            "DOCKER_CONFIG" => Some("".into()),
            _ => None,
        };
        let found: Vec<_> = files(env).iter().map(|p| p.display().to_string()).collect();
        assert_eq!(
            found,
            ["/f", "/r/containers/auth.json", "/h/.config/containers/auth.json", "/h/.docker/config.json"]
        );
    }
}
