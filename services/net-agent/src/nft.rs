//! libnftables in this process: a transaction costs no fork and no parsing of a tool's output. The library is loaded at
//! run time, since only hosts of VMs need it. All of the crate's calls into C are here.
#![expect(unsafe_code, reason = "libnftables has a C interface only; see the SAFETY comments")]

use bothy_contract::{Code, Error};
use libloading::Library;
use std::{
    ffi::{CStr, CString, c_char, c_int, c_uint, c_void},
    ptr::NonNull,
};

/// The library's name by its ABI version, as the package installs it.
const LIBRARY: &str = "libnftables.so.1";

// From nftables/libnftables.h, stable since version 0.9.
const NFT_CTX_DEFAULT: u32 = 0;
const NFT_CTX_OUTPUT_JSON: c_uint = 1 << 4;

type Run = unsafe extern "C" fn(*mut c_void, *const c_char) -> c_int;
type Text = unsafe extern "C" fn(*mut c_void) -> *const c_char;
type Free = unsafe extern "C" fn(*mut c_void);

/// One libnftables context. Its netlink socket belongs to the network namespace of the thread that made it.
#[derive(Debug)]
pub struct Nft {
    context: NonNull<c_void>,
    run: Run,
    output: Text,
    error: Text,
    free: Free,
    /// Keeps the code behind the pointers above mapped; dropped after `Drop::drop` has run.
    _library: Library,
}

// SAFETY: a context has no thread-local state: it is plain memory and a netlink socket. It is not used by two threads at
// once, because `run` takes `&mut self`.
unsafe impl Send for Nft {}

impl Nft {
    /// Loads the library and makes a context.
    ///
    /// # Errors
    /// `failed_precondition` where the library is missing or older than JSON support, naming the package.
    pub fn open() -> Result<Self, Error> {
        let missing = |e: &libloading::Error| {
            Error::new(
                Code::FailedPrecondition,
                format!("cannot load {LIBRARY}: {}", bothy_contract::error::chain(e)),
            )
            .hint("install it with `apt-get install libnftables1`")
        };
        // SAFETY: loading runs the initialisers of the distribution's own library, found by the system's search path
        // alone; they have no preconditions.
        let library = unsafe { Library::new(LIBRARY) }.map_err(|e| missing(&e))?;
        // SAFETY: the names and signatures are those of nftables/libnftables.h; the pointers are copied out of their
        // symbols, and `_library` keeps the code mapped for as long as `Nft` lives.
        let (new, set_flags, buffer_output, buffer_error, run, output, error, free) = unsafe {
            (
                *library
                    .get::<unsafe extern "C" fn(u32) -> *mut c_void>(b"nft_ctx_new\0")
                    .map_err(|e| missing(&e))?,
                *library
                    .get::<unsafe extern "C" fn(*mut c_void, c_uint)>(b"nft_ctx_output_set_flags\0")
                    .map_err(|e| missing(&e))?,
                *library
                    .get::<unsafe extern "C" fn(*mut c_void) -> c_int>(b"nft_ctx_buffer_output\0")
                    .map_err(|e| missing(&e))?,
                *library
                    .get::<unsafe extern "C" fn(*mut c_void) -> c_int>(b"nft_ctx_buffer_error\0")
                    .map_err(|e| missing(&e))?,
                *library.get::<Run>(b"nft_run_cmd_from_buffer\0").map_err(|e| missing(&e))?,
                *library.get::<Text>(b"nft_ctx_get_output_buffer\0").map_err(|e| missing(&e))?,
                *library.get::<Text>(b"nft_ctx_get_error_buffer\0").map_err(|e| missing(&e))?,
                *library.get::<Free>(b"nft_ctx_free\0").map_err(|e| missing(&e))?,
            )
        };
        // SAFETY: any flags are valid; NULL is checked for below.
        let context = NonNull::new(unsafe { new(NFT_CTX_DEFAULT) }).ok_or_else(|| {
            Error::new(Code::Internal, "libnftables gave no context: out of memory or sockets")
        })?;
        let nft = Self { context, run, output, error, free, _library: library };
        // SAFETY: the context is valid and ours alone. Both buffers make the library keep text instead of printing it.
        let buffered = unsafe {
            set_flags(context.as_ptr(), NFT_CTX_OUTPUT_JSON);
            buffer_output(context.as_ptr()) == 0 && buffer_error(context.as_ptr()) == 0
        };
        if !buffered {
            return Err(Error::new(Code::Internal, "libnftables cannot buffer its output: out of memory"));
        }
        Ok(nft)
    }

    /// Runs commands in the JSON of libnftables-json(5) as one transaction; gives back the output, JSON too.
    ///
    /// # Errors
    /// What the library says, one line. Nothing was changed then.
    pub fn run(&mut self, json: &str) -> Result<String, String> {
        let command = CString::new(json).map_err(|_| "the commands hold a zero byte".to_owned())?;
        // SAFETY: the context is valid, and `&mut self` makes this its only use; the command is a C string that outlives
        // the call. The buffers belong to the context until the next run, and are copied before that.
        let (code, output, error) = unsafe {
            let code = (self.run)(self.context.as_ptr(), command.as_ptr());
            (code, copy((self.output)(self.context.as_ptr())), copy((self.error)(self.context.as_ptr())))
        };
        if code == 0 {
            return Ok(output);
        }
        let line =
            error.lines().find(|l| !l.trim().is_empty()).unwrap_or("no reason given").trim().to_owned();
        Err(line)
    }
}

impl Drop for Nft {
    fn drop(&mut self) {
        // SAFETY: the context was made by the same library and is freed once, here.
        unsafe { (self.free)(self.context.as_ptr()) }
    }
}

/// The text at `text`, empty for NULL.
///
/// # Safety
/// `text` is NULL or a valid C string.
unsafe fn copy(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: by the function's own contract.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}
