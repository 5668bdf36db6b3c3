//! What values mean.

use bothy_contract::Error;
use nix::sys::signal::Signal;
use std::time::Duration;

/// A size in MiB from `512M`, `2G`, `1T`, `2GiB` or a bare number of MiB.
pub(super) fn mib(text: &str) -> Result<u64, Error> {
    let wrong = || {
        Error::invalid(format!("{text:?} is not a size"))
            .hint("give a number with M, G or T behind it, such as `2G`")
    };
    let (number, unit) = number(text).ok_or_else(wrong)?;
    let factor: u64 = match unit.to_ascii_lowercase().as_str() {
        "" | "m" | "mib" => 1,
        "g" | "gib" => 1 << 10,
        "t" | "tib" => 1 << 20,
        _ => return Err(wrong()),
    };
    number.checked_mul(factor).ok_or_else(wrong)
}

/// A duration from `90s`, `30m`, `12h`, `7d` or `2w`.
pub(super) fn age(text: &str) -> Result<Duration, Error> {
    let wrong = || {
        Error::invalid(format!("{text:?} is not a duration"))
            .hint("give a number with s, m, h, d or w behind it, such as `7d`")
    };
    let (number, unit) = number(text).ok_or_else(wrong)?;
    let factor = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        "w" => 7 * 86_400,
        _ => return Err(wrong()),
    };
    number.checked_mul(factor).map(Duration::from_secs).ok_or_else(wrong)
}

/// The number that `text` begins with, and the rest.
fn number(text: &str) -> Option<(u64, &str)> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at_checked(digits)?;
    Some((number.parse().ok()?, unit))
}

/// The signals that do not end a process (signal(7)), and so no VMM.
const HARMLESS: [Signal; 8] = [
    Signal::SIGCHLD,
    Signal::SIGCONT,
    Signal::SIGSTOP,
    Signal::SIGTSTP,
    Signal::SIGTTIN,
    Signal::SIGTTOU,
    Signal::SIGURG,
    Signal::SIGWINCH,
];

/// A signal's number from `KILL`, `SIGKILL`, `kill` or `9`.
pub(super) fn signal(text: &str) -> Result<i32, Error> {
    let wrong = || {
        Error::invalid(format!("{text:?} is not a signal"))
            .hint("give a name or a number, such as `TERM` or `15`")
    };
    let signal = match text.parse::<i32>() {
        Ok(number) => Signal::try_from(number).map_err(|_| wrong())?,
        Err(_) => {
            let name = text.to_ascii_uppercase();
            let name = if name.starts_with("SIG") { name } else { format!("SIG{name}") };
            name.parse().map_err(|_| wrong())?
        }
    };
    if HARMLESS.contains(&signal) {
        return Err(Error::invalid(format!("{signal} does not end a process"))
            .hint("give one that does, such as `KILL`, `TERM` or `QUIT`"));
    }
    Ok(signal as i32)
}

pub(super) fn key_value(text: &str) -> Result<(String, String), Error> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(Error::invalid(format!("{text:?} is not of the form KEY=VALUE"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(mib("512").unwrap(), 512);
        assert_eq!(mib("512M").unwrap(), 512);
        assert_eq!(mib("2g").unwrap(), 2048);
        assert_eq!(mib("1TiB").unwrap(), 1 << 20);
        for bad in ["", "G", "-1", "1.5G", "1K", "2GG", "99999999999999999999", "18446744073709551615T", "é"]
        {
            assert!(mib(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ages() {
        assert_eq!(age("90s").unwrap(), Duration::from_secs(90));
        assert_eq!(age("7d").unwrap(), age("1w").unwrap());
        assert_eq!(age("0s").unwrap(), Duration::ZERO);
        for bad in ["", "7", "d", "-1d", "1.5h", "1y", "18446744073709551615w"] {
            assert!(age(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn signals() {
        for nine in ["9", "KILL", "SIGKILL", "kill", "SigKill"] {
            assert_eq!(signal(nine).unwrap(), 9, "{nine}");
        }
        assert_eq!(signal("term").unwrap(), 15);
        for bad in ["", "0", "-9", "65", "SIG", "NOPE", "STOP", "19", "CHLD", "cont"] {
            assert!(signal(bad).is_err(), "{bad}");
        }
    }
}
