//! A VM assembled: boot protocols, firmware tables.

pub mod boot;
pub mod firmware;
