//! An image of a registry (OCI distribution specification, 1.1): its manifest for this machine, its configuration and its
//! layers, each checked against the digest that led to it.

use super::{
    blobs::Blobs,
    documents::{self, Documents, Failed},
    room,
};
use crate::{
    build::Stage,
    digest::{self, Beat},
    fault::{self, blocking},
};
use bothy_contract::{Code, Error, error::chain, intake::Credentials};
use bothy_oci::{Contents, LayerAt, documents as config};
use futures::{StreamExt as _, TryStreamExt as _};
use oci_client::{
    Client, Reference, RegistryOperation,
    client::{BlobResponse, ClientConfig, ClientProtocol, SizedStream},
    errors::{OciDistributionError, OciErrorCode},
    secrets::RegistryAuth,
};
use sha2::{Digest as _, Sha256};
use std::{
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::{AsyncSeekExt as _, AsyncWriteExt as _, BufWriter},
    time::timeout,
};

/// How often an index may lead to an index.
const MAX_DEPTH: usize = 4;
/// The longest reference.
const MAX_REFERENCE: usize = 400;
/// The largest layer.
const MAX_LAYER: u64 = 64 << 30;
/// Layers that come at once.
const AT_ONCE: usize = 3;
/// How long a connection, a document, and the next piece of a blob may take.
const CONNECT: Duration = Duration::from_secs(20);
const DOCUMENT: Duration = Duration::from_secs(60);
const STALL: Duration = Duration::from_secs(60);
/// How often a blob that breaks off is gone on with, and after which pause.
const TRIES: u32 = 4;
const PAUSE: Duration = Duration::from_millis(500);

/// Reads a reference as a registry's users write it: `debian` is `docker.io/library/debian:latest`.
pub(super) fn parse(reference: &str) -> Result<Reference, Error> {
    let wrong = |why: &dyn std::fmt::Display| {
        let shown: String = reference.chars().filter(|c| !c.is_control()).take(MAX_REFERENCE).collect();
        Error::invalid(format!("`{shown}` is not the reference of an image: {why}")).hint(
            "write [REGISTRY/]REPOSITORY[:TAG] or ...@sha256:DIGEST, as in `docker.io/library/debian:12`",
        )
    };
    if reference.len() > MAX_REFERENCE {
        return Err(wrong(&format!("it is longer than {MAX_REFERENCE} letters")));
    }
    let parsed: Reference = reference.parse().map_err(|e| wrong(&e))?;
    if let Some(digest) = parsed.digest() {
        config::sha256(digest).map_err(|e| wrong(&e))?;
    }
    Ok(parsed)
}

/// One image, on its way.
pub(super) struct Pull {
    client: Client,
    documents: Documents,
    reference: Reference,
    auth: RegistryAuth,
    blobs: Arc<Blobs>,
    with: Stage,
}

impl Pull {
    /// Of `reference`, asked for as `credentials` say.
    pub(super) fn new(
        reference: &str,
        insecure_http: bool,
        credentials: Option<Credentials>,
        blobs: Arc<Blobs>,
        with: Stage,
    ) -> Result<Self, Error> {
        let reference = parse(reference)?;
        // Another part of this process may have set it already: to the same.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let registry = reference.resolve_registry().to_owned();
        let plain = insecure_http || is_loopback(&registry);
        let config = ClientConfig {
            protocol: if plain { ClientProtocol::HttpsExcept(vec![registry]) } else { ClientProtocol::Https },
            connect_timeout: Some(CONNECT),
            read_timeout: Some(STALL),
            user_agent: concat!("bothy/", env!("CARGO_PKG_VERSION")),
            ..ClientConfig::default()
        };
        let documents = Documents::new(plain, CONNECT, STALL, config.user_agent)?;
        let client = Client::try_from(config).map_err(|e| Error::internal("cannot ask registries", &e))?;
        let auth = match credentials {
            Some(Credentials { username, secret }) => RegistryAuth::Basic(username, secret),
            None => RegistryAuth::Anonymous,
        };
        Ok(Self { client, documents, reference, auth, blobs, with })
    }

    /// Brings all of it into `dir`.
    pub(super) async fn contents(&self, dir: &Path) -> Result<Contents, Error> {
        let taken = self.take(dir).await;
        // What broke off is kept for the next pull, and counts as well.
        if let Err(error) = self.blobs.trim() {
            tracing::warn!(%error, "cannot look after the blobs of registries");
        }
        taken
    }

