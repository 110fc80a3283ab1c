//! Guest memory as a simple bus-mastering device sees it.

use x86::addr::Gpa;

/// Whole transfers to and from guest RAM. An access that is not all in RAM fails and may have done a part.
pub trait DmaMemory: Send + Sync {
    /// Copies guest memory at `gpa` into `data`. Returns whether all of it is RAM.
    fn read(&self, gpa: Gpa, data: &mut [u8]) -> bool;
    /// Copies `data` into guest memory at `gpa`. Returns whether all of it is RAM.
    fn write(&self, gpa: Gpa, data: &[u8]) -> bool;
}
