//! Fuzz targets: what a hostile guest, kernel file or driver can feed the monitor must never panic or hang it.
//!
//! Each target is an ordinary function `target(data)`. Two things call them:
//! - `cargo +nightly fuzz run <target> --features libfuzzer`: coverage-guided, for as long as one likes;
//! - `cargo test` in this directory, on any toolchain: some thousand seeded random inputs (`tests/random.rs`).

pub mod decoder;
pub mod devices;
pub mod input;
pub mod interpreter;
pub mod loaders;
pub mod messages;
pub mod nics;
pub mod packets;
pub mod qcow2;
pub mod translator;
pub mod virtqueue;
