//! Exits: any event that takes a vCPU out of plain guest execution. Each has a cause, a count and a cost.

use crate::account::{Entry, Meter, Span};
use crate::cost::Row;
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

/// Counts and costs by cause.
#[derive(Clone, Debug, Default)]
pub struct ExitStats {
    entries: [Entry; Cause::ALL.len()],
    /// Times spans; an engine's own accounts use it, too.
    pub meter: Meter,
}

impl ExitStats {
    /// A vCPU's: counts and measures.
    #[must_use]
    pub fn measuring() -> Self {
        Self { meter: Meter::new(), ..Self::default() }
    }

    /// Counts one event that is not measured.
    #[inline(always)]
    pub fn count(&mut self, cause: Cause) {
        self.entries[cause as usize].count += 1;
    }

    /// Counts one event that begins.
    #[inline(always)]
    pub fn begin(&mut self, cause: Cause) -> Span {
        self.meter.begin(&mut self.entries[cause as usize])
    }

    /// One begins that is counted elsewhere, if it comes to that.
    #[inline(always)]
    pub fn watch(&mut self, cause: Cause) -> Span {
        self.meter.watch(&mut self.entries[cause as usize])
    }

    /// It ends.
    #[inline(always)]
    pub fn end(&mut self, cause: Cause, span: Span) {
        self.meter.end(&mut self.entries[cause as usize], span);
    }

    /// From now on events of these causes are only counted: who calls this measures what is around them.
    pub fn mute(&mut self, causes: &[Cause]) {
        causes.iter().for_each(|&c| self.entries[c as usize].mute());
    }

    /// How often `cause` happened.
    #[must_use]
    pub fn get(&self, cause: Cause) -> u64 {
        self.entries[cause as usize].count
    }

    /// Adds another vCPU's counts.
    pub fn add(&mut self, other: &Self) {
        self.entries.iter_mut().zip(&other.entries).for_each(|(mine, theirs)| mine.add(theirs));
        self.meter.measurements += other.meter.measurements;
    }

    /// Every cause with its count.
    pub fn iter(&self) -> impl Iterator<Item = (Cause, u64)> + '_ {
        Cause::ALL.iter().map(|&c| (c, self.get(c)))
    }

    /// Every cause with its cost.
    #[must_use]
    pub fn rows(&self) -> Vec<Row> {
        let rows = Cause::ALL.iter().zip(&self.entries);
        rows.map(|(cause, entry)| Row::of("exit", cause.name(), entry)).collect()
    }
}
