//! Who is next to the guest on its network, found out again: after a pause nobody knows what has changed there.

use std::io;
use std::net::IpAddr;

use futures::TryStreamExt;
use netlink_packet_route::neighbour::{NeighbourFlags, NeighbourState};
use rtnetlink::Handle;

use crate::nic::{self, Nic};

/// Forgets all neighbours and looks for the gateways anew. The questions go to everybody on the link, so it learns again where
/// this machine is, too.
///
/// # Errors
/// When the kernel refuses.
pub(crate) async fn refresh(nic: &Nic) -> io::Result<()> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    let driver = tokio::spawn(connection);
    let result = refresh_with(&handle, nic).await;
    driver.abort();
    result
}

async fn refresh_with(handle: &Handle, nic: &Nic) -> io::Result<()> {
    let index = nic::wait_for_ethernet(handle).await?.header.index;
    let mut known = handle.neighbours().get().execute();
    let mut old = Vec::new();
    while let Some(neighbour) = known.try_next().await.map_err(|e| named("list the neighbours", e))? {
        let fixed = matches!(neighbour.header.state, NeighbourState::Permanent | NeighbourState::Noarp);
        if neighbour.header.ifindex == index && !fixed {
            old.push(neighbour);
        }
    }
    drop(known);
    for neighbour in old {
        // One that went by itself meanwhile is what was wanted.
        let _ = handle.neighbours().del(neighbour).execute().await;
    }
    for gateway in nic.gateways() {
        if let Err(error) = ask_for(handle, index, gateway).await {
            // Of an address family that the link does not have, say.
            crate::kmsg::info(&format!("look for the gateway {gateway}: {error}"));
        }
    }
    Ok(())
}

/// Has the kernel find out where `address` is, as if there were something to send to it.
async fn ask_for(handle: &Handle, index: u32, address: IpAddr) -> Result<(), rtnetlink::Error> {
    let request = handle.neighbours().add(index, address);
    request.state(NeighbourState::None).flags(NeighbourFlags::Use).replace().execute().await
}

fn named(what: &str, error: rtnetlink::Error) -> io::Error {
    io::Error::other(format!("{what}: {error}"))
}
