//! IPv6 forwarding, as far as guests with a way out, or with each other in a group, need it.
//!
//! Newer kernels (6.17) have `force_forwarding` for one link, as IPv4 has; it is turned on for the bridge and the uplinks, and
//! the firewall forwards nothing from those uplinks but to the bridge. Older ones forward in IPv6 by the setting of the
//! whole host only, and a host that forwards stops listening to router advertisements, which would cost it its own
//! addresses: so `accept_ra` of links that listen becomes 2 ("although forwarding") first, and the firewall forwards
//! nothing but for guests. What was changed is written down first and put back at teardown. Where the host forwards
//! already, nothing is ours. Source: Documentation/networking/ip-sysctl.rst.

use crate::{
    firewall::Firewall,
    forwarding::{ensure, read, write},
    leases::{Leases, Setting},
    link::Links,
    plan::Plan,
};
use bothy_contract::Error;
use std::collections::BTreeSet;

const ALL: &str = "ipv6/conf/all/forwarding";
/// Whether questions for neighbours that the host stands in for are taken on their way through it.
const PROXY: &str = "ipv6/conf/all/proxy_ndp";

/// Lets guests' IPv6 packets out and the answers in. Does nothing where the host itself has no way out in IPv6.
pub async fn enable(plan: &Plan, links: &Links, leases: &Leases, firewall: &Firewall) -> Result<(), Error> {
    if plan.prefix6.is_none() {
        return Ok(());
    }
    let uplinks = links.uplinks6(&plan.bridge).await?;
    if uplinks.is_empty() {
        return Ok(());
    }
    forward(plan, links, leases, firewall, &uplinks).await
}

/// Lets the bridge stand in for guests in neighbour discovery, at once, and the host forward between them, whether it has a
/// way out itself or not.
pub async fn between(plan: &Plan, links: &Links, leases: &Leases, firewall: &Firewall) -> Result<(), Error> {
    if plan.prefix6.is_none() {
        return Ok(());
    }
    forward(plan, links, leases, firewall, &BTreeSet::new()).await?;
    // These go with the bridge. Without its own `forwarding` the kernel answers for nobody there, whatever the host's is
    // (ndisc_recv_ns of net/ipv6/ndisc.c).
    let bridge = &plan.bridge;
    ensure(&format!("ipv6/neigh/{bridge}/proxy_delay"), "0")?;
    ensure(&format!("ipv6/conf/{bridge}/forwarding"), "1")?;
    ensure(&format!("ipv6/conf/{bridge}/proxy_ndp"), "1")?;
    // A guest that asks whether another is still there sends that to the other's address, by way of the host, which takes such a
    // question for itself only where this is on (ip6_forward of net/ipv6/ip6_output.c). On other links it answers for whom
    // somebody made an entry there, and for nobody else.
    if read(PROXY)?.is_some_and(|value| value == "0") {
        note(leases, PROXY.to_owned(), "0", "1").await?;
        write(PROXY, "1")?;
    }
    Ok(())
}

/// Turns forwarding on between the bridge, its guests and `uplinks`, where it is not on.
async fn forward(
    plan: &Plan,
    links: &Links,
    leases: &Leases,
    firewall: &Firewall,
    uplinks: &BTreeSet<String>,
) -> Result<(), Error> {
    if read(ALL)?.is_none_or(|value| value == "1") {
        return Ok(());
    }
    let forced = |link: &str| format!("ipv6/conf/{link}/force_forwarding");
    if read(&forced(&plan.bridge))?.is_some() {
        let mut ours = uplinks_of(leases).await?;
        for uplink in uplinks {
            if read(&forced(uplink))?.is_some_and(|value| value == "0") {
                ours.insert(uplink.clone());
                note(leases, forced(uplink), "0", "1").await?;
                firewall.set_uplinks6(&ours).await?;
                write(&forced(uplink), "1")?;
                tracing::info!(link = %uplink, "turned on IPv6 forwarding of this link, for guests");
            }
        }
        // The bridge's goes with the bridge.
        return ensure(&forced(&plan.bridge), "1");
    }
    for (name, _) in links.list().await? {
        let setting = format!("ipv6/conf/{name}/accept_ra");
        if name != plan.bridge && read(&setting)?.is_some_and(|value| value == "1") {
            note(leases, setting.clone(), "1", "2").await?;
            write(&setting, "2")?;
        }
    }
    firewall.set_guard6(true).await?;
    note(leases, ALL.to_owned(), "0", "1").await?;
    write(ALL, "1")?;
    tracing::info!("turned on IPv6 forwarding of this host, kept to guests by the rules");
    Ok(())
}

/// The links that forward IPv6 on our account.
pub async fn uplinks_of(leases: &Leases) -> Result<BTreeSet<String>, Error> {
    let mut ours = BTreeSet::new();
    for setting in leases.settings().await? {
        let link = setting.path.strip_prefix("ipv6/conf/").and_then(|p| p.strip_suffix("/force_forwarding"));
        ours.extend(link.map(str::to_owned));
    }
    Ok(ours)
}

/// Whether the whole host forwards on our account.
pub async fn is_guarded(leases: &Leases) -> Result<bool, Error> {
    Ok(leases.settings().await?.iter().any(|setting| setting.path == ALL))
}

/// Puts back what we changed and nobody has changed since.
pub async fn restore(leases: &Leases) -> Result<(), Error> {
    let mut settings = leases.settings().await?;
    // Forwarding first: by itself it resets what the host believes of routers.
    settings.sort_by_key(|setting| setting.path != ALL);
    for setting in settings {
        if read(&setting.path)?.is_some_and(|now| now == setting.ours) {
            write(&setting.path, &setting.was)?;
        }
        leases.forget_setting(setting.path).await?;
    }
    Ok(())
}

async fn note(leases: &Leases, path: String, was: &str, ours: &str) -> Result<(), Error> {
    leases.note_setting(Setting { path, was: was.to_owned(), ours: ours.to_owned() }).await
}
