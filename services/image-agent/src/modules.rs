//! Which kernel modules a guest needs before it has a root, and in which order they are loaded.
//!
//! The order comes from the kernel package's own `modules.dep` where there is one, and otherwise from the modules
//! themselves: Debian's package has none, since depmod(8) runs when it is installed, and it is never installed here.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
};

/// The modules a guest asks for: disks, the channel's ports, the NIC and the joined root. Each costs an emulated
/// guest time, so there are no others. `-` and `_` in names are the same to the kernel; files spell them either way.
pub(crate) const WANTED: [&str; 5] = ["virtio_mmio", "virtio_blk", "virtio_console", "virtio_net", "overlay"];

/// What a guest asks for besides where its machine has a virtio socket device, as Firecracker's have: only there it is
/// loaded. A kernel without it boots under QEMU only.
pub(crate) const WANTED_FOR_VSOCK: [&str; 1] = ["vmw_vsock_virtio_transport"];

/// Modules by their files, each after what it needs.
#[derive(Debug)]
pub(crate) struct Modules {
    /// What every guest loads.
    pub(crate) always: Vec<PathBuf>,
    /// What a guest with a virtio socket device loads after that.
    pub(crate) vsock: Vec<PathBuf>,
}

/// Why the order could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ModulesError {
    /// The tree could not be read.
    #[error("cannot read the kernel's modules")]
    Io(#[from] io::Error),
    /// A module that another needs is not in the package.
    #[error("module {needed} is needed by {by} and not in the kernel package")]
    Missing {
        /// What is not there.
        needed: String,
        /// What needs it.
        by: String,
    },
    /// Modules that need one another.
    #[error("the modules' dependencies go in a circle through {0}")]
    Circle(String),
    /// Not an ELF file with a `.modinfo` section.
    #[error("{0} is not an uncompressed kernel module")]
    NotAModule(PathBuf),
}

/// The kernel's spelling of a module name.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

/// The files of [`WANTED`] and [`WANTED_FOR_VSOCK`] and all they need, below `tree` (`lib/modules/<release>`).
/// A wanted module that the kernel has built in is left out.
pub(crate) fn in_load_order(tree: &Path) -> Result<Modules, ModulesError> {
    let mut files = BTreeMap::new();
    collect(tree, &mut files)?;
    let builtin: BTreeSet<String> = match fs_err::read_to_string(tree.join("modules.builtin")) {
        Ok(text) => text.lines().filter_map(|l| stem(Path::new(l))).collect(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => BTreeSet::new(),
        Err(e) => return Err(e.into()),
    };
    let needs = |name: &str| -> Result<Vec<String>, ModulesError> {
        let Some(file) = files.get(name) else { return Ok(Vec::new()) };
        let data = fs_err::read(file)?;
        depends(&data).ok_or_else(|| ModulesError::NotAModule(file.clone()))
    };
    let sorted = |wanted: &[&str]| {
        sort(wanted.iter().copied(), needs, |n| files.contains_key(n), |n| builtin.contains(n))
    };
    let always = sorted(&WANTED)?;
    let there: Vec<&str> = WANTED_FOR_VSOCK.into_iter().filter(|n| files.contains_key(*n)).collect();
    let mut vsock = sorted(&there)?;
    vsock.retain(|n| !always.contains(n));
    let paths = |names: &[String]| names.iter().filter_map(|n| files.get(n).cloned()).collect();
    Ok(Modules { always: paths(&always), vsock: paths(&vsock) })
}

/// Depth-first: each name after all that it needs. Pure, so that it can be tested without a kernel.
fn sort<'a>(
    wanted: impl Iterator<Item = &'a str>,
    needs: impl Fn(&str) -> Result<Vec<String>, ModulesError>,
    exists: impl Fn(&str) -> bool,
    builtin: impl Fn(&str) -> bool,
) -> Result<Vec<String>, ModulesError> {
    struct Walk<N, E, B> {
        needs: N,
        exists: E,
        builtin: B,
        open: BTreeSet<String>,
        order: Vec<String>,
    }
    impl<N, E, B> Walk<N, E, B>
    where
        N: Fn(&str) -> Result<Vec<String>, ModulesError>,
        E: Fn(&str) -> bool,
        B: Fn(&str) -> bool,
    {
        fn visit(&mut self, name: &str, by: &str) -> Result<(), ModulesError> {
            if self.order.iter().any(|n| n == name) || (self.builtin)(name) {
                return Ok(());
            }
            if !(self.exists)(name) {
                return Err(ModulesError::Missing { needed: name.to_owned(), by: by.to_owned() });
            }
            if !self.open.insert(name.to_owned()) {
                return Err(ModulesError::Circle(name.to_owned()));
            }
            for needed in (self.needs)(name)? {
                self.visit(&needed, name)?;
            }
            self.open.remove(name);
            self.order.push(name.to_owned());
            Ok(())
        }
    }
    let mut walk = Walk { needs, exists, builtin, open: BTreeSet::new(), order: Vec::new() };
    for name in wanted {
        walk.visit(name, "bothy-guest")?;
    }
    Ok(walk.order)
}

