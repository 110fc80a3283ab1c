//! Guest state between the interpreter's `Cpu` and the frame. While fragments run, the frame (and the host's registers) hold what they
//! change: general registers, RFLAGS, the bases of FS and GS, and which of SYSCALL's or SYSRET's segments are in force.

use bt::{Facts, FpLevel, TimeStamp, Variant, frame};
use x86::Segment;
use x86::bits::{cr0, cr4, efer, rflags};
use x86::cpuid::Vendor;
use x86::state::{Activity, sreg};
use x86_interp::cpu::{CodeSize, Cpu};
use x86_interp::flags::LazyFlags;
use x86_interp::system::segment::null_stack;
use x86_interp::system::syscall;
use x86_interp::vector;

use crate::exec::Frame;
use crate::{cpuid, fp, invlpg, legacy, switch, xstate};

/// What the host offers to translated code.
#[derive(Clone, Copy)]
pub struct Host {
    components: u64,
    bmi2: bool,
    rdtsc: TimeStamp,
}

impl Host {
    /// This host.
    pub fn detect() -> Self {
        Self {
            components: vector::host_components(),
            bmi2: std::is_x86_feature_detected!("bmi2"),
            rdtsc: TimeStamp::Inline,
        }
    }

    /// Without x87 and vector instructions in fragments.
    pub const fn without_fp(self) -> Self {
        Self { components: 0, ..self }
    }

    /// With another way to do RDTSC, where it is allowed.
    pub const fn with_time_stamp(self, rdtsc: TimeStamp) -> Self {
        Self { rdtsc, ..self }
    }
}

/// RF only keeps instruction breakpoints quiet, and ends with the next instruction (SDM 3B 17.3.1.1): without breakpoints nobody can tell.
pub fn drop_resume_flag(cpu: &mut Cpu) {
    // A single-step trap in the middle of a repeated instruction shows it.
    if cpu.system_flag(rflags::RF)
        && !cpu.system_flag(rflags::TF)
        && cpu.s.dr7 & x86::bits::dr::DR7_ENABLES == 0
    {
        cpu.system_flags &= !rflags::RF;
    }
}

/// Whether the code at RIP may be translated: at level 0 or 3, with plain memory accesses.
pub fn eligible(cpu: &Cpu) -> bool {
    (cpu.code_size == CodeSize::Bits64 || legacy::eligible(cpu))
        && matches!(cpu.s.cpl, 0 | 3)
        && !cpu.careful()
        && !cpu.alignment_checked()
        && !cpu.system_flag(rflags::DF)
        && cpu.s.activity == Activity::Running
}

/// Whether the interpreter may go on without a look at anything else: 16- or 32-bit code that runs undisturbed.
pub fn only_legacy(cpu: &Cpu) -> bool {
    cpu.code_size != CodeSize::Bits64
        && cpu.s.activity == Activity::Running
        && !cpu.careful()
        && !cpu.poll()
        && !cpu.code_changed
        && !eligible(cpu)
}

/// Rights of the code at RIP.
pub const fn variant(cpu: &Cpu) -> Variant {
    match cpu.variant {
        0 => Variant::Supervisor,
        1 => Variant::SupervisorAc,
        _ => Variant::User,
    }
}

fn fp_level(cpu: &Cpu, host: Host) -> FpLevel {
    const AVX: u64 = 6;
    const AVX512: u64 = 0xe6;
    let s = &cpu.s;
    if host.components & 3 != 3 || s.cr0 & (cr0::EM | cr0::TS) != 0 || !vector::exceptions_masked(&s.fpu) {
        return FpLevel::None;
    }
    if s.cr4 & cr4::OSFXSR == 0 {
        return FpLevel::X87;
    }
    let enabled = if s.cr4 & cr4::OSXSAVE != 0 { s.xcr0 & host.components } else { 0 };
    if enabled & AVX512 == AVX512 {
        FpLevel::Avx512
    } else if enabled & AVX == AVX {
        FpLevel::Avx
    } else {
        FpLevel::Sse
    }
}

