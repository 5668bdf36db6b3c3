//! `bothy image import`: an archive is read here, as the user, and sent to the gateway. No daemon opens a path of the user's.

use crate::{
    Context, Status,
    cli::{Import, Intake},
    http::Body,
    printer::{duration, size},
    progress::Watcher,
    pull,
};
use bothy_contract::{Code, Error, op::Begun};
use bothy_gateway::api;
use bytes::Bytes;
use fs_err as fs;
use futures::StreamExt as _;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use std::{
    ffi::OsStr,
    io::{self, Read, Write},
    path::{Path, PathBuf},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// How many pieces of an archive may wait, of so many bytes each.
const QUEUE: usize = 4;
const PIECE: usize = 256 << 10;
/// What an archive that nobody takes any longer fails with.
const GONE: &str = "the gateway takes no more of the archive";

pub(crate) async fn main(context: &Context, command: Intake) -> Result<Status, Error> {
    match command {
        Intake::Import(args) => import(context, args).await,
        Intake::Pull(args) => pull::main(context, args).await,
    }
}

async fn import(context: &Context, args: Import) -> Result<Status, Error> {
    let source = Source::open(&args.path)?;
    let image = &args.image;
    let kernel = args.kernel.as_ref().map(|k| format!("&kernel={k}")).unwrap_or_default();
    let path = format!(
        "/v1/images/{image}/import?force={}{kernel}&from={}",
        args.force,
        api::segment(&source.name())
    );
    let watcher = Watcher::new(&context.gateway, context.printer, false)?;
    if let Some(bytes) = source.bytes() {
        context.printer.note(format!("sending {} ({})", args.path.display(), size(bytes)));
    }
    let (send, receive) = mpsc::channel::<Result<Bytes, Error>>(QUEUE);
    let reading = tokio::task::spawn_blocking(move || {
        let read = source.send(&mut Pieces(send.clone()));
        if let Err(e) = &read {
            // The body must not look whole. Nobody listening means that the request has failed already.
            let _ = send.blocking_send(Err(e.clone()));
        }
        read
    });
    let body: Body =
        BodyExt::boxed(StreamBody::new(ReceiverStream::new(receive).map(|piece| piece.map(Frame::data))));
    let sent = watcher.begin(context.gateway.upload::<Begun>(&path, body)).await;
    let begun = match sent {
        Ok(begun) => begun,
        Err(e) => {
            // An archive that cannot be read is the reason; one that could not be sent is not. A reader of a terminal or pipe
            // may never end by itself.
            let read = tokio::time::timeout(std::time::Duration::from_secs(1), reading).await;
            let own = match read {
                Ok(Ok(Err(own))) if !own.message.contains(GONE) => own,
                _ => e,
            };
            return Err(own.context(format!("image {image} was not imported")));
        }
    };
    let outcome = watcher
        .watch(begun.op, image.as_str())
        .await
        .map_err(|e| e.context(format!("image {image} was not imported")))?;
    let value = serde_json::json!({
        "op": begun.op, "image": image, "took_us": outcome.took_us, "result": outcome.result
    });
    context
        .printer
        .record(&value, |_| format!("image {image} is imported ({})", duration(outcome.took_us)))?;
    Ok(Status::SUCCESS)
}

/// Where an archive comes from, opened with the user's own rights.
enum Source {
    File(fs::File),
    Layout(PathBuf),
    Stdin,
}

impl Source {
    fn open(path: &Path) -> Result<Self, Error> {
        if path == Path::new("-") {
            return Ok(Self::Stdin);
        }
        let failed = |e: io::Error| {
            let code = match e.kind() {
                io::ErrorKind::NotFound => Code::NotFound,
                io::ErrorKind::PermissionDenied => Code::PermissionDenied,
                _ => Code::Internal,
            };
            Error::new(code, format!("cannot open the archive: {e}"))
        };
        let meta = fs::metadata(path).map_err(failed)?;
        if !meta.is_dir() {
            return fs::File::open(path).map(Self::File).map_err(failed);
        }
        if !path.join("oci-layout").is_file() || !path.join("index.json").is_file() {
            return Err(Error::invalid(format!("{} is not the directory of an OCI layout", path.display()))
                .hint(format!(
                    "it has no `oci-layout` and `index.json`; for a root file system pack it first: `tar -C {} -c . | bothy image import NAME -`",
                    path.display()
                )));
        }
        Ok(Self::Layout(path.to_owned()))
    }

    /// What it is called, for people.
    fn name(&self) -> String {
        let path = match self {
            Self::File(file) => file.path(),
            Self::Layout(dir) => dir,
            Self::Stdin => return "standard input".to_owned(),
        };
        path.file_name().unwrap_or(OsStr::new("a layout")).to_string_lossy().into_owned()
    }

    fn bytes(&self) -> Option<u64> {
        match self {
            Self::File(file) => file.metadata().ok().filter(std::fs::Metadata::is_file).map(|m| m.len()),
            _ => None,
        }
    }

    fn send(self, to: &mut Pieces) -> Result<(), Error> {
        let failed = |e: io::Error| Error::internal("cannot read the archive", &e);
        match self {
            Self::File(file) => copy(file, to).map_err(failed),
            Self::Stdin => copy(io::stdin().lock(), to).map_err(failed),
            Self::Layout(dir) => pack(&dir, to).map_err(|e| Error::internal("cannot pack the layout", &e)),
        }
    }
}

fn copy(mut from: impl Read, to: &mut Pieces) -> io::Result<()> {
    loop {
        let mut piece = Vec::with_capacity(PIECE);
        if from.by_ref().take(PIECE as u64).read_to_end(&mut piece)? == 0 {
            return Ok(());
        }
        to.piece(piece.into())?;
    }
}

/// The files of a layout as an archive of it; whatever else is in the directory stays here.
fn pack(dir: &Path, to: &mut Pieces) -> io::Result<()> {
    let mut tar = tar::Builder::new(io::BufWriter::with_capacity(PIECE, to));
    for name in ["oci-layout", "index.json"] {
        tar.append_path_with_name(dir.join(name), name)?;
    }
    for algorithm in fs::read_dir(dir.join("blobs"))? {
        let algorithm = algorithm?;
        if !algorithm.file_type()?.is_dir() {
            continue;
        }
        for blob in fs::read_dir(algorithm.path())? {
            let blob = blob?;
            let name = Path::new("blobs").join(algorithm.file_name()).join(blob.file_name());
            if blob.metadata()?.is_file() {
                tar.append_path_with_name(blob.path(), name)?;
            }
        }
    }
    tar.into_inner()?.flush()
}

/// The writer's end of a queue of pieces.
struct Pieces(mpsc::Sender<Result<Bytes, Error>>);

impl Pieces {
    fn piece(&self, piece: Bytes) -> io::Result<()> {
        self.0.blocking_send(Ok(piece)).map_err(|_| io::Error::new(io::ErrorKind::BrokenPipe, GONE))
    }
}

impl Write for Pieces {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.piece(Bytes::copy_from_slice(data)).map(|()| data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
