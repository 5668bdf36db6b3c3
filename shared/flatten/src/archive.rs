//! Reading tar archives: ustar, with the extensions of POSIX (pax) and of GNU for long names. Formats: tar(5).
//!
//! Names are bytes. Whatever a header says is bounded here before anything is kept of it, and a header that makes no
//! sense ends the archive with an error: nothing is guessed about what comes behind it.

use bothy_contract::Error;
use std::io::{self, Read};

const RECORD: usize = 512;
/// The most that an extended header may have. Attributes are the longest thing in one.
const MAX_EXTENDED: u64 = 1 << 20;
/// The longest path and link target: Linux' PATH_MAX.
const MAX_PATH: usize = 4096;

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A file with so many bytes, which are read from the reader next.
    File(u64),
    /// A directory.
    Directory,
    /// A symbolic link and where it leads.
    Symlink(Vec<u8>),
    /// Another name of an entry before it.
    HardLink(Vec<u8>),
    /// A device node.
    Device {
        /// A block device; else a character device.
        block: bool,
        /// Its major number.
        major: u32,
        /// Its minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
}

/// One entry of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name, as the archive has it.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Its permissions.
    pub mode: u32,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// When it was changed: seconds and nanoseconds.
    pub mtime: (i64, u32),
    /// Its extended attributes.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Entry {
    /// What it takes to remember it, in bytes.
    pub(crate) fn weight(&self) -> u64 {
        let link = match &self.kind {
            Kind::Symlink(t) | Kind::HardLink(t) => t.len(),
            _ => 0,
        };
        let xattrs: usize = self.xattrs.iter().map(|(n, v)| n.len() + v.len() + 48).sum();
        (self.path.len() + link + xattrs) as u64
    }
}

/// What extended headers say of the entry behind them.
#[derive(Debug, Default)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// An archive, entry by entry. Read from it is the data of the last entry.
#[derive(Debug)]
pub struct Reader<R> {
    inner: R,
    /// Bytes of data that are left, and of padding behind them.
    left: u64,
    padding: u64,
    position: u64,
}

impl<R: Read> Read for Reader<R> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let n = (&mut self.inner).take(self.left).read(to)?;
        self.left -= n as u64;
        self.position += n as u64;
        Ok(n)
    }
}

impl<R: Read> Reader<R> {
    /// The archive that `inner` is at the start of.
    pub fn new(inner: R) -> Self {
        Self { inner, left: 0, padding: 0, position: 0 }
    }

    /// How many bytes of the archive have been read: behind an entry, where its data begins.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// The next entry. What is left of the data of the one before is skipped.
    ///
    /// # Errors
    /// The archive makes no sense, or cannot be read.
    pub fn entry(&mut self) -> Result<Option<Entry>, Error> {
        let mut extended = Extended::default();
        loop {
            self.skip()?;
            let Some(header) = self.header()? else { return Ok(None) };
            let size = number(field(&header, 124, 12)).ok_or_else(|| garbled("a size that is no number"))?;
            match header.get(156).copied().unwrap_or_default() {
                b'x' | b'X' => pax(&self.extended(size)?, &mut extended)?,
                b'g' => {
                    // git-archive(1) puts a comment there. What changes entries is too rare to carry along.
                    let mut all = Extended::default();
                    pax(&self.extended(size)?, &mut all)?;
                    if all.size.is_some() || all.path.is_some() || all.link.is_some() {
                        return Err(garbled("a global header that names or measures entries"));
                    }
                }
                b'L' => extended.path = Some(text(&self.extended(size)?).to_vec()),
                b'K' => extended.link = Some(text(&self.extended(size)?).to_vec()),
                // A volume's label, and what GNU tar notes of directories.
                b'V' | b'D' => self.data(size)?,
                b'S' => return Err(sparse()),
                kind => return self.plain(&header, kind, size, extended).map(Some),
            }
        }
    }

