//! Exits of KVM as plain data (Linux `Documentation/virt/kvm/api.rst`, "The kvm_run structure").

#![expect(unsafe_code, reason = "the exit reason says which member of a union is valid")]

use std::mem::offset_of;

use kvm_bindings as kvm;
use kvm_bindings::kvm_run;

/// IN, OUT, INS, OUTS.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PortAccess {
    /// The port.
    pub port: u16,
    /// 1, 2 or 4 bytes.
    pub size: u8,
    /// How many of these (string instructions).
    pub count: u32,
    /// OUT.
    pub write: bool,
    /// Where in the shared page the data stands.
    pub at: usize,
}

/// An access to what is no RAM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DeviceAccess {
    /// Guest physical address.
    pub gpa: u64,
    /// Bytes, at most 8.
    pub len: usize,
    /// The bytes written.
    pub data: [u8; 8],
    /// A write.
    pub write: bool,
}

/// RDMSR or WRMSR of a register that KVM leaves to us, or could not handle.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MsrAccess {
    /// The register.
    pub index: u32,
    /// The value written.
    pub value: u64,
    /// WRMSR.
    pub write: bool,
}

/// Why `KVM_RUN` returned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// Ports.
    Port(PortAccess),
    /// Device memory.
    Device(DeviceAccess),
    /// Model-specific registers.
    Msr(MsrAccess),
    /// HLT.
    Halt,
    /// An interrupt could be taken now.
    Window,
    /// CR8 was lowered.
    TaskPriority,
    /// A signal, or nothing in particular: run on.
    Again,
    /// Triple fault.
    Shutdown,
    /// A debug exception while a debugger is there.
    Debug {
        /// Vector: 1 or 3.
        exception: u32,
        /// Linear address of the instruction.
        pc: u64,
        /// What DR6 would be.
        dr6: u64,
    },
    /// KVM gave up: see [`crate::failure`].
    Failure(Failure),
}

/// What KVM could not do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Failure {
    /// It had to emulate an instruction and could not.
    Emulation {
        /// The instruction's bytes, where it gives them, and how many.
        bytes: [u8; 15],
        /// 0: not given.
        len: usize,
    },
    /// Another internal error.
    Internal {
        /// `KVM_INTERNAL_ERROR_*`.
        suberror: u32,
        /// The first word that comes with it.
        data: u64,
    },
    /// The processor refused to enter the guest.
    Entry {
        /// Its reason, as the manuals number them.
        reason: u64,
    },
    /// An exit that no x86 guest of ours can cause.
    Unexpected {
        /// `KVM_EXIT_*`.
        reason: u32,
    },
}

/// Where answers go in the shared page.
pub const DEVICE_DATA: usize =
    offset_of!(kvm_run, __bindgen_anon_1) + offset_of!(kvm::kvm_run__bindgen_ty_1__bindgen_ty_6, data);
/// Eight bytes: the value of RDMSR.
pub const MSR_DATA: usize =
    offset_of!(kvm_run, __bindgen_anon_1) + offset_of!(kvm::kvm_run__bindgen_ty_1__bindgen_ty_23, data);
/// One byte: not 0 raises #GP.
pub const MSR_ERROR: usize =
    offset_of!(kvm_run, __bindgen_anon_1) + offset_of!(kvm::kvm_run__bindgen_ty_1__bindgen_ty_23, error);

/// The exit that the page tells of.
#[must_use]
pub fn decode(run: &kvm_run) -> Exit {
    let u = &run.__bindgen_anon_1;
    // SAFETY (all blocks): `exit_reason`, which the kernel wrote, says which member is valid; all are plain integers.
    match run.exit_reason {
        // SAFETY: see above.
        kvm::KVM_EXIT_IO => port(unsafe { u.io }),
        // SAFETY: see above.
        kvm::KVM_EXIT_MMIO => device(unsafe { u.mmio }),
        // SAFETY: see above.
        kvm::KVM_EXIT_X86_RDMSR => msr(unsafe { u.msr }, false),
        // SAFETY: see above.
        kvm::KVM_EXIT_X86_WRMSR => msr(unsafe { u.msr }, true),
        kvm::KVM_EXIT_HLT => Exit::Halt,
        kvm::KVM_EXIT_IRQ_WINDOW_OPEN => Exit::Window,
        kvm::KVM_EXIT_SET_TPR => Exit::TaskPriority,
        kvm::KVM_EXIT_INTR => Exit::Again,
        kvm::KVM_EXIT_SHUTDOWN => Exit::Shutdown,
        kvm::KVM_EXIT_DEBUG => {
            // SAFETY: see above.
            let arch = unsafe { u.debug }.arch;
            Exit::Debug { exception: arch.exception, pc: arch.pc, dr6: arch.dr6 }
        }
        kvm::KVM_EXIT_FAIL_ENTRY => {
            // SAFETY: see above.
            Exit::Failure(Failure::Entry { reason: unsafe { u.fail_entry }.hardware_entry_failure_reason })
        }
        kvm::KVM_EXIT_INTERNAL_ERROR => Exit::Failure(internal_error(u)),
        reason => Exit::Failure(Failure::Unexpected { reason }),
    }
}

