//! What the host's KVM cannot or will not do.

use std::io;

/// Why there is no VM on KVM.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// `/dev/kvm` cannot be opened.
    #[error("cannot open /dev/kvm: {why}; {advice}")]
    Open {
        /// The kernel's reason.
        why: io::Error,
        /// What to do about it.
        advice: &'static str,
    },
    /// An old or cut-down KVM.
    #[error("this host's KVM lacks {0}, which the engine kvm needs (Linux 5.14 has it); use --engine bt")]
    Lacks(&'static str),
    /// Features of the CPU model that the user asked for.
    #[error(
        "this host's KVM does not give a guest {0}, which the CPU model asks for; give another --cpu, or --engine bt"
    )]
    Features(String),
    /// A request that failed.
    #[error("KVM refused {what}: {source}")]
    Refused {
        /// The request.
        what: &'static str,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// A register that KVM does not take.
    #[error("KVM refused the value {value:#x} of MSR {index:#x}")]
    Msr {
        /// Its number.
        index: u32,
        /// The value.
        value: u64,
    },
}

impl KvmError {
    /// For `map_err` of the rust-vmm crates' errors.
    pub(crate) fn refused(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |error| Self::Refused { what, source: io::Error::from_raw_os_error(error.errno()) }
    }
}
