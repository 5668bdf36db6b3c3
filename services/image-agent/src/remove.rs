//! `image rm` and `image prune`: never what a VM needs.
//!
//! Whether a VM uses an image only the vm-agent knows, whose records are written before a create does anything. While it is
//! asked and the image goes, nobody may begin to use one ([`Agent::using`]): a create that has its image already is on the
//! vm-agent's list, and one that comes later finds the image whole or gone. So no count is kept that a crash could make
//! wrong.

use crate::{agent::Agent, fault::blocking};
use bothy_bus::Client;
use bothy_contract::{
    Code, Error, ImageName,
    catalogue::{PruneImages, Pruned},
    methods::VmListAll,
    vm::{ListVms, VmRecord},
};

/// More VMs than this are not all named.
const NAMED: usize = 5;

/// Removes an image that no VM uses.
pub(crate) async fn remove(client: &Client, agent: &Agent, image: ImageName) -> Result<Pruned, Error> {
    let _alone = agent.using.write().await;
    let vms = vms(client).await?;
    let users = users(&vms, &image);
    if !users.is_empty() {
        let some: Vec<_> = users.iter().take(NAMED).copied().collect();
        let more = users.len().saturating_sub(NAMED);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        return Err(Error::new(
            Code::FailedPrecondition,
            format!("image {image} is used by VM {}{more}", some.join(", ")),
        )
        .hint(format!(
            "delete what you do not need any more, `bothy vm delete {}`, then try again",
            some.join(" ")
        )));
    }
    let agent = agent.clone();
    blocking(move || {
        let removed = agent.store.remove(&image)?;
        agent.disks.forget_images()?;
        Ok(removed)
    })
    .await
}

/// Removes what nothing needs, or says what that is.
pub(crate) async fn prune(client: &Client, agent: &Agent, ask: PruneImages) -> Result<Pruned, Error> {
    let _alone = agent.using.write().await;
    let vms = if ask.all { vms(client).await? } else { Vec::new() };
    let agent = agent.clone();
    blocking(move || {
        let images = agent.store.list()?;
        let unused: Vec<_> = images
            .iter()
            .map(|i| i.name.clone())
            .filter(|name| ask.all && users(&vms, name).is_empty() && *name != ImageName::default_image())
            .collect();
        let mut pruned = Pruned::default();
        for name in unused {
            if ask.dry_run {
                pruned.freed += agent.store.would_free(&name)?;
            } else {
                pruned.freed += agent.store.remove(&name)?.freed;
            }
            pruned.images.push(name);
        }
        if !ask.dry_run {
            agent.disks.forget_images()?;
        }
        let garbage = if ask.dry_run { agent.store.garbage()? } else { agent.store.collect()? };
        let old = agent.old_initramfs(ask.dry_run)?;
        for file in garbage.into_iter().chain(old) {
            pruned.freed += file.allocated;
            pruned.files.push(file.path);
        }
        Ok(pruned)
    })
    .await
}

async fn vms(client: &Client) -> Result<Vec<VmRecord>, Error> {
    let list = client.call::<VmListAll>(&ListVms {}).await;
    Ok(list.map_err(|e| e.context("cannot find out which VMs use images"))?.vms)
}

/// The names of the VMs that use `image`.
fn users<'a>(vms: &'a [VmRecord], image: &ImageName) -> Vec<&'a str> {
    vms.iter().filter(|vm| vm.image == *image).map(|vm| vm.name.as_str()).collect()
}
