//! Images from elsewhere: an OCI image without an init system, sshd or anything else of a distribution is imported, booted
//! and worked in.

use bothy_e2e::{
    host::Host,
    oci::{layout, shell},
};
use bothy_testkit::require_root;
use fs_err as fs;
use std::path::PathBuf;

#[test]
fn an_oci_image_is_imported_booted_and_worked_in() {
    require_root!();
    let host = Host::start();
    let dir = tempfile::tempdir().unwrap();
    let layout = layout(dir.path());
    let path = layout.to_str().unwrap();

    let made = host.bothy(["image", "import", "tiny", path, "--json"]);
    assert_eq!(made.status, 0, "{made:?}\n{}", host.logs());
    let made = made.json();
    assert_eq!(made["result"]["init"], "agent", "{made:#}");
    assert_eq!(made["result"]["defaults"]["env"][0], "GREETING=hello");
    assert_eq!(made["result"]["defaults"]["working_dir"], "/etc");
    let taken = host.bothy(["image", "import", "tiny", path]);
    assert!(taken.status != 0 && taken.stderr.contains("there is an image tiny already"), "{taken:?}");

    host.bothy(["vm", "create", "--name", "t", "--image", "tiny", "--memory", "256M", "--cpus", "1"]).ok();
    // Where, as whom and with what the image says; and as root where that is asked for.
    let said = host.sh(
        "t",
        "echo $GREETING $PWD; while read -r k v; do case $k in Uid:|Gid:) echo $v;; esac; done < /proc/self/status",
    );
    assert_eq!(said.ok().stdout, "hello /etc\n12 12 12 12\n7 7 7 7\n");
    let as_root = |line: &str| host.bothy(["vm", "exec", "--user", "root", "t", "--", "sh", "-c", line]);
    // Neither file ends in a line's end, so `read` says that it came to the file's end; `test` has the last word.
    let said = as_root("read -r a < above; read -r k < /etc/kept; echo $a $k; test ! -e /etc/gone");
    assert_eq!(said.ok().stdout, "above below\n");
    let written =
        as_root("echo new > /etc/new && read -r n < /etc/new && echo $n $$ > /root/home && echo ok");
    assert_eq!(written.ok().stdout, "ok\n");
    let refused = host.sh("t", "echo new > /etc/other");
    assert!(refused.status != 0 && refused.stderr.contains("ermission denied"), "{refused:?}");
    host.bothy(["vm", "delete", "--force", "t"]).ok();

    // A root file system's archive, through standard input's place as a file; and what is refused leaves nothing.
    let tar = dir.path().join("root.tar");
    fs::write(&tar, shell()).unwrap();
    let root = host.bothy(["image", "import", "root", tar.to_str().unwrap(), "--json"]).json();
    assert_eq!(root["result"]["origin"], "root.tar");
    for damaged in fs::read_dir(layout.join("blobs/sha256")).unwrap() {
        let damaged = damaged.unwrap();
        if damaged.metadata().unwrap().len() > 100_000 {
            let mut data = fs::read(damaged.path()).unwrap();
            data[5000] ^= 1;
            fs::write(damaged.path(), data).unwrap();
        }
    }
    for (path, why) in [
        (path, "should be sha256:"),
        ("/no/such/file", "cannot open the archive"),
        ("/etc", "is not the directory of an OCI layout"),
        ("/etc/passwd", "no tar archive"),
    ] {
        let refused = host.bothy(["image", "import", "bad", path]);
        assert!(refused.status != 0 && refused.stderr.contains(why), "{path}: {refused:?}");
    }
    let agent = host.config.service_dir(bothy_contract::Service::Image);
    let left = |dir: PathBuf| -> Vec<_> {
        let names = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        names.filter(|n| n.starts_with('.') || n.len() == 32 || n == "bad").collect()
    };
    assert_eq!(left(agent.join("incoming")), Vec::<String>::new());
    assert_eq!(left(agent.join("store/images")), Vec::<String>::new());
    host.finish();
}
