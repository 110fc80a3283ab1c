//! Why a guest cannot be started: one line each, saying what is wrong, where, and what to do.

use super::Protocol;

/// A kernel, initrd or command line that cannot be loaded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the fields are what their messages say")]
pub enum BootError {
    #[error("the kernel file is empty; give a Linux bzImage, an ELF or a multiboot image")]
    Empty,

    #[error(
        "the kernel file has only {len} bytes, less than any kernel header; give a Linux bzImage, an ELF or a multiboot image"
    )]
    TooShort { len: usize },

    #[error("not a kernel: {found}; give a Linux bzImage, an ELF or a multiboot image")]
    NotAKernel { found: &'static str },

    #[error("the kernel file is compressed with {format}; decompress it first ({tool})")]
    Compressed { format: &'static str, tool: &'static str },

    #[error(
        "the kernel file is truncated: {what} needs {needed:#x} bytes, the file has {len:#x}; get a complete copy"
    )]
    Truncated { what: &'static str, needed: u64, len: u64 },

    #[error(
        "malformed {format} header: {what} is {value:#x}; the file is damaged or not meant for this machine"
    )]
    Malformed { format: &'static str, what: &'static str, value: u64 },

    #[error("the kernel cannot be loaded: {what}; {advice}")]
    Unsupported { what: &'static str, advice: &'static str },

    #[error("the kernel does not offer the {wanted} boot protocol that was asked for; it offers {offers}")]
    Protocol { wanted: Protocol, offers: &'static str },

    #[error("{what} at {start:#x}..{end:#x} is not in usable guest RAM ({ram}); {advice}")]
    OutsideRam { what: &'static str, start: u64, end: u64, ram: String, advice: String },

    #[error(
        "{what} of {size:#x} bytes does not fit in guest RAM between {from:#x} and {limit:#x}; give the guest more memory"
    )]
    NoRoom { what: &'static str, size: u64, from: u64, limit: u64 },

    #[error("the kernel command line has {len} bytes, this kernel takes at most {max}; shorten it")]
    CommandLineTooLong { len: usize, max: usize },

    #[error("the kernel command line contains a NUL byte at offset {at}; remove it")]
    CommandLineNul { at: usize },

    #[error("guest memory of {have:#x} bytes is too small for a PC; give at least {needed:#x}")]
    MemoryTooSmall { have: u64, needed: u64 },

    #[error("{cpus} CPUs cannot be described; give 1 to {max}")]
    Cpus { cpus: u32, max: u32 },

    #[error("cannot read the kernel file again for the reset: {0}; start the machine anew")]
    Again(String),

    #[error("cannot write boot data: {0}")]
    Memory(#[from] guestmem::Unbacked),
}
