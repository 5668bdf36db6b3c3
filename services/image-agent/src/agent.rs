//! What the image-agent owns on disk, put together: the store, the initramfs files, the disks, and the builds.

use crate::{
    build,
    disks::{self, Disks},
    fault,
    initramfs::Initramfs,
    oci::{Blobs, Intake},
    recipe::Recipe,
    seeds::Grown,
    store::{Garbage, Store},
};
use bothy_config::Config;
use bothy_contract::{
    Error, ImageName, KernelName, Service,
    catalogue::KernelInfo,
    image::{BootSet, ImageManifest},
};
use std::{
    collections::BTreeSet,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};
use tokio::sync::RwLock;

/// The image-agent's things.
#[derive(Debug, Clone)]
pub(crate) struct Agent {
    /// The images.
    pub(crate) store: Store,
    /// The disks of VMs.
    pub(crate) disks: Disks,
    /// Read by whoever begins to use an image, written by whoever removes some.
    pub(crate) using: Arc<RwLock<()>>,
    /// The images whose work-seed is being made anew.
    pub(crate) healing: Arc<Mutex<BTreeSet<ImageName>>>,
    /// The work-seeds as large as disks.
    pub(crate) grown: Grown,
    /// The archives on their way in.
    pub(crate) intake: Arc<Intake>,
    /// The blobs that came from registries.
    pub(crate) blobs: Arc<Blobs>,
    initramfs: Arc<Initramfs>,
    recipes: PathBuf,
    netns: Option<PathBuf>,
}

impl Agent {
    /// Makes the directories that are not there yet.
    ///
    /// # Errors
    /// A directory cannot be made or swept.
    pub(crate) fn open(config: &Config) -> Result<Self, Error> {
        let home = config.service_dir(Service::Image);
        let (store, disks, templates) = (home.join("store"), home.join("disks"), home.join("templates"));
        let initramfs = store.join("initramfs");
        // VMMs' users go through these to files that they know the names of; the store may be listed by everybody.
        for (dir, mode) in [
            (&home, 0o711),
            (&store, 0o755),
            (&store.join("images"), 0o755),
            (&store.join("kernels"), 0o755),
            (&initramfs, 0o755),
            (&disks, 0o711),
            (&templates, 0o700),
        ] {
            fs_err::create_dir_all(dir)
                .and_then(|()| fs_err::set_permissions(dir, std::fs::Permissions::from_mode(mode)))
                .map_err(|e| fault::io("cannot make the image-agent's directories", &e))?;
        }
        for dir in home.ancestors().skip(1).filter(|d| !passable(d)) {
            tracing::warn!(
                dir = %dir.display(),
                "VMMs' users cannot pass this directory to reach their disks; `chmod o+x` it"
            );
        }
        let root = disks::choose(config.image.root_disk, &store, &disks);
        // Slot n of the network is user uid_base + n (config), and there are no more slots than addresses.
        let slots = 1_u32.checked_shl(32 - u32::from(config.net.prefix)).unwrap_or(u32::MAX);
        Ok(Self {
            store: Store::new(&store),
            disks: Disks::new(
                disks,
                templates,
                root,
                config.vm.uid_base..config.vm.uid_base.saturating_add(slots),
                store.join("roots"),
            ),
            using: Arc::default(),
            healing: Arc::default(),
            grown: Grown::new(store.join("grown")),
            blobs: Arc::new(Blobs::new(home.join("blobs"))),
            intake: Arc::new(Intake::new(config.ticket_socket(Service::Image), home.join("incoming"))),
            initramfs: Arc::new(Initramfs::new(initramfs, config.image.guest_binary.clone())),
            recipes: config.image.recipe_dir.clone(),
            netns: config.image.build_netns.clone(),
        })
    }

    /// The initramfs files that no image boots any more, removed unless only a `look` is asked for.
    pub(crate) fn old_initramfs(&self, look: bool) -> Result<Vec<Garbage>, Error> {
        let names: Vec<_> = self.store.list()?.into_iter().map(|m| m.name).collect();
        // One that cannot be used boots nothing.
        let images: Vec<_> = names.iter().filter_map(|name| self.store.open(name).ok()).collect();
        self.initramfs.prune_all(&images, look)
    }

    /// One kernel and who uses it.
    pub(crate) fn kernel(&self, name: &KernelName) -> Result<KernelInfo, Error> {
        let manifest = self.store.kernel(name)?;
        let images = self.store.list()?.into_iter().filter(|i| i.kernel.as_ref() == Some(name));
        Ok(KernelInfo { manifest, used_by: images.map(|i| i.name).collect() })
    }

    /// What `image` boots. Its initramfs is made if it is not there.
    pub(crate) fn resolve(&self, image: &ImageName) -> Result<BootSet, Error> {
        let _use = self.using.blocking_read();
        let image = self.store.open(image)?;
        let initrd = self.initramfs.ensure(&image)?;
        let (_, kernel) = image.artifact("kernel")?;
        let digest = image.digest();
        let manifest = image.manifest;
        Ok(BootSet {
            image: manifest.name,
            kernel,
            initrd,
            init: manifest.init,
            home: manifest.home,
            wait: manifest.wait,
            digest,
            defaults: manifest.defaults,
            root_disk: self.disks.root_disk(),
        })
    }

    /// A build of the recipe `name`, under way as `id`, and the image that is there if it is one of the same recipe.
    pub(crate) fn build(
        &self,
        name: &ImageName,
        id: impl std::fmt::Display,
    ) -> Result<(build::Build, Option<ImageManifest>), Error> {
        let recipe = Recipe::load(&self.recipes, name)?;
        let current = self.store.open(name).ok().map(|i| i.manifest);
        let current = current.filter(|m| m.recipe_sha256 == recipe.sha256);
        Ok((build::Build::new(name.clone(), recipe, self.store.clone(), self.netns.clone(), id), current))
    }
}

/// Whether others may pass `dir`.
fn passable(dir: &Path) -> bool {
    fs_err::metadata(dir).is_ok_and(|m| m.permissions().mode() & 0o001 != 0)
}