/// What translations of the code at RIP may rely on. `counter`: what the guest's TSC is ahead of the host's, if that does not change.
pub fn facts(cpu: &Cpu, host: Host, counter: Option<u64>) -> Facts {
    let variant = variant(cpu);
    let user = variant == Variant::User;
    // Only kernel code knows its address: user pages are mapped at many.
    let legacy = legacy::facts(cpu);
    // 16- and 32-bit kernels share the half that each address space has to itself: their code is found by its frame, at whatever address.
    let page_rip = Some(cpu.rip & !0xfff).filter(|page| !user && legacy.is_none() && *page != 0);
    Facts {
        page_rip,
        variant,
        fp: fp_level(cpu, host),
        amd: cpu.model.vendor() == Vendor::Amd,
        syscall: cpu.s.msr.efer & efer::SCE != 0,
        smap: cpu.s.cr4 & cr4::SMAP != 0,
        fsgsbase: cpu.s.cr4 & cr4::FSGSBASE != 0,
        rdtsc: if cpu.s.cr4 & cr4::TSD == 0 && counter.is_some() { host.rdtsc } else { TimeStamp::Callout },
        bmi2: host.bmi2,
        plain: false,
        legacy,
    }
}

/// Before fragments run, for as long as the vCPU is in the guest.
pub fn begin(cpu: &mut Cpu, host: Host, frame: &Frame) {
    frame.set(frame::SECOND_TLB, cpu.tlb.address());
    frame.set(frame::MEMORY, cpu.mem.host_base() as u64);
    frame.set(frame::TRACES, cpu.mem.trace_table() as u64);
    fp::begin(frame, host.components);
    frame.set32(frame::MODE, 0);
}

/// The `Cpu` into the frame.
pub fn fill(cpu: &mut Cpu, frame: &Frame, counter: Option<u64>) {
    for (at, value) in (frame::GPR..).step_by(8).zip(&cpu.gpr[..16]) {
        frame.set(at, *value);
    }
    let f = cpu.flags.to_rflags();
    #[expect(clippy::cast_possible_truncation, reason = "flags in 16 bits")]
    frame.set32(frame::FLAGS, ((f & 0xd5 | 2) << 8 | (f >> 11 & 1)) as u32);
    frame.set(frame::SYSFLAGS, cpu.system_flags);
    frame.set(frame::RIP, legacy::linear_rip(cpu));
    frame.set(frame::FS_BASE, cpu.s.seg[sreg::FS].base);
    frame.set(frame::GS_BASE, cpu.s.seg[sreg::GS].base);
    for (at, segment) in (frame::SELECTORS..).step_by(4).zip(&cpu.s.seg) {
        frame.set32(at, u32::from(segment.selector));
    }
    if cpu.code_size != CodeSize::Bits64 {
        legacy::fill(cpu, frame);
    }
    fill_system_calls(cpu, frame);
    fill_iret(cpu, frame);
    xstate::fill(cpu, frame);
    cpuid::forget_if_changed(cpu, frame);
    frame.set(frame::CR0, cpu.s.cr0);
    frame.set(frame::CR2, cpu.s.cr2);
    frame.set(frame::CR3, cpu.s.cr3);
    frame.set(frame::CR4, cpu.s.cr4);
    frame.set(frame::CONTEXT, cpu.tlb.context[0]);
    frame.set(frame::CONTEXT + 8, cpu.tlb.context[1]);
    frame.set(frame::CODE_CONTEXT, cpu.tlb.context[0]);
    frame.set(frame::KERNEL_GS_BASE, cpu.s.msr.kernel_gs_base);
    frame.set(frame::TSC_OFFSET, counter.unwrap_or(0).wrapping_add(cpu.s.msr.tsc_offset));
    frame.set(
        frame::FP_AREA,
        std::ptr::from_ref::<x86::state::FpuArea>(&cpu.s.fpu).expose_provenance() as u64,
    );
    if std::mem::take(&mut cpu.fpu_touched) {
        vector::prepare_restore(&mut cpu.s.fpu);
    }
}

/// What SYSCALL, SYSRET and RDTSCP in fragments take from model-specific registers.
pub fn fill_system_calls(cpu: &Cpu, frame: &Frame) {
    let selectors = syscall::selectors(cpu);
    for (at, selector) in (frame::SYSCALL_SELECTORS..).step_by(4).zip(selectors) {
        frame.set32(at, u32::from(selector));
    }
    let m = &cpu.s.msr;
    frame.set(frame::LSTAR, m.lstar);
    frame.set(frame::SYSCALL_KEEP, !m.sfmask | rflags::FIXED);
    let masked = m.sfmask;
    let keep = !((masked & 0xd5) << 8 | (masked >> 11 & 1));
    frame.set(frame::SYSCALL_KEEP_STATUS, keep);
    frame.set(frame::TSC_AUX, m.tsc_aux);
}

