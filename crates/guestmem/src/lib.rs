//! Guest RAM: which machine page stands behind which guest page, and access to it.
//!
//! # Requirements
//! - Two neighbouring guest pages need not be neighbours in the host, and the machine page behind a guest page
//!   may change at any time (sharing, swapping, ballooning, discard). So nobody keeps a host pointer: the map
//!   from [`Gfn`] to [`Hva`] is per page, an [`Hva`] is an offset into this VM's machine memory that every
//!   access bounds-checks, and whoever remembers one (a TLB entry, decoded code, DMA in flight) registers as a
//!   [`Holder`] and is told before it becomes wrong.
//! - Writes to pages that someone derived something from must be noticed: [`trace`] tells how.
//!
//! # Threading
//! Every method takes `&self` and may be called from any thread. Accesses are single host instructions, so
//! guest memory has the host's (x86-TSO) ordering between vCPUs and devices, aligned or not.
//!
//! # Invariants
//! - INV-GM-1: the machine memory mapping `base..base+len` stays mapped, readable and writable, from
//!   construction to drop. Any `Hva` below `len` is therefore accessible, whatever it means to the guest.
//! - INV-GM-2: an entry of the map names an `Hva` whose whole page lies below `len`.

mod access;
mod discard;
mod holder;
mod map;
pub mod protocol;
mod requests;
mod scalar;
pub mod sync;
pub mod trace;

pub use access::Unbacked;
pub use holder::{Holder, Invalidation};
pub use map::{GuestMemory, HOLE_END, HOLE_START, Hva, MemoryError, Page};
pub use requests::{ALL_FRAMES, Request, Requests};
pub use scalar::Scalar;
pub use x86::addr::{Gfn, Gpa};
