//! Exits: any event that takes a vCPU out of plain guest execution. Each has a cause and a count.

use crate::debug::DebugStop;

/// Why [`crate::Vcpu::run`] returned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VcpuExit {
    /// Somebody raised [`crate::signals::Signal::KICK`].
    Kicked,
    /// The instruction budget is used up.
    Budget,
    /// The vCPU waits for an interrupt (HLT, MWAIT) or for a start-up IPI.
    Halted,
    /// Triple fault: the vCPU is in shutdown.
    TripleFault,
    /// The debugger wanted to stop here.
    Debug(DebugStop),
    /// The engine cannot go on; [`crate::Vcpu::failure`] says why. A fault of the host, not of the guest.
    Failed,
}

macro_rules! causes {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// What happened.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
        #[repr(usize)]
        pub enum Cause { $($(#[$doc])* $name,)* }
        impl Cause {
            /// All causes, in order of their numbers.
            pub const ALL: &[Self] = &[$(Self::$name,)*];
            /// The name in statistics.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

causes! {
    /// IN, INS.
    PortRead = "port-read",
    /// OUT, OUTS.
    PortWrite = "port-write",
    /// Read of device memory.
    MmioRead = "mmio-read",
    /// Write of device memory.
    MmioWrite = "mmio-write",
    /// An external interrupt was delivered.
    Interrupt = "interrupt",
    /// An NMI was delivered.
    Nmi = "nmi",
    /// An exception was delivered (page faults apart).
    Exception = "exception",
    /// A page fault that the guest must see was delivered.
    TruePageFault = "true-page-fault",
    /// A translation was missing in the software TLB and found in the guest's tables.
    TlbFill = "tlb-fill",
    /// INT n, INT3, INTO, INT1.
    SoftwareInterrupt = "software-interrupt",
    /// RDMSR, WRMSR.
    Msr = "msr",
    /// CPUID.
    Cpuid = "cpuid",
    /// MOV to and from control registers.
    ControlRegister = "control-register",
    /// A TLB flush (CR3, CR4, INVLPG, INVPCID).
    TlbFlush = "tlb-flush",
    /// HLT or MWAIT that went to sleep.
    Halt = "halt",
    /// A kick from outside.
    Kick = "kick",
    /// A write hit traced code.
    CodeWrite = "code-write",
    /// A page was decoded anew.
    CodeDecode = "code-decode",
    /// An instruction was executed natively (x87, SIMD).
    Native = "native-instruction",
    /// Another vCPU or a device asked for translations to be given up.
    Invalidate = "invalidate",
    /// INIT or start-up IPI.
    InitSipi = "init-sipi",
}

/// Counts by cause.
#[derive(Clone, Debug, Default)]
pub struct ExitStats {
    counts: [u64; Cause::ALL.len()],
}

impl ExitStats {
    /// Counts one event.
    #[inline(always)]
    pub fn count(&mut self, cause: Cause) {
        self.counts[cause as usize] += 1;
    }

    /// How often `cause` happened.
    #[must_use]
    pub fn get(&self, cause: Cause) -> u64 {
        self.counts[cause as usize]
    }

    /// Adds another vCPU's counts.
    pub fn add(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
    }

    /// Every cause with its count.
    pub fn iter(&self) -> impl Iterator<Item = (Cause, u64)> + '_ {
        Cause::ALL.iter().map(|&c| (c, self.get(c)))
    }
}
