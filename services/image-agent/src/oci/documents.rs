//! The manifests of a registry, each read up to a bound: what a registry sends is not kept before it is known to be small.
//!
//! oci-client reads the whole answer before anybody can look at its size, so this is asked for here, with the token that it has
//! got. Names and statuses are those of the OCI distribution specification, 1.1.

use bothy_contract::{Code, Error};
use bothy_oci::documents::MAX_DOCUMENT;
use oci_client::{
    Reference,
    errors::{OciDistributionError, OciEnvelope},
    secrets::RegistryAuth,
};
use reqwest::{Response, StatusCode, header};
use std::time::Duration;

/// What a manifest may be.
const MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";
/// How much of a refusal is read.
const MAX_REFUSAL: u64 = 64 << 10;

/// Who asks a registry for its manifests.
pub(super) struct Documents {
    http: reqwest::Client,
    scheme: &'static str,
}

/// Why there is no manifest.
#[derive(Debug)]
pub(super) enum Failed {
    /// The registry, or the way to it.
    Registry(OciDistributionError),
    /// It is too large.
    Large,
}

impl From<reqwest::Error> for Failed {
    fn from(error: reqwest::Error) -> Self {
        Self::Registry(error.into())
    }
}

impl Documents {
    /// Asked in the clear, where the registry is; a connection may take `connect`, the next piece of an answer `stall`.
    pub(super) fn new(plain: bool, connect: Duration, stall: Duration, agent: &str) -> Result<Self, Error> {
        let http = reqwest::Client::builder()
            .connect_timeout(connect)
            .read_timeout(stall)
            .user_agent(agent)
            .build()
            .map_err(|e| Error::internal("cannot ask registries", &e))?;
        Ok(Self { http, scheme: if plain { "http" } else { "https" } })
    }

    /// The manifest of `of`, with `token` where the registry gave one; else, where it asks for a password, with that of `auth`.
    pub(super) async fn manifest(
        &self,
        of: &Reference,
        token: Option<&str>,
        auth: &RegistryAuth,
    ) -> Result<Vec<u8>, Failed> {
        let which = of.digest().or(of.tag()).unwrap_or("latest");
        let (registry, repository) = (of.resolve_registry(), of.repository());
        let url = format!("{}://{registry}/v2/{repository}/manifests/{which}", self.scheme);
        let ask = || self.http.get(&url).header(header::ACCEPT, MANIFESTS);
        let answer = match token {
            Some(token) => ask().bearer_auth(token).send().await?,
            None => {
                let answer = ask().send().await?;
                match auth {
                    RegistryAuth::Basic(name, secret) if answer.status() == StatusCode::UNAUTHORIZED => {
                        ask().basic_auth(name, Some(secret)).send().await?
                    }
                    _ => answer,
                }
            }
        };
        let status = answer.status();
        if status == StatusCode::OK {
            return bounded(answer, MAX_DOCUMENT).await?.ok_or(Failed::Large);
        }
        let body = bounded(answer, MAX_REFUSAL).await?.unwrap_or_default();
        Err(Failed::Registry(refusal(status, url, &body)))
    }
}

/// The body of an answer; `None` where it is longer than `most`, and then no more of it is read.
async fn bounded(mut answer: Response, most: u64) -> Result<Option<Vec<u8>>, Failed> {
    let mut body = Vec::new();
    while let Some(piece) = answer.chunk().await? {
        if (body.len() + piece.len()) as u64 > most {
            return Ok(None);
        }
        body.extend_from_slice(&piece);
    }
    Ok(Some(body))
}

fn refusal(status: StatusCode, url: String, body: &[u8]) -> OciDistributionError {
    if status == StatusCode::UNAUTHORIZED {
        return OciDistributionError::UnauthorizedError { url };
    }
    match serde_json::from_slice::<OciEnvelope>(body) {
        Ok(envelope) if status.is_client_error() => OciDistributionError::RegistryError { envelope, url },
        _ if status == StatusCode::NOT_FOUND => OciDistributionError::ImageManifestNotFoundError(url),
        _ => {
            let message = String::from_utf8_lossy(body).into_owned();
            OciDistributionError::ServerError { code: status.as_u16(), url, message }
        }
    }
}

/// The error for a manifest of `reference` that is too large.
pub(super) fn too_large(reference: &Reference) -> Error {
    let large = format!("the manifest of {reference} is larger than {} MiB", MAX_DOCUMENT >> 20);
    Error::new(Code::ResourceExhausted, large)
}
