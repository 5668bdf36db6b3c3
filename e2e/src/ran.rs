//! What a command did, and the two things that tests ask of it first.

use std::process::Output;

/// What a command printed and how it ended.
#[derive(Debug)]
pub struct Ran {
    /// Its exit status; 128 + n where signal n ended it.
    pub status: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Ran {
    /// Takes what `output` says.
    pub fn new(output: Output) -> Self {
        use std::os::unix::process::ExitStatusExt;
        let status = output.status.code().or(output.status.signal().map(|s| 128 + s)).unwrap_or(-1);
        Self {
            status,
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// The same, if it ended well.
    ///
    /// # Panics
    /// With all that it printed, if not.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.status, 0, "the command failed\n{self:#?}");
        self
    }

    /// The JSON that it printed.
    ///
    /// # Panics
    /// If it failed or printed something else.
    #[track_caller]
    pub fn json(self) -> serde_json::Value {
        let ran = self.ok();
        serde_json::from_str(&ran.stdout).unwrap_or_else(|e| panic!("not JSON: {e}\n{ran:#?}"))
    }
}
