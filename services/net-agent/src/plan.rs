//! Everything that follows from the configuration and a slot's number: names, addresses, users. Pure: the kernel and the
//! lease table are compared with it, and it never changes while the agent runs.

use bothy_config::Config;
use bothy_contract::{Error, net::Lease};
use std::{
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
};

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl Mac {
    /// The link-local address that goes with it (RFC 4291, appendix A).
    pub fn link_local(self) -> Ipv6Addr {
        let [a, b, c, d, e, g] = self.0;
        Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, g])
    }
}

/// What one slot is, before and apart from any kernel object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// Its number, from 1 to the capacity.
    pub number: u32,
    /// The TAP device's name.
    pub tap: String,
    /// The guest's address.
    pub address: Ipv4Addr,
    /// The guest's MAC address.
    pub mac: Mac,
    /// The user and group that may open the TAP.
    pub uid: u32,
}

/// The plan of the whole network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The bridge's name, and the name of the nftables tables.
    pub bridge: String,
    /// What TAP names begin with.
    pub tap_prefix: String,
    /// The network address.
    pub subnet: Ipv4Addr,
    /// The prefix length.
    pub prefix: u8,
    /// The IPv6 network, a unique-local /64 (RFC 4193); none where the host has no IPv6.
    pub prefix6: Option<Ipv6Addr>,
    /// The user of slot 0, which no VM has.
    pub uid_base: u32,
    /// How many free slots are kept warm.
    pub pool_size: u32,
}

impl Plan {
    /// The plan that `config` asks for.
    ///
    /// # Errors
    /// `invalid_argument`, naming the setting, for names that a network device cannot bear, a subnet with host bits or
    /// outside unicast space, and user ids beyond 32 bits.
    pub fn new(config: &Config) -> Result<Self, Error> {
        let net = &config.net;
        config.check()?;
        check_name("net.bridge", &net.bridge)?;
        check_name("net.tap_prefix", &net.tap_prefix)?;
        if net.bridge.starts_with(&net.tap_prefix) {
            return Err(Error::invalid(format!(
                "net.bridge `{}` begins with net.tap_prefix `{}`, so it would be taken for a TAP",
                net.bridge, net.tap_prefix
            )));
        }
        let host_bits = u32::MAX.checked_shr(u32::from(net.prefix)).unwrap_or(0);
        let first = u32::from(net.subnet);
        if first & host_bits != 0 {
            let right = Ipv4Addr::from(first & !host_bits);
            return Err(Error::invalid(format!(
                "net.subnet {}/{} has host bits set",
                net.subnet, net.prefix
            ))
            .hint(format!("write `subnet = \"{right}\"`")));
        }
        let ip = net.subnet;
        if ip.is_loopback()
            || ip.is_multicast()
            || ip.is_link_local()
            || ip.octets()[0] == 0
            || ip.octets()[0] >= 240
        {
            return Err(Error::invalid(format!("net.subnet {ip} is not in unicast space"))
                .hint("choose one of the private ranges, such as `10.77.0.0`"));
        }
        let plan = Self {
            bridge: net.bridge.clone(),
            tap_prefix: net.tap_prefix.clone(),
            subnet: net.subnet,
            prefix: net.prefix,
            prefix6: None,
            uid_base: config.vm.uid_base,
            pool_size: net.tap_pool_size,
        };
        // u32::MAX as a user id means "no change" to chown(2) and "no owner" to the TUN driver.
        if plan.uid_base.checked_add(plan.capacity()).is_none_or(|last| last == u32::MAX) {
            return Err(Error::invalid(format!(
                "vm.uid_base {} leaves no room for {} users",
                plan.uid_base,
                plan.capacity()
            )));
        }
        Ok(plan)
    }

    /// The same plan with that IPv6 network.
    #[must_use]
    pub fn with_prefix6(self, prefix6: Option<Ipv6Addr>) -> Self {
        Self { prefix6, ..self }
    }

    /// The same plan in another subnet of the same size.
    #[must_use]
    pub fn with_subnet(self, subnet: Ipv4Addr) -> Self {
        Self { subnet, ..self }
    }

    /// How many slots there are: all addresses but the network's, the gateway's and the broadcast address.
    pub fn capacity(&self) -> u32 {
        (1_u32 << (32 - u32::from(self.prefix).clamp(16, 29))) - 3
    }

