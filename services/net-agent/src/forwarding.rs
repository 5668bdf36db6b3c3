//! IPv4 forwarding (for IPv6 see [`crate::forwarding6`]), by interface and only as far as NAT and groups need it.
//!
//! The kernel forwards a packet where forwarding is on for the link that the packet *came in* by: the bridge for what
//! guests send, the uplinks for the answers. So that the host does not become a router for everybody else on those
//! uplinks, the firewall forwards nothing from links on which *we* turned it on, but to the bridge. What we turned on is
//! written down first and turned off at teardown. Where the whole host forwards already (`net.ipv4.ip_forward`), or
//! begins to later, nothing is ours: others want it so, and their traffic is not touched.
//! Source: Documentation/networking/ip-sysctl.rst.

use crate::{firewall::Firewall, leases::Leases, link::Links, plan::Plan};
use bothy_contract::Error;
use std::{collections::BTreeSet, io};

const ROOT: &str = "/proc/sys/net";

/// Settings of a link that is ours; all go with the link. With `ipv6` the bridge has the addresses that we give it and no
/// others, and believes no router.
pub fn prepare_bridge(bridge: &str, ipv6: bool) -> Result<(), Error> {
    if ipv6 {
        for (name, value) in [
            ("addr_gen_mode", "1"),
            ("accept_ra", "0"),
            ("accept_redirects", "0"),
            ("accept_dad", "0"),
            ("autoconf", "0"),
            ("disable_ipv6", "0"),
        ] {
            let setting = format!("ipv6/conf/{bridge}/{name}");
            if read(&setting)?.is_some_and(|now| now != value) {
                write(&setting, value)?;
            }
        }
    } else {
        no_ipv6(bridge)?;
    }
    // Answer ARP only for the bridge's own address, not for the host's others.
    write(&format!("ipv4/conf/{bridge}/arp_ignore"), "1")
}

/// Turns IPv6 off on a link of ours: the host says nothing there by itself.
pub fn no_ipv6(link: &str) -> Result<(), Error> {
    let setting = format!("ipv6/conf/{link}/disable_ipv6");
    // A kernel without IPv6 has no such file.
    if read(&setting)?.is_some_and(|value| value != "1") { write(&setting, "1") } else { Ok(()) }
}

/// Lets answers come back to guests: forwarding on for the bridge and all uplinks, guarded.
pub async fn enable(plan: &Plan, links: &Links, leases: &Leases, firewall: &Firewall) -> Result<(), Error> {
    let mut ours: BTreeSet<String> = leases.forwarding().await?.into_iter().collect();
    for uplink in links.uplinks(&plan.bridge).await? {
        if is_on(&uplink)? != Some(false) {
            continue;
        }
        leases.note_forwarding(&uplink, true).await?;
        ours.insert(uplink.clone());
        // The guard first: at no time does the host forward for others.
        firewall.set_uplinks(&ours).await?;
        write(&forwarding(&uplink), "1")?;
        tracing::info!(link = %uplink, "turned on net.ipv4.conf.{uplink}.forwarding, for guests with NAT");
    }
    if is_on(&plan.bridge)? == Some(false) {
        write(&forwarding(&plan.bridge), "1")?;
    }
    Ok(())
}

/// Lets the bridge stand in for guests in ARP, at once, and forward between them: its ports do not see each other. All of it
/// goes with the bridge.
pub fn between(bridge: &str) -> Result<(), Error> {
    ensure(&format!("ipv4/neigh/{bridge}/proxy_delay"), "0")?;
    ensure(&format!("ipv4/conf/{bridge}/proxy_arp_pvlan"), "1")?;
    ensure(&forwarding(bridge), "1")
}

/// Makes a setting that; one that there is not on this kernel is fine.
pub(crate) fn ensure(setting: &str, value: &str) -> Result<(), Error> {
    if read(setting)?.is_some_and(|now| now != value) { write(setting, value) } else { Ok(()) }
}

/// Which links are forwarding on our account. Where the whole host forwards IPv4 by now, none is: the guard goes, and so
/// do the notes, as turning forwarding off again would break whoever turned it on.
pub async fn refresh(leases: &Leases, firewall: &Firewall) -> Result<(), Error> {
    if read("ipv4/ip_forward")?.is_some_and(|value| value == "1") {
        for link in leases.forwarding().await? {
            leases.note_forwarding(&link, false).await?;
        }
    }
    firewall.set_uplinks(&leases.forwarding().await?.into_iter().collect()).await
}

/// Turns off what we turned on.
pub async fn restore(leases: &Leases) -> Result<(), Error> {
    let all = read("ipv4/ip_forward")?.is_some_and(|value| value == "1");
    for link in leases.forwarding().await? {
        // A link that went away took its setting with it.
        if !all && is_on(&link)? == Some(true) {
            write(&forwarding(&link), "0")?;
            tracing::info!(%link, "turned net.ipv4.conf.{link}.forwarding off again");
        }
        leases.note_forwarding(&link, false).await?;
    }
    Ok(())
}

fn forwarding(link: &str) -> String {
    format!("ipv4/conf/{link}/forwarding")
}

/// Whether the link forwards; `None` where there is no such link.
fn is_on(link: &str) -> Result<Option<bool>, Error> {
    Ok(read(&forwarding(link))?.map(|value| value == "1"))
}

// These files are answered by the kernel at once, for the namespace of the calling thread; no disk is waited for.

/// Whether this host has IPv6.
pub fn has_ipv6() -> Result<bool, Error> {
    Ok(read("ipv6/conf/all/disable_ipv6")?.is_some_and(|value| value == "0"))
}

pub(crate) fn read(setting: &str) -> Result<Option<String>, Error> {
    match fs_err::read_to_string(format!("{ROOT}/{setting}")) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::internal("cannot read a network setting", &e)),
    }
}

pub(crate) fn write(setting: &str, value: &str) -> Result<(), Error> {
    fs_err::write(format!("{ROOT}/{setting}"), value)
        .map_err(|e| Error::internal(format!("cannot set a network setting to {value}"), &e))
}
