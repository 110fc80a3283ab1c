//! [`CpuState`] to and from KVM's register structures: plain conversions, no requests.
//!
//! What KVM has not: the activity (it is the vCPU loop's) and the registers that are ours ([`crate::msr`]).

use kvm_bindings::{
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, KVM_X86_SHADOW_INT_MOV_SS,
    KVM_X86_SHADOW_INT_STI, kvm_debugregs, kvm_regs, kvm_sregs2, kvm_vcpu_events, kvm_xsave,
};
use x86::CpuState;
use x86::bits::{cr0, cr4};
use x86::state::{FPU_BYTES, FpuArea, InterruptShadow, gpr, sreg};

use crate::segment::{from_kvm, table_from_kvm, table_to_kvm, to_kvm};

/// General registers, RIP, RFLAGS.
#[must_use]
pub fn general(s: &CpuState) -> kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = s.gpr;
    let (rip, rflags) = (s.rip, s.rflags);
    kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
}

/// The reverse of [`general`].
pub fn take_general(s: &mut CpuState, r: &kvm_regs) {
    s.gpr = [
        r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13,
        r.r14, r.r15,
    ];
    debug_assert_eq!(s.gpr[gpr::RDI], r.rdi);
    s.rip = r.rip;
    s.rflags = r.rflags;
}

/// `KVM_SREGS2_FLAGS_PDPTRS_VALID`.
const PDPTES_VALID: u64 = 1;

/// PAE paging outside of IA-32e mode: the only one whose PDPTEs are registers (SDM 3A 4.4.1).
const fn has_pdptes(s: &CpuState) -> bool {
    s.cr0 & cr0::PG != 0 && s.cr4 & cr4::PAE != 0 && !s.long_mode()
}

/// Segments, tables, control registers, EFER.
#[must_use]
pub fn system(s: &CpuState, cr8: u64, apic_base: u64) -> kvm_sregs2 {
    let mut ss = to_kvm(&s.seg[sreg::SS]);
    // The level is the descriptor privilege level of SS, for KVM.
    ss.dpl = s.cpl;
    kvm_sregs2 {
        es: to_kvm(&s.seg[sreg::ES]),
        cs: to_kvm(&s.seg[sreg::CS]),
        ss,
        ds: to_kvm(&s.seg[sreg::DS]),
        fs: to_kvm(&s.seg[sreg::FS]),
        gs: to_kvm(&s.seg[sreg::GS]),
        ldt: to_kvm(&s.ldtr),
        tr: to_kvm(&s.tr),
        gdt: table_to_kvm(&s.gdtr),
        idt: table_to_kvm(&s.idtr),
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8,
        efer: s.msr.efer,
        apic_base,
        flags: if has_pdptes(s) { PDPTES_VALID } else { 0 },
        pdptrs: s.pdpte,
    }
}

/// The reverse of [`system`].
pub fn take_system(s: &mut CpuState, r: &kvm_sregs2) {
    s.seg = [&r.es, &r.cs, &r.ss, &r.ds, &r.fs, &r.gs].map(from_kvm);
    (s.ldtr, s.tr) = (from_kvm(&r.ldt), from_kvm(&r.tr));
    (s.gdtr, s.idtr) = (table_from_kvm(&r.gdt), table_from_kvm(&r.idt));
    (s.cr0, s.cr2, s.cr3, s.cr4) = (r.cr0, r.cr2, r.cr3, r.cr4);
    s.msr.efer = r.efer;
    if r.flags & PDPTES_VALID != 0 {
        s.pdpte = r.pdptrs;
    }
    s.cpl = match (s.protected(), s.v86()) {
        (false, _) => 0,
        (true, true) => 3,
        (true, false) => r.ss.dpl & 3,
    };
}

/// DR0 to DR3, DR6, DR7.
#[must_use]
pub fn debug(s: &CpuState) -> kvm_debugregs {
    kvm_debugregs { db: s.dr, dr6: s.dr6, dr7: s.dr7, ..kvm_debugregs::default() }
}

/// The reverse of [`debug`].
pub fn take_debug(s: &mut CpuState, r: &kvm_debugregs) {
    (s.dr, s.dr6, s.dr7) = (r.db, r.dr6, r.dr7);
}

/// No event in flight; what interrupts have to wait for.
#[must_use]
pub fn events(s: &CpuState) -> kvm_vcpu_events {
    let shadow = match s.shadow {
        InterruptShadow::None => 0,
        InterruptShadow::Sti => KVM_X86_SHADOW_INT_STI,
        InterruptShadow::MovSs => KVM_X86_SHADOW_INT_MOV_SS,
    };
    let flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW;
    let mut events = kvm_vcpu_events { flags, ..kvm_vcpu_events::default() };
    events.interrupt.shadow = shadow.to_le_bytes()[0];
    events.nmi.masked = u8::from(s.nmi_blocked);
    events
}

/// The reverse of [`events`], without the events.
pub fn take_events(s: &mut CpuState, e: &kvm_vcpu_events) {
    let shadow = u32::from(e.interrupt.shadow);
    s.shadow = if shadow & KVM_X86_SHADOW_INT_MOV_SS != 0 {
        InterruptShadow::MovSs
    } else if shadow & KVM_X86_SHADOW_INT_STI != 0 {
        InterruptShadow::Sti
    } else {
        InterruptShadow::None
    };
    s.nmi_blocked = e.nmi.masked != 0;
}

