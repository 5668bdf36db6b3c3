//! `vm set`: disks grow at once, processors and memory come with the next start, nothing shrinks.
#![expect(clippy::unwrap_used, reason = "a test's helper: a failed step is a failed test")]

use bothy_e2e::host::Host;
use bothy_testkit::require_root;

const GIB: u64 = 1 << 20; // in KiB

fn size(host: &Host, mount: &str) -> u64 {
    let line = format!("df -Pk {mount} | tail -1 | tr -s ' ' | cut -d' ' -f2");
    host.sh("grow", &line).ok().stdout.trim().parse().unwrap()
}

#[test]
fn disks_grow_live_and_stopped_and_the_rest_at_the_next_start() {
    require_root!();
    let host = Host::start_quick(|_| {});
    host.create_quick("grow", &["--disk", "2G", "--cpus", "1", "--memory", "384M"]);
    host.sh("grow", "echo kept > /root/kept; echo kept > /etc/kept").ok();
    let boot = host.boot_id("grow");
    assert!((GIB..2 * GIB + 1).contains(&size(&host, "/root")));

    // Live: the guest sees it at once, and does not boot for it.
    host.bothy(["vm", "set", "grow", "--disk", "4G"]).ok();
    assert!(size(&host, "/root") > 3 * GIB, "{} KiB", size(&host, "/root"));
    host.bothy(["vm", "set", "grow", "--system-disk", "12G"]).ok();
    assert!(size(&host, "/") > 11 * GIB, "{} KiB", size(&host, "/"));
    assert_eq!(host.boot_id("grow"), boot);

    // What a running guest cannot be given is wanted, and shown as not there yet.
    host.bothy(["vm", "set", "grow", "--cpus", "2", "--memory", "512M"]).ok();
    let vm = host.show("grow");
    assert_eq!((&vm["shape"]["cpus"], &vm["shape"]["memory_mib"]), (&2.into(), &512.into()), "{vm:#}");
    assert_eq!((&vm["booted"]["cpus"], &vm["booted"]["memory_mib"]), (&1.into(), &384.into()), "{vm:#}");
    assert_eq!(host.sh("grow", "nproc").ok().stdout, "1\n");

    // Nothing shrinks, and a refusal changes nothing.
    for args in [["--disk", "1G"], ["--system-disk", "1G"]] {
        let refused = host.bothy(["vm", "set", "grow"].iter().chain(&args));
        assert_ne!(refused.status, 0, "{args:?}");
        assert!(refused.stderr.contains("shrink") || refused.stderr.contains("grow"), "{}", refused.stderr);
    }
    assert_eq!(host.show("grow")["shape"], vm["shape"]);

    // Stopped: the disk grows now, the guest finds it at its start.
    host.bothy(["vm", "stop", "grow"]).ok();
    host.bothy(["vm", "set", "grow", "--disk", "6G"]).ok();
    host.bothy(["vm", "start", "grow"]).ok();
    assert!(size(&host, "/root") > 5 * GIB, "{} KiB", size(&host, "/root"));
    assert_eq!(host.sh("grow", "nproc").ok().stdout, "2\n");
    let total = host.sh("grow", "grep MemTotal /proc/meminfo | tr -s ' ' | cut -d' ' -f2").ok();
    assert!(total.stdout.trim().parse::<u64>().unwrap() > 384 << 10, "{}", total.stdout);
    assert_eq!(host.sh("grow", "cat /root/kept /etc/kept").ok().stdout, "kept\nkept\n");
    host.bothy(["vm", "delete", "grow", "--force"]).ok();
    host.finish();
}
