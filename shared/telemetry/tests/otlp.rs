//! Spans arrive at a receiver, over HTTP and over gRPC, in one trace; and nothing happens where none is configured.
//!
//! Telemetry is set up once per process and from the environment, so each case runs in a process of its own: this test
//! binary again, with just the test [`child`].

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "helpers of tests, to stop with the line")]

use std::{
    net::SocketAddr,
    process::{Command, Output},
    time::{Duration, UNIX_EPOCH},
};
use tokio::net::{TcpListener, TcpStream};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

#[test]
#[ignore = "run by the other tests, with an environment"]
fn child() {
    let guard = bothy_telemetry::init_on("bothy-test", Some("here"));
    let span = tracing::info_span!("unit.work", bothy.vm.id = "vm-1");
    bothy_telemetry::set_parent(&span, Some(&format!("00-{TRACE}-b7ad6b7169203331-01")), None);
    span.in_scope(|| {
        let exported = std::env::var_os("OTEL_EXPORTER_OTLP_ENDPOINT").is_some();
        let current = bothy_telemetry::current();
        assert_eq!(current.is_some(), exported);
        assert!(current.is_none_or(|c| c.traceparent.starts_with(&format!("00-{TRACE}-"))));
        tracing::info_span!(target: "h2::client", "noise.from.transport").in_scope(|| {});
        let at = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        bothy_telemetry::past_span(
            &span,
            "guest.step",
            at,
            at + Duration::from_secs(1),
            [("step", "mounts".into())],
        );
        bothy_telemetry::record_error(&span, "not_found", "no such thing");
    });
    drop(span);
    guard.shutdown();
}

/// Runs [`child`] with these variables.
async fn run(variables: &[(&str, String)]) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child", "--ignored", "--nocapture"]);
    for (name, _) in std::env::vars_os().filter(|(n, _)| n.to_string_lossy().starts_with("OTEL_")) {
        command.env_remove(name);
    }
    command.envs(variables.iter().map(|(n, v)| (*n, v.as_str())));
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

fn succeeded(output: &Output) -> String {
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{log}");
    log
}

fn has(body: &[u8], part: &[u8]) -> bool {
    body.windows(part.len()).any(|window| window == part)
}

/// The body is protobuf, in which strings and ids are plain bytes.
fn check(body: &[u8]) {
    for part in
        ["bothy-test", "bothy.host", "unit.work", "bothy.vm.id", "guest.step", "mounts", "no such thing"]
    {
        assert!(has(body, part.as_bytes()), "{part} is missing");
    }
    let trace: Vec<u8> = (0..16).map(|n| u8::from_str_radix(&TRACE[2 * n..2 * n + 2], 16).unwrap()).collect();
    assert!(has(body, &trace), "the spans are in the caller's trace");
    assert!(!has(body, b"noise.from.transport"));
}

async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// Takes one export over HTTP/1.1.
async fn http_body(mut stream: TcpStream) -> (String, Vec<u8>) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut got = Vec::new();
    loop {
        let mut buffer = [0; 4096];
        let n = stream.read(&mut buffer).await.unwrap();
        assert!(n > 0, "the request ended early");
        got.extend_from_slice(&buffer[..n]);
        let Some(end) = got.windows(4).position(|w| w == b"\r\n\r\n") else { continue };
        let head = String::from_utf8_lossy(&got[..end]).to_ascii_lowercase();
        let length =
            head.lines().find_map(|l| l.strip_prefix("content-length:")).unwrap().trim().parse::<usize>();
        if got.len() >= end + 4 + length.unwrap() {
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
            return (head, got.split_off(end + 4));
        }
    }
}

#[tokio::test]
async fn spans_arrive_over_http() {
    let (listener, address) = listen().await;
    let receiver = tokio::spawn(async move { http_body(listener.accept().await.unwrap().0).await });
    succeeded(&run(&[("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://{address}"))]).await);
    let (head, body) = receiver.await.unwrap();
    assert!(head.starts_with("post /v1/traces "), "{head}");
    check(&body);
}

#[tokio::test]
async fn spans_arrive_over_grpc() {
    let (listener, address) = listen().await;
    let receiver = tokio::spawn(async move {
        let mut connection = h2::server::handshake(listener.accept().await.unwrap().0).await.unwrap();
        let (request, mut respond) = connection.accept().await.unwrap().unwrap();
        let path = request.uri().path().to_owned();
        let driver = tokio::spawn(async move { while connection.accept().await.is_some() {} });
        let mut stream = request.into_body();
        let mut body = Vec::new();
        while let Some(chunk) = stream.data().await {
            let chunk = chunk.unwrap();
            stream.flow_control().release_capacity(chunk.len()).unwrap();
            body.extend_from_slice(&chunk);
        }
        let response = http::Response::builder().header("content-type", "application/grpc").body(()).unwrap();
        let mut reply = respond.send_response(response, false).unwrap();
        // An empty message: no compression, length 0.
        reply.send_data(vec![0; 5].into(), false).unwrap();
        reply
            .send_trailers(
                [("grpc-status", "0")]
                    .map(|(n, v)| (n.parse().unwrap(), v.parse().unwrap()))
                    .into_iter()
                    .collect(),
            )
            .unwrap();
        driver.await.unwrap();
        (path, body)
    });
    let variables = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://{address}")),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc".to_owned()),
    ];
    succeeded(&run(&variables).await);
    let (path, body) = receiver.await.unwrap();
    assert_eq!(path, "/opentelemetry.proto.collector.trace.v1.TraceService/Export");
    check(&body);
}

#[tokio::test]
async fn without_an_endpoint_there_are_only_logs_and_a_bad_setting_is_told() {
    let log = succeeded(&run(&[("BOTHY_LOG", "bothy=nonsense=x".to_owned())]).await);
    assert!(log.contains("BOTHY_LOG is not a valid filter"), "{log}");
    let variables = [
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:1".to_owned()),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "pigeon".to_owned()),
    ];
    let log = succeeded(&run(&variables).await);
    assert!(log.contains("traces are not exported") && log.contains("pigeon"), "{log}");
}