/// What IRETQ in the cache needs to know.
fn fill_iret(cpu: &Cpu, frame: &Frame) {
    let mut allowed = if cpu.s.cr4 & cr4::SMAP != 0 { frame::IRET_SMAP } else { 0 };
    // IRET unblocks NMIs: the interpreter does that.
    if !cpu.s.nmi_blocked {
        allowed |= 1 | u32::from(cpu.keeps_segments_outward()) << 3;
    }
    frame.set32(frame::IRET_ALLOWED, allowed);
    frame.set32(frame::GDT_LIMIT, u32::from(cpu.s.gdtr.limit));
    frame.set(frame::GDT_BASE, cpu.s.gdtr.base);
}

/// The arithmetic flags of the frame, as RFLAGS has them.
pub fn status_flags(frame: &Frame) -> u64 {
    let f = u64::from(frame.get32(frame::FLAGS));
    let of = if f & 1 != 0 { rflags::OF } else { 0 };
    f >> 8 & 0xd5 | of
}

/// The frame into the `Cpu`, RIP excepted.
pub fn read(cpu: &mut Cpu, frame: &Frame) {
    for (at, value) in (frame::GPR..).step_by(8).zip(&mut cpu.gpr[..16]) {
        *value = frame.get(at);
    }
    cpu.flags = LazyFlags::from_rflags(status_flags(frame));
    cpu.s.msr.kernel_gs_base = frame.get(frame::KERNEL_GS_BASE);
    read_nulled(cpu, frame);
    for (segment, at) in [(sreg::FS, frame::FS_BASE), (sreg::GS, frame::GS_BASE)] {
        let base = frame.get(at);
        cpu.s.seg[segment].base = base;
        cpu.seg_base[segment] = base;
    }
    read_mode(cpu, frame);
}

/// The segment registers that translated code loaded with 0. Bases are read later: they may have been written since.
fn read_nulled(cpu: &mut Cpu, frame: &Frame) {
    let nulled = frame.get32(frame::NULLED);
    if nulled == 0 {
        return;
    }
    for n in (0..6).filter(|n| nulled >> n & 1 != 0) {
        cpu.s.seg[n] = Segment::default();
    }
    cpu.derive_segments();
    frame.set32(frame::NULLED, 0);
}

/// Level, RFLAGS and address space of the frame into the `Cpu`: what decides about rights and translations.
pub fn read_mode(cpu: &mut Cpu, frame: &Frame) {
    invlpg::adopt(cpu, frame);
    switch::adopt(cpu, frame);
    let mode = frame.get32(frame::MODE);
    let system_flags = frame.get(frame::SYSFLAGS);
    if mode == 0 && system_flags == cpu.system_flags {
        return;
    }
    cpu.system_flags = system_flags;
    cpu.s.rflags = system_flags;
    match mode {
        frame::MODE_SYSCALL => syscall::enter_flat(cpu),
        frame::MODE_SYSRET => syscall::return_flat(cpu),
        frame::MODE_IRET => load_returned(cpu, frame),
        _ => cpu.derive_variant(),
    }
    frame.set32(frame::MODE, 0);
    cpu.derive_poll_mask();
}

/// The segments that IRETQ in the cache found (it checked them).
#[expect(clippy::cast_possible_truncation, reason = "selectors")]
fn load_returned(cpu: &mut Cpu, frame: &Frame) {
    let selector = |register: usize| frame.get32(frame::SELECTORS + 4 * register as i32) as u16;
    let (cs, ss) = (selector(sreg::CS), selector(sreg::SS));
    let [code, stack] = [0, 8].map(|at| frame.get(frame::IRET_DESCRIPTORS + at));
    let cpl = (cs & 3) as u8;
    cpu.s.seg[sreg::SS] = if ss == 0 { null_stack(ss, cpl) } else { Segment::from_descriptor(ss, stack) };
    cpu.set_code_segment(Segment::from_descriptor(cs, code), cpl);
}
