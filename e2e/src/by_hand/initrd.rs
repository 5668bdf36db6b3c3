//! The initramfs as bothy makes it: `/init`, the directories that it finds, and the image's modules behind.

use std::{io, path::Path};

/// Writes the initramfs of the image in `image` with the agent `guest` to `to`.
pub(super) fn write(image: &Path, guest: &Path, to: &Path) -> io::Result<()> {
    let mut archive = newc(&[
        ("dev", 0o040_755, b""),
        ("proc", 0o040_755, b""),
        ("sys", 0o040_755, b""),
        ("init", 0o100_755, &fs_err::read(guest)?),
        ("TRAILER!!!", 0, b""),
    ]);
    archive.extend(fs_err::read(image.join("modules.cpio"))?);
    fs_err::write(to, archive)
}

/// An archive of the kind that the kernel unpacks (initramfs buffer format of the kernel's documentation).
fn newc(entries: &[(&str, u32, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut padded = |bytes: &[&[u8]]| {
        out.extend(bytes.concat());
        out.resize(out.len().next_multiple_of(4), 0);
    };
    for (number, (name, mode, data)) in entries.iter().enumerate() {
        let numbers = [number, *mode as usize, 0, 0, 1, 0, data.len(), 0, 0, 0, 0, name.len() + 1, 0];
        let head: String = numbers.iter().map(|field| format!("{field:08x}")).collect();
        padded(&[b"070701", head.as_bytes(), name.as_bytes(), b"\0"]);
        padded(&[data]);
    }
    out
}
