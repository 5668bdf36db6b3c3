//! `bothy doctor`: what bothy needs, each with what was found and what to do. Nothing is changed.

mod names;

use crate::{Context, Status, host::up::find_program};
use bothy_config::Config;
use bothy_contract::{Error, ImageName};
use bothy_gateway::api::{HostReport, HostUses, Version};
use serde::Serialize;
use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// The oldest nats-server that will do: older ones lack what the permissions and streams are made of.
const OLDEST_BUS: [u32; 3] = [2, 12, 6];
/// Free space below which a build or a few machines may fail.
const LITTLE: u64 = 8 << 30;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

#[derive(Debug, Clone, Serialize)]
struct Check {
    check: &'static str,
    verdict: Verdict,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    todo: Option<String>,
}

fn check(check: &'static str, verdict: Verdict, found: impl Into<String>, todo: Option<&str>) -> Check {
    Check { check, verdict, found: found.into(), todo: todo.map(str::to_owned) }
}

/// Exit status 1 where a check failed.
pub(crate) async fn main(context: &Context) -> Result<Status, Error> {
    let (mut checks, report) = services(context).await;
    let bus_answers = report.as_ref().is_some_and(HostReport::all_up);
    if let Some(net) = report.as_ref().and_then(|report| report.net.as_ref()) {
        checks.extend(names::checks(net).await);
    }
    // What the host uses is known best by its gateway; the configuration may be another's, or unreadable.
    let told = report.and_then(|report| report.uses);
    let uses = told.unwrap_or_else(|| HostUses::from(&configuration()));
    checks.push(kvm());
    checks.push(tun());
    checks.extend([qemu(&uses), bus_server(&uses, bus_answers), nftables(), space(&uses)]);
    checks.extend([
        tool("git", "git", Verdict::Fail, "`apt-get install git`"),
        tool(
            "ssh",
            "ssh",
            Verdict::Warn,
            "`apt-get install openssh-client`; without it there is no `bothy vm ssh`",
        ),
        tool("ssh-keygen", "ssh-keygen", Verdict::Warn, "`apt-get install openssh-client`"),
        tool(
            "mmdebstrap",
            "mmdebstrap",
            Verdict::Warn,
            "`apt-get install mmdebstrap`; without it no image can be built",
        ),
        tool(
            "mkfs.ext4",
            "mkfs.ext4",
            Verdict::Warn,
            "`apt-get install e2fsprogs`; without it no image can be built",
        ),
    ]);
    let failed = checks.iter().any(|c| c.verdict == Verdict::Fail);
    context.printer.record(&checks, |checks| {
        let lines: Vec<_> = checks.iter().map(line).collect();
        lines.join("\n")
    })?;
    Ok(if failed { Status::FOUND } else { Status::SUCCESS })
}

fn line(check: &Check) -> String {
    let verdict = match check.verdict {
        Verdict::Ok => "ok",
        Verdict::Warn => "warn",
        Verdict::Fail => "fail",
    };
    let found = crate::printer::visible(&check.found).replace('\n', " ");
    let mut text = format!("{verdict:<5} {:<16} {found}", check.check);
    if let Some(todo) = &check.todo {
        text.push_str(&format!("\n      {:<16} -> {todo}", ""));
    }
    text
}

fn configuration() -> Config {
    let path = std::env::var_os(bothy_config::PATH_VARIABLE)
        .filter(|path| !path.is_empty())
        .map_or_else(|| PathBuf::from("/var/lib/bothy/bothy.toml"), PathBuf::from);
    Config::load(&path)
        .or_else(|_| Config::load(Path::new(bothy_config::DEFAULT_PATH)))
        .unwrap_or_else(|_| Config::new("/var/lib/bothy", "/run/bothy"))
}