/// All `.ko` files below `dir`, by canonical name.
fn collect(dir: &Path, into: &mut BTreeMap<String, PathBuf>) -> io::Result<()> {
    for entry in fs_err::read_dir(dir)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            collect(&path, into)?;
        } else if path.extension().is_some_and(|e| e == "ko")
            && let Some(name) = stem(&path)
        {
            into.insert(name, path);
        }
    }
    Ok(())
}

fn stem(path: &Path) -> Option<String> {
    path.file_stem().and_then(|s| s.to_str()).map(canonical)
}

/// What a module says that it needs: the `depends=a,b` string of its `.modinfo` section.
fn depends(data: &[u8]) -> Option<Vec<String>> {
    let line = modinfo(data, "depends=")?;
    Some(line.split(',').filter(|n| !n.is_empty()).map(canonical).collect())
}

/// The release of the kernel that a module was built for: the first word of its `vermagic=` string.
pub(crate) fn release(module: &[u8]) -> Option<String> {
    modinfo(module, "vermagic=")?.split(' ').next().map(str::to_owned)
}

/// The string that begins with `key` in a module's `.modinfo` section, which holds strings closed by zeros. None where
/// `data` is no ELF64 file with such a section (elf(5)) and such a string.
fn modinfo(data: &[u8], key: &str) -> Option<String> {
    if !data.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let u16_at = |at: usize| data.get(at..)?.first_chunk().map(|b| u16::from_le_bytes(*b) as usize);
    let u32_at = |at: usize| data.get(at..)?.first_chunk().map(|b| u32::from_le_bytes(*b) as usize);
    let u64_at = |at: usize| usize::try_from(u64::from_le_bytes(*data.get(at..)?.first_chunk()?)).ok();
    let (table, size, count, names) = (u64_at(0x28)?, u16_at(0x3a)?, u16_at(0x3c)?, u16_at(0x3e)?);
    let section = |i: usize| {
        let at = table.checked_add(i.checked_mul(size)?)?;
        let (name, offset, length) = (u32_at(at)?, u64_at(at + 0x18)?, u64_at(at + 0x20)?);
        Some((name, data.get(offset..offset.checked_add(length)?)))
    };
    let strings = section(names)?.1?;
    for i in 0..count {
        let Some((name, Some(content))) = section(i) else { continue };
        if strings.get(name..)?.starts_with(b".modinfo\0") {
            let line = content.split(|b| *b == 0).find_map(|s| s.strip_prefix(key.as_bytes()))?;
            return std::str::from_utf8(line).ok().map(str::to_owned);
        }
    }
    None
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    fn order(wanted: &[&str], graph: &[(&str, &[&str])]) -> Result<Vec<String>, ModulesError> {
        let graph: BTreeMap<_, _> = graph.iter().copied().collect();
        sort(
            wanted.iter().copied(),
            |n| Ok(graph.get(n).into_iter().flat_map(|d| d.iter().map(|s| s.to_string())).collect()),
            |n| graph.contains_key(n),
            |n| n == "built_in",
        )
    }

    #[test]
    fn each_comes_after_what_it_needs_and_once() {
        let graph: &[(&str, &[&str])] = &[
            ("ring", &["built_in"]),
            ("virtio", &[]),
            ("blk", &["ring", "virtio"]),
            ("net", &["failover", "ring"]),
            ("failover", &["virtio"]),
        ];
        assert_eq!(order(&["net", "blk"], graph).unwrap(), ["virtio", "failover", "ring", "net", "blk"]);
        assert!(matches!(order(&["gone"], graph), Err(ModulesError::Missing { .. })));
        assert!(matches!(order(&["a"], &[("a", &["b"]), ("b", &["a"])]), Err(ModulesError::Circle(_))));
    }

    /// An ELF file with a `.modinfo` section, as small as it can be.
    fn module(depends: &str) -> Vec<u8> {
        module_of("6.1.0-1-test", depends)
    }

    pub(crate) fn module_of(release: &str, depends: &str) -> Vec<u8> {
        let info = format!("license=GPL\0depends={depends}\0name=x\0vermagic={release} SMP mod_unload \0");
        let names = b"\0.modinfo\0.shstrtab\0";
        let mut elf = vec![0; 64];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        let (info_at, names_at) = (64, 64 + info.len());
        let table = names_at + names.len();
        elf.extend(info.as_bytes());
        elf.extend(names);
        for (name, at, len) in [(0, 0, 0), (1, info_at, info.len()), (10, names_at, names.len())] {
            let mut s = vec![0u8; 64];
            s[..4].copy_from_slice(&(name as u32).to_le_bytes());
            s[0x18..0x20].copy_from_slice(&(at as u64).to_le_bytes());
            s[0x20..0x28].copy_from_slice(&(len as u64).to_le_bytes());
            elf.extend(s);
        }
        elf[0x28..0x30].copy_from_slice(&(table as u64).to_le_bytes());
        elf[0x3a..0x3c].copy_from_slice(&64u16.to_le_bytes());
        elf[0x3c..0x3e].copy_from_slice(&3u16.to_le_bytes());
        elf[0x3e..0x40].copy_from_slice(&2u16.to_le_bytes());
        elf
    }

    /// A tree of modules as a guest wants them, of a kernel of `release`.
    pub(crate) fn plant(tree: &Path, release: &str) {
        fs_err::create_dir_all(tree.join("kernel")).unwrap();
        for name in WANTED {
            let needs = if name == "virtio_net" { "failover" } else { "" };
            let file = tree.join(format!("kernel/{}.ko", name.replace('_', "-")));
            fs_err::write(file, module_of(release, needs)).unwrap();
        }
        fs_err::write(tree.join("kernel/failover.ko"), module_of(release, "")).unwrap();
    }

    #[test]
    fn what_a_module_needs_is_read_from_itself() {
        assert_eq!(release(&module_of("6.1.0-1", "")).unwrap(), "6.1.0-1");
        assert_eq!(depends(&module("virtio,net-failover")).unwrap(), ["virtio", "net_failover"]);
        assert_eq!(depends(&module("")).unwrap(), [""; 0]);
        let good = module("virtio");
        // The last section header is read up to its length field, 24 bytes before its end.
        for cut in 0..good.len() - 24 {
            assert_eq!(depends(&good[..cut]), None, "{cut}");
        }
    }

    #[test]
    fn a_tree_is_put_into_order() {
        let dir = tempfile::tempdir().unwrap();
        let put = |path: &str, needs: &str| {
            let path = dir.path().join(path);
            fs_err::create_dir_all(path.parent().unwrap()).unwrap();
            fs_err::write(path, module(needs)).unwrap();
        };
        for name in WANTED {
            put(&format!("kernel/{}.ko", name.replace('_', "-")), "virtio");
        }
        fs_err::remove_file(dir.path().join("kernel/overlay.ko")).unwrap();
        fs_err::write(dir.path().join("modules.builtin"), "kernel/fs/overlay.ko\n").unwrap();
        put("kernel/drivers/virtio.ko", "");
        let order = in_load_order(dir.path()).unwrap();
        assert_eq!(order.always.len(), WANTED.len());
        assert!(order.always[0].ends_with("virtio.ko"), "{order:?}");
        assert!(order.vsock.is_empty(), "a kernel without vsock is one all the same: {order:?}");
        put("kernel/net/vsock.ko", "");
        put("kernel/net/vmw_vsock_virtio_transport.ko", "vsock,virtio");
        let order = in_load_order(dir.path()).unwrap();
        assert_eq!(order.always.len(), WANTED.len());
        assert!(order.vsock[0].ends_with("vsock.ko") && order.vsock.len() == 2, "{order:?}");
        fs_err::remove_file(dir.path().join("kernel/drivers/virtio.ko")).unwrap();
        assert!(matches!(in_load_order(dir.path()), Err(ModulesError::Missing { .. })));
    }
}