fn port(io: kvm::kvm_run__bindgen_ty_1__bindgen_ty_4) -> Exit {
    Exit::Port(PortAccess {
        port: io.port,
        size: io.size,
        count: io.count,
        write: u32::from(io.direction) == kvm::KVM_EXIT_IO_OUT,
        at: usize::try_from(io.data_offset).unwrap_or(usize::MAX),
    })
}

fn device(mmio: kvm::kvm_run__bindgen_ty_1__bindgen_ty_6) -> Exit {
    let len = usize::try_from(mmio.len).unwrap_or(8).min(8);
    Exit::Device(DeviceAccess { gpa: mmio.phys_addr, len, data: mmio.data, write: mmio.is_write != 0 })
}

fn msr(msr: kvm::kvm_run__bindgen_ty_1__bindgen_ty_23, write: bool) -> Exit {
    Exit::Msr(MsrAccess { index: msr.index, value: msr.data, write })
}

fn internal_error(u: &kvm::kvm_run__bindgen_ty_1) -> Failure {
    // SAFETY: for KVM_EXIT_INTERNAL_ERROR `internal` is valid.
    let internal = unsafe { u.internal };
    if internal.suberror != kvm::KVM_INTERNAL_ERROR_EMULATION {
        let data = if internal.ndata > 0 { internal.data[0] } else { 0 };
        return Failure::Internal { suberror: internal.suberror, data };
    }
    // SAFETY: for this suberror `emulation_failure` is the same bytes by names; all are integers.
    let failure = unsafe { u.emulation_failure };
    // Words behind `ndata`: flags, then length and bytes of the instruction.
    let has_bytes = failure.ndata >= 3
        && failure.flags & u64::from(kvm::KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
    // SAFETY: as above; the member holds the only form there is.
    let instruction = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
    let len = if has_bytes { usize::from(instruction.insn_size).min(15) } else { 0 };
    Failure::Emulation { bytes: instruction.insn_bytes, len }
}

macro_rules! reasons {
    ($($constant:ident $name:literal)*) => {
        /// The names of exit reasons, in statistics.
        pub const REASONS: &[(u32, &str)] = &[$((kvm::$constant, $name),)*];
    };
}

reasons! {
    KVM_EXIT_IO "io"
    KVM_EXIT_MMIO "mmio"
    KVM_EXIT_X86_RDMSR "rdmsr"
    KVM_EXIT_X86_WRMSR "wrmsr"
    KVM_EXIT_HLT "hlt"
    KVM_EXIT_IRQ_WINDOW_OPEN "irq-window"
    KVM_EXIT_SET_TPR "set-tpr"
    KVM_EXIT_INTR "intr"
    KVM_EXIT_SHUTDOWN "shutdown"
    KVM_EXIT_DEBUG "debug"
    KVM_EXIT_FAIL_ENTRY "fail-entry"
    KVM_EXIT_INTERNAL_ERROR "internal-error"
    KVM_EXIT_UNKNOWN "unknown"
    KVM_EXIT_EXCEPTION "exception"
    KVM_EXIT_HYPERCALL "hypercall"
    KVM_EXIT_SYSTEM_EVENT "system-event"
    KVM_EXIT_MEMORY_FAULT "memory-fault"
    KVM_EXIT_X86_BUS_LOCK "bus-lock"
    KVM_EXIT_NOTIFY "notify"
}

/// The name of an exit reason; an unknown one is `other`.
#[must_use]
pub fn reason_name(reason: u32) -> &'static str {
    REASONS.iter().find(|r| r.0 == reason).map_or("other", |r| r.1)
}

