//! The HTTP API. It keeps no state of its own: it knows who calls ([`peer`]), asks the service that owns the answer
//! over the bus, and moves bulk between the caller and that service's ticket socket.
//!
//! # Who may do what
//! A caller sees and touches the VMs and operations of their own uid, as the kernel tells it (SO_PEERCRED, unix(7));
//! root sees all. What belongs to somebody else is "not found", so that nobody learns of it. The API answers every
//! local user: what they can use up is bounded by the number of their connections ([`listener`]) and by what services
//! allow one user.

mod catalogue;
mod error;
mod host;
mod images;
mod intake;
mod listener;
mod logs;
mod ops;
pub mod peer;
mod streams;
mod templates;
mod trace;
mod usage;
mod vms;
mod workspace;

pub use error::ApiError;
pub use peer::Peer;

use crate::{
    api::{self, HostUses},
    refs,
};
use axum::{
    Json, Router,
    extract::DefaultBodyLimit,
    http::HeaderMap,
    routing::{get, post, put},
};
use bothy_bus::Client;
use bothy_contract::{
    Code, Error, RequestId,
    methods::{Method, VmListAll, VmShow},
    vm::{ListVms, VmRecord, VmRef},
};
use sha2::{Digest, Sha256};
use std::{future::Future, sync::Arc};
use tokio::net::UnixListener;

/// The largest JSON body, in bytes: a spec with a handful of ssh keys is a few KiB.
const MAX_JSON: usize = 256 << 10;

/// What every handler has: the bus, and what to say of the host.
#[derive(Clone)]
pub struct Gateway {
    bus: Client,
    uses: Arc<HostUses>,
}

impl std::fmt::Debug for Gateway {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Gateway")
    }
}

impl Gateway {
    /// A gateway that asks over `bus`, on a host that `uses` what it says.
    pub fn new(bus: Client, uses: HostUses) -> Self {
        Self { bus, uses: Arc::new(uses) }
    }

    /// All routes.
    pub fn router(self) -> Router {
        let v1 = Router::new()
            .route("/version", get(version))
            .route("/host", get(host::show))
            .route("/host/teardown", post(host::teardown))
            .route("/vms", get(vms::list).post(vms::create))
            .route("/vms/{vm}", get(vms::show).patch(vms::set).delete(vms::delete))
            .route("/vms/{vm}/start", post(vms::start))
            .route("/vms/{vm}/stop", post(vms::stop))
            .route("/vms/{vm}/restart", post(vms::restart))
            .route("/vms/{vm}/pause", post(vms::pause))
            .route("/vms/{vm}/suspend", post(vms::suspend))
            .route("/vms/{vm}/resume", post(vms::resume))
            .route("/vms/{vm}/kill", post(vms::kill))
            .route("/vms/{vm}/egress", get(vms::egress))
            .route("/vms/{vm}/ports", get(usage::ports))
            .route("/stats", get(usage::stats))
            .route("/vms/{vm}/logs", get(logs::logs))
            .route("/vms/{vm}/channel/{port}", get(streams::channel))
            .route(
                "/vms/{vm}/workspace",
                get(workspace::export).put(workspace::import).layer(DefaultBodyLimit::disable()),
            )
            .route("/images", get(images::list))
            .route("/images/{image}", get(images::show).delete(catalogue::remove))
            .route("/images/{image}/build", post(images::build))
            .route("/images/{image}/warm", post(templates::warm))
            .route("/templates", get(templates::list))
            .route("/images/{image}/register", post(catalogue::register))
            .route("/images/{image}/promote", post(catalogue::promote))
            .route("/images/{image}/import", put(intake::import).layer(DefaultBodyLimit::disable()))
            .route("/images/{image}/pull", post(intake::pull))
            .route("/kernels", get(catalogue::kernels).post(catalogue::import_kernel))
            .route("/kernels/{kernel}", get(catalogue::kernel).delete(catalogue::remove_kernel))
            .route("/catalogue/verify", post(catalogue::verify))
            .route("/catalogue/prune", post(catalogue::prune))
            .route("/ops", get(ops::list))
            .route("/ops/{op}", get(ops::show))
            .route("/ops/{op}/cancel", post(ops::cancel))
            .route("/ops/{op}/events", get(ops::events));
        Router::new()
            .nest("/v1", v1)
            .fallback(error::no_route)
            .method_not_allowed_fallback(error::no_method)
            .layer(DefaultBodyLimit::max(MAX_JSON))
            .layer(axum::middleware::from_fn(trace::span))
            .with_state(self)
    }