    /// The bridge's address.
    pub fn gateway(&self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.subnet) + 1)
    }

    /// The bridge's IPv6 address.
    pub fn gateway6(&self) -> Option<Ipv6Addr> {
        self.prefix6.map(|p| Ipv6Addr::from(u128::from(p) + 1))
    }

    /// The IPv6 address of a slot; its last part is that of the IPv4 address within the subnet.
    pub fn address6(&self, number: u32) -> Option<Ipv6Addr> {
        self.prefix6.map(|p| Ipv6Addr::from(u128::from(p) + 1 + u128::from(number)))
    }

    /// The slot with that address, IPv4 or IPv6.
    pub fn slot_of(&self, address: std::net::IpAddr) -> Option<u32> {
        let offset = match address {
            std::net::IpAddr::V4(a) => u32::from(a).checked_sub(u32::from(self.subnet)),
            std::net::IpAddr::V6(a) => {
                u128::from(a).checked_sub(u128::from(self.prefix6?)).and_then(|o| u32::try_from(o).ok())
            }
        };
        offset?.checked_sub(1).filter(|n| (1..=self.capacity()).contains(n))
    }

    /// The IPv6 network as text.
    pub fn cidr6(&self) -> Option<String> {
        self.prefix6.map(|p| format!("{p}/64"))
    }

    /// The bridge's MAC address. It is set, since a bridge without one takes the lowest of its ports' and so changes it
    /// under guests that have it in their neighbour tables.
    pub fn bridge_mac(&self) -> Mac {
        mac_of(self.gateway())
    }

    /// The slot of that number; `None` outside 1 to the capacity.
    pub fn slot(&self, number: u32) -> Option<Slot> {
        if !(1..=self.capacity()).contains(&number) {
            return None;
        }
        let address = Ipv4Addr::from(u32::from(self.subnet) + 1 + number);
        Some(Slot {
            number,
            tap: format!("{}{number}", self.tap_prefix),
            address,
            mac: mac_of(address),
            uid: self.uid_base + number,
        })
    }

    /// The number in a TAP's name; `None` for devices that are not ours. `0` and numbers beyond the capacity are
    /// returned, too: such a device is ours by its name and belongs to no slot.
    pub fn number_of_tap(&self, name: &str) -> Option<u32> {
        let digits = name.strip_prefix(&self.tap_prefix)?;
        let number: u32 = digits.parse().ok()?;
        (number.to_string() == digits).then_some(number)
    }

    /// The subnet as text, `10.77.0.0/24`.
    pub fn cidr(&self) -> String {
        format!("{}/{}", self.subnet, self.prefix)
    }

    /// Whether `address/prefix` shares an address with the subnet.
    pub fn overlaps(&self, address: Ipv4Addr, prefix: u8) -> bool {
        let shorter = u32::from(self.prefix.min(prefix));
        let mask = u32::MAX.checked_shl(32 - shorter).unwrap_or(0);
        u32::from(self.subnet) & mask == u32::from(address) & mask
    }

    /// The lease on `slot`.
    pub fn lease(&self, slot: &Slot, dns: Vec<Ipv4Addr>) -> Lease {
        Lease {
            slot: slot.number,
            tap: slot.tap.clone(),
            uid: slot.uid,
            address: slot.address,
            prefix: self.prefix,
            gateway: self.gateway(),
            mac: slot.mac.to_string(),
            dns,
            address6: self.address6(slot.number),
            prefix6: self.prefix6.map(|_| 64),
            gateway6: self.gateway6(),
        }
    }
}

/// The MAC address that goes with an address: unique on the bridge, as all addresses there share the first octet.
fn mac_of(address: Ipv4Addr) -> Mac {
    let [_, b, c, d] = address.octets();
    Mac([0x52, 0x54, 0x00, b, c, d])
}