    fn plain(&mut self, header: &[u8], kind: u8, size: u64, extended: Extended) -> Result<Entry, Error> {
        let path = extended.path.unwrap_or_else(|| {
            let name = text(field(header, 0, 100));
            // GNU's own format has other things where POSIX has the first part of a long name.
            let prefix =
                if field(header, 257, 6) == b"ustar\0" { text(field(header, 345, 155)) } else { &[] };
            if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
        });
        let link = extended.link.unwrap_or_else(|| text(field(header, 157, 100)).to_vec());
        for name in [&path, &link] {
            if name.len() > MAX_PATH || name.contains(&0) {
                return Err(garbled("a name that is too long, or has a zero byte in it"));
            }
        }
        let numeric = |at, extended: Option<u64>| {
            let value = extended.or_else(|| number(field(header, at, 8))).unwrap_or_default();
            u32::try_from(value).map_err(|_| garbled("an owner's number that is too large"))
        };
        let size = extended.size.unwrap_or(size);
        let kind = match kind {
            // Before POSIX a directory was told by its name.
            b'\0' | b'0' | b'7' if path.ends_with(b"/") => Kind::Directory,
            b'\0' | b'0' | b'7' => Kind::File(size),
            b'1' => Kind::HardLink(link),
            b'2' => Kind::Symlink(link),
            b'3' | b'4' => {
                Kind::Device { block: kind == b'4', major: numeric(329, None)?, minor: numeric(337, None)? }
            }
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => {
                return Err(garbled(&format!("an entry of the unknown type {:?}", char::from(other))));
            }
        };
        if let Kind::File(size) = kind {
            self.data(size)?;
        }
        Ok(Entry {
            path,
            kind,
            mode: u32::try_from(number(field(header, 100, 8)).unwrap_or(0o644) & 0o7777).unwrap_or(0o644),
            uid: numeric(108, extended.uid)?,
            gid: numeric(116, extended.gid)?,
            mtime: extended.mtime.unwrap_or_else(|| (seconds(field(header, 136, 12)), 0)),
            xattrs: extended.xattrs,
        })
    }

    /// Notes that data of that size comes next.
    fn data(&mut self, size: u64) -> Result<(), Error> {
        let whole = size.checked_next_multiple_of(RECORD as u64).filter(|s| *s < 1 << 60);
        let whole = whole.ok_or_else(|| garbled("a size that is too large"))?;
        (self.left, self.padding) = (size, whole - size);
        Ok(())
    }

    /// Reads to the stream's end, whatever is there.
    pub fn drain(&mut self) -> Result<(), Error> {
        io::copy(&mut self.inner, &mut io::sink()).map(drop).map_err(|e| unreadable(&e))
    }

    fn skip(&mut self) -> Result<(), Error> {
        let whole = self.left + self.padding;
        let n = io::copy(&mut (&mut self.inner).take(whole), &mut io::sink()).map_err(|e| unreadable(&e))?;
        self.position += n;
        // Some writers leave out the last padding, and nothing else.
        if n < self.left {
            return Err(garbled("an end in the middle of an entry"));
        }
        (self.left, self.padding) = (0, 0);
        Ok(())
    }

    /// The next header; `None` at the archive's end, which is a record of zeros, or the stream's own.
    fn header(&mut self) -> Result<Option<[u8; RECORD]>, Error> {
        let mut header = [0; RECORD];
        let mut filled = 0;
        while filled < RECORD {
            let (_, rest) = header.split_at_mut(filled);
            match self.inner.read(rest) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(garbled("an end in the middle of a header")),
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(unreadable(&e)),
            }
        }
        self.position += RECORD as u64;
        if header.iter().all(|b| *b == 0) {
            return Ok(None);
        }
        let told = number(field(&header, 148, 8));
        let sum = |of: fn(u8) -> i64| -> i64 {
            header
                .iter()
                .enumerate()
                .map(|(at, b)| of(if (148..156).contains(&at) { b' ' } else { *b }))
                .sum()
        };
        // Old writers added up signed bytes.
        let sums = [sum(i64::from), sum(|b| i64::from(b.cast_signed()))];
        match told.and_then(|t| i64::try_from(t).ok()) {
            Some(told) if sums.contains(&told) => Ok(Some(header)),
            _ => Err(garbled("a header with a wrong checksum")),
        }
    }

    /// The content of an extended header.
    fn extended(&mut self, size: u64) -> Result<Vec<u8>, Error> {
        if size > MAX_EXTENDED {
            return Err(garbled("an extended header that is too long"));
        }
        self.data(size)?;
        let mut data = Vec::new();
        self.read_to_end(&mut data).map_err(|e| unreadable(&e))?;
        if data.len() as u64 == size { Ok(data) } else { Err(garbled("an end in the middle of a header")) }
    }
}

