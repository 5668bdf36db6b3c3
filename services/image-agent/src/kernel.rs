//! The uncompressed kernel out of a distribution's `vmlinuz`.
//!
//! A VMM boots an ELF `vmlinux` faster than a bzImage, since nothing unpacks itself inside the guest, and Firecracker
//! takes nothing else. The bzImage's set-up header says where its payload is (Linux, Documentation/arch/x86/boot.rst);
//! Debian compresses it with LZ4 in the legacy frame format (lz4, doc/lz4_Frame_format.md).

/// Why no kernel came out.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum KernelError {
    /// Neither an ELF file nor a bzImage.
    #[error("it is neither an ELF file nor a bzImage of boot protocol 2.08 or later")]
    NotAKernel,
    /// The file ends before its payload does.
    #[error("it is cut short: {0} lies beyond its end")]
    Short(&'static str),
    /// Compressed by something else.
    #[error("its payload starts with {0:02x?}, which is not LZ4 in the legacy format")]
    Compression([u8; 4]),
    /// The LZ4 data is damaged.
    #[error("its LZ4 payload is damaged: {0}")]
    Damaged(String),
    /// Unpacked, and still not a kernel.
    #[error("its payload is not a 64-bit x86 ELF file")]
    NotElf,
}

/// First bytes of an LZ4 legacy frame.
const LZ4_LEGACY: [u8; 4] = 0x184C_2102_u32.to_le_bytes();
/// No block of a legacy frame unpacks to more.
const LZ4_BLOCK: usize = 8 << 20;

/// The ELF kernel in `image`, which is a bzImage or already one.
pub(crate) fn vmlinux(image: &[u8]) -> Result<Vec<u8>, KernelError> {
    if is_elf(image) {
        return Ok(image.to_vec());
    }
    // boot.rst: "HdrS" at 0x202, protocol version at 0x206, setup_sects at 0x1f1, payload_offset and _length from 0x248.
    if image.get(0x202..0x206) != Some(b"HdrS") || u16_at(image, 0x206).is_none_or(|v| v < 0x0208) {
        return Err(KernelError::NotAKernel);
    }
    let header = || KernelError::Short("the set-up header");
    let sectors = match *image.get(0x1f1).ok_or_else(header)? {
        0 => 4, // for backwards compatibility, says boot.rst
        n => usize::from(n),
    };
    let offset = u32_at(image, 0x248).ok_or_else(header)? as usize;
    let length = u32_at(image, 0x24c).ok_or_else(header)? as usize;
    let start = (sectors + 1) * 512 + offset;
    let payload = image.get(start..start + length).ok_or(KernelError::Short("the payload"))?;
    let kernel = if is_elf(payload) { payload.to_vec() } else { unpack(payload)? };
    if is_elf(&kernel) { Ok(kernel) } else { Err(KernelError::NotElf) }
}

/// The release that an unpacked kernel says it is, from its banner, `Linux version 6.1.0-56-cloud-amd64 (...`.
pub(crate) fn release(vmlinux: &[u8]) -> Option<String> {
    let banner = b"Linux version ";
    let mut rest = vmlinux;
    while let Some(at) = rest.windows(banner.len()).position(|w| w == banner) {
        rest = rest.get(at + banner.len()..)?;
        let word = rest.split(|b| *b == b' ').next()?;
        // A format string is not it.
        if word.len() < 128
            && word.first().is_some_and(u8::is_ascii_digit)
            && let Ok(word) = std::str::from_utf8(word)
        {
            return Some(word.to_owned());
        }
    }
    None
}

/// Unpacks an LZ4 legacy frame. The kernel's build puts the unpacked size, 4 bytes, behind the last block.
fn unpack(payload: &[u8]) -> Result<Vec<u8>, KernelError> {
    let magic: [u8; 4] = payload.first_chunk().copied().ok_or(KernelError::Short("the payload"))?;
    if magic != LZ4_LEGACY {
        return Err(KernelError::Compression(magic));
    }
    let (body, size) = payload
        .get(4..)
        .and_then(|b| b.split_last_chunk::<4>())
        .ok_or(KernelError::Short("the unpacked size"))?;
    let size = u32::from_le_bytes(*size) as usize;
    let mut out = Vec::with_capacity(size.min(256 << 20));
    let mut block = vec![0; LZ4_BLOCK];
    let mut rest = body;
    while let Some((head, tail)) = rest.split_first_chunk::<4>() {
        rest = tail;
        if *head == LZ4_LEGACY {
            continue; // frames may follow one another
        }
        let packed = u32::from_le_bytes(*head) as usize;
        let (data, tail) = rest.split_at_checked(packed).ok_or(KernelError::Short("a block"))?;
        rest = tail;
        let n = lz4_flex::block::decompress_into(data, &mut block)
            .map_err(|e| KernelError::Damaged(e.to_string()))?;
        out.extend_from_slice(block.get(..n).unwrap_or_default());
    }
    if out.len() == size {
        Ok(out)
    } else {
        Err(KernelError::Damaged(format!("{} bytes came out, {size} are promised", out.len())))
    }
}