/// How the services stand, and the report that says so where there is one.
async fn services(context: &Context) -> (Vec<Check>, Option<HostReport>) {
    let socket = context.gateway.socket().display().to_string();
    let version: Version = match context.gateway.get("/v1/version").await {
        Ok(version) => version,
        Err(e) => return (vec![check("gateway", Verdict::Fail, e.message, e.hint.as_deref())], None),
    };
    let mine = env!("CARGO_PKG_VERSION");
    let mut checks = vec![if version.version == mine {
        check("gateway", Verdict::Ok, format!("{} on {socket}", version.version), None)
    } else {
        check(
            "gateway",
            Verdict::Warn,
            format!("{} on {socket}, but this is bothy {mine}", version.version),
            Some("restart the services"),
        )
    }];
    let report: HostReport = match context.gateway.get("/v1/host").await {
        Ok(report) => report,
        Err(e) => {
            checks.push(check("services", Verdict::Fail, e.message, e.hint.as_deref()));
            return (checks, None);
        }
    };
    let down: Vec<_> = report.services.iter().filter(|s| !s.up).collect();
    if down.is_empty() {
        checks.push(check("services", Verdict::Ok, "all five answer on the bus", None));
    }
    for service in down {
        let why = service.error.as_ref().map(|e| e.message.clone()).unwrap_or_default();
        checks.push(check(
            "services",
            Verdict::Fail,
            format!("{}: {why}", service.service.binary()),
            Some("look at its log: `<state>/log`, or `journalctl -u` its name"),
        ));
    }
    if let Some(vm) = &report.vm {
        let driver = format!("{} {}: {}", vm.driver, vm.vmm_version, vm.driver_reason);
        checks.push(check("driver", Verdict::Ok, driver, None));
        checks.push(check("limits", Verdict::Ok, vm.limits.clone(), None));
        let found = format!("{} with {}: {}", vm.driver, vm.accelerator, vm.accelerator_reason);
        // `auto` is decided by the first VM: nothing to warn of yet.
        checks.push(if vm.accelerator != "tcg" {
            check("accelerator", Verdict::Ok, found, None)
        } else {
            check(
                "accelerator",
                Verdict::Warn,
                found,
                Some("machines work, slowly; use a host with a KVM that runs stock guests"),
            )
        });
    }
    if let Some(images) = &report.images {
        let default = ImageName::default_image();
        checks.push(if images.iter().any(|image| image.name == default) {
            check("image", Verdict::Ok, format!("{default} is built"), None)
        } else {
            check(
                "image",
                Verdict::Warn,
                format!("the image {default} is not built"),
                Some("`bothy image build`, as root"),
            )
        });
    }
    (checks, Some(report))
}

fn kvm() -> Check {
    // Opened as this user: the vm-agent, which may be another, says above what it found.
    match fs_err::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => check(
            "kvm",
            Verdict::Ok,
            "/dev/kvm opens (the vm-agent finds out whether it truly runs a guest)",
            None,
        ),
        Err(e) => check(
            "kvm",
            Verdict::Warn,
            e.to_string(),
            Some("machines run under TCG then: slow, but they run"),
        ),
    }
}

fn tun() -> Check {
    if Path::new("/dev/net/tun").exists() {
        check("tun", Verdict::Ok, "/dev/net/tun is there", None)
    } else {
        check("tun", Verdict::Fail, "/dev/net/tun is not there", Some("`modprobe tun`"))
    }
}

/// The first line of what `program --version` says.
fn version_of(program: &Path) -> Option<String> {
    let out = Command::new(program).arg("--version").stdin(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&out.stdout);
    out.status.success().then(|| text.lines().next().unwrap_or_default().trim().to_owned())
}

fn qemu(uses: &HostUses) -> Check {
    let todo = Some("`apt-get install qemu-system-x86`");
    match find_program(&uses.qemu) {
        None => check("qemu", Verdict::Fail, format!("there is no {}", uses.qemu.display()), todo),
        Some(path) => match version_of(&path) {
            Some(version) => check("qemu", Verdict::Ok, version, None),
            None => check("qemu", Verdict::Fail, format!("{} does not run", path.display()), todo),
        },
    }
}

