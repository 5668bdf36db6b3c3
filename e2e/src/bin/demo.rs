//! `cargo xtask demo`: the main job on a real repository, from nothing to nothing.
//!
//! A private host comes up, the default image is built if it is not there, `bothy run` works on a clone of this very
//! repository, and its patch is checked against that clone. Then everything goes, and the leak check says so.
#![expect(clippy::print_stdout, reason = "a program for people")]
#![expect(clippy::expect_used, reason = "a failed step is a failed demo")]

use bothy_e2e::{host::Host, images, repo};

/// What runs in the guest: reads the history and the files, and changes some.
const IN_THE_GUEST: &str = r#"
set -e
echo "I am $(uname -n), kernel $(uname -r), booted $(cut -d. -f1 /proc/uptime) s ago, in $PWD"
echo "$(git log --oneline | wc -l) commits, the last: $(git log -1 --format=%s)"
echo "$(git ls-files | wc -l) files, $(git ls-files -z '*.rs' | xargs -0 cat | wc -l) lines of Rust"
echo "A guest was here." > GUESTBOOK
sed -i '1s/$/ (as seen from a guest)/' README.md
git add GUESTBOOK && git -c user.name=guest -c user.email=guest@bothy commit -qm "a commit made in the guest"
git rm -q LICENSE-MIT
"#;

fn main() {
    let image = images::default_image();
    println!("== image: {}", image.display());
    let host = Host::start();
    println!("== host up: a bus and five services in a network namespace of their own");

    let scratch = host.scratch();
    let clone = scratch.join("bothy");
    let from = images::workspace_dir();
    repo::git(&scratch, &["clone", "-q", &from.to_string_lossy(), &clone.to_string_lossy()]);
    let patch = scratch.join("work.patch");
    println!("== bothy run . --rm -- sh -c '...'   (in a clone of this repository)");
    let run = ["run", ".", "--rm", "--patch", &patch.to_string_lossy(), "--", "sh", "-c", IN_THE_GUEST];
    let status = host.bothy_live(&clone, run);
    assert_eq!(status, 0, "`bothy run` failed\n{}", host.logs());

    repo::git(&clone, &["apply", "--check", &patch.to_string_lossy()]);
    println!(
        "== the patch applies: {}",
        repo::git(&clone, &["apply", "--stat", &patch.to_string_lossy()]).trim_end()
    );

    println!("== where the time went");
    for op in host.bothy(["op", "list", "--json"]).json().as_array().expect("operations") {
        if op["kind"] == "vm.create" {
            for stage in op["stages"].as_array().expect("stages") {
                let ms = |field: &str| stage[field].as_f64().unwrap_or(0.0) / 1e3;
                let name = stage["name"].as_str().unwrap_or_default();
                println!("   {name:<20} began {:>8.1} ms   took {:>8.1} ms", ms("started_us"), ms("took_us"));
            }
        }
    }
    host.finish();
    println!("== host down: no process, TAP, bridge, rule, mount, loop device, socket or file is left");
}
