//! Frames on the wire: pure encoding and decoding.
//!
//! ```text
//! 0       4         5      6          8        12    16        24    28
//! | magic | version | kind | reserved | length | seq | session | crc | payload ...
//! ```
//! All numbers are big-endian; `length` is that of the payload; `crc` is the CRC-32 (IEEE) of the 24 bytes before it and
//! of the payload.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Longest frame, header included, in bytes: what a reader may have to hold before it can judge one.
pub const MAX_FRAME: usize = 64 << 10;
/// Length of a frame's header in bytes.
pub(crate) const HEADER: usize = 28;
/// Longest payload in bytes.
pub(crate) const MAX_PAYLOAD: usize = MAX_FRAME - HEADER;

/// Begins every frame. No byte is zero, so padding is skipped at the speed of a search for one byte.
const MAGIC: [u8; 4] = *b"\xb0chn";
const VERSION: u8 = 1;
/// Where the CRC is in the header; it covers all before it.
const CRC_AT: usize = 24;

/// What a frame is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Guest to host: I have no session, greet me.
    Ready,
    /// Host to guest: the session begins.
    Hello,
    /// Guest to host: it has.
    Ack,
    /// Either way: the next bytes of the session.
    Data,
}

impl Kind {
    const fn byte(self) -> u8 {
        match self {
            Kind::Ready => 1,
            Kind::Hello => 2,
            Kind::Ack => 3,
            Kind::Data => 4,
        }
    }

    const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Kind::Ready),
            2 => Some(Kind::Hello),
            3 => Some(Kind::Ack),
            4 => Some(Kind::Data),
            _ => None,
        }
    }
}

/// One frame that arrived whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) kind: Kind,
    pub(crate) session: u64,
    pub(crate) seq: u32,
    pub(crate) payload: Bytes,
}

/// A buffer with room for a header in front, ready for up to [`MAX_PAYLOAD`] bytes of payload.
pub(crate) fn begin(out: &mut BytesMut) {
    out.put_bytes(0, HEADER);
}

/// Fills in the header of what [`begin`] began, and takes the frame out of the buffer.
pub(crate) fn seal(out: &mut BytesMut, kind: Kind, session: u64, seq: u32) -> Bytes {
    debug_assert!((HEADER..=MAX_FRAME).contains(&out.len()), "a frame that was begun and is not too long");
    let mut frame = out.split();
    let (header, payload) = frame.split_at_mut(HEADER);
    let mut head = BytesMut::with_capacity(HEADER);
    head.put_slice(&MAGIC);
    head.put_u8(VERSION);
    head.put_u8(kind.byte());
    head.put_u16(0);
    #[expect(clippy::cast_possible_truncation, reason = "at most MAX_PAYLOAD, which is asserted above")]
    head.put_u32(payload.len() as u32);
    head.put_u32(seq);
    head.put_u64(session);
    head.put_u32(crc(&head, payload));
    header.copy_from_slice(&head);
    frame.freeze()
}

/// A frame without payload and, behind it, enough zeros to push any torn frame in front of it out of a reader's way.
pub(crate) fn control(kind: Kind, session: u64) -> Bytes {
    let mut out = BytesMut::with_capacity(HEADER + MAX_FRAME);
    begin(&mut out);
    let head = seal(&mut out, kind, session, 0);
    let mut all = BytesMut::from(head);
    all.put_bytes(0, MAX_FRAME);
    all.freeze()
}

fn crc(head: &[u8], payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(head);
    hasher.update(payload);
    hasher.finalize()
}

/// Finds frames in a stream of bytes that may hold anything else as well.
#[derive(Debug, Default)]
pub(crate) struct Decoder {
    buf: BytesMut,
    skipped: u64,
}

impl Decoder {
    /// Where the next bytes from the wire are to be put. Never longer than one frame and what is put there at once, as
    /// long as [`Decoder::next`] is called until it gives `None`.
    pub(crate) fn buffer(&mut self) -> &mut BytesMut {
        &mut self.buf
    }

    /// How many bytes were no part of a frame since this was last asked, padding included.
    pub(crate) fn take_skipped(&mut self) -> u64 {
        std::mem::take(&mut self.skipped)
    }

    /// The next whole frame, or `None` where more bytes are needed.
    pub(crate) fn next(&mut self) -> Option<Frame> {
        loop {
            self.skip_to_magic();
            let head = self.buf.get(..HEADER)?;
            let Some((kind, length, seq, session, sum)) = parse(head) else {
                self.skip(1);
                continue;
            };
            let payload = self.buf.get(HEADER..HEADER + length)?;
            // A bad sum may be the payload's or the length's fault: only the first byte is known not to begin a frame.
            if crc(self.buf.get(..CRC_AT)?, payload) != sum {
                self.skip(1);
                continue;
            }
            let payload = self.buf.split_to(HEADER + length).freeze().slice(HEADER..);
            return Some(Frame { kind, session, seq, payload });
        }
    }

    fn skip_to_magic(&mut self) {
        let first = self.buf.iter().position(|byte| *byte == MAGIC[0]).unwrap_or(self.buf.len());
        self.skip(first);
    }

    fn skip(&mut self, n: usize) {
        self.buf.advance(n);
        self.skipped += n as u64;
    }
}

