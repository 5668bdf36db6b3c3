//! The part of the D-Bus wire format that a conversation with systemd needs: calls out, and the answers' few types in.

/// A call of `method`, of an interface of an object of `destination`.
pub(super) fn call(
    serial: u32,
    destination: &str,
    [object, interface, method]: [&str; 3],
    signature: &str,
    body: &[u8],
) -> Vec<u8> {
    let mut fields = Writer::default();
    fields.field(1, "o", object);
    fields.field(2, "s", interface);
    fields.field(3, "s", method);
    fields.field(6, "s", destination);
    fields.align(8);
    fields.0.push(8);
    fields.signature("g");
    fields.signature(signature);

    let mut message = Writer(vec![b'l', 1, 0, 1]);
    message.number(body.len());
    message.0.extend(serial.to_le_bytes());
    message.number(fields.0.len());
    message.0.extend(fields.0);
    message.align(8);
    message.0.extend(body);
    message.0
}

/// Bytes in the making, aligned from their beginning: what they are put behind must end at a multiple of 8.
#[derive(Debug, Default)]
pub(super) struct Writer(pub(super) Vec<u8>);

impl Writer {
    pub(super) fn align(&mut self, to: usize) {
        self.0.resize(self.0.len().next_multiple_of(to), 0);
    }

    pub(super) fn number(&mut self, number: usize) {
        self.align(4);
        self.0.extend(u32::try_from(number).unwrap_or(u32::MAX).to_le_bytes());
    }

    pub(super) fn text(&mut self, text: &str) {
        self.number(text.len());
        self.0.extend(text.as_bytes());
        self.0.push(0);
    }

    pub(super) fn signature(&mut self, text: &str) {
        self.0.push(u8::try_from(text.len()).unwrap_or(0));
        self.0.extend(text.as_bytes());
        self.0.push(0);
    }

    /// An array of texts: its length in bytes, then they.
    pub(super) fn texts(&mut self, texts: &[&str]) {
        let mut array = Self::default();
        for text in texts {
            array.text(text);
        }
        self.number(array.0.len());
        self.0.extend(array.0);
    }

    /// One header field: a number, and a variant that holds a text or path.
    fn field(&mut self, code: u8, kind: &str, value: &str) {
        self.align(8);
        self.0.push(code);
        self.signature(kind);
        self.text(value);
    }
}

pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    pub(super) fn is_at(&self, place: usize) -> bool {
        self.at >= place
    }

    pub(super) fn place(&self) -> usize {
        self.at
    }

    pub(super) fn align(&mut self, to: usize) -> Option<()> {
        self.at = self.at.checked_next_multiple_of(to)?;
        Some(())
    }

    pub(super) fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let end = self.at.checked_add(count)?;
        let taken = self.bytes.get(self.at..end)?;
        self.at = end;
        Some(taken)
    }

    pub(super) fn number(&mut self) -> Option<usize> {
        self.align(4)?;
        usize::try_from(u32::from_le_bytes(self.take(4)?.try_into().ok()?)).ok()
    }

    pub(super) fn long(&mut self) -> Option<u64> {
        self.align(8)?;
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }

    pub(super) fn text(&mut self) -> Option<&'a str> {
        let count = self.number()?;
        let text = self.take(count)?;
        self.take(1)?;
        std::str::from_utf8(text).ok()
    }
}