    async fn take(&self, dir: &Path) -> Result<Contents, Error> {
        (self.with.progress)(0, None, "asking the registry");
        // For all that is asked for later, too.
        let asked = self.client.auth(&self.reference, &self.auth, RegistryOperation::Pull);
        let token = self.answer(asked).await?;
        let mut text = self.manifest(&self.reference, token.as_deref()).await?;
        if let Some(digest) = self.reference.digest() {
            config::check("manifest", &text, config::sha256(digest)?)?;
        }
        for _ in 0..MAX_DEPTH {
            if !config::is_index(&text)? {
                break;
            }
            let chosen = config::choose(&text)?;
            let of = self.reference.clone_with_digest(chosen.digest.clone());
            text = self.manifest(&of, token.as_deref()).await?;
            config::check("manifest", &text, chosen.sha256()?)?;
        }
        let digest = hex::encode(Sha256::digest(&text));
        let manifest = config::manifest(&text)?;
        let all = || manifest.layers.iter().chain([&manifest.config]);
        let total = all().map(|d| d.size).fold(0, u64::saturating_add);
        self.fits(total).await?;
        let beat = self.with.bytes(total);

        let configuration = dir.join("configuration");
        self.fetch(
            manifest.config.sha256()?,
            manifest.config.size,
            config::MAX_DOCUMENT,
            &configuration,
            &beat,
        )
        .await?;
        let text =
            fs_err::read(&configuration).map_err(|e| fault::io("cannot read the configuration", &e))?;
        let (diff_ids, defaults) = config::config(&text, manifest.layers.len())?;
        let mut fetches = Vec::new();
        for (n, (layer, diff_id)) in manifest.layers.into_iter().zip(diff_ids).enumerate() {
            fetches.push(self.layer(layer, diff_id, dir.join(format!("layer-{n}")), &beat));
        }
        let layers: Vec<LayerAt> = futures::stream::iter(fetches).buffered(AT_ONCE).try_collect().await?;
        Ok(Contents { layers, defaults, digest: Some(digest) })
    }

    async fn layer(
        &self,
        layer: config::Descriptor,
        diff_id: String,
        file: PathBuf,
        beat: Beat<'_>,
    ) -> Result<LayerAt, Error> {
        let sha256 = layer.sha256()?.to_owned();
        let length = self.fetch(&sha256, layer.size, MAX_LAYER, &file, beat).await?;
        Ok(LayerAt { file, offset: 0, length, digest: Some(sha256), diff_id: Some(diff_id) })
    }

    async fn manifest(&self, of: &Reference, token: Option<&str>) -> Result<Vec<u8>, Error> {
        let asked = self.documents.manifest(of, token, &self.auth);
        let answer = self.unless_stopped(timeout(DOCUMENT, asked)).await?;
        answer.map_err(|_| self.slow())?.map_err(|failed| match failed {
            Failed::Registry(error) => self.refused(error),
            Failed::Large => documents::too_large(&self.reference),
        })
    }

    /// Refuses what the disk does not hold. What of it is there already is not looked at.
    async fn fits(&self, bytes: u64) -> Result<(), Error> {
        let dir = self.blobs.dir().to_owned();
        if blocking(move || room(&dir)).await? >= bytes {
            return Ok(());
        }
        let message = format!("there is no space for {}: it has {} MiB", self.reference, bytes >> 20);
        Err(Error::new(Code::ResourceExhausted, message)
            .hint("free some space where the state directory is (`df -h`), then try again"))
    }

    /// Brings a blob to `to`; its length.
    async fn fetch(
        &self,
        sha256: &str,
        size: u64,
        most: u64,
        to: &Path,
        beat: Beat<'_>,
    ) -> Result<u64, Error> {
        if size > most {
            let large = format!(
                "a part of {} has {} MiB, and {} is the most",
                self.reference,
                size >> 20,
                most >> 20
            );
            return Err(Error::new(Code::ResourceExhausted, large));
        }
        let _alone = self.unless_stopped(self.blobs.alone(sha256)).await?;
        let failed = |e: io::Error| fault::io("cannot keep a layer", &e);
        if !self.blobs.link(sha256, to).map_err(failed)? {
            let part = self.blobs.part(sha256);
            let mut told = 0;
            let mut tries = 1;
            while let Err(e) = self.download(sha256, size, &part, &mut told, beat).await {
                if e.code != Code::Unavailable || tries == TRIES {
                    return Err(e);
                }
                tracing::info!(error = %e, "a layer is gone on with");
                self.unless_stopped(tokio::time::sleep(PAUSE * tries)).await?;
                tries += 1;
            }
            self.check(sha256, part).await?;
            self.blobs.keep(sha256).map_err(failed)?;
            if !self.blobs.link(sha256, to).map_err(failed)? {
                return Err(Error::new(Code::Internal, "a layer went away while it was taken"));
            }
        } else {
            beat(size)?;
        }
        Ok(fs_err::metadata(to).map_err(failed)?.len())
    }

