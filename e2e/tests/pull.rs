//! Images of a real registry: pulled once, gone on with where they broke off, refused where they were altered, and shown to
//! whom the registry shows them.
#![expect(clippy::unwrap_used, reason = "a test's helper: a failed step is a failed test")]

use bothy_contract::Service;
use bothy_e2e::{host::Host, images, oci};
use bothy_testkit::{ChildGuard, require_root};
use fs_err as fs;
use std::{
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

const SECRET: &str = "open-sesame-4711";

/// A registry on the host's loopback.
struct Registry {
    dir: PathBuf,
    at: String,
    _process: ChildGuard,
}

impl Registry {
    /// One at `port`; with `secret`, for user `ali` only.
    fn start(host: &Host, port: u16, secret: Option<&str>) -> Self {
        let dir = host.scratch().join(format!("registry-{port}"));
        fs::create_dir_all(&dir).unwrap();
        let at = format!("127.0.0.1:{port}");
        let auth = secret.map(|secret| {
            let line = "import crypt,sys; print('ali:' + crypt.crypt(sys.argv[1], crypt.mksalt(crypt.METHOD_BLOWFISH)))";
            let made = Command::new("python3").args(["-W", "ignore", "-c", line, secret]).output().unwrap();
            fs::write(dir.join("users"), made.stdout).unwrap();
            format!("auth: {{ htpasswd: {{ realm: test, path: {} }} }}\n", dir.join("users").display())
        });
        let config = format!(
            "version: 0.1\nlog: {{ accesslog: {{ disabled: false }} }}\nstorage: {{ filesystem: {{ rootdirectory: {} }} }}\nhttp: {{ addr: '{at}' }}\n{}",
            dir.join("data").display(),
            auth.unwrap_or_default()
        );
        fs::write(dir.join("config.yml"), config).unwrap();
        let mut command = Command::new("bash");
        let program = host.run_bash("command -v docker-registry").stdout;
        let program = match program.trim() {
            "" => images::target_dir().join("tools/docker-registry").display().to_string(),
            found => found.to_owned(),
        };
        let line = format!(
            "exec {program} serve {} > {} 2>&1",
            dir.join("config.yml").display(),
            dir.join("log").display()
        );
        command.args(["-c", &line]);
        let process = host.spawn(&mut command);
        let begun = Instant::now();
        while host.run_bash(&format!("exec 3<>/dev/tcp/127.0.0.1/{port}")).status != 0 {
            let log = fs::read_to_string(dir.join("log")).unwrap_or_default();
            assert!(begun.elapsed() < Duration::from_secs(30), "no registry: {log}");
            std::thread::sleep(Duration::from_millis(50));
        }
        Self { dir, at, _process: process }
    }

    fn push(&self, host: &Host, layout: &Path, tag: &str, user: &str) {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pull_push.py");
        let line =
            format!("python3 {} {} {} team/tiny {tag} {user}", script.display(), layout.display(), self.at);
        host.run_bash(&line).ok();
    }

    /// The file of a blob.
    fn blob(&self, sha256: &str) -> PathBuf {
        let blobs = self.dir.join("data/docker/registry/v2/blobs/sha256");
        blobs.join(&sha256[..2]).join(sha256).join("data")
    }

    fn reference(&self, tag: &str) -> String {
        format!("{}/team/tiny:{tag}", self.at)
    }
}

/// The layers of a layout, the largest first: their digests and contents.
fn layers(layout: &Path) -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<_> = fs::read_dir(layout.join("blobs/sha256"))
        .unwrap()
        .map(|blob| {
            let path = blob.unwrap().path();
            (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(path).unwrap())
        })
        .filter(|(_, data)| data.first() != Some(&b'{'))
        .collect();
    all.sort_by_key(|(_, data)| std::cmp::Reverse(data.len()));
    all
}

