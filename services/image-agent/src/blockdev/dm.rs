//! The device mapper's ioctls (linux/dm-ioctl.h): devices that the kernel puts together from others by a table of targets.
//!
//! A request is one buffer: a header that says how long it is, and what goes with it. The kernel answers into the same buffer.

use super::{Number, call, errno};
use fs_err::File;
use nix::{errno::Errno, libc};
use std::{
    io,
    os::fd::AsRawFd as _,
    time::{Duration, Instant},
};

const CONTROL: &str = "/dev/mapper/control";
/// The length of `struct dm_ioctl`, and where its fields are.
const HEADER: usize = 312;
const DATA_SIZE: usize = 12;
const DATA_START: usize = 16;
const TARGET_COUNT: usize = 20;
const FLAGS: usize = 28;
const DEV: usize = 40;
const NAME: usize = 48;
/// The longest name, without the zero that ends it.
const MAX_NAME: usize = 127;
/// `struct dm_target_spec`, which the target's parameters follow.
const SPEC: usize = 40;

const LIST_DEVICES: u8 = 2;
const DEV_CREATE: u8 = 3;
const DEV_REMOVE: u8 = 4;
const DEV_SUSPEND: u8 = 6;
const DEV_STATUS: u8 = 7;
const TABLE_LOAD: u8 = 9;

const ACTIVE_PRESENT: u32 = 1 << 5;
const BUFFER_FULL: u32 = 1 << 8;

/// The most that an answer may have.
const MAX_ANSWER: usize = 16 << 20;
/// How long a device that somebody has open is waited for. udev, for one, looks at each new one.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often it is tried meanwhile.
const STEP: Duration = Duration::from_millis(20);

/// One target of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    /// How many sectors of 512 bytes it has. It begins where the one before ends.
    pub(crate) sectors: u64,
    /// `snapshot`, `linear`.
    pub(crate) kind: &'static str,
    /// Its parameters.
    pub(crate) params: String,
}

/// The device mapper.
#[derive(Debug)]
pub(crate) struct Mapper {
    control: File,
}

