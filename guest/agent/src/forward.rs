//! TCP connections inside the guest on behalf of the host.

use std::net::Ipv4Addr;

use bothy_guest_proto::{CHUNK, v1::ForwardChunk};
use futures::{Stream, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tonic::Status;

/// Connects to `port` of loopback, or else of `nic`.
///
/// # Errors
/// `Unavailable` when nobody listens there.
pub(crate) async fn connect(port: u16, nic: Option<Ipv4Addr>) -> Result<TcpStream, Status> {
    let error = match TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
        Ok(stream) => return Ok(stream),
        Err(error) => error,
    };
    if let Some(nic) = nic
        && let Ok(stream) = TcpStream::connect((nic, port)).await
    {
        return Ok(stream);
    }
    Err(Status::unavailable(format!("connect to port {port} of the guest: {error}")))
}

/// Copies both ways until both ends have closed, or the host is gone.
pub(crate) async fn run<S>(
    tcp: TcpStream,
    first: Vec<u8>,
    mut input: S,
    output: mpsc::Sender<Result<ForwardChunk, Status>>,
) where
    S: Stream<Item = Result<ForwardChunk, Status>> + Unpin,
{
    let _ = tcp.set_nodelay(true);
    let (mut from, mut to) = tcp.into_split();
    let inward = async {
        if !first.is_empty() && to.write_all(&first).await.is_err() {
            return;
        }
        while let Some(Ok(chunk)) = input.next().await {
            if to.write_all(&chunk.data).await.is_err() {
                return;
            }
        }
        let _ = to.shutdown().await;
    };
    let outward = async {
        let mut buffer = vec![0; CHUNK];
        loop {
            let read = tokio::select! {
                read = from.read(&mut buffer) => read,
                () = output.closed() => return,
            };
            let message = match read {
                Ok(0) => return,
                Ok(count) => {
                    Ok(ForwardChunk { port: 0, data: buffer.get(..count).unwrap_or_default().to_vec() })
                }
                Err(error) => Err(Status::unavailable(format!("read from the guest's port: {error}"))),
            };
            let failed = message.is_err();
            if output.send(message).await.is_err() || failed {
                return;
            }
        }
    };
    // The far end closing ends the stream; the host closing only ends its half.
    let mut outward = std::pin::pin!(outward);
    tokio::select! {
        () = &mut outward => {}
        () = inward => outward.await,
    }
}