#[test]
fn an_image_is_pulled_once_gone_on_with_and_refused_where_it_was_altered() {
    require_root!();
    let host = Host::start_quick(|_| {});
    let registry = Registry::start(&host, 5000, None);
    let layout = oci::layout(&host.scratch());
    registry.push(&host, &layout, "1", "");
    let (tiny, layers) = (registry.reference("1"), layers(&layout));
    let cache = host.config.service_dir(Service::Image).join("blobs");
    let whole = |n: usize| cache.join(&layers[n].0);

    // What an earlier pull began is gone on with.
    let half = layers[0].1.len() / 2;
    fs::write(whole(0).with_extension("part"), &layers[0].1[..half]).unwrap();
    let pulled = host.bothy(["image", "pull", &tiny, "--json"]);
    assert_eq!(pulled.status, 0, "{pulled:?}\n{}", host.logs());
    let pulled = pulled.json();
    let origin = pulled["result"]["origin"].as_str().unwrap();
    assert!(origin.starts_with(&format!("{tiny}@sha256:")), "{pulled:#}");
    assert_eq!((&pulled["image"], &pulled["result"]["init"]), (&"tiny".into(), &"agent".into()));
    assert_eq!(pulled["result"]["defaults"]["env"][0], "GREETING=hello");
    let log = fs::read_to_string(registry.dir.join("log")).unwrap();
    let partly = log.lines().filter(|line| line.contains(&layers[0].0) && line.contains("\" 206 "));
    assert_eq!(partly.count(), 1, "{log}");
    assert_eq!(fs::read(whole(0)).unwrap(), layers[0].1);

    // What is there is not fetched again: the registry has it no more.
    for (sha256, data) in &layers {
        fs::write(registry.blob(sha256), vec![0; data.len()]).unwrap();
    }
    let digest = origin.rsplit_once('@').unwrap().1;
    let by_digest = format!("{}/team/tiny@{digest}", registry.at);
    host.bothy(["image", "pull", &by_digest, "--name", "again"]).ok();
    let taken = host.bothy(["image", "pull", &tiny]);
    assert!(taken.status != 0 && taken.stderr.contains("there is an image tiny already"), "{taken:?}");
    host.bothy(["image", "pull", &tiny, "--force"]).ok();

    // Two at once for the same are one.
    let bothy = host.program("bothy").display().to_string();
    let pull = format!("{bothy} image pull {tiny} --name both --json");
    let both = host.run_bash(&format!("{pull} & {pull}; wait"));
    let ops: Vec<serde_json::Value> =
        serde_json::Deserializer::from_str(&both.stdout).into_iter().map(Result::unwrap).collect();
    // The second may have come when the first was done, and then was told so.
    assert!(ops.len() == 1 || ops[0]["op"] == ops[1]["op"], "{both:?}");

    // Another's bytes under its name are refused, and nothing of them stays.
    for n in 0..layers.len() {
        fs::remove_file(whole(n)).unwrap();
    }
    let refused = |what: &str, why: &str| {
        let refused = host.bothy(["image", "pull", what, "--name", "bad"]);
        assert!(refused.status != 0 && refused.stderr.contains(why), "{what}: {refused:?}");
    };
    refused(&tiny, "should have sha256:");
    refused(&registry.reference("2"), "has no image");
    refused("127.0.0.1:1/x", "cannot talk to registry 127.0.0.1:1");
    refused("Not a reference", "is not the reference of an image");
    refused(&format!("{}/team/tiny@sha256:{}", registry.at, "0".repeat(64)), "has no image");
    assert_ne!(host.bothy(["image", "show", "bad"]).status, 0);
    let store = host.config.service_dir(Service::Image).join("store");
    let left = fs::read_dir(store).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    assert_eq!(left.filter(|name| name.starts_with('.')).collect::<Vec<_>>(), Vec::<String>::new());
    assert!(!whole(0).exists() && !whole(0).with_extension("part").exists());
    drop(registry);
    host.finish();
}

#[test]
fn a_private_image_is_pulled_as_the_user_and_the_password_goes_nowhere_else() {
    require_root!();
    let host = Host::start_quick(|_| {});
    let registry = Registry::start(&host, 5001, Some(SECRET));
    let layout = oci::layout(&host.scratch());
    registry.push(&host, &layout, "1", &format!("ali:{SECRET}"));
    let tiny = registry.reference("1");
    let login = host.scratch().join("login");
    fs::create_dir_all(&login).unwrap();
    let pull = |auth: &str| {
        fs::write(login.join("config.json"), format!(r#"{{"auths":{{"{}":{{{auth}}}}}}}"#, registry.at))
            .unwrap();
        let bothy = host.program("bothy").display().to_string();
        let line = format!("DOCKER_CONFIG={} {bothy} image pull {tiny} --json", login.display());
        let ran = host.run_bash(&line);
        fs::remove_file(login.join("config.json")).unwrap();
        ran
    };
    let told = host.bothy(["image", "pull", &tiny]);
    assert!(told.status != 0 && told.stderr.contains("docker login"), "{told:?}");
    let helped = pull("");
    assert!(helped.status != 0 && helped.stderr.contains("helper"), "{helped:?}");
    // `printf ali:wrong | base64`, as `docker login` writes it.
    let wrong = pull(r#""auth":"YWxpOndyb25n""#);
    assert!(wrong.status != 0 && wrong.stderr.contains("user ali"), "{wrong:?}");

    let encoded = host.run_bash(&format!("printf 'ali:%s' {SECRET} | base64 -w0")).stdout;
    let pulled = pull(&format!(r#""auth":"{encoded}""#));
    assert_eq!(pulled.status, 0, "{pulled:?}\n{}", host.logs());
    // Nowhere in what the services keep or write: databases, logs, images.
    let state = host.config.state_dir.display().to_string();
    for secret in [SECRET, encoded.as_str()] {
        let found = host.run_bash(&format!("grep -rlaF --exclude-dir=scratch -e '{secret}' {state}"));
        assert_eq!((found.status, found.stdout.as_str()), (1, ""), "{found:?}");
    }
    drop(registry);
    host.finish();
}