/// Reads a header, where these bytes can be one.
fn parse(mut head: &[u8]) -> Option<(Kind, usize, u32, u64, u32)> {
    if head.try_get_u32().ok()? != u32::from_be_bytes(MAGIC) || head.try_get_u8().ok()? != VERSION {
        return None;
    }
    let kind = Kind::from_byte(head.try_get_u8().ok()?)?;
    if head.try_get_u16().ok()? != 0 {
        return None;
    }
    let length = usize::try_from(head.try_get_u32().ok()?).ok()?;
    if length > MAX_PAYLOAD || (kind != Kind::Data && length != 0) {
        return None;
    }
    Some((kind, length, head.try_get_u32().ok()?, head.try_get_u64().ok()?, head.try_get_u32().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn data(session: u64, seq: u32, payload: &[u8]) -> Bytes {
        let mut out = BytesMut::new();
        begin(&mut out);
        out.put_slice(payload);
        seal(&mut out, Kind::Data, session, seq)
    }

    fn decode(bytes: &[u8], step: usize) -> Vec<Frame> {
        let mut decoder = Decoder::default();
        let mut frames = Vec::new();
        for part in bytes.chunks(step.max(1)) {
            decoder.buffer().put_slice(part);
            while let Some(frame) = decoder.next() {
                frames.push(frame);
            }
        }
        frames
    }

    #[test]
    fn the_wire_format_does_not_change_by_accident() {
        let wire = data(0x0102_0304_0506_0708, 9, b"hi");
        assert_eq!(wire[..24], *b"\xb0chn\x01\x04\0\0\0\0\0\x02\0\0\0\x09\x01\x02\x03\x04\x05\x06\x07\x08");
        assert_eq!(wire[24..28], crc32fast::hash(&[&wire[..24], b"hi"].concat()).to_be_bytes());
        assert_eq!(&wire[28..], b"hi");
        assert_eq!(control(Kind::Hello, 1).len(), HEADER + MAX_FRAME);
    }

    #[test]
    fn a_torn_frame_is_pushed_out_by_the_padding_of_the_next_control_frame() {
        let mut wire = data(1, 0, &[7; MAX_PAYLOAD])[..100].to_vec();
        wire.extend_from_slice(&control(Kind::Ack, 2));
        let frames = decode(&wire, 4096);
        assert_eq!(frames, [Frame { kind: Kind::Ack, session: 2, seq: 0, payload: Bytes::new() }]);
    }

    #[test]
    fn a_frame_that_claims_too_much_is_not_waited_for() {
        let mut huge = data(1, 0, b"x").to_vec();
        huge[8..12].copy_from_slice(&u32::MAX.to_be_bytes());
        huge.extend_from_slice(&data(1, 1, b"y"));
        assert_eq!(decode(&huge, 1).len(), 1);
    }

    #[test]
    fn what_is_held_back_stays_below_one_frame() {
        let mut decoder = Decoder::default();
        for _ in 0..64 {
            decoder.buffer().put_bytes(0xb0, 8 << 10);
            assert_eq!(decoder.next(), None);
            assert!(decoder.buffer().len() <= MAX_FRAME);
        }
    }

    proptest! {
        #[test]
        fn frames_are_found_behind_any_garbage_in_any_pieces(
            garbage in proptest::collection::vec(any::<u8>(), 0..300),
            payloads in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..200), 1..6),
            session: u64,
            step in 1usize..97,
        ) {
            let mut wire = garbage;
            for (seq, payload) in payloads.iter().enumerate() {
                wire.extend_from_slice(&data(session, seq as u32, payload));
            }
            wire.extend_from_slice(&[0; MAX_FRAME]);
            let found: Vec<_> = decode(&wire, step).into_iter().map(|f| (f.session, f.seq, f.payload)).collect();
            let sent: Vec<_> =
                payloads.iter().enumerate().map(|(i, p)| (session, i as u32, Bytes::copy_from_slice(p))).collect();
            prop_assert_eq!(found, sent);
        }

        #[test]
        fn one_flipped_bit_loses_that_frame_and_no_other(
            payload in proptest::collection::vec(any::<u8>(), 1..200),
            at: prop::sample::Index,
            bit in 0u8..8,
        ) {
            let mut bad = data(5, 0, &payload).to_vec();
            let at = at.index(bad.len());
            bad[at] ^= 1 << bit;
            bad.extend_from_slice(&data(5, 1, &payload));
            bad.extend_from_slice(&[0; MAX_FRAME]);
            let seqs: Vec<_> = decode(&bad, 50).into_iter().map(|f| f.seq).collect();
            prop_assert_eq!(seqs, [1]);
        }

        #[test]
        fn a_frame_cut_anywhere_hides_nothing_behind_it(
            payload in proptest::collection::vec(any::<u8>(), 0..2000),
            keep: prop::sample::Index,
        ) {
            let whole = data(5, 0, &payload);
            let mut wire = whole[..keep.index(whole.len())].to_vec();
            wire.extend_from_slice(&control(Kind::Hello, 9));
            wire.extend_from_slice(&data(9, 0, b"after"));
            wire.extend_from_slice(&[0; MAX_FRAME]);
            let found: Vec<_> = decode(&wire, 777).into_iter().map(|f| (f.kind, f.session)).collect();
            prop_assert_eq!(found, [(Kind::Hello, 9), (Kind::Data, 9)]);
        }
    }
}