/// Takes the records of a pax header: `<length> <key>=<value>\n`, the length being that of all of it.
fn pax(mut data: &[u8], into: &mut Extended) -> Result<(), Error> {
    let wrong = || garbled("an extended header without sense");
    while !data.is_empty() {
        let space = data.iter().take(20).position(|b| *b == b' ').ok_or_else(wrong)?;
        let (length, _) = data.split_at(space);
        let length: usize =
            std::str::from_utf8(length).ok().and_then(|l| l.parse().ok()).ok_or_else(wrong)?;
        let record = data.get(space + 1..length).and_then(|r| r.strip_suffix(b"\n")).ok_or_else(wrong)?;
        data = data.get(length..).unwrap_or_default();
        let equals = record.iter().position(|b| *b == b'=').ok_or_else(wrong)?;
        let (key, value) =
            (record.get(..equals).unwrap_or_default(), record.get(equals + 1..).unwrap_or_default());
        let decimal =
            || std::str::from_utf8(value).ok().and_then(|v| v.parse::<u64>().ok()).ok_or_else(wrong);
        match key {
            b"path" => into.path = Some(value.to_vec()),
            b"linkpath" => into.link = Some(value.to_vec()),
            b"size" => into.size = Some(decimal()?),
            b"uid" => into.uid = Some(decimal()?),
            b"gid" => into.gid = Some(decimal()?),
            b"mtime" => into.mtime = Some(fraction(value).ok_or_else(wrong)?),
            _ if key.starts_with(b"GNU.sparse.") => return Err(sparse()),
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    into.xattrs.push((name.to_vec(), value.to_vec()));
                }
            }
        }
    }
    Ok(())
}

/// A time as pax writes it: seconds, which may be negative, and a fraction.
fn fraction(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    let digits: String = part.chars().chain("000000000".chars()).take(9).collect();
    let nanos: u32 = digits.parse().ok()?;
    // -1.25 is a quarter second before -1.
    if whole.starts_with('-') && nanos > 0 {
        return Some((seconds.checked_sub(1)?, 1_000_000_000 - nanos));
    }
    Some((seconds, nanos))
}

/// A number in octal digits, or GNU's way for large ones: big-endian, with the first bit set.
fn number(field: &[u8]) -> Option<u64> {
    match field {
        [0xff, ..] => None,
        [first, rest @ ..] if first & 0x80 != 0 => {
            rest.iter().try_fold(u64::from(first & 0x7f), |n, b| Some((n.checked_mul(256)?) | u64::from(*b)))
        }
        _ => {
            let digits = field.iter().skip_while(|b| **b == b' ');
            let mut digits = digits.take_while(|b| **b != b' ' && **b != 0).peekable();
            digits.try_fold(0_u64, |n, b| {
                let digit = u64::from(b.checked_sub(b'0').filter(|d| *d < 8)?);
                n.checked_mul(8)?.checked_add(digit)
            })
        }
    }
}

/// A time in a header; GNU's may lie before 1970.
fn seconds(field: &[u8]) -> i64 {
    if field.first() == Some(&0xff) {
        return field.iter().skip(1).fold(-1_i64, |n, b| n.wrapping_mul(256) | i64::from(*b));
    }
    number(field).and_then(|n| i64::try_from(n).ok()).unwrap_or_default()
}

fn field(header: &[u8], at: usize, length: usize) -> &[u8] {
    header.get(at..at + length).unwrap_or_default()
}

/// What comes before the first zero byte.
fn text(field: &[u8]) -> &[u8] {
    field.split(|b| *b == 0).next().unwrap_or_default()
}

fn garbled(what: &str) -> Error {
    Error::invalid(format!("it is no tar archive that makes sense: it has {what}"))
}

fn sparse() -> Error {
    Error::invalid("it has a file in GNU tar's form for sparse files")
        .hint("make the archive without `--sparse`")
}

fn unreadable(e: &io::Error) -> Error {
    crate::failed("the archive cannot be read", e)
}
