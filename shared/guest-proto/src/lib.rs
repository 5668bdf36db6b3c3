//! The gRPC protocol between host and guest agent, and how a host process gets a client over a raw stream.
//!
//! `proto/guest.proto` is the protocol. It runs over streams to numbered ports of the guest (`bothy-channel`): the
//! same service answers on [`CONTROL_PORT`] and [`BULK_PORT`], which ride different virtio-serial ports, so that a
//! health check never waits behind a gigabyte of tar.

/// The generated messages, client and server.
#[expect(missing_docs, clippy::allow_attributes_without_reason, reason = "generated code")]
pub mod v1 {
    tonic::include_proto!("bothy.guest.v1");
}

use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::transport::{Channel, Endpoint};

/// The guest port for short calls.
pub const CONTROL_PORT: u32 = 1;
/// The guest port for exec, tar and forwarded connections.
pub const BULK_PORT: u32 = 2;
/// The largest data field of a streamed message, in bytes; MACHINE measurements favour 32 to 64 KiB writes.
pub const CHUNK: usize = 64 << 10;
/// The largest message either side accepts, in bytes.
pub const MAX_MESSAGE: usize = 4 << 20;

/// A client of the guest's agent over one raw stream to one of its ports.
pub type GuestClient = v1::guest_client::GuestClient<Channel>;

/// Makes a client over `stream`. The HTTP/2 handshake happens with the first call.
///
/// # Errors
/// When the stream fails during the handshake.
pub async fn client<S>(stream: S) -> Result<GuestClient, tonic::transport::Error>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let mut stream = Some(stream);
    let channel = Endpoint::from_static("http://guest.bothy")
        // The stream is flow-controlled below; wide windows let bulk run at the channel's own rate.
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20)
        .connect_with_connector(tower::service_fn(move |_| {
            let stream = stream.take();
            async move {
                stream.map(TokioIo::new).ok_or_else(|| {
                    std::io::Error::new(std::io::ErrorKind::NotConnected, "the stream to the guest has ended")
                })
            }
        }))
        .await?;
    Ok(GuestClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE))
}
