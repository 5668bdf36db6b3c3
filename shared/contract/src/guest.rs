//! What the host knows of a guest's boot.

use serde::{Deserialize, Serialize};

/// One step of a guest's boot, as the guest timed it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootStep {
    /// `kernel`, `modules`, `mounts`, `channel`, `personalise`, `init`.
    pub name: String,
    /// When it began, in microseconds since the kernel started.
    pub started_us: u64,
    /// How long it took, in microseconds.
    pub took_us: u64,
}