fn bus_server(uses: &HostUses, answers: bool) -> Check {
    let todo = Some("`cargo xtask setup` installs it");
    let given = std::env::var_os("BOTHY_NATS_SERVER").filter(|_| !answers);
    let server = given.map_or_else(|| uses.bus_server.clone(), PathBuf::from);
    let Some(path) = find_program(&server) else {
        if answers {
            // The services found it; only this user does not.
            return check("nats-server", Verdict::Ok, format!("runs ({})", server.display()), None);
        }
        return check("nats-server", Verdict::Fail, format!("there is no {}", server.display()), todo);
    };
    match version_of(&path) {
        Some(text) if numbers(&text).is_some_and(|have| have >= OLDEST_BUS) => {
            check("nats-server", Verdict::Ok, text, None)
        }
        Some(text) => check("nats-server", Verdict::Fail, format!("{text} is older than 2.12.6"), todo),
        None => check("nats-server", Verdict::Fail, format!("{} does not run", path.display()), todo),
    }
}

/// The version in `nats-server: v2.12.6`.
fn numbers(text: &str) -> Option<[u32; 3]> {
    let (_, version) = text.rsplit_once('v')?;
    let mut parts = version.split(['.', '-']).map(|part| part.parse().ok());
    Some([parts.next()??, parts.next()??, parts.next()??])
}

fn nftables() -> Check {
    const NAME: &str = "libnftables.so.1";
    let dirs = [
        "/usr/lib/x86_64-linux-gnu",
        "/lib/x86_64-linux-gnu",
        "/usr/lib64",
        "/lib64",
        "/usr/lib",
        "/lib",
        "/usr/local/lib",
    ];
    match dirs.iter().map(|dir| Path::new(dir).join(NAME)).find(|path| path.exists()) {
        Some(path) => check("libnftables", Verdict::Ok, path.display().to_string(), None),
        None => check(
            "libnftables",
            Verdict::Fail,
            format!("there is no {NAME}"),
            Some("`apt-get install libnftables1`"),
        ),
    }
}

fn space(uses: &HostUses) -> Check {
    // The nearest directory that is there: the state directory is made by the first start.
    let dir = uses.state_dir.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/"));
    match nix::sys::statvfs::statvfs(dir) {
        Ok(stat) => {
            let free = stat.blocks_available().saturating_mul(stat.fragment_size());
            let found = format!("{} free in {}", crate::printer::size(free), dir.display());
            if free >= LITTLE {
                check("disk space", Verdict::Ok, found, None)
            } else {
                check(
                    "disk space",
                    Verdict::Warn,
                    found,
                    Some("make room: an image takes 1 to 2 GiB, each machine what it writes"),
                )
            }
        }
        Err(e) => check("disk space", Verdict::Warn, format!("cannot tell for {}: {e}", dir.display()), None),
    }
}

fn tool(name: &'static str, program: &str, missing: Verdict, todo: &str) -> Check {
    // Administrators' tools are not on every user's PATH.
    let found = find_program(Path::new(program)).or_else(|| {
        ["/usr/sbin", "/sbin"].iter().map(|dir| Path::new(dir).join(program)).find(|p| p.is_file())
    });
    match found {
        Some(path) => check(name, Verdict::Ok, path.display().to_string(), None),
        None => check(name, missing, format!("there is no {program}"), Some(todo)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_the_bus_server() {
        assert_eq!(numbers("nats-server: v2.12.6"), Some([2, 12, 6]));
        assert_eq!(numbers("nats-server: v2.15.1-RC.1"), Some([2, 15, 1]));
        assert!(numbers("nats-server: v2.9.10").unwrap() < OLDEST_BUS);
        assert_eq!(numbers("what"), None);
    }
}