    /// Brings a blob into the file `part`, from where that ends.
    async fn download(
        &self,
        sha256: &str,
        size: u64,
        part: &Path,
        told: &mut u64,
        beat: Beat<'_>,
    ) -> Result<(), Error> {
        let failed = |e: io::Error| fault::io("cannot keep a layer", &e);
        let digest = format!("sha256:{sha256}");
        let mut options = fs_err::tokio::OpenOptions::new();
        let mut file = options.create(true).write(true).truncate(false).open(part).await.map_err(failed)?;
        let mut have = file.metadata().await.map_err(failed)?.len();
        let mut done = |have: u64| match have.checked_sub(*told) {
            Some(more) => {
                *told = have;
                beat(more)
            }
            None => Ok(()),
        };
        if have == size {
            return done(have);
        }
        let (mut stream, from): (SizedStream, u64) = if have > 0 && have < size {
            let asked = self.client.pull_blob_stream_partial(&self.reference, digest.as_str(), have, None);
            match self.answer(asked).await? {
                BlobResponse::Partial(stream) => (stream, have),
                BlobResponse::Full(stream) => (stream, 0),
            }
        } else {
            (self.answer(self.client.pull_blob_stream(&self.reference, digest.as_str())).await?, 0)
        };
        have = from;
        file.set_len(have).await.map_err(failed)?;
        file.seek(io::SeekFrom::Start(have)).await.map_err(failed)?;
        let mut file = BufWriter::with_capacity(1 << 20, file);
        let came = loop {
            let piece = tokio::select! {
                piece = timeout(STALL, stream.next()) => piece,
                () = self.with.cancel.cancelled() => break Err(stopped()),
            };
            match piece {
                Err(_) => break Err(self.slow()),
                Ok(None) => break Ok(()),
                // What it came to is looked at by whoever has all of it.
                Ok(Some(Err(e))) => break Err(self.broken(&e)),
                Ok(Some(Ok(data))) => {
                    have += data.len() as u64;
                    if have > size {
                        let longer =
                            format!("{} sends more of {digest} than its manifest says", self.registry());
                        break Err(Error::new(Code::FailedPrecondition, longer));
                    }
                    file.write_all(&data).await.map_err(failed)?;
                    done(have)?;
                }
            }
        };
        file.flush().await.map_err(failed)?;
        match came {
            Ok(()) if have < size => Err(Error::new(
                Code::Unavailable,
                format!("{} sent {have} bytes of {digest}, which has {size}", self.registry()),
            )),
            came => came,
        }
    }

    async fn answer<T>(
        &self,
        asked: impl Future<Output = Result<T, OciDistributionError>>,
    ) -> Result<T, Error> {
        let answer = self.unless_stopped(timeout(DOCUMENT, asked)).await?;
        answer.map_err(|_| self.slow())?.map_err(|e| self.refused(e))
    }

    async fn unless_stopped<T>(&self, work: impl Future<Output = T>) -> Result<T, Error> {
        self.with.cancel.run_until_cancelled(work).await.ok_or_else(stopped)
    }

    /// Whether what came is what was asked for. What is not is not gone on with.
    async fn check(&self, sha256: &str, part: PathBuf) -> Result<(), Error> {
        let (expected, cancel) = (sha256.to_owned(), self.with.cancel.clone());
        let found = blocking(move || {
            let beat = |_| if cancel.is_cancelled() { Err(stopped()) } else { Ok(()) };
            let found = digest::of_file(&part, &beat)?;
            if found != expected {
                fs_err::remove_file(&part).map_err(|e| fault::io("cannot remove a layer", &e))?;
            }
            Ok(found)
        })
        .await?;
        if found == sha256 {
            return Ok(());
        }
        let damaged = format!(
            "a layer of {} has the digest sha256:{found}, and should have sha256:{sha256}",
            self.reference
        );
        Err(Error::invalid(damaged)
            .hint("it was damaged or altered on its way, or in the registry: try again"))
    }

