//! Control and debug registers, XCR0, TLB instructions (SDM 3A 2.5, 4.10, 17.2; SDM 2 MOV).

use engine::Cause;
use x86::Exception;
use x86::bits::{cr0, cr4, dr, efer, is_canonical};
use x86::paging::Mode;
use x86::state::sreg;

use crate::cpu::Cpu;
use crate::intercept::{Action, Event};

/// MOV from a control register.
pub fn read_cr(cpu: &mut Cpu, n: u8) -> Result<u64, Exception> {
    cpu.stats.count(Cause::ControlRegister);
    if cpu.intercepts.intercept(Event::CrRead(n)) == Action::Exit {
        return Ok(0);
    }
    match n {
        0 => Ok(cpu.s.cr0),
        2 => Ok(cpu.s.cr2),
        3 => Ok(cpu.s.cr3),
        4 => Ok(cpu.s.cr4),
        8 => Ok(cpu.io.cr8(cpu.index)),
        _ => Err(Exception::UD),
    }
}

/// MOV to a control register.
pub fn write_cr(cpu: &mut Cpu, n: u8, value: u64) -> Result<(), Exception> {
    if cpu.intercepts.intercept(Event::CrWrite(n)) == Action::Exit {
        cpu.stats.count(Cause::ControlRegister);
        return Ok(());
    }
    let span = cpu.stats.begin(Cause::ControlRegister);
    let result = write(cpu, n, value);
    cpu.stats.end(Cause::ControlRegister, span);
    result
}

fn write(cpu: &mut Cpu, n: u8, value: u64) -> Result<(), Exception> {
    match n {
        0 => write_cr0(cpu, value),
        2 => {
            cpu.s.cr2 = value;
            Ok(())
        }
        3 => write_cr3(cpu, value),
        4 => write_cr4(cpu, value),
        8 if value > 15 => Err(Exception::GP0),
        8 => {
            cpu.io.set_cr8(cpu.index, value);
            Ok(())
        }
        _ => Err(Exception::UD),
    }
}

/// CR0, with the switches into and out of IA-32e mode (SDM 3A 9.8.5).
pub fn write_cr0(cpu: &mut Cpu, value: u64) -> Result<(), Exception> {
    let old = cpu.s.cr0;
    let pg = value & cr0::PG != 0;
    if value >> 32 != 0
        || pg && value & cr0::PE == 0
        || value & cr0::NW != 0 && value & cr0::CD == 0
        || !pg && cpu.s.cr4 & cr4::PCIDE != 0
    {
        return Err(Exception::GP0);
    }
    let new = value & cr0::ALL | cr0::ET;
    let turns_on = pg && old & cr0::PG == 0;
    let turns_off = !pg && old & cr0::PG != 0;
    if turns_on && cpu.s.msr.efer & efer::LME != 0 {
        let cs = cpu.s.seg[sreg::CS].attr;
        let tss16 = !cpu.s.tr.attr.is_code_or_data() && cpu.s.tr.attr.typ() & 8 == 0;
        if cpu.s.cr4 & cr4::PAE == 0 || cs.long() || tss16 {
            return Err(Exception::GP0);
        }
        cpu.s.msr.efer |= efer::LMA;
    } else if turns_off && cpu.s.msr.efer & efer::LMA != 0 {
        if cpu.code_size == crate::cpu::CodeSize::Bits64 {
            return Err(Exception::GP0);
        }
        cpu.s.msr.efer &= !efer::LMA;
    }
    cpu.s.cr0 = new;
    if (turns_on || pg && (old ^ new) & (cr0::CD | cr0::NW) != 0)
        && let Err(e) = load_pdptes(cpu, cpu.s.cr3)
    {
        cpu.s.cr0 = old;
        if turns_on {
            cpu.s.msr.efer &= !efer::LMA;
        }
        return Err(e);
    }
    if (old ^ new) & cr0::PE != 0 {
        cpu.s.cpl = 0;
    }
    cpu.derive_all();
    if (old ^ new) & (cr0::PG | cr0::WP | cr0::PE) != 0 {
        cpu.stats.count(Cause::TlbFlush);
        cpu.tlb.flush_all();
    }
    Ok(())
}

/// Loads the PDPTE registers, if PAE paging is on (SDM 3A 4.4.1).
fn load_pdptes(cpu: &mut Cpu, cr3: u64) -> Result<(), Exception> {
    cpu.derive_paging();
    if cpu.paging.mode != Mode::Pae {
        return Ok(());
    }
    let phys = !((1u64 << cpu.model.phys_bits()) - 1) & 0x000f_ffff_ffff_f000;
    let reserved = 0xfff0_0000_0000_0000 | phys | 0x1e6;
    let mut new = [0; 4];
    for (i, entry) in new.iter_mut().enumerate() {
        let gpa = guestmem::Gpa((cr3 & 0xffff_ffe0) + 8 * i as u64);
        *entry = cpu.mem.load_gpa(gpa).unwrap_or(u64::MAX);
        if *entry & 1 != 0 && *entry & reserved != 0 {
            return Err(Exception::GP0);
        }
    }
    cpu.s.pdpte = new;
    cpu.derive_paging();
    Ok(())
}

/// CR3: another address space (SDM 3A 4.10.4.1).
pub fn write_cr3(cpu: &mut Cpu, value: u64) -> Result<(), Exception> {
    cpu.stats.count(Cause::TlbFlush);
    let long = cpu.s.long_mode();
    let pcid_on = cpu.s.cr4 & cr4::PCIDE != 0;
    let keep = pcid_on && value >> 63 != 0;
    let value = if pcid_on { value & !(1 << 63) } else { value };
    if long && value & !((1u64 << cpu.model.phys_bits()) - 1) != 0 {
        return Err(Exception::GP0);
    }
    if cpu.paging.mode == Mode::Pae {
        load_pdptes(cpu, value)?;
    }
    cpu.s.cr3 = value;
    cpu.derive_paging();
    let locals = cpu.tlb.switch(if pcid_on { value & 0xfff } else { 0 }, keep);
    cpu.look_again(locals);
    Ok(())
}