/// Where XSTATE_BV stands in an XSAVE area (SDM 1 13.4.2).
const HEADER: usize = 512;
const HEADER_END: usize = 576;

/// FP and SIMD state. `components` are those that this guest can have; our area has all of them whole.
#[must_use]
pub fn fpu(area: &FpuArea, components: u64) -> kvm_xsave {
    let mut bytes = area.0;
    bytes[HEADER..HEADER_END].fill(0);
    bytes[HEADER..HEADER + 8].copy_from_slice(&(components | 3).to_le_bytes());
    let mut xsave = kvm_xsave::default();
    for (word, four) in xsave.region.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *word = u32::from_le_bytes(*four);
    }
    xsave
}

/// The reverse of [`fpu`]; KVM gives all components whole too.
pub fn take_fpu(area: &mut FpuArea, xsave: &kvm_xsave) {
    let header: [u8; HEADER_END - HEADER] = std::array::from_fn(|i| area.0[HEADER + i]);
    for (four, word) in area.0[..FPU_BYTES].as_chunks_mut::<4>().0.iter_mut().zip(&xsave.region) {
        *four = word.to_le_bytes();
    }
    // What stands there means nothing to us (INV-VEC-2), so it stays.
    area.0[HEADER..HEADER_END].copy_from_slice(&header);
}

#[cfg(test)]
mod tests {
    use super::*;
    use x86::{Attr, Segment, TableRegister};

    /// A state in which every field that KVM holds has a value of its own.
    fn state() -> CpuState {
        let mut s = CpuState::reset();
        s.gpr = std::array::from_fn(|i| 0x1111_0000 + i as u64);
        (s.rip, s.rflags) = (0xffff_ffff_8100_0000, 0x246);
        for (i, segment) in (0u16..).zip(&mut s.seg) {
            *segment = Segment {
                selector: i << 3,
                attr: Attr(0xc093 | i << 12 & 0x1000),
                limit: u32::MAX,
                base: u64::from(i),
            };
        }
        s.seg[sreg::CS].attr = Attr(0xa09b);
        s.ldtr = Segment { selector: 0x50, attr: Attr(0x82), limit: 0xf, base: 0x5000 };
        s.tr = Segment { selector: 0x40, attr: Attr(0x8b), limit: 0x67, base: 0x6000 };
        s.gdtr = TableRegister { base: 0x7000, limit: 0x7f };
        s.idtr = TableRegister { base: 0x8000, limit: 0xfff };
        (s.cr0, s.cr2, s.cr3, s.cr4) = (0x8005_0033, 0xdead, 0x1000, 0x6f0);
        s.msr.efer = 0xd01;
        (s.dr, s.dr6, s.dr7) = ([1, 2, 3, 4], 0xffff_0ff1, 0x455);
        (s.shadow, s.nmi_blocked) = (InterruptShadow::MovSs, true);
        for (i, byte) in s.fpu.0.iter_mut().enumerate() {
            *byte = i.to_le_bytes()[0];
        }
        s
    }

    fn there_and_back(s: &CpuState) -> CpuState {
        let mut back = CpuState::reset();
        take_general(&mut back, &general(s));
        take_system(&mut back, &system(s, 0, 0xfee0_0900));
        take_debug(&mut back, &debug(s));
        take_events(&mut back, &events(s));
        back.fpu.0[HEADER..HEADER_END].copy_from_slice(&s.fpu.0[HEADER..HEADER_END]);
        take_fpu(&mut back.fpu, &fpu(&s.fpu, 0));
        back
    }

    #[test]
    fn state_comes_back_as_it_went() {
        let s = state();
        assert_eq!(there_and_back(&s), s);
    }

    #[test]
    fn level_follows_the_mode() {
        let mut s = state();
        (s.cpl, s.seg[sreg::SS].attr) = (3, Attr(0xc0f3));
        assert_eq!(there_and_back(&s).cpl, 3);
        // Real mode has level 0, whatever SS was; virtual-8086 mode has 3.
        (s.cr0, s.msr.efer) = (0x10, 0);
        s.seg[sreg::SS] = Segment::real_mode(0x10);
        s.cpl = 0;
        assert_eq!(there_and_back(&s).cpl, 0);
        (s.cr0, s.rflags) = (0x11, 0x2_0002);
        s.cpl = 3;
        assert_eq!(there_and_back(&s).cpl, 3);
    }

    #[test]
    fn pdptes_go_with_pae_paging_only() {
        let mut s = state();
        s.pdpte = [1, 2, 3, 4];
        assert_eq!(system(&s, 0, 0).flags, 0);
        s.msr.efer = 0;
        assert_eq!(system(&s, 0, 0).flags, PDPTES_VALID);
        assert_eq!(there_and_back(&s).pdpte, [1, 2, 3, 4]);
    }

    #[test]
    fn fpu_header_names_the_components_of_the_guest() {
        let words = fpu(&FpuArea::default(), 0xe7).region;
        assert_eq!((words[128], words[129], words[130]), (0xe7, 0, 0));
    }
}
