//! The real binary on a real bus, with a store of its own.

use bothy_bus::{Client, testing::TestBus};
use bothy_contract::{
    ImageName, OpId, Service,
    image::{Artifact, ImageManifest, InitStyle, ListImages},
    methods::{ImageListAll, ImageOpShow},
    op::{OpRecord, OpRef},
};
use std::{
    path::{Path, PathBuf},
    process::{Child, Command},
    time::Duration,
};

pub(crate) const MIB: u64 = 1 << 20;
/// How long anything may take on a loaded machine: nothing is waited for without end.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);
/// The SHA-256 of a MiB of zeros.
const ZEROS: &str = "30e14955ebf1352266dc2ff8067e68104607e750abb9d3b36582b8af909fcb58";

/// The agent, ended with the test.
pub(crate) struct Agent(Child);

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) struct Host {
    pub(crate) agent: Agent,
    pub(crate) bus: TestBus,
    pub(crate) file: PathBuf,
}

impl Host {
    pub(crate) fn home(&self) -> PathBuf {
        self.bus.config.service_dir(Service::Image)
    }

    pub(crate) fn spawn(file: &Path) -> Agent {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bothy-image-agent"));
        Agent(command.arg("--config").arg(file).spawn().unwrap())
    }

    pub(crate) async fn start() -> (Self, Client, Client) {
        let mut bus = TestBus::start();
        let state = bus.config.state_dir.clone();
        bus.config.image.recipe_dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guest/images");
        bus.config.image.guest_binary = state.join("guest");
        fs_err::write(state.join("guest"), "the guest's agent").unwrap();
        let file = state.join("bothy.toml");
        fs_err::write(&file, bus.config.to_toml().unwrap()).unwrap();
        let gateway = Client::connect(&bus.config, Service::Gateway).await.unwrap();
        gateway.ensure_ops_stream().await.unwrap();
        let vm = Client::connect(&bus.config, Service::Vm).await.unwrap();
        let host = Self { agent: Self::spawn(&file), bus, file };
        host.ready(&gateway).await;
        (host, gateway, vm)
    }

    pub(crate) async fn ready(&self, gateway: &Client) {
        let answers = async {
            while gateway.call::<ImageListAll>(&ListImages {}).await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, answers).await.unwrap();
    }

    /// Copies an image in, as a person may: its directory is all that makes it one.
    pub(crate) fn plant(&self, name: &str) -> ImageName {
        let name: ImageName = name.parse().unwrap();
        let dir = self.home().join("store/images").join(name.as_str());
        fs_err::create_dir_all(&dir).unwrap();
        let files = ["rootfs", "kernel", "modules", "system-seed", "work-seed"].map(|role| {
            fs_err::File::create(dir.join(role)).unwrap().set_len(MIB).unwrap();
            let artifact =
                Artifact { file: role.into(), sha256: ZEROS.into(), size: MIB, path: None, stamp: None };
            (role.to_owned(), artifact)
        });
        let manifest =
            ImageManifest { artifacts: files.into(), ..ImageManifest::new(name.clone(), InitStyle::Systemd) };
        fs_err::write(dir.join("manifest.json"), serde_json::to_vec(&manifest).unwrap()).unwrap();
        name
    }

    pub(crate) fn builds_left(&self) -> Vec<PathBuf> {
        let entries = fs_err::read_dir(self.home().join("store/images")).unwrap();
        entries.map(|e| e.unwrap().path()).filter(|p| p.to_string_lossy().contains("/images/.")).collect()
    }
}

impl Host {
    /// Ends the agent as a crash would, and starts it anew.
    pub(crate) fn spawn_after_kill(agent: Agent, file: &Path) -> Agent {
        drop(agent);
        Self::spawn(file)
    }
}

pub(crate) async fn ended(gateway: &Client, op: OpId) -> OpRecord {
    let ended = async {
        loop {
            let record = gateway.call::<ImageOpShow>(&OpRef { op }).await.unwrap();
            if record.state.is_final() {
                return record;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, ended).await.unwrap()
}
