//! What is chosen once for a host and kept: its subnet, where the configuration leaves it open, and its IPv6 network.

use super::upkeep::overlap;
use crate::{forwarding, leases::Leases, link::Links, plan::Plan};
use bothy_config::Config;
use bothy_contract::{Code, Error};
use std::{
    io::Read,
    net::{Ipv4Addr, Ipv6Addr},
};

const SUBNET: &str = "subnet";
const PREFIX6: &str = "prefix6";

/// The plan of this host: the configured one, or, where the configuration has the default subnet, the first of a row of
/// subnets like it into which the host has no route. What was chosen stays, since leases are made for it.
///
/// # Errors
/// `failed_precondition` where the subnet belongs to somebody on this host.
pub(super) async fn plan(config: &Config, leases: &Leases, links: &Links) -> Result<Plan, Error> {
    let configured = Plan::new(config)?;
    let plan = if config.net.subnet == bothy_config::Net::default().subnet {
        match leases.fact(SUBNET).await? {
            Some(kept) => {
                let bad = |e| Error::internal(format!("the kept subnet `{kept}`"), &e);
                let subnet: Ipv4Addr = kept.parse().map_err(bad)?;
                // The prefix length may have been changed; the same beginning is right for longer ones only.
                if overlap_of_bits(subnet, configured.prefix) {
                    configured
                } else {
                    configured.with_subnet(subnet)
                }
            }
            None => choose(configured, leases, links).await?,
        }
    } else {
        configured
    };
    if let Some(route) = overlap(&plan, links).await? {
        return Err(Error::new(
            Code::FailedPrecondition,
            format!("subnet {} overlaps the host's route to {route}", plan.cidr()),
        )
        .hint("set net.subnet to a range that this host does not use, such as `10.78.0.0`"));
    }
    let prefix6 = if forwarding::has_ipv6()? { Some(prefix6(leases).await?) } else { None };
    Ok(plan.with_prefix6(prefix6))
}

async fn choose(first: Plan, leases: &Leases, links: &Links) -> Result<Plan, Error> {
    let [a, b, _, _] = first.subnet.octets();
    for second in b..=254 {
        let plan = first.clone().with_subnet(Ipv4Addr::new(a, second, 0, 0));
        if overlap(&plan, links).await?.is_none() {
            if plan.subnet != first.subnet {
                tracing::info!(subnet = %plan.cidr(), "the default subnet is in use on this host; this one is not");
            }
            leases.keep_fact(SUBNET, plan.subnet.to_string()).await?;
            return Ok(plan);
        }
    }
    // The check that follows says what is in the way.
    Ok(first)
}

fn overlap_of_bits(subnet: Ipv4Addr, prefix: u8) -> bool {
    u32::from(subnet) & u32::MAX.checked_shr(u32::from(prefix)).unwrap_or(0) != 0
}

/// The host's unique-local network: `fd`, 40 random bits, subnet 0 (RFC 4193).
async fn prefix6(leases: &Leases) -> Result<Ipv6Addr, Error> {
    if let Some(kept) = leases.fact(PREFIX6).await? {
        return kept.parse().map_err(|e| Error::internal(format!("the kept IPv6 network `{kept}`"), &e));
    }
    let mut random = [0; 5];
    let read = fs_err::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut random));
    read.map_err(|e| Error::internal("cannot choose an IPv6 network", &e))?;
    let [a, b, c, d, e] = random;
    let prefix = Ipv6Addr::from([0xfd, a, b, c, d, e, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    leases.keep_fact(PREFIX6, prefix.to_string()).await?;
    Ok(prefix)
}
