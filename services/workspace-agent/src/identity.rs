//! The user's public identity in a guest: `authorized_keys` and git's `user.name` and `user.email`.
//!
//! `authorized_keys` is bothy's and is replaced. `.gitconfig` is the guest user's: where there is one, only the two
//! settings change. Secrets have no way in here.

use crate::{guest::Guest, path, script::IDENTITY};
use bothy_contract::{
    Code, Error,
    workspace::{GuestFile, Identity, SyncIdentity},
};
use bothy_guest_proto::v1::File;

/// The most keys that are taken.
const MAX_KEYS: usize = 100;
/// The longest line of a key, in bytes; an RSA key of 16384 bits has 2.8 KiB.
const MAX_LINE: usize = 8 << 10;

/// The key types of sshd(8), "AUTHORIZED_KEYS FILE FORMAT".
const TYPES: [&str; 6] = [
    "ssh-ed25519",
    "ssh-rsa",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "sk-ssh-ed25519@openssh.com",
];
/// The one that does not fit the line above.
const SK_ECDSA: &str = "sk-ecdsa-sha2-nistp256@openssh.com";

/// The files of the identity in a home that has none yet.
///
/// # Errors
/// A home, key, name or address that is not valid.
pub fn files(home: &str, identity: &Identity) -> Result<Vec<GuestFile>, Error> {
    path::check("home", home)?;
    check(identity)?;
    Ok(authorized_keys(home, identity).into_iter().chain(gitconfig(home, identity)).collect())
}

/// Puts the identity into the guest. What is empty in it stays as it is there.
///
/// # Errors
/// A home, key, name or address that is not valid: then nothing was written; or the guest's.
pub async fn sync<G: Guest>(guest: &G, request: &SyncIdentity) -> Result<(), Error> {
    let (home, identity) = (request.home.as_str(), &request.identity);
    path::check("home", home)?;
    check(identity)?;
    let (keys, config) = (authorized_keys(home, identity), gitconfig(home, identity));
    // A new machine has none: then one call writes all, which matters where each process takes the guest 20 ms.
    let edit = match &config {
        Some(file) => guest.exists(&file.path).await?,
        None => false,
    };
    let file =
        |file: GuestFile| File { path: file.path, content: file.content.into_bytes(), mode: file.mode };
    let files: Vec<File> = keys.into_iter().chain(config.filter(|_| !edit)).map(file).collect();
    if !files.is_empty() {
        guest.write_files(files).await?;
    }
    if edit {
        let word = |word: &Option<String>| word.clone().unwrap_or_default();
        let (name, email) = (word(&identity.git_name), word(&identity.git_email));
        match guest.run(&IDENTITY, &[home, &name, &email]).await?.check(&IDENTITY, home) {
            // A guest without git needs no identity for it.
            Err(e) if e.code == Code::FailedPrecondition => tracing::info!("no git identity: {e}"),
            other => drop(other?),
        }
    }
    Ok(())
}

fn authorized_keys(home: &str, identity: &Identity) -> Option<GuestFile> {
    let keys = &identity.ssh_public_keys;
    let content = keys.iter().flat_map(|key| [key.trim(), "\n"]).collect::<String>();
    let path = format!("{home}/.ssh/authorized_keys");
    (!keys.is_empty()).then_some(GuestFile { path, content, mode: 0o600 })
}

fn check(identity: &Identity) -> Result<(), Error> {
    if identity.ssh_public_keys.len() > MAX_KEYS {
        return Err(Error::invalid(format!("more than {MAX_KEYS} ssh keys")));
    }
    identity.ssh_public_keys.iter().try_for_each(|key| check_key(key))?;
    for (what, value) in [("user.name", &identity.git_name), ("user.email", &identity.git_email)] {
        if let Some(value) = value
            && (value.is_empty() || value.len() > 1000 || value.chars().any(char::is_control))
        {
            return Err(Error::invalid(format!(
                "git's {what} {value:?} is empty, too long or has control characters"
            )));
        }
    }
    Ok(())
}

/// Checks one line: a known type, a blob of that type in base 64, a comment. Options in front are refused.
fn check_key(line: &str) -> Result<(), Error> {
    let refuse = |why: &str| {
        // A line that is no public key may be a secret one: it is not repeated.
        Err(Error::invalid(format!("an ssh public key {why}"))
            .hint("give lines like those in `~/.ssh/id_ed25519.pub`, without options"))
    };
    let line = line.trim();
    if line.len() > MAX_LINE || line.chars().any(char::is_control) {
        return refuse("is too long, or is more than one line");
    }
    let mut words = line.split(' ');
    let kind = words.next().unwrap_or_default();
    if !TYPES.contains(&kind) && kind != SK_ECDSA {
        return refuse("is of no known type");
    }
    let blob = words.next().and_then(base64).unwrap_or_default();
    // RFC 4253 section 6.6: the blob begins with its type, as a string with a length of 4 bytes.
    let named = blob
        .split_first_chunk::<4>()
        .and_then(|(length, rest)| rest.get(..usize::try_from(u32::from_be_bytes(*length)).ok()?));
    if named != Some(kind.as_bytes()) { refuse("is damaged") } else { Ok(()) }
}

/// Base 64 of RFC 4648 section 4.
fn base64(text: &str) -> Option<Vec<u8>> {
    let body = text.trim_end_matches('=');
    if !text.len().is_multiple_of(4) || text.len() - body.len() > 2 {
        return None;
    }
    let (mut out, mut bits, mut held) = (Vec::with_capacity(body.len()), 0_u32, 0_u32);
    for byte in body.bytes() {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = (bits << 6) | u32::from(value);
        held += 6;
        if held >= 8 {
            held -= 8;
            out.push(u8::try_from((bits >> held) & 0xff).ok()?);
        }
    }
    Some(out)
}

/// A `.gitconfig` with the identity's settings (git-config(1), "Syntax"), if it has any.
fn gitconfig(home: &str, identity: &Identity) -> Option<GuestFile> {
    let mut content = String::from("[user]\n");
    let settings = [("name", &identity.git_name), ("email", &identity.git_email)];
    for (key, value) in settings {
        if let Some(value) = value {
            let escaped = value.replace('\\', r"\\").replace('"', "\\\"");
            content.push_str(&format!("\t{key} = \"{escaped}\"\n"));
        }
    }
    let path = format!("{home}/.gitconfig");
    settings.iter().any(|(_, value)| value.is_some()).then_some(GuestFile { path, content, mode: 0o644 })
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGkuLTLnxmjmJ3tJlCrkHCGHrZ1Ehm4hwMUSjZsGXDLR a@b";

    #[test]
    fn only_plain_public_keys_are_taken() {
        assert!(check_key(KEY).is_ok());
        let bad = [
            "",
            "ssh-ed25519",
            "ssh-dss AAAAB3NzaC1kc3MAAACB",
            &format!("command=\"x\" {KEY}"),
            &format!("{KEY}\n{KEY}"),
            &KEY.replace("ssh-ed25519 ", "ssh-rsa "),
            &KEY.replace("AAAAC3", "AAAA?3"),
            "-----BEGIN OPENSSH PRIVATE KEY-----",
        ];
        for bad in bad {
            let e = check_key(bad).unwrap_err();
            assert!(!e.message.contains("BEGIN"), "{e}");
        }
    }
}
