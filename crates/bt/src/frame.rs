//! The contract between translated code and the engine that runs it: where things are, relative to GS.
//!
//! Host RSP is the host's own stack while fragments run, so signals and calls out of the cache need no care. Guest RAX…R12
//! live in the host registers of the same name, but guest RSP lives in host R13; guest R13, R14 and R15 live in the frame. Host R14
//! and R15 are scratch: dead between guest instructions.
//!
//! Guest flags at every fragment boundary are in the frame (INV-BT-1), as LAHF and SETO leave them: AH in the high byte, OF in the low.

#![expect(clippy::cast_possible_truncation, reason = "masked to the number of sets")]

/// Guest registers RAX…R15, eight bytes each.
pub const GPR: i32 = 0;
/// RIP to go on at, when a fragment exits.
pub const RIP: i32 = 0x80;
/// Status flags, 16 bits.
pub const FLAGS: i32 = 0x88;
/// Number of the site that called out.
pub const SITE: i32 = 0x8c;
/// Signals that can be acted on now.
pub const POLL_MASK: i32 = 0x90;
/// Number of the exit that was taken, to chain it.
pub const EXIT: i32 = 0x94;
/// Address of the pending-signals word.
pub const SIGNALS: i32 = 0x98;
/// Address of the code that leaves the cache.
pub const LEAVE: i32 = 0xa0;
/// Address of the code that calls out for a memory access that missed, and comes back.
pub const SLOW: i32 = 0xa8;
/// Address of the code that calls out for an instruction, and comes back.
pub const CALLOUT: i32 = 0xb0;
/// Linear bases of FS and GS.
pub const FS_BASE: i32 = 0xb8;
/// See [`FS_BASE`].
pub const GS_BASE: i32 = 0xc0;
/// Host RSP of the engine while fragments run.
pub const HOST_RSP: i32 = 0xc8;
/// Linear address of the access that missed.
pub const ADDRESS: i32 = 0xd8;
/// The engine's own context pointer.
pub const ENGINE: i32 = 0xd0;

/// The jump cache: [`JUMP_ENTRIES`] pairs of guest RIP and host address.
pub const JUMPS: i32 = 0x1000;
/// Entries of the jump cache.
pub const JUMP_ENTRIES: u32 = 4096;
/// The software TLB: entries of 32 bytes: read tag, write tag, host page, guest frame.
pub const TLB: i32 = JUMPS + 16 * JUMP_ENTRIES as i32;
/// Entries per variant (supervisor, user).
pub const TLB_ENTRIES: u32 = 1024;
/// Bytes from one variant's table to the next.
pub const TLB_STRIDE: i32 = 32 * TLB_ENTRIES as i32;
/// Size of a frame in bytes.
pub const SIZE: usize = TLB as usize + 2 * TLB_STRIDE as usize;

/// A tag that no page has.
pub const NO_TAG: u64 = u64::MAX;

/// The set of a jump target, as the inline lookup computes it.
#[must_use]
pub const fn jump_set(rip: u64) -> u32 {
    ((rip ^ rip >> 10) & (JUMP_ENTRIES as u64 - 1)) as u32
}