    fn registry(&self) -> &str {
        self.reference.resolve_registry()
    }

    fn slow(&self) -> Error {
        Error::new(Code::Unavailable, format!("registry {} does not answer", self.registry()))
    }

    fn broken(&self, e: &io::Error) -> Error {
        Error::new(
            Code::Unavailable,
            format!("the transfer from registry {} broke off: {}", self.registry(), chain(e)),
        )
    }

    /// What a registry's refusal means for whoever asked.
    fn refused(&self, error: OciDistributionError) -> Error {
        use OciDistributionError as E;
        let (registry, reference) = (self.registry(), &self.reference);
        let none = || {
            Error::new(Code::NotFound, format!("registry {registry} has no image {reference}"))
                .hint("look at the name and the tag; some registries say so of private ones too")
        };
        let denied = || {
            let who = match &self.auth {
                RegistryAuth::Basic(name, _) => format!("user {name} of yours"),
                _ => "anybody unknown".to_owned(),
            };
            let message = format!("registry {registry} does not show {reference} to {who}");
            Error::new(Code::PermissionDenied, message)
                .hint(format!("it may not exist; if it is private, `docker login {registry}` or `podman login {registry}` first"))
        };
        match error {
            E::ImageManifestNotFoundError(_) => none(),
            E::UnauthorizedError { .. } | E::AuthenticationFailure(_) => denied(),
            E::RegistryError { envelope, .. } => {
                let is = |codes: &[OciErrorCode]| envelope.errors.iter().any(|e| codes.contains(&e.code));
                if is(&[
                    OciErrorCode::ManifestUnknown,
                    OciErrorCode::NameUnknown,
                    OciErrorCode::BlobUnknown,
                    OciErrorCode::NotFound,
                ]) {
                    none()
                } else if is(&[OciErrorCode::Unauthorized, OciErrorCode::Denied]) {
                    denied()
                } else {
                    let said: Vec<_> = envelope.errors.iter().map(|e| e.message.as_str()).collect();
                    Error::new(
                        Code::FailedPrecondition,
                        format!("registry {registry} refuses {reference}: {}", said.join("; ")),
                    )
                }
            }
            E::ServerError { code, .. } => {
                Error::new(Code::Unavailable, format!("registry {registry} fails with status {code}"))
                    .hint("that is the registry's own trouble: try again later")
            }
            // Without the address: that of a redirection may carry a signature.
            E::RequestError(e) => {
                let error = Error::new(
                    Code::Unavailable,
                    format!("cannot talk to registry {registry}: {}", chain(&e.without_url())),
                );
                error.hint("is its name right, and is it reachable from this host? One without TLS needs `--insecure-http`")
            }
            other => {
                Error::new(Code::FailedPrecondition, format!("registry {registry} and {reference}: {other}"))
            }
        }
    }
}

fn stopped() -> Error {
    Error::new(Code::Cancelled, "it was stopped on request")
}

/// Whether a registry is this host's own: nobody else hears what is said to it.
fn is_loopback(registry: &str) -> bool {
    let host = match registry.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => host,
        _ => registry,
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_read_as_people_write_them() {
        let whole = |text: &str| parse(text).unwrap().whole();
        assert_eq!(whole("debian"), "docker.io/library/debian:latest");
        assert_eq!(whole("localhost:5000/a/b:c"), "localhost:5000/a/b:c");
        for bad in ["", "A B", "x@sha256:12", "../x", &"a".repeat(401), "x@sha512:1234"] {
            let e = parse(bad).unwrap_err();
            assert!(e.message.contains("not the reference of an image") && e.hint.is_some(), "{bad}: {e}");
        }
    }

    #[test]
    fn only_this_host_is_asked_in_the_clear() {
        for own in ["localhost", "localhost:5000", "127.0.0.1:5000", "[::1]:5000", "127.9.9.9"] {
            assert!(is_loopback(own), "{own}");
        }
        for other in
            ["docker.io", "localhost.example.org", "10.0.0.1:5000", "example.org:443", "[fd00::1]:5000"]
        {
            assert!(!is_loopback(other), "{other}");
        }
    }
}
