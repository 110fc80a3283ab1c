//! From guest bytes to decoded instructions, and the cache of them.

pub mod build;
pub mod cache;

pub use cache::{DecodeCache, Page, PageKey};
