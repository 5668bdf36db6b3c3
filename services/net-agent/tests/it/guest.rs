//! A guest made by hand: it has a TAP open, as a VMM would, and reads and writes frames.

use bothy_contract::net::Lease;
use bothy_net_agent::{plan::Mac, tun};
use bothy_testkit::Netns;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::{
    io::{Read, Write},
    net::{Ipv4Addr, Ipv6Addr},
    os::fd::AsFd,
};

/// The virtio-net header in front of each frame; all zero means: nothing to say.
const HEADER: usize = 10;

pub(crate) const BROADCAST: Mac = Mac([0xff; 6]);

pub(crate) struct Guest {
    tap: fs_err::File,
    pub(crate) ip: Ipv4Addr,
    pub(crate) ip6: Ipv6Addr,
    pub(crate) mac: Mac,
    pub(crate) gateway: Ipv4Addr,
}

/// What a guest can receive, as far as the tests look.
#[derive(Debug, PartialEq)]
pub(crate) enum Packet {
    /// An ARP request for that address.
    ArpRequest(Ipv4Addr),
    Udp {
        from: (Ipv4Addr, u16),
        to: (Ipv4Addr, u16),
        data: Vec<u8>,
    },
    Other(Vec<u8>),
}

impl Guest {
    pub(crate) fn new(ns: &Netns, lease: &Lease) -> Self {
        let tap = ns.run(|| tun::open(&lease.tap)).unwrap();
        let mac: Vec<u8> = lease.mac.split(':').map(|b| u8::from_str_radix(b, 16).unwrap()).collect();
        Self {
            tap,
            ip: lease.address,
            ip6: lease.address6.unwrap(),
            mac: Mac(mac.try_into().unwrap()),
            gateway: lease.gateway,
        }
    }

    /// The bridge's MAC address, asked for by ARP until there is an answer: the kernel notices a moment after a TAP was
    /// opened that its port has a carrier, and drops frames until then.
    pub(crate) fn gateway_mac(&mut self) -> Mac {
        let question = arp(self.mac, BROADCAST, 1, (self.mac, self.ip), (Mac([0; 6]), self.gateway));
        for _ in 0..100 {
            self.send(&question);
            let Some(frame) = self.read(100) else { continue };
            if frame[12..14] == [8, 6] && frame[20..22] == [0, 2] {
                return Mac(frame[22..28].try_into().unwrap());
            }
        }
        panic!("no answer to ARP");
    }

    pub(crate) fn send(&mut self, frame: &[u8]) {
        let mut whole = vec![0; HEADER];
        whole.extend_from_slice(frame);
        self.tap.write_all(&whole).unwrap();
    }

    /// Sends a UDP packet as itself, by way of the gateway.
    pub(crate) fn send_udp(&mut self, via: Mac, to: (Ipv4Addr, u16), data: &[u8]) {
        let frame = udp(self.mac, via, (self.ip, 7000), to, data);
        self.send(&frame);
    }

    /// The next packet; questions for its own address are answered on the way.
    pub(crate) fn receive(&mut self) -> Packet {
        loop {
            let frame = self.read(10_000).expect("a packet");
            let packet = parse(&frame);
            if packet == Packet::ArpRequest(self.ip) {
                let asker = Mac(frame[22..28].try_into().unwrap());
                let asker_ip = Ipv4Addr::from(<[u8; 4]>::try_from(&frame[28..32]).unwrap());
                self.send(&arp(self.mac, asker, 2, (self.mac, self.ip), (asker, asker_ip)));
                continue;
            }
            // A late answer to one of our own questions.
            if matches!(&packet, Packet::Other(f) if f[12..14] == [8, 6]) {
                continue;
            }
            return packet;
        }
    }

    /// The data of the next UDP packet over IPv6, and where its frame went; others are passed over.
    pub(crate) fn receive_udp6(&mut self) -> (Mac, Vec<u8>) {
        loop {
            let frame = self.read(10_000).expect("a packet");
            if frame[12..14] == [0x86, 0xdd] && frame[20] == 17 {
                return (Mac(frame[..6].try_into().unwrap()), frame[62..].to_vec());
            }
        }
    }

    /// Whom the next answer in ARP is about, and where it says that is; other frames are passed over.
    pub(crate) fn receive_arp_reply(&mut self) -> (Ipv4Addr, Mac) {
        loop {
            let frame = self.read(10_000).expect("an answer");
            // Late answers to questions for the bridge are no news.
            let about = |f: &[u8]| Ipv4Addr::from(<[u8; 4]>::try_from(&f[28..32]).unwrap());
            if frame[12..14] == [8, 6] && frame[20..22] == [0, 2] && about(&frame) != self.gateway {
                return (about(&frame), Mac(frame[22..28].try_into().unwrap()));
            }
        }
    }

    /// The same in neighbour discovery.
    pub(crate) fn receive_advert(&mut self) -> (Ipv6Addr, Mac) {
        loop {
            let frame = self.read(10_000).expect("an answer");
            if frame[12..14] == [0x86, 0xdd] && frame[20] == 58 && frame[54] == 136 {
                let about = Ipv6Addr::from(<[u8; 16]>::try_from(&frame[62..78]).unwrap());
                // Who asked it directly is answered without: it knows where that is.
                let at = frame.get(80..86).unwrap_or(&frame[6..12]);
                return (about, Mac(at.try_into().unwrap()));
            }
        }
    }

