//! The command-line program `trellis` (see `main.rs`); a library so that its parts can be tested.

pub mod image;
pub mod suggest;
