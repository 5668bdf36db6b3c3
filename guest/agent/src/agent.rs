//! The agent process: opens its end of the channel, which is two virtio-serial ports or a virtio socket device, whichever the
//! machine has, and serves the gRPC service on the streams that the host opens to ports 1 and 2. One thread: a guest often has one CPU, and file work goes to tokio's blocking threads.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bothy_channel::guest::Listener;
use bothy_guest_proto::{BULK_PORT, CONTROL_PORT, MAX_MESSAGE, v1::guest_server::GuestServer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::{Connected, Server};

use crate::boot::{NEW_ROOT, SYSTEM};
use crate::port::{self, Port};
use crate::service::{Guest, Init};
use crate::timeline::{Step, now_us};
use crate::{boot, kmsg, machine, vsock};

/// How long to wait when no connection can be accepted.
const PAUSE: Duration = Duration::from_millis(100);

/// Runs the agent; it ends only with the machine.
///
/// # Errors
/// When a port is missing, or PID 1 is not at the other end of standard input.
pub fn run() -> io::Result<()> {
    let began = now_us();
    // A directory on the disk that takes what is written to the root: nobody finds the overlay's upper layer by a path later.
    let upper = if Path::new(SYSTEM).is_dir() { SYSTEM } else { NEW_ROOT };
    let upper = fs_err::File::open(upper)?;
    nix::unistd::chroot(NEW_ROOT)?;
    nix::unistd::chdir("/")?;
    let link = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let steps = boot::receive_steps(&link)?;
    link.set_nonblocking(true)?;
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let init = Init::waiting(tokio::net::UnixStream::from_std(link)?);
        let guest = Guest::new(init, steps).writing_to(upper);
        let (accepted, streams) = mpsc::channel(8);
        let vsock = machine::has_virtio(machine::VSOCK);
        if vsock {
            // The port that the host asks for first is the last one to be there: once it answers, both do.
            for port in [BULK_PORT, CONTROL_PORT] {
                let listener = vsock::Listener::new(port).map_err(|error| {
                    let text = format!(
                        "listen on vsock port {port}: {error} (an image built before \
                        there was vsock has no modules for it: build it again)"
                    );
                    io::Error::new(error.kind(), text)
                })?;
                tokio::spawn(accept_vsock(listener, accepted.clone()));
            }
        }
        // A machine may have both. One without either has a VMM that forgot the channel, and the ports' error says so.
        if machine::has_virtio(machine::CONSOLE) || !vsock {
            let (control, bulk) = tokio::try_join!(port::open("bothy.control"), port::open("bothy.bulk"))?;
            tokio::spawn(accept(control, accepted.clone()));
            tokio::spawn(accept(bulk, accepted.clone()));
        }
        drop(accepted);
        guest.add_step(Step::ends_now("channel", began));
        server(guest, ReceiverStream::new(streams)).await.map_err(io::Error::other)
    })
}

/// Serves `guest` on `streams`, with windows as wide as the host's: the channel below does the flow control.
///
/// # Errors
/// When the HTTP/2 server cannot go on.
pub async fn server<S>(guest: Guest, streams: S) -> Result<(), tonic::transport::Error>
where
    S: futures::Stream<Item = io::Result<Accepted>>,
{
    let service =
        GuestServer::new(guest).max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE);
    Server::builder()
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20)
        .add_service(service)
        .serve_with_incoming(streams)
        .await
}

/// Passes on the connections to one vsock port, for as long as the machine runs.
async fn accept_vsock(listener: vsock::Listener, accepted: mpsc::Sender<io::Result<Accepted>>) {
    loop {
        match listener.accept().await {
            Ok(stream) => {
                if accepted.send(Ok(Accepted::new(stream))).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                kmsg::error(&format!("cannot accept a connection from the host: {error}"));
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// Passes on the streams of one virtio-serial port, for as long as the machine runs.
async fn accept(port: Port, accepted: mpsc::Sender<io::Result<Accepted>>) {
    let mut listener = Listener::new(port);
    loop {
        match listener.accept().await {
            Ok((CONTROL_PORT | BULK_PORT, stream)) => {
                if accepted.send(Ok(Accepted::new(stream))).await.is_err() {
                    return;
                }
            }
            Ok((other, _)) => kmsg::info(&format!("refused a stream to port {other}: nobody listens there")),
            Err(error) => return kmsg::error(&format!("the channel is gone for good: {error}")),
        }
    }
}

/// Any byte stream.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A stream that the host opened.
pub struct Accepted(Box<dyn Stream>);

impl std::fmt::Debug for Accepted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Accepted")
    }
}

impl Accepted {
    /// Makes one of any byte stream.
    #[must_use]
    pub fn new(stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Self {
        Self(Box::new(stream))
    }
}

impl Connected for Accepted {
    type ConnectInfo = ();
    fn connect_info(&self) {}
}

impl AsyncRead for Accepted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
