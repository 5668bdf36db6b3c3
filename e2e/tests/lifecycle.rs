//! One VM through its life: create, exec, stop, start, delete; and what other tools see of it.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "what both tests share: a failed step is a failed test"
)]

use bothy_e2e::host::Host;
use bothy_testkit::require_root;

#[test]
fn a_vm_lives_through_create_exec_stop_start_delete() {
    require_root!();
    a_life(Host::start());
}

#[test]
fn a_vm_that_was_resumed_lives_as_one_that_booted() {
    require_root!();
    let mut host = Host::start_with(&[], |config| config.template.max = 1);
    host.warm(&[]);
    a_life(host);
}

const SECRET: &str = "keep-out-of-everything-0815";

/// Has the user's machines get a token, and what it is.
fn give_token(host: &Host, token: &str) {
    let dir = host.user_config().join("bothy");
    fs_err::create_dir_all(&dir).unwrap();
    fs_err::write(dir.join("token"), token).unwrap();
    let config = format!(
        "[[file_sync]]\nhost = \"{0}/token\"\nguest = \"~/.config/tool/token\"\n\n\
         [[file_sync]]\nhost = \"{0}/none\"\nguest = \"~/none\"\n",
        dir.display()
    );
    fs_err::write(dir.join("config.toml"), config).unwrap();
}

fn a_life(host: Host) {
    give_token(&host, SECRET);
    let created = host.bothy(["vm", "create", "--name", "web-1", "--json"]);
    assert!(
        created.stderr.contains("file_sync") && created.stderr.contains("none is not there"),
        "{created:?}"
    );
    let vm = created.json()["vm"].clone();
    let token = "stat -c '%a %U' /root/.config/tool/token; cat /root/.config/tool/token";
    assert_eq!(host.sh("web-1", token).ok().stdout, format!("600 root\n{SECRET}"));
    // Where it is: on the machine's own disks, and nowhere else of the host's.
    let state = host.config.state_dir.display();
    let found = host.run_bash(&format!(
        "grep -rlaF --exclude-dir=disks --exclude-dir=home -e {SECRET} {state} {}",
        host.config.run_dir.display()
    ));
    assert_eq!(found.stdout, "", "{found:?}");
    assert_eq!(vm["state"], "running");
    assert_eq!(vm["name"], "web-1");

    // The guest is the machine that it was told to be.
    assert_eq!(host.sh("web-1", "hostname").ok().stdout.trim(), "web-1");
    let address = vm["lease"]["address"].as_str().unwrap().to_owned();
    assert!(host.sh("web-1", "ip -4 -o addr show").ok().stdout.contains(&address));
    let first_boot = host.sh("web-1", "cat /proc/sys/kernel/random/boot_id").ok().stdout.trim().to_owned();
    assert_eq!(vm["boot_id"], first_boot.as_str());
    let guest_time: i64 = host.sh("web-1", "date +%s").ok().stdout.trim().parse().unwrap();
    let host_time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    assert!(guest_time.abs_diff(host_time.cast_signed()) < 30, "guest {guest_time}, host {host_time}");

    // The work disk and the root were grown to what was asked for: 10 GiB by default.
    for mount in ["/", "/root"] {
        let size = host.sh("web-1", &format!("df -Pk {mount} | tail -1 | tr -s ' ' | cut -d' ' -f2")).ok();
        let kib: u64 = size.stdout.trim().parse().unwrap();
        assert!(kib > 9 << 20, "{mount} has {kib} KiB");
    }

    // A write that a command has finished is there after a stop, on both disks.
    host.sh("web-1", "echo kept > /root/kept; echo kept > /etc/kept").ok();
    host.bothy(["vm", "stop", "web-1"]).ok();
    let stopped = host.show("web-1");
    assert_eq!(stopped["state"], "stopped", "{stopped:#}");
    let refused = host.sh("web-1", "true");
    assert_eq!(refused.status, 125);
    assert!(refused.stderr.contains("vm start"), "says what to do: {}", refused.stderr);

    give_token(&host, "another");
    host.bothy(["vm", "start", "web-1"]).ok();
    assert_eq!(host.sh("web-1", token).ok().stdout, "600 root\nanother");
    assert_eq!(host.sh("web-1", "cat /root/kept /etc/kept").ok().stdout, "kept\nkept\n");
    assert_ne!(host.sh("web-1", "cat /proc/sys/kernel/random/boot_id").ok().stdout.trim(), first_boot);
    assert!(host.sh("web-1", "ip -4 -o addr show").ok().stdout.contains(&address), "the lease is stable");

    // ssh works through the channel, with the key that the create put there.
    let ssh = host.bothy(["vm", "ssh", "web-1", "--", "echo from-ssh; exit 3"]);
    assert_eq!((ssh.status, ssh.stdout.trim()), (3, "from-ssh"), "{ssh:?}");

    let logs = host.bothy(["vm", "logs", "web-1"]).ok();
    assert!(!logs.stdout.is_empty(), "the console says something");

    let refused = host.bothy(["vm", "delete", "web-1"]);
    assert_ne!(refused.status, 0, "a running VM is not deleted without --force");
    assert_eq!(host.show("web-1")["state"], "running");
    host.bothy(["vm", "delete", "web-1", "--force"]).ok();
    assert_eq!(host.bothy(["vm", "list", "--json"]).json().as_array().unwrap().len(), 0);
    assert_eq!(host.resumed(), u64::from(host.config.template.max.min(1)));
    host.finish();
}

#[test]
fn a_power_off_from_inside_ends_in_stopped() {
    require_root!();
    let host = Host::start();
    host.create("short");
    let _ = host.sh("short", "poweroff");
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    loop {
        let vm = host.show("short");
        if vm["state"] == "stopped" {
            assert_eq!(vm["last_exit"]["status"], 0, "{vm:#}");
            break;
        }
        assert!(std::time::Instant::now() < deadline, "{vm:#}\n{}", host.logs());
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
    host.bothy(["vm", "delete", "short"]).ok();
    host.finish();
}
