//! A guest's output for the user's terminal: text without the sequences and control characters that drive a terminal, in
//! pieces that end anywhere. They could set the title, answer as if the user had typed, or overwrite what was shown.

/// What has been seen of a sequence (ECMA-48 sections 5.3, 5.4 and 5.6).
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Seen {
    #[default]
    Text,
    /// `ESC`.
    Escape,
    /// `ESC [`, up to a final byte.
    Control,
    /// `ESC ]` and the like: a string, up to `BEL` or `ESC \`.
    String,
    /// The first byte of U+0080 to U+00BF, of which the lower half are control characters.
    C2,
}

/// Makes a stream harmless.
#[derive(Debug, Default)]
pub(crate) struct Plain {
    seen: Seen,
}

impl Plain {
    /// What is text in `piece`.
    pub(crate) fn filter(&mut self, piece: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(piece.len());
        for &byte in piece {
            self.seen = match (self.seen, byte) {
                // A line's end ends everything, so that an unfinished sequence hides no more than its line.
                (_, b'\n') => {
                    out.push(byte);
                    Seen::Text
                }
                (_, 0x1b) => Seen::Escape,
                (Seen::Escape, b'[') => Seen::Control,
                (Seen::Escape, b']' | b'P' | b'X' | b'^' | b'_') => Seen::String,
                (Seen::Escape, 0x20..=0x2f) => Seen::Escape,
                (Seen::Control, 0x40..=0x7e) | (Seen::String, 0x07) | (Seen::Escape, _) => Seen::Text,
                (Seen::Control, 0x20..=0x3f) => Seen::Control,
                (Seen::String, _) => Seen::String,
                (Seen::C2, 0x80..=0x9f) => Seen::Text,
                (Seen::C2, 0xa0..=0xbf) => {
                    out.extend([0xc2, byte]);
                    Seen::Text
                }
                (_, 0xc2) => Seen::C2,
                (_, b'\t' | 0x20..=0x7e | 0x80..) => {
                    out.push(byte);
                    Seen::Text
                }
                _ => Seen::Text,
            };
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(text: &[u8]) -> String {
        let together = Plain::default().filter(text);
        let mut plain = Plain::default();
        let apart: Vec<u8> = text.chunks(1).flat_map(|piece| plain.filter(piece)).collect();
        assert_eq!(together, apart, "{text:?}");
        String::from_utf8(together).unwrap()
    }

    #[test]
    fn only_text_is_left() {
        assert_eq!(whole("plain ä € \u{a0}text\n\tmore".as_bytes()), "plain ä € \u{a0}text\n\tmore");
        assert_eq!(whole(b"[\x1b[0;32m  OK  \x1b[0m] up\r\n"), "[  OK  ] up\n");
        assert_eq!(whole(b"a\x1b]0;title\x07b\x1b]52;c;eA==\x1b\\c\x1bPq\x1b\\d"), "abcd");
        assert_eq!(whole(b"a\x08\x07\x00\x7fb\x1b7\x1b(Bc"), "abc");
        // The same as `ESC [`, as one character.
        assert_eq!(whole("a\u{9b}2Jb".as_bytes()), "a2Jb");
        assert_eq!(whole(b"\x1b]never ends\nnext\x1b[31\nlast"), "\nnext\nlast");
    }
}
