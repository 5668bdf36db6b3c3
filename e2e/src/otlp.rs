//! A receiver of OTLP over HTTP (the OpenTelemetry protocol specification, "OTLP/HTTP", binary protobuf): it keeps the
//! spans that it is sent, for tests to look at.

use bothy_testkit::Netns;
use opentelemetry_proto::tonic::{
    collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse},
    common::v1::{KeyValue, any_value::Value},
};
use prost::Message;
use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
};

/// One span as it arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// `service.name` of the process that made it.
    pub service: String,
    /// Its name.
    pub name: String,
    /// The trace that it belongs to.
    pub trace: Vec<u8>,
    /// Its id.
    pub id: Vec<u8>,
    /// The span above it; empty for a root.
    pub parent: Vec<u8>,
    /// When it began, in nanoseconds since the epoch.
    pub start: u64,
    /// When it ended.
    pub end: u64,
}

/// A receiver in a network namespace. It serves until the process ends.
#[derive(Debug)]
pub struct Receiver {
    /// What `OTEL_EXPORTER_OTLP_ENDPOINT` should be.
    pub endpoint: String,
    spans: Arc<Mutex<Vec<Span>>>,
}

impl Receiver {
    /// Starts one on a free port of the namespace's loopback.
    ///
    /// # Panics
    /// Where no socket can be had.
    pub fn start(netns: &Netns) -> Self {
        let listener = netns.run(|| TcpListener::bind("127.0.0.1:0")).expect("a listener");
        let endpoint = format!("http://{}", listener.local_addr().expect("its address"));
        let spans = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&spans);
        std::thread::spawn(move || {
            for connection in listener.incoming().map_while(Result::ok) {
                let kept = Arc::clone(&kept);
                std::thread::spawn(move || while let Ok(true) = answer(&connection, &kept) {});
            }
        });
        Self { endpoint, spans }
    }

    /// All spans so far.
    pub fn spans(&self) -> Vec<Span> {
        self.spans.lock().expect("no reader panicked").clone()
    }
}

/// Takes one request from `connection` and answers it. `false` at the end of the stream.
fn answer(connection: &TcpStream, kept: &Mutex<Vec<Span>>) -> io::Result<bool> {
    let mut reader = BufReader::new(connection);
    let mut length = 0;
    let mut line = String::new();
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            return Ok(false);
        }
        let line = line.trim_end().to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse().map_err(io::Error::other)?;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let request = ExportTraceServiceRequest::decode(body.as_slice()).map_err(io::Error::other)?;
    kept.lock().expect("no reader panicked").extend(spans_of(request));
    let reply = ExportTraceServiceResponse::default().encode_to_vec();
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: {}\r\n\r\n",
        reply.len()
    );
    let mut out = connection;
    out.write_all(head.as_bytes())?;
    out.write_all(&reply)?;
    Ok(true)
}

fn spans_of(request: ExportTraceServiceRequest) -> Vec<Span> {
    let mut out = Vec::new();
    for resource in request.resource_spans {
        let attributes = resource.resource.map(|r| r.attributes).unwrap_or_default();
        let service = text(&attributes, "service.name").unwrap_or_default();
        for span in resource.scope_spans.into_iter().flat_map(|s| s.spans) {
            out.push(Span {
                service: service.clone(),
                name: span.name,
                trace: span.trace_id,
                id: span.span_id,
                parent: span.parent_span_id,
                start: span.start_time_unix_nano,
                end: span.end_time_unix_nano,
            });
        }
    }
    out
}

fn text(attributes: &[KeyValue], key: &str) -> Option<String> {
    let value = attributes.iter().find(|a| a.key == key)?.value.clone()?.value?;
    if let Value::StringValue(text) = value { Some(text) } else { None }
}
