//! Lines of a hostile stream: bounded memory whatever their length.

use bothy_contract::Error;
use std::io::{BufRead, BufReader, Read};

/// The longest line that is kept whole, in bytes: a header with two quoted names of PATH_MAX.
const KEPT: u64 = 40 << 10;

/// Lines with one line of look-back. A line longer than [`KEPT`] is cut, and then lacks its newline.
pub(crate) struct Lines<R> {
    input: BufReader<R>,
    line: Vec<u8>,
    held: bool,
    limit: u64,
    /// Bytes so far.
    pub(crate) bytes: u64,
    /// The number of the last line, from 1.
    pub(crate) number: u64,
}

impl<R: Read> Lines<R> {
    pub(crate) fn new(reader: R, limit: u64) -> Self {
        let input = BufReader::with_capacity(64 << 10, reader);
        Self { input, line: Vec::new(), held: false, limit, bytes: 0, number: 0 }
    }

    /// The next line with its newline; empty at the end.
    pub(crate) fn next(&mut self) -> Result<&[u8], Error> {
        if std::mem::take(&mut self.held) {
            return Ok(&self.line);
        }
        self.line.clear();
        let n = (&mut self.input).take(KEPT).read_until(b'\n', &mut self.line).map_err(|e| lost(&e))?;
        self.number += u64::from(n > 0);
        self.count(n)?;
        let mut ended = self.line.ends_with(b"\n") || (n as u64) < KEPT;
        while !ended {
            let available = self.input.fill_buf().map_err(|e| lost(&e))?;
            let (n, end) = match available.iter().position(|b| *b == b'\n') {
                Some(at) => (at + 1, true),
                None => (available.len(), available.is_empty()),
            };
            self.input.consume(n);
            self.count(n)?;
            ended = end;
        }
        Ok(&self.line)
    }

    /// Gives the last line once more at the next call.
    pub(crate) fn hold(&mut self) {
        self.held = true;
    }

    fn count(&mut self, n: usize) -> Result<(), Error> {
        self.bytes += n as u64;
        if self.bytes > self.limit {
            return Err(Error::invalid(format!("it is larger than {} MiB", self.limit >> 20)));
        }
        Ok(())
    }
}

fn lost(err: &std::io::Error) -> Error {
    Error::internal("cannot read it", err)
}
