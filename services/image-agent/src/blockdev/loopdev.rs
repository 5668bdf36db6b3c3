//! Loop devices (loop(4)). Each is made to go by itself when nobody has it open any more (`LO_FLAGS_AUTOCLEAR`): first this process has,
//! then the mapping that it was made for. So there is no moment at which a crash could leave one behind.

use super::{Number, call, errno};
use fs_err::File;
use nix::{errno::Errno, libc};
use std::{
    io,
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    path::Path,
};

const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;
const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
const READ_ONLY: u32 = 1;
const AUTOCLEAR: u32 = 4;
/// How often another free device is asked for, where somebody else was faster.
const TRIES: u32 = 64;

/// `struct loop_info64` of linux/loop.h.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` of linux/loop.h.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

/// A part of a file, of whole sectors.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part {
    /// Where it begins, in bytes.
    pub(crate) offset: u64,
    /// How many bytes it has; 0 for all to the end.
    pub(crate) length: u64,
}

/// A loop device, which goes when this and all others who have it open are gone.
#[derive(Debug)]
pub(crate) struct Loop {
    _device: File,
    /// Its number.
    pub(crate) number: Number,
}

/// Makes a loop device of `part` of the file at `path`.
pub(crate) fn open(path: &Path, part: Part, read_only: bool) -> io::Result<Loop> {
    let file = fs_err::OpenOptions::new().read(true).write(!read_only).open(path)?;
    let control = call("open /dev/loop-control", || {
        fs_err::OpenOptions::new().read(true).write(true).open("/dev/loop-control")
    })?;
    for _ in 0..TRIES {
        let index = call("LOOP_CTL_GET_FREE", || free(&control))?;
        let name = format!("/dev/loop{index}");
        let device = call("open a loop device", || {
            fs_err::OpenOptions::new().read(true).write(!read_only).open(&name)
        })?;
        let config = config(&file, part, read_only)?;
        match call("LOOP_CONFIGURE", || configure(&device, &config)) {
            Ok(()) => {
                let number = Number::of(device.metadata()?.rdev());
                return Ok(Loop { _device: device, number });
            }
            Err(e) if errno(&e) == Some(Errno::EBUSY as i32) => {}
            Err(e) => return Err(e),
        }
    }
    Err(io::Error::other("others take each free loop device first"))
}

fn config(file: &File, part: Part, read_only: bool) -> io::Result<Config> {
    let info = Info {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: part.offset,
        size_limit: part.length,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: AUTOCLEAR | if read_only { READ_ONLY } else { 0 },
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
    let fd = u32::try_from(file.file().as_raw_fd()).map_err(io::Error::other)?;
    Ok(Config { fd, block_size: 0, info, reserved: [0; 8] })
}

#[expect(unsafe_code, reason = "an ioctl that nix does not wrap")]
fn free(control: &File) -> io::Result<i32> {
    // SAFETY: the descriptor is open and the request has no argument.
    let index = unsafe { libc::ioctl(control.file().as_raw_fd(), LOOP_CTL_GET_FREE) };
    Ok(Errno::result(index)?)
}

#[expect(unsafe_code, reason = "an ioctl that nix does not wrap")]
fn configure(device: &File, config: &Config) -> io::Result<()> {
    // SAFETY: the descriptors are open for the call, and the kernel reads one `loop_config` from a pointer to a live one.
    let done = unsafe { libc::ioctl(device.file().as_raw_fd(), LOOP_CONFIGURE, &raw const *config) };
    Errno::result(done)?;
    Ok(())
}

/// How many loop devices have a file below `dir` behind them, one that is removed too.
#[cfg(test)]
pub(crate) fn count_below(dir: &Path) -> usize {
    let blocks = fs_err::read_dir("/sys/block").unwrap();
    let files =
        blocks.filter_map(|block| fs_err::read_to_string(block.ok()?.path().join("loop/backing_file")).ok());
    files.filter(|file| Path::new(file.trim()).starts_with(dir)).count()
}

/// The same, once none is left or a moment is over: the kernel may take one, where somebody else has just looked at it.
#[cfg(test)]
pub(crate) fn left_below(dir: &Path) -> usize {
    for _ in 0..300 {
        if count_below(dir) == 0 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    count_below(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_structures_have_their_sizes() {
        assert_eq!((size_of::<Info>(), size_of::<Config>()), (232, 304));
    }

    #[test]
    fn a_device_shows_its_part_and_goes_by_itself() {
        bothy_testkit::require_root!();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let data: Vec<u8> = (0..64u8).flat_map(|n| [n; 512]).collect();
        fs_err::write(&path, data).unwrap();
        let part = |offset: u64, length: u64| Part { offset: offset * 512, length: length * 512 };
        for (part, first, length) in [(part(0, 0), 0, 64), (part(3, 8), 3, 8), (part(60, 0), 60, 4_usize)] {
            let device = open(&path, part, true).unwrap();
            assert_eq!(count_below(dir.path()), 1);
            let node = format!("/dev/loop{}", device.number.minor);
            let shown = fs_err::read(node).unwrap();
            assert_eq!((shown.len(), shown[0]), (length * 512, first));
            drop(device);
            assert_eq!(left_below(dir.path()), 0);
        }
    }
}
