//! Bad input, one by one: each is refused with what is wrong and what to do, and changes nothing.

use bothy_e2e::{host::Host, repo};
use bothy_testkit::require_root;
use std::path::Path;

/// `args` must fail as bothy's own failure, say `what`, and hint.
#[track_caller]
fn refused(host: &Host, cwd: &Path, args: &[&str], what: &str) {
    let ran = host.bothy_in(cwd, args);
    assert_eq!(ran.status, 125, "{args:?}: {ran:#?}");
    assert!(ran.stderr.contains(what), "{args:?} should say {what:?}:\n{}", ran.stderr);
    assert!(!ran.stderr.contains("panicked"), "{}", ran.stderr);
    assert_eq!(host.bothy(["vm", "list", "--json"]).json(), serde_json::json!([]), "{args:?} left a VM");
}

#[test]
fn bad_input_is_refused_and_changes_nothing() {
    require_root!();
    let host = Host::start();
    let scratch = host.scratch();
    let at = scratch.as_path();
    for name in ["", "-x", "UPPER", "a_b", "a.b", "ä", "../x", &"x".repeat(64)] {
        refused(&host, at, &["vm", "create", &format!("--name={name}")], "name");
    }
    refused(&host, at, &["vm", "create", "--image", "no-such-image"], "no-such-image");
    refused(&host, at, &["vm", "create", "--cpus", "0"], "cpus");
    refused(&host, at, &["vm", "create", "--cpus", "1000"], "cpus");
    refused(&host, at, &["vm", "create", "--memory", "0"], "memory");
    refused(&host, at, &["vm", "create", "--memory", "1"], "memory");
    refused(&host, at, &["vm", "create", "--disk", "0"], "disk");
    refused(&host, at, &["vm", "show", "nobody"], "nobody");
    refused(&host, at, &["vm", "exec", "nobody", "--", "true"], "nobody");
    refused(&host, at, &["op", "show", "not-an-id"], "not-an-id");
    refused(&host, at, &["image", "build", "no-such-recipe"], "no-such-recipe");

    refused(&host, at, &["run", ".", "--", "true"], "git repository");
    refused(&host, at, &["run", "/no/such/dir", "--", "true"], "/no/such/dir");
    repo::git(at, &["init", "-q", "--bare", "bare"]);
    refused(&host, at, &["run", "bare", "--", "true"], "bare");
    repo::git(at, &["init", "-q", "empty"]);
    refused(&host, at, &["run", "empty", "--", "true"], "no commit");

    host.assert_no_leaks();
    host.finish();
}

#[test]
fn a_host_that_is_not_there_or_there_already_is_said() {
    require_root!();
    let host = Host::start_bare(&[], |_| {});
    let second = host.bothy(["host", "up", "--state", host.config.state_dir.to_str().unwrap()]);
    assert_eq!(second.status, 125, "{second:?}");
    assert!(second.stderr.contains("belongs to a running"), "{}", second.stderr);
    host.bothy(["host", "status"]).ok();

    // No image: said, with the command that makes one.
    let no_image = host.bothy(["vm", "create"]);
    assert_eq!(no_image.status, 125);
    assert!(no_image.stderr.contains("bothy image build"), "{}", no_image.stderr);

    let nowhere = host.bothy(["--socket", "/nowhere/gateway.sock", "vm", "list"]);
    assert_eq!(nowhere.status, 125);
    assert!(nowhere.stderr.contains("bothy host up"), "{}", nowhere.stderr);
    host.finish();
}

#[test]
fn a_full_disk_fails_the_create_and_leaves_nothing() {
    require_root!();
    // The disks of VMs go to a file system that is too small for the seeds.
    let host = Host::start_with(&[], |config| {
        let disks = config.service_dir(bothy_contract::Service::Image).join("disks");
        fs_err::create_dir_all(&disks).unwrap();
        let options = Some("size=64k");
        nix::mount::mount(Some("none"), &disks, Some("tmpfs"), nix::mount::MsFlags::empty(), options)
            .unwrap();
    });
    let disks = host.config.state_dir.join("image-agent/disks");
    let full = host.bothy(["vm", "create", "--name", "full"]);
    assert_eq!(full.status, 125, "{full:?}");
    assert!(full.stderr.contains("space"), "says why: {}", full.stderr);
    host.assert_no_leaks();
    nix::mount::umount2(&disks, nix::mount::MntFlags::MNT_DETACH).unwrap();
    // With room again, the same name works.
    host.create("full");
    host.bothy(["vm", "delete", "full", "--force"]).ok();
    host.finish();
}
