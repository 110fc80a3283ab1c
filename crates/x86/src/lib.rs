//! x86 as data: addresses, registers, descriptors, page tables, exceptions, the CPUID model, decoding.
//! Nothing here executes anything. Every engine and the boot loaders share these types.

pub mod addr;
pub mod bits;
pub mod cpuid;
pub mod decode;
pub mod exception;
pub mod paging;
pub mod segment;
pub mod state;

pub use exception::Exception;
pub use segment::{Attr, Segment, TableRegister};
pub use state::CpuState;