impl Exit {
    /// The exit reason that stands for it in statistics.
    #[must_use]
    pub const fn reason(&self) -> u32 {
        match self {
            Self::Port(_) => kvm::KVM_EXIT_IO,
            Self::Device(_) => kvm::KVM_EXIT_MMIO,
            Self::Msr(MsrAccess { write: false, .. }) => kvm::KVM_EXIT_X86_RDMSR,
            Self::Msr(_) => kvm::KVM_EXIT_X86_WRMSR,
            Self::Halt => kvm::KVM_EXIT_HLT,
            Self::Window => kvm::KVM_EXIT_IRQ_WINDOW_OPEN,
            Self::TaskPriority => kvm::KVM_EXIT_SET_TPR,
            Self::Again => kvm::KVM_EXIT_INTR,
            Self::Shutdown => kvm::KVM_EXIT_SHUTDOWN,
            Self::Debug { .. } => kvm::KVM_EXIT_DEBUG,
            Self::Failure(Failure::Entry { .. }) => kvm::KVM_EXIT_FAIL_ENTRY,
            Self::Failure(Failure::Unexpected { reason }) => *reason,
            Self::Failure(_) => kvm::KVM_EXIT_INTERNAL_ERROR,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(reason: u32) -> kvm_run {
        // SAFETY: all members are integers, for which zero is a value.
        let mut run: kvm_run = unsafe { std::mem::zeroed() };
        run.exit_reason = reason;
        run
    }

    #[test]
    fn port_exit_keeps_size_apart_from_count() {
        let mut run = page(kvm::KVM_EXIT_IO);
        run.__bindgen_anon_1.io = kvm::kvm_run__bindgen_ty_1__bindgen_ty_4 {
            direction: 1,
            size: 2,
            port: 0x1f0,
            count: 256,
            data_offset: 4096,
        };
        let access = PortAccess { port: 0x1f0, size: 2, count: 256, write: true, at: 4096 };
        assert_eq!(decode(&run), Exit::Port(access));
        assert_eq!(reason_name(decode(&run).reason()), "io");
    }

    #[test]
    fn device_access_is_never_longer_than_its_data() {
        let mut run = page(kvm::KVM_EXIT_MMIO);
        run.__bindgen_anon_1.mmio = kvm::kvm_run__bindgen_ty_1__bindgen_ty_6 {
            phys_addr: 0xfee0_0020,
            data: [7; 8],
            len: 99,
            is_write: 0,
        };
        assert_eq!(
            decode(&run),
            Exit::Device(DeviceAccess { gpa: 0xfee0_0020, len: 8, data: [7; 8], write: false })
        );
    }

    #[test]
    fn failed_emulation_has_its_bytes_only_where_kvm_gives_them() {
        let mut run = page(kvm::KVM_EXIT_INTERNAL_ERROR);
        run.__bindgen_anon_1.emulation_failure.suberror = kvm::KVM_INTERNAL_ERROR_EMULATION;
        // SAFETY: integers.
        unsafe {
            let instruction = &mut run.__bindgen_anon_1.emulation_failure.__bindgen_anon_1.__bindgen_anon_1;
            instruction.insn_size = 200;
            instruction.insn_bytes = [0xcd; 15];
        }
        assert_eq!(decode(&run), Exit::Failure(Failure::Emulation { bytes: [0xcd; 15], len: 0 }));
        run.__bindgen_anon_1.emulation_failure.ndata = 4;
        run.__bindgen_anon_1.emulation_failure.flags = 1;
        assert_eq!(decode(&run), Exit::Failure(Failure::Emulation { bytes: [0xcd; 15], len: 15 }));
        run.__bindgen_anon_1.internal.suberror = kvm::KVM_INTERNAL_ERROR_DELIVERY_EV;
        // SAFETY: integers.
        unsafe { run.__bindgen_anon_1.internal.data[0] = 0x8000_000d };
        let other = Failure::Internal { suberror: kvm::KVM_INTERNAL_ERROR_DELIVERY_EV, data: 0x8000_000d };
        assert_eq!(decode(&run), Exit::Failure(other));
    }

    #[test]
    fn unknown_reasons_are_failures_with_their_number() {
        assert_eq!(decode(&page(250)), Exit::Failure(Failure::Unexpected { reason: 250 }));
        assert_eq!(reason_name(250), "other");
        for &(reason, name) in REASONS {
            let of = decode(&page(reason)).reason();
            assert_eq!(reason_name(of), name, "{reason} is counted under its own name");
        }
    }
}