impl Mapper {
    /// The host's; `None` where its kernel has none, or this process may not use it: then it has made nothing there either.
    pub(crate) fn open() -> io::Result<Option<Self>> {
        let open = || fs_err::OpenOptions::new().read(true).write(true).open(CONTROL);
        match call("open /dev/mapper/control", open) {
            Ok(control) => Ok(Some(Self { control })),
            // No such file, or none of that number: a kernel without it, or whose module nobody has loaded.
            Err(e)
                if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied)
                    || errno(&e) == Some(Errno::ENODEV as i32) =>
            {
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    /// Makes the device `name` of `table`. On failure there is no such device, unless there was one before.
    pub(crate) fn create(&self, name: &str, table: &[Target]) -> io::Result<Number> {
        let mut request = Request::new(name)?;
        call("DM_DEV_CREATE", || self.ask(DEV_CREATE, &mut request))?;
        let made = self.load(name, table);
        if made.is_err() {
            self.remove(name)?;
        }
        made
    }

    /// Gives the device `name` another table.
    pub(crate) fn load(&self, name: &str, table: &[Target]) -> io::Result<Number> {
        let mut request = Request::new(name)?;
        request.table(table)?;
        call("DM_TABLE_LOAD", || self.ask(TABLE_LOAD, &mut request))?;
        let mut request = Request::new(name)?;
        // Without the flag that would suspend it: it goes on, with the table that was loaded.
        call("DM_DEV_SUSPEND", || self.ask(DEV_SUSPEND, &mut request))?;
        Ok(request.number())
    }

    /// The number of the device `name` where there is one that has a table.
    pub(crate) fn find(&self, name: &str) -> io::Result<Option<Number>> {
        let mut request = Request::new(name)?;
        match call("DM_DEV_STATUS", || self.ask(DEV_STATUS, &mut request)) {
            Ok(()) if request.word(FLAGS) & ACTIVE_PRESENT != 0 => Ok(Some(request.number())),
            Ok(()) => Ok(None),
            Err(e) if errno(&e) == Some(Errno::ENXIO as i32) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Removes the device `name`, if there is one; waits a while for others to close it.
    pub(crate) fn remove(&self, name: &str) -> io::Result<()> {
        let until = Instant::now() + PATIENCE;
        loop {
            let mut request = Request::new(name)?;
            match call("DM_DEV_REMOVE", || self.ask(DEV_REMOVE, &mut request)) {
                Err(e) if errno(&e) == Some(Errno::ENXIO as i32) => return Ok(()),
                Err(e) if errno(&e) == Some(Errno::EBUSY as i32) && Instant::now() < until => {
                    std::thread::sleep(STEP);
                }
                done => return done,
            }
        }
    }

    /// The names of all devices.
    pub(crate) fn names(&self) -> io::Result<Vec<String>> {
        let mut request = Request::new("")?;
        call("DM_LIST_DEVICES", || self.ask(LIST_DEVICES, &mut request))?;
        let mut names = Vec::new();
        let mut at = request.word(DATA_START) as usize;
        // `struct dm_name_list`: number, offset of the next, name. The first of none has the number 0.
        while request.long(at).is_some_and(|device| device != 0) {
            names.extend(request.text(at + 12));
            match request.word(at + 8) as usize {
                0 => break,
                next => at += next,
            }
        }
        Ok(names)
    }

    /// Sends a request; asks again with more room where the answer had too little.
    fn ask(&self, command: u8, request: &mut Request) -> io::Result<()> {
        loop {
            let sent = request.bytes.clone();
            self.ioctl(command, &mut request.bytes)?;
            let length = request.bytes.len();
            if request.word(FLAGS) & BUFFER_FULL == 0 {
                return Ok(());
            }
            if length >= MAX_ANSWER {
                return Err(io::Error::other("the device mapper's answer is too long"));
            }
            request.bytes = sent;
            request.resize(length * 4)?;
        }
    }

    #[expect(unsafe_code, reason = "ioctls that nix does not wrap")]
    fn ioctl(&self, command: u8, buffer: &mut [u8]) -> io::Result<()> {
        let code = nix::request_code_readwrite!(0xfd, command, HEADER);
        // SAFETY: the descriptor is open for the call. The buffer's header has the buffer's own length (`Request::resize`), and
        // the kernel reads and writes within that.
        let done = unsafe { libc::ioctl(self.control.file().as_raw_fd(), code, buffer.as_mut_ptr()) };
        Errno::result(done)?;
        Ok(())
    }
}

/// A request, and then the answer. Fields have the machine's byte order.
#[derive(Debug)]
struct Request {
    bytes: Vec<u8>,
}

impl Request {
    fn new(name: &str) -> io::Result<Self> {
        if name.len() > MAX_NAME || name.contains(['/', '\0']) {
            return Err(io::Error::other(format!("{name:?} is no name of a device")));
        }
        let mut request = Self { bytes: Vec::new() };
        request.resize(4096)?;
        // The version of the interface: whatever has had it since 2001.
        request.put(0, 4);
        request.put(DATA_START, u32::try_from(HEADER).map_err(io::Error::other)?);
        request.put_bytes(NAME, name.as_bytes());
        Ok(request)
    }

    fn resize(&mut self, length: usize) -> io::Result<()> {
        self.bytes.resize(length, 0);
        self.put(DATA_SIZE, u32::try_from(length).map_err(io::Error::other)?);
        Ok(())
    }

    fn table(&mut self, table: &[Target]) -> io::Result<()> {
        let (mut at, mut sector) = (HEADER, 0_u64);
        for target in table {
            let length = (SPEC + target.params.len() + 1).next_multiple_of(8);
            if at + length > self.bytes.len() {
                self.resize(at + length + 4096)?;
            }
            self.put_bytes(at, &sector.to_ne_bytes());
            self.put_bytes(at + 8, &target.sectors.to_ne_bytes());
            self.put(at + 20, u32::try_from(length).map_err(io::Error::other)?);
            self.put_bytes(at + 24, target.kind.as_bytes());
            self.put_bytes(at + SPEC, target.params.as_bytes());
            at += length;
            sector += target.sectors;
        }
        self.put(TARGET_COUNT, u32::try_from(table.len()).map_err(io::Error::other)?);
        Ok(())
    }

    fn put(&mut self, at: usize, word: u32) {
        self.put_bytes(at, &word.to_ne_bytes());
    }

    fn put_bytes(&mut self, at: usize, bytes: &[u8]) {
        if let Some(place) = self.bytes.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }

    fn word(&self, at: usize) -> u32 {
        let bytes = self.bytes.get(at..).and_then(|rest| rest.first_chunk());
        bytes.map_or(0, |bytes| u32::from_ne_bytes(*bytes))
    }

    fn long(&self, at: usize) -> Option<u64> {
        self.bytes.get(at..).and_then(|rest| rest.first_chunk()).map(|bytes| u64::from_ne_bytes(*bytes))
    }

    fn text(&self, at: usize) -> Option<String> {
        let rest = self.bytes.get(at..)?;
        let end = rest.iter().position(|byte| *byte == 0)?;
        Some(String::from_utf8_lossy(rest.get(..end)?).into_owned())
    }

    fn number(&self) -> Number {
        Number::of(self.long(DEV).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_as_the_kernel_reads_it() {
        let target = |sectors, params: &str| Target { sectors, kind: "linear", params: params.into() };
        let mut request = Request::new("bothy").unwrap();
        request.table(&[target(8, "7:0 0"), target(16, "7:1 24")]).unwrap();
        assert_eq!(request.word(DATA_SIZE) as usize, request.bytes.len());
        assert_eq!((request.word(DATA_START), request.word(TARGET_COUNT)), (312, 2));
        assert_eq!(request.text(NAME).unwrap(), "bothy");
        let second = HEADER + request.word(HEADER + 20) as usize;
        assert_eq!(second, HEADER + 48, "a multiple of eight after the first's");
        assert_eq!((request.long(HEADER), request.long(HEADER + 8)), (Some(0), Some(8)));
        assert_eq!((request.long(second), request.long(second + 8)), (Some(8), Some(16)));
        assert_eq!(request.text(second + 24).unwrap(), "linear");
        assert_eq!(request.text(second + SPEC).unwrap(), "7:1 24");
        let mut long = Request::new("").unwrap();
        long.table(&vec![target(1, "7:1 24"); 1000]).unwrap();
        assert_eq!(long.word(DATA_SIZE) as usize, long.bytes.len());
        assert!(Request::new(&"x".repeat(128)).is_err() && Request::new("a/b").is_err());
    }
}
