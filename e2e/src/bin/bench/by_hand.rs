//! What the runs by hand need beside their command lines: disks and keys as bothy makes them.

use bothy_e2e::by_hand::{Recipe, Saved};
use bothy_guest_proto::v1::{self, exec_input};
use std::{
    io,
    path::Path,
    process::Command,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// The size of a work disk.
const WORK: u64 = 200 << 20;

/// Puts the image's seeds back in place of the pattern's disks, sized as they were.
pub(crate) fn pristine(image: &Path, disks: &[std::path::PathBuf]) {
    for (disk, seed) in disks.iter().filter_map(|d| Some((d, seed_of(d)?))) {
        let size = fs_err::metadata(disk).expect("a disk").len();
        let copied = Command::new("cp").arg("--sparse=always").arg(image.join(seed)).arg(disk).status();
        assert!(copied.expect("cp").success(), "cannot copy {seed}");
        fs_err::OpenOptions::new().write(true).open(disk).and_then(|f| f.set_len(size)).expect("its size");
    }
}

fn seed_of(disk: &Path) -> Option<&'static str> {
    match disk.file_name()?.to_str()? {
        "system.ext4" => Some("system-seed.ext4"),
        "work.ext4" => Some("work-seed.ext4"),
        _ => None,
    }
}

/// Makes a template of `recipe` as bothy does: booted as nobody, ready, held still, saved.
pub(crate) async fn template(
    recipe: &Recipe,
    saved: &Saved,
    system: &Path,
    keys: Vec<v1::File>,
) -> io::Result<()> {
    let mut machine = recipe.begin_template(saved, system).await?;
    let mut guest = machine.guest().await?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(io::Error::other)?;
    let nobody = v1::PersonaliseRequest {
        hostname: "template".into(),
        machine_id: "7".repeat(32),
        unix_time_us: u64::try_from(now.as_micros()).unwrap_or(u64::MAX),
        files: keys,
        init_systemd: true,
        template: true,
        ..Default::default()
    };
    guest.personalise(nobody).await.map_err(io::Error::other)?;
    let wait = v1::WaitServiceRequest { port: 22, timeout_ms: 120_000, ..Default::default() };
    guest.wait_service(wait).await.map_err(io::Error::other)?;
    guest.quiesce(v1::QuiesceRequest {}).await.map_err(io::Error::other)?;
    drop(guest);
    machine.hang_up().await;
    recipe.save_template(saved, machine).await
}

/// Restores `saved` to its agent's first answer and ends it; from the VMM's start to that answer.
pub(crate) async fn resume(recipe: &Recipe, saved: &Saved, work: &Path) -> io::Result<Duration> {
    fs_err::File::create(work)?.set_len(WORK)?;
    let (machine, guest, resumed) = recipe.resume(saved, work).await?;
    drop(guest);
    machine.end().await?;
    Ok(resumed.agent)
}

/// The same, and on: the guest becomes the machine `who`, if it is to be another, and runs `sh -c true`, over the one connection; from
/// the VMM's start to that command's end. `seed` is what its work disk begins as.
pub(crate) async fn become_and_run(
    recipe: &Recipe,
    saved: &Saved,
    (seed, work): (&Path, &Path),
    who: Option<v1::PersonaliseRequest>,
) -> io::Result<Duration> {
    let copied = Command::new("cp").arg("--sparse=always").args([seed, work]).status()?;
    assert!(copied.success(), "cannot copy {}", seed.display());
    let (machine, mut guest, resumed) = recipe.resume(saved, work).await?;
    let answered = Instant::now();
    if let Some(who) = who {
        guest.personalise(who).await.map_err(io::Error::other)?;
    }
    let argv = ["sh", "-c", "true"].map(str::to_owned).into();
    let start = exec_input::Input::Start(v1::ExecStart { argv, ..Default::default() });
    let begin = futures::stream::iter([v1::ExecInput { input: Some(start) }]);
    let mut output = guest.exec(begin).await.map_err(io::Error::other)?.into_inner();
    while output.message().await.map_err(io::Error::other)?.is_some() {}
    let ran = resumed.agent + answered.elapsed();
    drop((output, guest));
    machine.end().await?;
    Ok(ran)
}

/// Who such a guest is to be: VM `vm` of the host's, as it is told by `bothy`.
pub(crate) fn somebody(vm: &serde_json::Value, seed: &Path, files: Vec<v1::File>) -> v1::PersonaliseRequest {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let text = |key: &str| vm["lease"][key].as_str().unwrap_or_default().to_owned();
    let number =
        |key: &str| vm["lease"][key].as_u64().and_then(|n| u32::try_from(n).ok()).unwrap_or_default();
    v1::PersonaliseRequest {
        hostname: "somebody".into(),
        machine_id: "8".repeat(32),
        nic: Some(v1::Nic {
            mac: text("mac"),
            address: text("address"),
            prefix: number("prefix"),
            gateway: text("gateway"),
            dns: vec![text("gateway")],
            address6: text("address6"),
            prefix6: number("prefix6"),
            gateway6: text("gateway6"),
        }),
        unix_time_us: u64::try_from(now.as_micros()).unwrap_or(u64::MAX),
        entropy: vec![8; 64],
        files,
        home: "/root".into(),
        init_systemd: true,
        work_bytes: fs_err::metadata(seed).expect("the seed").len(),
        ..Default::default()
    }
}

/// An ssh host key as bothy makes one, so that sshd starts alike.
pub(crate) fn host_keys(scratch: &Path) -> Vec<v1::File> {
    let key = scratch.join("host_key");
    let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key).status();
    assert!(made.expect("ssh-keygen").success(), "no host key");
    let file = |path: &str, from: &Path, mode| v1::File {
        path: path.into(),
        content: fs_err::read(from).expect("the key"),
        mode,
    };
    vec![
        file("/etc/ssh/ssh_host_ed25519_key", &key, 0o600),
        file("/etc/ssh/ssh_host_ed25519_key.pub", &key.with_extension("pub"), 0o644),
    ]
}
