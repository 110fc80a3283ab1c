//! What can go wrong on the host's side of a VM.

use crate::boot::BootError;

/// A VM that cannot be made, run, saved or restored. What a guest does wrong is an [`crate::Outcome`], never an error.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The kernel cannot be started.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] guestmem::MemoryError),
    /// The CPU model.
    #[error("{0}")]
    Cpu(#[from] x86::cpuid::ModelError),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] devices::virtio::block::ImageError),
    /// A shared directory.
    #[error(transparent)]
    Share(#[from] devices::virtio::share::ShareError),
    /// The host has no randomness to give.
    #[error("cannot open the host's random generator: {0}")]
    Entropy(#[source] std::io::Error),
    /// `--clock icount` runs everything on one thread.
    #[error("the clock icount needs exactly one CPU, not {0}; give --cpus 1 or --clock host")]
    IcountCpus(u32),
    /// Only the interpreter counts instructions.
    #[error(
        "the clock icount counts instructions, which the engine {0} does not; give --engine interp or --clock host"
    )]
    NoIcount(&'static str),
    /// Packets are not reproducible.
    #[error(
        "the clock icount is reproducible, which networks and sockets are not; give --clock host, or neither --net nor --vsock"
    )]
    IcountNet,
    /// A device's thread.
    #[error("cannot start the thread of a device: {0}")]
    Net(#[source] std::io::Error),
    /// The host's KVM.
    #[error(transparent)]
    Kvm(#[from] engine_kvm::KvmError),
    /// An engine that cannot go on.
    #[error("{0}")]
    Engine(String),
    /// No memory for translated code.
    #[error("cannot get memory for translated code: {0}; use --engine interp")]
    CodeMemory(#[source] std::io::Error),
    /// A file for `perf`.
    #[error(transparent)]
    Profile(#[from] engine_bt::perf_map::ProfileError),
    /// A vCPU thread could not be made.
    #[error("cannot start a thread for the machine: {0}")]
    Thread(#[source] std::io::Error),
    /// A thread of the machine panicked: a broken invariant of this program.
    #[error("internal error: {thread} panicked: {message}; this is a bug in trellis")]
    Panic {
        /// Which thread.
        thread: String,
        /// What it said.
        message: String,
    },
    /// The board's wiring contradicts itself.
    #[error("internal error: {0}")]
    Board(String),
    /// A snapshot.
    #[error(transparent)]
    Snapshot(#[from] crate::snapshot::SnapshotError),
}

impl From<devices::bus::Overlap> for VmError {
    fn from(error: devices::bus::Overlap) -> Self {
        Self::Board(error.to_string())
    }
}

impl From<devices::pci::PciError> for VmError {
    fn from(error: devices::pci::PciError) -> Self {
        Self::Board(error.to_string())
    }
}