/// Names go into nftables as they are, where `*` is a wildcard and `@` a reference; so only plain ones are taken.
fn check_name(what: &str, name: &str) -> Result<(), Error> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if !name.starts_with(|c: char| c.is_ascii_alphabetic()) || !name.chars().all(plain) {
        return Err(Error::invalid(format!(
            "{what} `{name}` is not letters, digits, `-` and `_`, a letter first"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    fn plan(subnet: [u8; 4], prefix: u8) -> Result<Plan, Error> {
        let mut config = Config::new("/s", "/r");
        config.net.subnet = subnet.into();
        config.net.prefix = prefix;
        Plan::new(&config)
    }

    #[test]
    fn a_slot_determines_everything() {
        let plan = plan([10, 77, 0, 0], 24).unwrap();
        assert_eq!(plan.capacity(), 253);
        assert_eq!(plan.gateway(), Ipv4Addr::new(10, 77, 0, 1));
        let slot = plan.slot(1).unwrap();
        assert_eq!(slot.tap, "bothy-tap-1");
        assert_eq!(slot.address, Ipv4Addr::new(10, 77, 0, 2));
        assert_eq!(slot.mac.to_string(), "52:54:00:4d:00:02");
        assert_eq!(slot.uid, 780_001);
        assert_eq!(plan.slot(253).unwrap().address, Ipv4Addr::new(10, 77, 0, 254));
        assert!(plan.slot(0).is_none() && plan.slot(254).is_none());
    }

    #[test]
    fn only_our_names_are_ours() {
        let plan = plan([10, 77, 0, 0], 24).unwrap();
        assert_eq!(plan.number_of_tap("bothy-tap-7"), Some(7));
        assert_eq!(plan.number_of_tap("bothy-tap-999"), Some(999));
        for other in ["bothy-tap-", "bothy-tap-07", "bothy-tap-+7", "bothy-tap-x", "tap7", "bothy0"] {
            assert_eq!(plan.number_of_tap(other), None, "{other}");
        }
    }

    #[test]
    fn wrong_settings_are_refused() {
        let host_bits = plan([10, 77, 0, 1], 24).unwrap_err();
        assert_eq!(host_bits.hint.as_deref(), Some("write `subnet = \"10.77.0.0\"`"));
        for subnet in [[127, 0, 0, 0], [224, 1, 0, 0], [169, 254, 0, 0], [0, 1, 0, 0], [250, 0, 0, 0]] {
            assert!(plan(subnet, 24).is_err(), "{subnet:?}");
        }
        for name in ["a b", "tap*", "@set", "1tap", ""] {
            let mut config = Config::new("/s", "/r");
            config.net.tap_prefix = name.into();
            assert!(Plan::new(&config).is_err(), "{name:?}");
        }
        let mut config = Config::new("/s", "/r");
        config.vm.uid_base = u32::MAX - 253;
        assert!(Plan::new(&config).unwrap_err().message.contains("uid_base"));
    }

    #[test]
    fn overlap_is_found_both_ways() {
        let plan = plan([10, 77, 0, 0], 24).unwrap();
        for (address, prefix, overlaps) in [
            ([10, 77, 0, 9], 32, true),
            ([10, 77, 0, 128], 25, true),
            ([10, 0, 0, 0], 8, true),
            ([0, 0, 0, 0], 0, true),
            ([10, 77, 1, 0], 24, false),
            ([10, 76, 0, 0], 16, false),
        ] {
            assert_eq!(plan.overlaps(address.into(), prefix), overlaps, "{address:?}/{prefix}");
        }
    }

    proptest! {
        #[test]
        fn no_two_slots_share_anything(a in 1_u8..=223, b: u8, c: u8, d: u8, prefix in 16_u8..=29) {
            let mask = u32::MAX << (32 - u32::from(prefix));
            let subnet = Ipv4Addr::from(u32::from(Ipv4Addr::new(a, b, c, d)) & mask);
            let Ok(plan) = plan(subnet.octets(), prefix) else { return Ok(()) };
            let slots: Vec<_> = (1..=plan.capacity()).step_by(7).filter_map(|n| plan.slot(n)).collect();
            let (mut addresses, mut macs) = (HashSet::new(), HashSet::new());
            addresses.insert(plan.gateway());
            macs.insert(plan.bridge_mac());
            let plan = plan.with_prefix6(Some("fd00::".parse().unwrap()));
            for slot in &slots {
                let six = plan.address6(slot.number).unwrap();
                prop_assert!(plan.gateway6() != Some(six) && slot.mac != plan.bridge_mac());
                prop_assert_eq!(plan.slot_of(six.into()), Some(slot.number));
                prop_assert_eq!(plan.slot_of(slot.address.into()), Some(slot.number));
                prop_assert!(addresses.insert(slot.address) && macs.insert(slot.mac));
                prop_assert!(plan.overlaps(slot.address, 32));
                prop_assert!(slot.tap.len() <= 15);
                prop_assert_eq!(plan.number_of_tap(&slot.tap), Some(slot.number));
            }
            let last = plan.slot(plan.capacity()).unwrap().address;
            prop_assert!(plan.overlaps(Ipv4Addr::from(u32::from(last) + 1), 32), "broadcast is still inside");
            prop_assert!(!plan.overlaps(Ipv4Addr::from(u32::from(last).wrapping_add(2)), 32));
        }
    }
}
