//! Layers into file systems, looked at with e2fsprogs and, where this may be done, through the kernel's own eyes.

mod hostile;
mod model;
mod semantics;
mod support;
