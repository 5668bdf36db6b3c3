//! Several VMs in one command, how they are named, and signals to VMMs.

use bothy_e2e::host::Host;
use bothy_testkit::require_root;

#[test]
fn several_vms_in_one_command_and_one_wrong_name() {
    require_root!();
    let host = Host::start_quick(|_| {});
    let one = host.create_quick("web", &[]);
    host.create_quick("web-2", &[]);

    // An exact name beats a prefix; a prefix of one is enough, of two is not.
    assert_eq!(host.show("web")["id"], one["id"]);
    assert_eq!(host.show("web-")["name"], "web-2");
    let both = host.bothy(["vm", "show", "we"]);
    assert_ne!(both.status, 0);
    assert!(both.stderr.contains("web-2"), "says which: {}", both.stderr);
    let id = one["id"].as_str().unwrap().to_owned();
    assert_eq!(host.show(&id)["name"], "web");

    // The wrong one is named, the others are done, each once, and the status says that not all was.
    let ran = host.bothy(["vm", "stop", "web", "nobody", "web-2", &id]);
    assert_ne!(ran.status, 0, "{ran:?}");
    assert!(ran.stderr.contains("nobody"), "{}", ran.stderr);
    for name in ["web", "web-2"] {
        assert_eq!(host.show(name)["state"], "stopped");
    }
    let stops = host.bothy(["op", "list", "--json"]).json();
    let stops = stops.as_array().unwrap().iter().filter(|op| op["kind"] == "vm.stop").count();
    assert_eq!(stops, 2, "one named twice is stopped once");

    // One that is refused keeps no other from being done.
    host.bothy(["vm", "start", "web"]).ok();
    let ran = host.bothy(["vm", "delete", "web", "web-2"]);
    assert_ne!(ran.status, 0, "{ran:?}");
    assert_eq!(host.show("web")["state"], "running");
    assert_ne!(host.bothy(["vm", "show", "web-2"]).status, 0, "it is deleted");
    host.bothy(["vm", "delete", "web", "--force"]).ok();
    host.finish();
}

#[test]
fn a_kill_ends_in_stopped_whatever_the_signal() {
    require_root!();
    let host = Host::start_quick(|_| {});
    host.create_quick("victim", &[]);
    for (name, number) in [("TERM", 15), ("KILL", 9), ("INT", 2)] {
        if host.show("victim")["state"] == "stopped" {
            host.bothy(["vm", "start", "victim"]).ok();
        }
        host.bothy(["vm", "kill", "victim", "--signal", name]).ok();
        let vm = host.show("victim");
        assert_eq!(vm["state"], "stopped", "{name}: {vm:#}");
        // QEMU takes the gentle ones for a request to end, and exits.
        let exit = &vm["last_exit"];
        assert!(exit["signal"] == number || exit["status"] == 0, "{name}: {exit}");
        assert!(name != "KILL" || exit["signal"] == 9, "{exit}");
    }
    let refused = host.bothy(["vm", "kill", "victim"]);
    assert_ne!(refused.status, 0, "nothing is left to kill");
    host.bothy(["vm", "delete", "victim"]).ok();
    host.finish();
}
