//! A guest with a kernel: a namespace whose `eth0` is joined to a lease's TAP, frame by frame, as a VMM joins it to the
//! guest's network card. So there are real sockets, ARP and neighbour discovery on the guest's side.

use bothy_contract::net::Lease;
use bothy_net_agent::{link::Links, tun};
use bothy_testkit::Netns;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rtnetlink::{LinkUnspec, RouteMessageBuilder};
use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

pub(crate) struct Machine {
    pub(crate) ns: Netns,
    pub(crate) lease: Lease,
    stop: Arc<AtomicBool>,
    pump: Option<JoinHandle<()>>,
}

impl Machine {
    pub(crate) fn new(host: &Netns, lease: &Lease) -> Self {
        let ns = Netns::new();
        let outer = host.run(|| tun::open(&lease.tap)).unwrap();
        let inner = ns.run(|| {
            tun::create("eth0", 0).unwrap();
            fs_err::write("/proc/sys/net/ipv6/conf/eth0/accept_dad", "0").unwrap();
            tun::open("eth0").unwrap()
        });
        let mac: Vec<u8> = lease.mac.split(':').map(|b| u8::from_str_radix(b, 16).unwrap()).collect();
        ns.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection().unwrap();
            tokio::spawn(connection);
            let index = Links::open().unwrap().find("eth0").await.unwrap().unwrap().index;
            let up = LinkUnspec::new_with_index(index).address(mac).up().build();
            handle.link().set(up).execute().await.unwrap();
            let v4 = handle.address().add(index, IpAddr::V4(lease.address), lease.prefix);
            v4.execute().await.unwrap();
            let v4 = RouteMessageBuilder::<Ipv4Addr>::new().gateway(lease.gateway).build();
            handle.route().add(v4).execute().await.unwrap();
            let (address6, gateway6) = (lease.address6.unwrap(), lease.gateway6.unwrap());
            handle
                .address()
                .add(index, IpAddr::V6(address6), lease.prefix6.unwrap())
                .execute()
                .await
                .unwrap();
            let v6 = RouteMessageBuilder::<Ipv6Addr>::new().gateway(gateway6).build();
            handle.route().add(v6).execute().await.unwrap();
        });
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let pump = std::thread::spawn(move || {
            let mut ends = [outer, inner];
            let mut frame = vec![0; 65_600];
            while !stopped.load(Ordering::Relaxed) {
                let ready = {
                    let mut fds = [&ends[0], &ends[1]].map(|f| PollFd::new(f.as_fd(), PollFlags::POLLIN));
                    poll(&mut fds, PollTimeout::from(50_u16)).unwrap();
                    fds.map(|fd| fd.revents().is_some_and(|r| r.contains(PollFlags::POLLIN)))
                };
                for from in [0, 1] {
                    if !ready[from] {
                        continue;
                    }
                    let Ok(n) = ends[from].read(&mut frame) else { return };
                    // A device that is gone, or down for a moment, loses frames, as a cable does.
                    let _ = ends[1 - from].write(&frame[..n]);
                }
            }
        });
        let machine = Self { ns, lease: lease.clone(), stop, pump: Some(pump) };
        machine.settle();
        machine
    }

    /// Waits until the bridge answers: the kernel notices a moment after a TAP was opened that its port has a carrier, and
    /// drops frames until then.
    fn settle(&self) {
        for _ in 0..200 {
            let table = self.ns.run(|| {
                let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
                let _ = socket.send_to(b"?", (self.lease.gateway, 9));
                std::thread::sleep(Duration::from_millis(20));
                fs_err::read_to_string("/proc/thread-self/net/arp")
            });
            // The flag of a complete entry: ATF_COM of linux/if_arp.h.
            let answered = |line: &str| {
                let mut words = line.split_whitespace();
                words.next() == Some(&self.lease.gateway.to_string()) && words.nth(1) == Some("0x2")
            };
            if table.unwrap().lines().any(answered) {
                return;
            }
        }
        panic!("the bridge does not answer {}", self.lease.tap);
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(pump) = self.pump.take() {
            let _ = pump.join();
        }
    }
}
