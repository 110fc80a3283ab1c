//! The translator, pure: bytes, mode and facts in, a fragment of host code out. It never executes anything.
//!
//! The way of a unit: [`unit::Reader::form`] takes instructions up to a control transfer, [`lower::translate`] makes host code of them
//! with [`emit::Asm`]; [`frame`] is the contract with the engine that runs it.

pub mod emit;
mod encode;
pub mod frame;
pub mod hints;
pub mod listing;
mod look;
pub mod lower;
pub mod normal;
pub mod unit;

pub use lower::{
    Checked, Exit, Facts, FpLevel, Fragment, Legacy, Own, Place, Site, SiteKind, TRAP, TimeStamp, Touch,
    Variant, translate, translate_checked,
};
