//! The hook that every interceptable event passes before its effect: SVM and VMX for guests will fill it.

/// An event that a hypervisor may want to see.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// An exception with this vector is about to be delivered.
    Exception(u8),
    /// An external interrupt is about to be acknowledged.
    Interrupt,
    /// An NMI is about to be delivered.
    Nmi,
    /// INT n.
    SoftwareInterrupt(u8),
    /// MOV from a control register.
    CrRead(u8),
    /// MOV to a control register, CLTS, LMSW.
    CrWrite(u8),
    /// MOV from a debug register.
    DrRead(u8),
    /// MOV to a debug register.
    DrWrite(u8),
    /// RDMSR.
    MsrRead(u32),
    /// WRMSR.
    MsrWrite(u32),
    /// IN, OUT and their string forms.
    Port(u16),
    /// An instruction that has an intercept of its own.
    Instruction(Sensitive),
    /// A task switch.
    TaskSwitch,
    /// Shutdown after a triple fault.
    Shutdown,
}

/// Instructions with an intercept of their own (APM 2 15.9).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "the manual's mnemonics")]
pub enum Sensitive {
    Cpuid,
    Hlt,
    Pause,
    Rdtsc,
    Rdtscp,
    Rdpmc,
    Invd,
    Wbinvd,
    Invlpg,
    Invpcid,
    Iret,
    Pushf,
    Popf,
    Monitor,
    Mwait,
    Xsetbv,
    DescriptorTable,
    Vmcall,
    Rsm,
}

/// What to do with an event.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Let it happen.
    Proceed,
    /// The nested hypervisor takes it.
    Exit,
}

/// Which events are intercepted: none, as long as no guest runs guests.
#[derive(Clone, Copy, Default, Debug)]
pub struct Intercepts;

impl Intercepts {
    /// Asked before the effect of every interceptable event.
    #[inline(always)]
    pub const fn intercept(&self, _event: Event) -> Action {
        Action::Proceed
    }
}
