//! The cost model: what a workload would keep of native speed under ways of virtualization that this host cannot run, predicted from events that
//! were counted and costs that were published.
//!
//! The way of the data: two statistics of an interpreted guest with a census (`x86_interp::census`), before and after the work →
//! [`events::Events`] of one operation → [`predict::predict`] with a processor of [`costs::PROCESSORS`] → percent of native per
//! [`predict::Technique`], with the terms it is made of. [`talk`] holds what VMware's talk of 2007 said about four programs, to compare.
//!
//! Everything here is a **prediction**: a sum of (how often) × (how dear), on top of native time as this host measures it. It knows nothing of caches
//! that exits empty, of exits that overlap, or of what a good monitor avoids beyond what is written here.

pub mod costs;
pub mod events;
pub mod predict;
pub mod table;
pub mod talk;
