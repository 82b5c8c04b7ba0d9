//! Runs expressions in Rust: the reference that emitted code is compared with.