    /// Serves on `listener` until `stop` ends, then until every request in flight has.
    ///
    /// # Errors
    /// When the listener fails for good.
    pub async fn serve(
        self,
        listener: UnixListener,
        stop: impl Future<Output = ()> + Send + 'static,
    ) -> std::io::Result<()> {
        let listener = listener::PerUser::new(listener);
        axum::serve(listener, self.router().into_make_service_with_connect_info::<Peer>())
            .with_graceful_shutdown(stop)
            .await
    }

    /// Asks a service something that changes nothing.
    async fn call<M: Method>(&self, request: &M::Request) -> Result<M::Reply, Error> {
        self.bus.call::<M>(request).await
    }

    /// Asks a service for a change. A caller that gave a request id may repeat the request: it gets the first reply.
    async fn change<M: Method>(
        &self,
        caller: &Peer,
        headers: &HeaderMap,
        request: &M::Request,
    ) -> Result<M::Reply, Error> {
        let id = request_id(caller, headers)?;
        self.bus
            .call_with::<M>(request, bothy_bus::CallOptions { request_id: Some(id), ..Default::default() })
            .await
    }

    /// The VMs that `caller` may see.
    async fn visible(&self, caller: &Peer) -> Result<Vec<VmRecord>, Error> {
        let mut vms = self.call::<VmListAll>(&ListVms {}).await?.vms;
        vms.retain(|vm| caller.owns(vm.owner));
        Ok(vms)
    }

    /// The one VM that `caller` means by `text`.
    async fn vm(&self, caller: &Peer, text: &str) -> Result<VmRecord, Error> {
        // Who names many VMs has resolved them once and sends ids: the whole list is not asked for each of them.
        if let Some(vm) = refs::whole_id(text) {
            match self.call::<VmShow>(&VmRef { vm }).await {
                Ok(vm) if caller.owns(vm.owner) => return Ok(vm),
                Err(e) if e.code != Code::NotFound => return Err(e),
                // Somebody else's is not there, and it may be a name.
                Ok(_) | Err(_) => {}
            }
        }
        let vms = self.visible(caller).await?;
        refs::resolve(&vms, text).cloned()
    }
}

/// The id under which a change goes over the bus. It is made of the caller's uid and the id that they chose, so that
/// nobody can get at the reply to somebody else's request by repeating its id.
fn request_id(caller: &Peer, headers: &HeaderMap) -> Result<RequestId, Error> {
    let Some(value) = headers.get(api::REQUEST_ID) else { return Ok(RequestId::new()) };
    let invalid = || Error::invalid(format!("the header `{}` is not a UUID", api::REQUEST_ID));
    let given: RequestId = value.to_str().map_err(|_| invalid())?.parse().map_err(|_| invalid())?;
    let mut hash = Sha256::new();
    hash.update(caller.uid.to_be_bytes());
    hash.update(given.to_string());
    let hex: String = hash.finalize().iter().take(16).map(|b| format!("{b:02x}")).collect();
    hex.parse().map_err(|e| Error::internal("cannot make a request id", &e))
}

async fn version() -> Json<api::Version> {
    Json(api::Version { version: env!("CARGO_PKG_VERSION").to_owned(), api: api::API_VERSION })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_ids_are_the_callers_own() {
        let (a, b) = (Peer { uid: 1000 }, Peer { uid: 1001 });
        let mut headers = HeaderMap::new();
        headers.insert(api::REQUEST_ID, "019a0000-0000-7000-8000-00000000000a".parse().unwrap());
        assert_eq!(request_id(&a, &headers).unwrap(), request_id(&a, &headers).unwrap());
        assert_ne!(request_id(&a, &headers).unwrap(), request_id(&b, &headers).unwrap());
        headers.insert(api::REQUEST_ID, "x".parse().unwrap());
        assert!(request_id(&a, &headers).is_err());
        assert_ne!(request_id(&a, &HeaderMap::new()).unwrap(), request_id(&a, &HeaderMap::new()).unwrap());
    }
}