/// CR4 (SDM 3A 2.5).
fn write_cr4(cpu: &mut Cpu, value: u64) -> Result<(), Exception> {
    let old = cpu.s.cr4;
    let long = cpu.s.long_mode();
    let pcid_turns_on = value & cr4::PCIDE != 0 && old & cr4::PCIDE == 0;
    if value & !cpu.model.cr4_mask() != 0
        || long && value & cr4::PAE == 0
        || long && (value ^ old) & cr4::LA57 != 0
        || pcid_turns_on && (!long || cpu.s.cr3 & 0xfff != 0)
    {
        return Err(Exception::GP0);
    }
    cpu.s.cr4 = value;
    // The one bit that kernels toggle often, to flush the TLB, CPUID does not tell.
    cpu.cpuid_changed |= (old ^ value) & !cr4::PGE != 0;
    let paging_bits = cr4::PSE | cr4::PAE | cr4::PGE | cr4::SMEP | cr4::SMAP;
    if (old ^ value) & (cr4::PAE | cr4::PSE | cr4::PGE | cr4::SMEP) != 0
        && let Err(e) = load_pdptes(cpu, cpu.s.cr3)
    {
        cpu.s.cr4 = old;
        cpu.derive_paging();
        return Err(e);
    }
    cpu.derive_all();
    if (old ^ value) & (paging_bits | cr4::PCIDE) != 0 {
        cpu.stats.count(Cause::TlbFlush);
        cpu.tlb.flush_all();
    }
    Ok(())
}

/// MOV from a debug register.
pub fn read_dr(cpu: &mut Cpu, n: u8) -> Result<u64, Exception> {
    let n = debug_register(cpu, n)?;
    if cpu.intercepts.intercept(Event::DrRead(n)) == Action::Exit {
        return Ok(0);
    }
    Ok(match n {
        6 => cpu.s.dr6,
        7 => cpu.s.dr7,
        n => cpu.s.dr[usize::from(n & 3)],
    })
}

/// MOV to a debug register.
pub fn write_dr(cpu: &mut Cpu, n: u8, value: u64) -> Result<(), Exception> {
    let n = debug_register(cpu, n)?;
    if cpu.intercepts.intercept(Event::DrWrite(n)) == Action::Exit {
        return Ok(());
    }
    if n >= 6 && value >> 32 != 0 {
        return Err(Exception::GP0);
    }
    match n {
        6 => cpu.s.dr6 = value & (0xf | dr::DR6_BD | dr::DR6_BS | dr::DR6_BT) | dr::DR6_FIXED,
        7 => {
            cpu.s.dr7 = value & 0xffff_2bff | dr::DR7_FIXED;
            cpu.derive_variant();
        }
        n => cpu.s.dr[usize::from(n & 3)] = value,
    }
    Ok(())
}

/// DR4 and DR5 are DR6 and DR7, unless CR4.DE is set (SDM 3B 17.2.2); DR7.GD makes every access a #DB.
fn debug_register(cpu: &mut Cpu, n: u8) -> Result<u8, Exception> {
    let n = match n {
        4 | 5 if cpu.s.cr4 & cr4::DE != 0 => return Err(Exception::UD),
        4 | 5 => n + 2,
        0..=7 => n,
        _ => return Err(Exception::UD),
    };
    if cpu.s.dr7 & dr::DR7_GD != 0 {
        cpu.s.dr6 |= dr::DR6_BD;
        return Err(Exception::DB);
    }
    Ok(n)
}

/// XSETBV of XCR0 (SDM 1 13.3).
pub fn write_xcr0(cpu: &mut Cpu, value: u64) -> Result<(), Exception> {
    let avx512 = value & 0xe0;
    let valid = value & 1 != 0
        && value & !cpu.model.xcr0_mask() == 0
        && (value & 4 == 0 || value & 2 != 0)
        && (avx512 == 0 || avx512 == 0xe0 && value & 4 != 0);
    if !valid {
        return Err(Exception::GP0);
    }
    cpu.s.xcr0 = value;
    cpu.cpuid_changed = true;
    Ok(())
}

/// INVLPG.
pub fn invlpg(cpu: &mut Cpu, la: u64) {
    cpu.stats.count(Cause::TlbFlush);
    if is_canonical(la) || !cpu.s.long_mode() {
        cpu.tlb.invalidate_page(la);
    }
}

/// INVPCID (SDM 2A INVPCID).
pub fn invpcid(cpu: &mut Cpu, kind: u64, pcid: u64, la: u64) -> Result<(), Exception> {
    cpu.stats.count(Cause::TlbFlush);
    let pcid_on = cpu.s.cr4 & cr4::PCIDE != 0;
    if kind > 3 || pcid >> 12 != 0 || kind < 2 && !pcid_on && pcid != 0 {
        return Err(Exception::GP0);
    }
    let current = if pcid_on { cpu.s.cr3 & 0xfff } else { 0 };
    match kind {
        0 if !is_canonical(la) => return Err(Exception::GP0),
        0 if pcid == current => cpu.tlb.invalidate_page(la),
        1 if pcid == current => {
            let locals = cpu.tlb.flush_local();
            cpu.look_again(locals);
        }
        0 | 1 => cpu.tlb.forget_pcid(pcid),
        2 => cpu.tlb.flush_all(),
        _ => {
            let locals = cpu.tlb.flush_all_local();
            cpu.look_again(locals);
        }
    }
    Ok(())
}
