//! What a guest makes of being a template's: two machines are resumed from one, with raw QEMU and the agent's own protocol.
//! They are told apart in everything that makes a machine one, and are the same in everything else.
#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests stop the test, with the line")]

use bothy_e2e::{
    by_hand::{Machine, Recipe, Saved},
    images,
};
use bothy_guest_proto::{
    GuestClient,
    v1::{self, exec_input::Input, exec_output::Output},
};
use bothy_testkit::{Netns, require_root};
use serde_json::json;
use std::{
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use tokio::io::AsyncWriteExt;

/// How long ago the template believes to have been made.
const AGE: Duration = Duration::from_secs(40 * 24 * 3600);
/// How far a guest's clock may be off, beside what cannot be known of a call's way.
const OFF: i64 = 50_000;
const WORK: u64 = 200 << 20;

/// What runs in the template when it is saved. As soon as the time jumps, it writes down who it takes itself for.
const RUNNING: &str = r#"
import os, time
last = time.time()
open("/run/running", "w").close()
while True:
    time.sleep(0.02)
    now = time.time()
    if now - last > 3600:
        with open("/run/jumped", "a") as out:
            out.write(os.uname().nodename + " " + os.getrandom(16).hex() + "\n")
    last = now
"#;

fn now_us() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    u64::try_from(now.as_micros()).unwrap()
}

fn random() -> Vec<u8> {
    let mut bytes = vec![0; 64];
    std::io::Read::read_exact(&mut fs_err::File::open("/dev/urandom").unwrap(), &mut bytes).unwrap();
    bytes
}

/// Not all zeros, which is no id.
fn machine_id(n: u8) -> String {
    format!("{:032x}", 0xb00_u32 + u32::from(n))
}

/// The identity number `n`, with an ssh host key of its own.
fn identity(n: u8, dir: &Path) -> v1::PersonaliseRequest {
    let key = dir.join(format!("key-{n}"));
    let mut keygen = Command::new("ssh-keygen");
    keygen.args(["-q", "-t", "ed25519", "-N", "", "-C", "", "-f"]).arg(&key);
    assert!(keygen.stdin(Stdio::null()).status().unwrap().success(), "no host key");
    let file = |path: &str, from: &Path, mode| v1::File {
        path: path.into(),
        content: fs_err::read(from).unwrap(),
        mode,
    };
    v1::PersonaliseRequest {
        hostname: format!("machine-{n}"),
        machine_id: machine_id(n),
        nic: Some(v1::Nic {
            mac: format!("52:54:00:00:00:{n:02x}"),
            address: format!("10.9.{n}.2"),
            prefix: 24,
            gateway: format!("10.9.{n}.1"),
            dns: vec![format!("10.9.{n}.1")],
            address6: format!("fd09:{n}::2"),
            prefix6: 64,
            gateway6: format!("fd09:{n}::1"),
        }),
        unix_time_us: now_us(),
        entropy: random(),
        files: vec![
            file("/etc/ssh/ssh_host_ed25519_key", &key, 0o600),
            file("/etc/ssh/ssh_host_ed25519_key.pub", &key.with_extension("pub"), 0o644),
        ],
        init_systemd: true,
        ..Default::default()
    }
}

/// What a shell in the guest prints.
async fn run(guest: &mut GuestClient, line: &str) -> String {
    let argv = ["/bin/sh", "-c", line].map(str::to_owned).to_vec();
    let start = v1::ExecStart { argv, ..Default::default() };
    let begin = futures::stream::iter([v1::ExecInput { input: Some(Input::Start(start)) }]);
    let mut output = guest.exec(begin).await.unwrap().into_inner();
    let (mut text, mut status) = (Vec::new(), None);
    while let Some(message) = output.message().await.unwrap() {
        match message.output.unwrap() {
            Output::Stdout(data) | Output::Stderr(data) => text.extend(data),
            Output::Exited(exited) => status = Some(exited.status),
            Output::Started(_) => {}
            Output::Failed(failed) => panic!("{line}: {failed:?}"),
        }
    }
    let text = String::from_utf8(text).unwrap();
    assert_eq!(status, Some(0), "{line}: {text}");
    text.trim().to_owned()
}