/// Whether `data` begins as a 64-bit little-endian x86-64 ELF file does.
fn is_elf(data: &[u8]) -> bool {
    data.starts_with(b"\x7fELF\x02\x01") && u16_at(data, 18) == Some(62)
}

fn u16_at(data: &[u8], at: usize) -> Option<u16> {
    data.get(at..)?.first_chunk().copied().map(u16::from_le_bytes)
}

fn u32_at(data: &[u8], at: usize) -> Option<u32> {
    data.get(at..)?.first_chunk().copied().map(u32::from_le_bytes)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// What passes for an unpacked kernel of `release`.
    pub(crate) fn vmlinux_of(release: &str) -> Vec<u8> {
        let mut kernel = elf(5000);
        kernel.extend(b"Linux version %s (%s)\0");
        kernel.extend(format!("Linux version {release} (somebody@somewhere) #1\n\0").as_bytes());
        kernel
    }

    #[test]
    fn a_kernel_says_its_release() {
        assert_eq!(release(&vmlinux_of("6.1.0-56-cloud-amd64")).unwrap(), "6.1.0-56-cloud-amd64");
        assert_eq!(release(&elf(5000)), None);
    }

    fn elf(len: usize) -> Vec<u8> {
        let mut elf: Vec<u8> = (0..len).map(|i| (i / 7 % 251) as u8).collect();
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[18..20].copy_from_slice(&62u16.to_le_bytes());
        elf
    }

    pub(crate) fn lz4(data: &[u8]) -> Vec<u8> {
        let mut out = LZ4_LEGACY.to_vec();
        for chunk in data.chunks(LZ4_BLOCK) {
            let packed = lz4_flex::block::compress(chunk);
            out.extend((packed.len() as u32).to_le_bytes());
            out.extend(packed);
        }
        out.extend((data.len() as u32).to_le_bytes());
        out
    }

    pub(crate) fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 3 * 512 + 0x40];
        image[0x1f1] = 2;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
        image[0x248..0x24c].copy_from_slice(&0x40u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend(payload);
        image.extend(b"what follows the payload");
        image
    }

    #[test]
    fn a_kernel_of_several_blocks_comes_out_as_it_went_in() {
        let kernel = elf(2 * LZ4_BLOCK + 12345);
        assert_eq!(vmlinux(&bzimage(&lz4(&kernel))).unwrap(), kernel);
    }

    #[test]
    fn an_elf_file_is_taken_as_it_is() {
        assert_eq!(vmlinux(&elf(100)).unwrap(), elf(100));
        assert_eq!(vmlinux(&bzimage(&elf(100))).unwrap(), elf(100));
    }

    #[test]
    fn wrong_files_are_refused_with_the_reason() {
        assert_eq!(vmlinux(b""), Err(KernelError::NotAKernel));
        assert_eq!(vmlinux(&[0; 4096]), Err(KernelError::NotAKernel));
        assert_eq!(
            vmlinux(&bzimage(b"\x1f\x8b\x08\x00....")),
            Err(KernelError::Compression([0x1f, 0x8b, 8, 0]))
        );
        assert_eq!(vmlinux(&bzimage(&lz4(b"no kernel"))), Err(KernelError::NotElf));
        let good = bzimage(&lz4(&elf(5000)));
        for cut in [0x1f0, 0x210, 0x24e, 3 * 512 + 0x40 + 100] {
            assert!(vmlinux(&good[..cut]).is_err(), "{cut}");
        }
        let mut damaged = bzimage(&lz4(&elf(5000)));
        let at = 3 * 512 + 0x40 + 4;
        damaged[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(vmlinux(&damaged), Err(KernelError::Short("a block")));
    }
}
