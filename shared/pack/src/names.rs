//! File names: any bytes but NUL. For people they are escaped, in patches git quotes them as C strings.

/// `name` for a terminal: valid UTF-8 stays, all that could confuse is escaped.
pub(crate) fn display(name: &[u8]) -> String {
    let mut out = String::new();
    for chunk in name.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c.is_control() || c == '\\' {
                out.extend(c.escape_default());
            } else {
                out.push(c);
            }
        }
        for b in chunk.invalid() {
            out.push_str(&format!("\\x{b:02x}"));
        }
    }
    out
}

/// `name` as a file system that folds case compares it: names that are equal so may be one file there.
pub(crate) fn fold(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    for chunk in name.utf8_chunks() {
        // By way of upper case, which has fewer letters that stay apart.
        out.extend_from_slice(chunk.valid().to_uppercase().to_lowercase().as_bytes());
        out.extend_from_slice(chunk.invalid());
    }
    out
}

/// Takes a name off the front of `line`: a C string as git's `quote.c` writes it.
///
/// Gives the name and what follows the closing quote; `None` where it is not such a string.
pub(crate) fn unquote(line: &[u8]) -> Option<(Vec<u8>, &[u8])> {
    let mut rest = line.strip_prefix(b"\"")?;
    let mut name = Vec::new();
    loop {
        let (&byte, after) = rest.split_first()?;
        rest = after;
        match byte {
            b'"' => return Some((name, rest)),
            b'\\' => {
                let (&escape, after) = rest.split_first()?;
                rest = after;
                name.push(match escape {
                    b'a' => 7,
                    b'b' => 8,
                    b't' => b'\t',
                    b'n' => b'\n',
                    b'v' => 11,
                    b'f' => 12,
                    b'r' => b'\r',
                    b'"' | b'\\' => escape,
                    b'0'..=b'3' => {
                        let (&[second, third], after) = rest.split_first_chunk::<2>()?;
                        rest = after;
                        if !matches!((second, third), (b'0'..=b'7', b'0'..=b'7')) {
                            return None;
                        }
                        ((escape - b'0') << 6) | ((second - b'0') << 3) | (third - b'0')
                    }
                    _ => return None,
                });
            }
            _ => name.push(byte),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unquoted_as_git_quotes_them() {
        assert_eq!(
            unquote(b"\"a\\tb\\303\\244\\\\\" x"),
            Some(("a\tbä\\".as_bytes().to_vec(), b" x".as_slice()))
        );
        for bad in [&b"a"[..], b"\"a", b"\"\\8\"", b"\"\\40", b"\"\\q\"", b"\"\\477\""] {
            assert_eq!(unquote(bad), None, "{bad:?}");
        }
        assert_eq!(display(b"a b\n\xff\x1b"), "a b\\n\\xff\\u{1b}");
    }
}
