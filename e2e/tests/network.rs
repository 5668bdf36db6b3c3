//! What a guest can reach and what it cannot, with real packets from real guests.

use bothy_e2e::host::Host;
use bothy_testkit::require_root;

#[test]
fn guests_reach_neither_each_other_nor_the_hosts_services() {
    require_root!();
    let host = Host::start();
    let one = host.create("one");
    let two = host.create("two");
    let address = |vm: &serde_json::Value, field: &str| vm["lease"][field].as_str().unwrap().to_owned();
    let (first, second) = (address(&one, "address"), address(&two, "address"));
    let gateway = address(&one, "gateway");
    assert_ne!(first, second);

    // The host reaches its guest: sshd answers on the guest's own address.
    let banner = host.run_bash(&format!("exec 3<>/dev/tcp/{first}/22 && head -c 4 <&3"));
    assert_eq!(banner.ok().stdout, "SSH-");

    // A guest reaches no other guest, and none of the host's listeners, the bus among them.
    let open = |vm: &str, address: &str, port: u16| {
        let line = format!("timeout 3 bash -c 'exec 3<>/dev/tcp/{address}/{port}'");
        host.sh(vm, &line).status == 0
    };
    assert!(open("one", &first, 22), "the probe itself works");
    assert!(!open("one", &second, 22), "guest to guest");
    assert!(!open("one", &gateway, host.config.bus.port), "guest to the bus");
    let mut listener = std::process::Command::new("python3");
    listener.args(["-m", "http.server", "8099", "--bind", "0.0.0.0"]).stdout(std::process::Stdio::null());
    let listener = host.spawn(listener.stderr(std::process::Stdio::null()));
    let local = "for i in $(seq 50); do (exec 3<>/dev/tcp/127.0.0.1/8099) 2>/dev/null && exit 0; sleep 0.1; done; exit 1";
    host.run_bash(local).ok();
    assert!(!open("one", &gateway, 8099), "guest to a service of the host");
    drop(listener);

    // Another guest's address does not work for a guest that takes it.
    host.sh("two", &format!("ip addr flush dev $(ip -o route show default | sed 's/.* dev \\([^ ]*\\).*/\\1/'); ip addr add {first}/24 dev $(ls /sys/class/net | grep -v lo | head -1)")).ok();
    let banner = host.run_bash(&format!("exec 3<>/dev/tcp/{first}/22 && head -c 4 <&3"));
    assert_eq!(banner.ok().stdout, "SSH-", "the first guest keeps its address");

    host.bothy(["vm", "delete", "one", "two", "--force"]).ok();
    host.finish();
}