/// A command that ends when `test` is true; it fails if it never is.
fn until(test: &str) -> String {
    format!("for i in $(seq 300); do {test} && break; sleep 0.1; done; {test}")
}

/// What a command says in the network that the machines are in.
fn outside(netns: &Netns, line: &str) -> String {
    let mut command = Command::new("sh");
    command.args(["-c", line]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let output = netns.spawn(&mut command).unwrap().wait_with_output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// How far the guest's clock is behind, as far as that can be known: by the quickest of a few calls, and half of its way.
async fn clock(guest: &mut GuestClient) -> (i64, i64) {
    let (mut best, mut off) = (i64::MAX, 0);
    for _ in 0..8 {
        let (before, begun) = (now_us(), Instant::now());
        let theirs = guest.health(v1::HealthRequest {}).await.unwrap().into_inner().unix_time_us;
        let way = i64::try_from(begun.elapsed().as_micros()).unwrap() / 2;
        if way < best {
            (best, off) = (way, before.cast_signed() + way - theirs.cast_signed());
        }
    }
    (off, best)
}

async fn is_on_time(guest: &mut GuestClient) {
    let (off, way) = clock(guest).await;
    assert!(off.abs() <= OFF + way, "{off} us behind, known to {way} us");
}

/// The half of a frame of the channel, which claims to be a long one: `shared/channel` has the format.
fn half_a_frame() -> Vec<u8> {
    let mut half = b"\xb0chn\x01\x04\0\0".to_vec();
    half.extend(60_000_u32.to_be_bytes());
    half.resize(20_000, 0xb0);
    half
}

async fn make_template(recipe: &Recipe, saved: &Saved, image: &Path, dir: &Path) {
    let mut machine = recipe.begin_template(saved, &image.join("system-seed.ext4")).await.unwrap();
    let mut guest = machine.guest().await.unwrap();
    let age = u64::try_from(AGE.as_micros()).unwrap();
    let mut who = identity(0, dir);
    who.template = true;
    who.unix_time_us -= age;
    let told = guest.personalise(who).await.unwrap().into_inner();
    assert!(told.pending.is_empty(), "{told:?}");
    let wait = v1::WaitServiceRequest { port: 22, timeout_ms: 120_000, ..Default::default() };
    let up = guest.wait_service(wait).await.unwrap().into_inner();
    assert!(up.ready, "{up:?}");
    let timer = "printf '[Timer]\\nOnCalendar=daily\\nPersistent=yes\\n' > /run/systemd/system/t.timer;
        printf '[Service]\\nType=oneshot\\nExecStart=touch /run/timer-ran\\n' > /run/systemd/system/t.service;
        systemctl daemon-reload; systemctl start t.timer; test ! -e /run/timer-ran";
    run(&mut guest, timer).await;
    run(&mut guest, &format!("systemd-run --quiet --unit=running python3 -c '{RUNNING}'")).await;
    run(&mut guest, &until("test -e /run/running")).await;
    assert_eq!(
        run(&mut guest, "cat /proc/mounts | grep -c vdc || true").await,
        "0",
        "nobody has its work disk"
    );
    let quiet = guest.quiesce(v1::QuiesceRequest {}).await.unwrap().into_inner();
    assert!(quiet.left.is_empty(), "{quiet:?}");
    assert_eq!(run(&mut guest, "grep frozen /sys/fs/cgroup/system.slice/cgroup.events").await, "frozen 1");
    drop(guest);
    machine.hang_up().await;
    machine.drain().await.unwrap();
    machine.raw.write_all(&half_a_frame()).await.unwrap();
    recipe.save_template(saved, machine).await.unwrap();
}

/// What makes the machine one, by its own word and the network's; the last is what all have alike.
async fn facts(netns: &Netns, n: u8, guest: &mut GuestClient) -> (Vec<String>, String) {
    let keyscan = |address: &str| {
        let line = outside(netns, &format!("ssh-keyscan -t ed25519 {address}"));
        line.split_whitespace().skip(1).collect::<Vec<_>>().join(" ")
    };
    let key = keyscan(&format!("10.9.{n}.2"));
    assert!(key.starts_with("ssh-ed25519 "), "sshd answers at once, on the new address: {key}");
    assert_eq!(keyscan(&format!("fd09:{n}::2")), key);
    assert_eq!(keyscan("10.9.0.2"), "", "nobody has the template's address any more");
    let public = run(guest, "cut -d' ' -f1,2 /etc/ssh/ssh_host_ed25519_key.pub").await;
    assert_eq!(key, public);

    let name = format!("machine-{n}");
    assert_eq!(
        run(guest, "hostname; cat /etc/hostname; grep -c machine-0 /etc/hosts || true").await,
        format!("{name}\n{name}\n0")
    );
    let id = run(guest, "cat /etc/machine-id").await;
    assert_eq!(id, machine_id(n));
    let boot_id = run(guest, "cat /proc/sys/kernel/random/boot_id").await;
    assert_eq!(guest.health(v1::HealthRequest {}).await.unwrap().into_inner().boot_id, boot_id);
    let link = run(guest, "cat /sys/class/net/eth0/address; ip -o address show dev eth0 | awk '{print $4}'; ip route; cat /etc/resolv.conf").await;
    let wanted = [
        format!("52:54:00:00:00:0{n}"),
        format!("10.9.{n}.2/24"),
        format!("fd09:{n}::2/64"),
        format!("fe80::5054:ff:fe00:{n}/64"),
        format!("default via 10.9.{n}.1 dev eth0 proto static"),
        format!("10.9.{n}.0/24 dev eth0 proto kernel scope link src 10.9.{n}.2"),
        format!("nameserver 10.9.{n}.1"),
    ];
    assert_eq!(link.lines().map(str::trim).collect::<Vec<_>>(), wanted);

    // The process that ran all the time: the first that it saw of its new life is all its own.
    let jumped = run(guest, &(until("test -s /run/jumped") + "; cat /run/jumped")).await;
    let (who, bytes) = jumped.split_once(' ').unwrap();
    assert!(who == name && bytes.len() == 32, "{jumped}");
    let fresh = run(guest, "python3 -c 'import os; print(os.getrandom(32).hex())'").await;
    let alike = run(
        guest,
        "uname -sr; id; sha256sum /etc/passwd /etc/ssh/sshd_config /usr/bin/git; df --output=target",
    )
    .await;
    (vec![key, id, boot_id, bytes.to_owned(), fresh], alike)
}

/// What a machine does that was resumed a while ago.
async fn goes_on(n: u8, machine: &mut Machine, guest: &mut GuestClient, work: &Path) {
    let wait = v1::WaitServiceRequest { port: 22, timeout_ms: 120_000, ..Default::default() };
    let up = guest.wait_service(wait).await.unwrap().into_inner();
    assert!(up.ready, "{up:?}");
    let metrics = guest.metrics(v1::MetricsRequest {}).await.unwrap().into_inner();
    assert!(metrics.home_size > WORK / 4 * 3, "the home was grown: {metrics:?}");
    let ports = guest.ports(v1::PortsRequest {}).await.unwrap().into_inner().ports;
    assert!(ports.iter().any(|port| port.port == 22 && port.process == "sshd"), "{ports:?}");
    fs_err::OpenOptions::new().write(true).open(work).unwrap().set_len(2 * WORK).unwrap();
    machine.ask("block_resize", json!({ "device": "work", "size": 2 * WORK })).await.unwrap();
    let grow = v1::GrowDisksRequest { work_bytes: 2 * WORK, system_bytes: 0 };
    assert_eq!(guest.grow_disks(grow).await.unwrap().into_inner().work_bytes, 2 * WORK);

    // Paused for a while, as a suspended machine is: it is still the same, and on time again.
    let before = guest.health(v1::HealthRequest {}).await.unwrap().into_inner();
    machine.ask("stop", json!({})).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    machine.ask("cont", json!({})).await.unwrap();
    let resumed = v1::ResumedRequest { unix_time_us: now_us(), entropy: random() };
    let told = guest.resumed(resumed).await.unwrap().into_inner();
    assert!(told.clock_was_off_us > 900_000, "{told:?}");
    assert_eq!(told.boot_id, before.boot_id);
    is_on_time(guest).await;
    assert!(run(guest, "ip neigh show 10.9.*.1 dev eth0; hostname").await.ends_with(&format!("machine-{n}")));

    for _ in 0..600 {
        if guest.health(v1::HealthRequest {}).await.unwrap().into_inner().pending.is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // Forty days have passed, and nothing was made up for; the journal is this machine's.
    let after = "ls -d /run/log/journal/*; systemctl is-active t.timer; grep -o barrier=0 /proc/mounts; cat /proc/1/autogroup | cut -d' ' -f3
        journalctl -q --output=cat | grep -c '^Linux version'; test ! -e /run/timer-ran";
    let wanted = format!("/run/log/journal/{}\nactive\n0\n1", machine_id(n));
    assert_eq!(run(guest, after).await, wanted);
}

#[test]
fn machines_of_one_template_are_told_apart_and_on_time() {
    require_root!();
    let image = images::default_image();
    let agent = images::target_dir().join("x86_64-unknown-linux-gnu/guest/bothy-guest");
    let dir = bothy_testkit::temp_dir();
    let netns = Netns::new();
    for n in 0..3 {
        let made = format!(
            "ip tuntap add dev t{n} mode tap && ip addr add 10.9.{n}.1/24 dev t{n} && \
             ip -6 addr add fd09:{n}::1/64 dev t{n} nodad && ip link set t{n} up && echo made"
        );
        assert_eq!(outside(&netns, &made), "made");
    }
    netns.block_on(async {
        let at = |n: u8| dir.path().join(format!("m{n}"));
        for n in 0..3 {
            fs_err::create_dir(at(n)).unwrap();
        }
        let recipe = Recipe::of_image(&image, &agent, &at(0), "t0").await.unwrap();
        let saved = Saved::new(&dir.path().join("saved"));
        make_template(&recipe, &saved, &image, dir.path()).await;

        // Both live at the same time, and write to the same pages of the one memory.
        let mut machines = Vec::new();
        for n in [1, 2] {
            let recipe = recipe.with_sockets(&at(n)).with_tap(&format!("t{n}"));
            let recipe = recipe.with_disk("system", &at(n).join("system.ext4"));
            let work = at(n).join("work.ext4");
            fs_err::copy(image.join("work-seed.ext4"), &work).unwrap();
            fs_err::OpenOptions::new().write(true).open(&work).unwrap().set_len(WORK).unwrap();
            let (machine, mut guest, _) = recipe.resume(&saved, &work).await.unwrap();
            let health = guest.health(v1::HealthRequest {}).await.unwrap().into_inner();
            assert!(health.template && health.init_started, "{health:?}");
            let mut who = identity(n, dir.path());
            (who.home, who.work_bytes) = ("/root".into(), WORK);
            who.unix_time_us = now_us();
            let told = guest.personalise(who.clone()).await.unwrap().into_inner();
            assert_ne!(told.boot_id, health.boot_id);
            let again = guest.personalise(who).await.unwrap().into_inner();
            assert!(again.steps.is_empty() && again.boot_id == told.boot_id, "{again:?}");
            machines.push((n, machine, guest, work));
        }
        let mut seen = Vec::new();
        for (n, _, guest, _) in &mut machines {
            // A host that finds the clock late, because its call was, sets it once more.
            if clock(guest).await.0.abs() > OFF / 2 {
                let resumed = v1::ResumedRequest { unix_time_us: now_us(), entropy: random() };
                guest.resumed(resumed).await.unwrap();
            }
            is_on_time(guest).await;
            seen.push(facts(&netns, *n, guest).await);
        }
        let [(one, alike), (other, alike_too)] = &seen[..] else { panic!("two machines") };
        for (one, other) in one.iter().zip(other) {
            assert_ne!(one, other);
        }
        assert_eq!(alike, alike_too);
        for (n, machine, guest, work) in &mut machines {
            goes_on(*n, machine, guest, work).await;
        }
        for (_, machine, guest, _) in machines {
            drop(guest);
            machine.end().await.unwrap();
        }
    });
}
