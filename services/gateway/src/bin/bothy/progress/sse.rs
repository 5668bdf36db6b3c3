//! Server-sent events (<https://html.spec.whatwg.org/multipage/server-sent-events.html>).

/// One server-sent event.
pub(super) struct SseMessage {
    pub(super) event: String,
    pub(super) data: String,
}

/// Takes server-sent events out of pieces that end anywhere.
#[derive(Default)]
pub(super) struct SseLines {
    rest: Vec<u8>,
    event: String,
    data: String,
}

impl SseLines {
    /// The events that end in `piece`.
    pub(super) fn feed(&mut self, piece: &[u8]) -> Vec<SseMessage> {
        self.rest.extend_from_slice(piece);
        let mut out = Vec::new();
        while let Some(end) = self.rest.iter().position(|&b| b == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            let line = line.trim_end_matches(['\n', '\r']);
            if line.is_empty() {
                let (event, data) = (std::mem::take(&mut self.event), std::mem::take(&mut self.data));
                if !data.is_empty() {
                    out.push(SseMessage { event, data });
                }
            } else if let Some((field, value)) = line.split_once(':') {
                let value = value.strip_prefix(' ').unwrap_or(value);
                match field {
                    "event" => value.clone_into(&mut self.event),
                    "data" => {
                        if !self.data.is_empty() {
                            self.data.push('\n');
                        }
                        self.data.push_str(value);
                    }
                    _ => {}
                }
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_sent_events_in_pieces_of_any_size() {
        let text = b": hello\n\nid: 0\nevent: accepted\ndata: {\"a\":1}\n\n:\n\nevent: error\r\ndata: x\r\ndata: y\r\n\r\ndata: cut";
        for size in 1..text.len() {
            let mut lines = SseLines::default();
            let all: Vec<_> = text.chunks(size).flat_map(|piece| lines.feed(piece)).collect();
            let all: Vec<_> = all.iter().map(|m| (m.event.as_str(), m.data.as_str())).collect();
            assert_eq!(all, [("accepted", "{\"a\":1}"), ("error", "x\ny")], "{size}");
        }
    }
}