    /// The next frame; `None` after `patience` milliseconds of silence.
    fn read(&mut self, patience: u16) -> Option<Vec<u8>> {
        let mut fds = [PollFd::new(self.tap.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::from(patience)).unwrap() == 0 {
            return None;
        }
        let mut frame = vec![0; 2048];
        let n = self.tap.read(&mut frame).unwrap();
        Some(frame[HEADER..n].to_vec())
    }
}

fn parse(frame: &[u8]) -> Packet {
    let ip = |at: usize| Ipv4Addr::from(<[u8; 4]>::try_from(&frame[at..at + 4]).unwrap());
    let port = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
    match &frame[12..14] {
        [8, 6] if frame[20..22] == [0, 1] => Packet::ArpRequest(ip(38)),
        [8, 0] if frame[14] == 0x45 && frame[23] == 17 => Packet::Udp {
            from: (ip(26), port(34)),
            to: (ip(30), port(36)),
            data: frame[42..34 + usize::from(port(38))].to_vec(),
        },
        _ => Packet::Other(frame.to_vec()),
    }
}

/// An Ethernet frame with an ARP packet (RFC 826); `op` 1 asks, 2 answers.
pub(crate) fn arp(from: Mac, to: Mac, op: u8, sender: (Mac, Ipv4Addr), target: (Mac, Ipv4Addr)) -> Vec<u8> {
    let mut frame = ethernet(from, to, [8, 6]);
    frame.extend([0, 1, 8, 0, 6, 4, 0, op]);
    for (mac, ip) in [sender, target] {
        frame.extend(mac.0);
        frame.extend(ip.octets());
    }
    frame
}

/// An Ethernet frame with an IPv4 packet (RFC 791) with a UDP packet (RFC 768), which need not have a checksum.
pub(crate) fn udp(mac: Mac, via: Mac, from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), data: &[u8]) -> Vec<u8> {
    let mut frame = ethernet(mac, via, [8, 0]);
    let length = |n: usize| u16::try_from(n).unwrap().to_be_bytes();
    let [a, b] = length(28 + data.len());
    let mut header = vec![0x45, 0, a, b, 0, 1, 0, 0, 64, 17, 0, 0];
    header.extend(from.0.octets());
    header.extend(to.0.octets());
    let sum: u32 = header.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], c[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    header[10..12]
        .copy_from_slice(&(!u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap()).to_be_bytes());
    frame.extend(header);
    frame.extend(from.1.to_be_bytes());
    frame.extend(to.1.to_be_bytes());
    frame.extend(length(8 + data.len()));
    frame.extend([0, 0]);
    frame.extend(data);
    frame
}

fn ethernet(from: Mac, to: Mac, kind: [u8; 2]) -> Vec<u8> {
    [&to.0[..], &from.0, &kind].concat()
}

/// An Ethernet frame with an IPv6 packet (RFC 8200) with a UDP packet (RFC 768).
pub(crate) fn udp6(mac: Mac, via: Mac, from: (Ipv6Addr, u16), to: (Ipv6Addr, u16), data: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + data.len()).unwrap().to_be_bytes();
    let header = [from.1.to_be_bytes(), to.1.to_be_bytes(), length, [0, 0]].concat();
    ipv6(mac, via, (from.0, to.0), 17, 64, [&header[..], data].concat(), 6)
}

/// An Ethernet frame with an ICMPv6 packet of neighbour discovery (RFC 4861): type, the eight bytes of checksum and flags
/// without the checksum, and what follows.
pub(crate) fn nd(
    mac: Mac,
    to: Mac,
    ips: (Ipv6Addr, Ipv6Addr),
    kind: u8,
    flags: [u8; 4],
    rest: &[u8],
) -> Vec<u8> {
    ipv6(mac, to, ips, 58, 255, [&[kind, 0, 0, 0], &flags[..], rest].concat(), 2)
}

/// The option that says "my hardware address is" (1, of the sender) or "its hardware address is" (2, of the target).
pub(crate) fn link_address(kind: u8, mac: Mac) -> Vec<u8> {
    [&[kind, 1], &mac.0[..]].concat()
}

fn ipv6(
    mac: Mac,
    via: Mac,
    (from, to): (Ipv6Addr, Ipv6Addr),
    next: u8,
    hops: u8,
    mut payload: Vec<u8>,
    checksum_at: usize,
) -> Vec<u8> {
    let length = u16::try_from(payload.len()).unwrap().to_be_bytes();
    let mut summed =
        [&from.octets()[..], &to.octets(), &[0, 0], &length, &[0, 0, 0, next], &payload].concat();
    if summed.len() % 2 == 1 {
        summed.push(0);
    }
    let mut sum: u32 = summed.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], c[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    payload[checksum_at..checksum_at + 2].copy_from_slice(&(!u16::try_from(sum).unwrap()).to_be_bytes());
    let header = [&[0x60, 0, 0, 0], &length[..], &[next, hops], &from.octets(), &to.octets()].concat();
    [ethernet(mac, via, [0x86, 0xdd]), header, payload].concat()
}
