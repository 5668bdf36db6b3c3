//! The services that an image declares: a VM is ready when they are up, and one that does not come up is named.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a helper that fails is a failed test")]

use bothy_contract::Service;
use bothy_e2e::{host::Host, images};
use bothy_testkit::require_root;
use serde_json::json;

/// Has VMs of image `late` wait for `wait` from now on.
fn declare(host: &Host, wait: serde_json::Value) {
    let image = host.config.service_dir(Service::Image).join("store/images/late/manifest.json");
    let mut manifest: serde_json::Value = serde_json::from_slice(&fs_err::read(&image).unwrap()).unwrap();
    manifest["wait"] = wait;
    // Beside, then in its place: what is there is linked with the cached image.
    let beside = image.with_extension("new");
    fs_err::write(&beside, manifest.to_string()).unwrap();
    fs_err::rename(&beside, &image).unwrap();
}

#[test]
fn a_service_that_fails_is_named_with_its_last_words_and_one_that_comes_up_is_waited_for() {
    require_root!();
    let host = Host::start_with(&[], |config| images::variant_into(config, "late", |_| {}));
    declare(&host, json!([{ "name": "shop", "unit": "shop.service", "timeout_s": 100 }]));
    let refused = host.bothy(["vm", "create", "--image", "late", "--name", "a", "--memory", "256M"]);
    assert_ne!(refused.status, 0, "{refused:?}");
    for words in ["stage wait_services failed", "shop", "unit shop.service"] {
        assert!(refused.stderr.contains(words), "{words}: {}", refused.stderr);
    }
    host.assert_no_leaks();

    declare(&host, json!([{ "name": "ssh", "port": 22, "timeout_s": 100 }]));
    host.bothy(["vm", "create", "--image", "late", "--name", "a", "--memory", "256M"]).ok();
    let unit = "[Service]\nType=oneshot\nExecStart=/bin/sh -c 'echo the till is empty; exit 3'\n\
        [Install]\nWantedBy=multi-user.target\n";
    let install = "cat > /etc/systemd/system/shop.service && systemctl enable shop.service";
    host.sh(
        "a",
        &format!("printf '{}' | {{ {install}; }}", unit.replace('\n', "\\n").replace('\'', "'\\''")),
    )
    .ok();
    host.bothy(["vm", "stop", "a"]).ok();
    declare(&host, json!([{ "name": "shop", "unit": "shop.service", "timeout_s": 100 }]));
    let failed = host.bothy(["vm", "start", "a"]);
    assert_ne!(failed.status, 0, "{failed:?}");
    for words in ["shop (unit shop.service)", "the till is empty"] {
        assert!(failed.stderr.contains(words), "{words}: {}", failed.stderr);
    }
    assert_eq!(host.show("a")["state"], "stopped");

    // The same unit with a port, and both are there.
    declare(&host, json!([{ "name": "ssh", "unit": "ssh.service", "port": 22, "timeout_s": 100 }]));
    host.bothy(["vm", "start", "a"]).ok();
    assert_eq!(host.sh("a", "systemctl is-active ssh.service").ok().stdout, "active\n");
    host.bothy(["vm", "delete", "a", "--force"]).ok();
    host.finish();
}
