//! The grammar of subjects, in one place: nobody else builds or takes apart a subject.
//!
//! Requests go to `bothy.<host>.<service>.<noun>.<verb>`; events to
//! `bothy.<host>.event.<service>.<noun>.<id>.<what>`.

use crate::{HostToken, Method, OpId, Service, op::OpEventKind};

/// The JetStream stream that keeps the events of operations.
pub const OPS_STREAM: &str = "BOTHY_OPS";

/// Where requests of method `M` go.
pub fn request<M: Method>(host: &HostToken) -> String {
    of(host, M::SERVICE, M::NOUN, M::VERB)
}

/// Where requests of a method go, from its parts.
pub fn of(host: &HostToken, service: Service, noun: &str, verb: &str) -> String {
    format!("bothy.{host}.{}.{noun}.{verb}", service.token())
}

/// Where an event of an operation goes.
pub fn op_event(host: &HostToken, service: Service, op: OpId, what: &OpEventKind) -> String {
    format!("bothy.{host}.event.{}.op.{op}.{}", service.token(), what.token())
}

/// All operation events that `service` may publish.
pub fn op_events_of(host: &HostToken, service: Service) -> String {
    format!("bothy.{host}.event.{}.op.*.*", service.token())
}

/// All events of one operation, whoever runs it.
pub fn op_events(host: &HostToken, op: OpId) -> String {
    format!("bothy.{host}.event.*.op.{op}.*")
}

/// All operation events of the host.
pub fn all_op_events(host: &HostToken) -> String {
    format!("bothy.{host}.event.*.op.*.*")
}

/// The prefix of the inboxes of `service`: each identity may read only its own replies.
pub fn inbox_prefix(host: &HostToken, service: Service) -> String {
    format!("_INBOX_bothy_{host}_{}", service.token())
}
