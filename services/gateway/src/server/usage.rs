//! How much VMs use, and what their guests serve.

use super::{ApiError, Gateway, Peer, error::Query};
use crate::refs;
use axum::{
    Json,
    extract::{Path, State},
};
use bothy_contract::{
    Code, Error, VmId,
    methods::{VmPortsList, VmStatsShow},
    usage::{GetVmStats, PortList, VmStatsList},
    vm::{VmRecord, VmRef, VmState},
};

/// How many VMs one bus request may ask about.
const AT_ONCE: usize = 200;

/// The VMs that `wanted` names, each once; all that run where nothing is named. A whole id of a VM that is gone names none:
/// who watches several must not lose the others with it.
fn chosen(vms: &[VmRecord], wanted: &[String]) -> Result<Vec<VmId>, Error> {
    if wanted.is_empty() {
        return Ok(vms.iter().filter(|vm| vm.state == VmState::Running).map(|vm| vm.id).collect());
    }
    let mut ids = Vec::with_capacity(wanted.len());
    for text in wanted {
        match refs::resolve(vms, text) {
            Ok(vm) if ids.contains(&vm.id) => {}
            Ok(vm) => ids.push(vm.id),
            Err(e) if e.code == Code::NotFound && refs::whole_id(text).is_some() => {}
            Err(e) => return Err(e),
        }
    }
    Ok(ids)
}

pub(crate) async fn stats(
    State(gateway): State<Gateway>,
    peer: Peer,
    Query(query): Query<Vec<(String, String)>>,
) -> Result<Json<VmStatsList>, ApiError> {
    let mut wanted = Vec::new();
    for (key, value) in query {
        if key != "vm" {
            return Err(Error::invalid(format!("the query does not know {key:?}"))
                .hint("give `vm` once for each VM, or not at all for all that run")
                .into());
        }
        wanted.push(value);
    }
    let vms = gateway.visible(&peer).await?;
    let mut stats = Vec::new();
    for vms in chosen(&vms, &wanted)?.chunks(AT_ONCE) {
        let request = GetVmStats { vms: vms.to_vec() };
        stats.append(&mut gateway.call::<VmStatsShow>(&request).await?.stats);
    }
    Ok(Json(VmStatsList { stats }))
}

pub(crate) async fn ports(
    State(gateway): State<Gateway>,
    peer: Peer,
    Path(vm): Path<String>,
) -> Result<Json<PortList>, ApiError> {
    let vm = gateway.vm(&peer, &vm).await?;
    Ok(Json(gateway.call::<VmPortsList>(&VmRef { vm: vm.id }).await?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bothy_contract::{ImageName, vm::Shape};

    #[test]
    fn what_is_asked_about() {
        let vm = |name: &str, state| VmRecord {
            state,
            ..VmRecord::new(
                VmId::new(),
                name.parse().unwrap(),
                1000,
                ImageName::default_image(),
                Shape::default(),
            )
        };
        let vms = [vm("web", VmState::Running), vm("web-1", VmState::Stopped), vm("db", VmState::Running)];
        let [web, web1, db] = [vms[0].id, vms[1].id, vms[2].id];
        let ask = |refs: &[&str]| chosen(&vms, &refs.iter().map(|&r| r.to_owned()).collect::<Vec<_>>());
        assert_eq!(ask(&[]).unwrap(), [web, db]);
        assert_eq!(ask(&["db", "web-", "d", "web"]).unwrap(), [db, web1, web]);
        assert_eq!(ask(&["db", &VmId::new().to_string()]).unwrap(), [db]);
        assert_eq!(ask(&["db", "nope"]).unwrap_err().code, Code::NotFound);
    }
}
