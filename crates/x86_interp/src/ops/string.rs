//! String instructions with and without REP (SDM 2B "REP"). Whole runs go page by page in one piece; between pieces
//! interrupts are polled, and the registers always say how far it got.
//!
//! In the [`Op`]: `b` is the address size in bits, `seg` the source segment, `extra` the repetition.

use guestmem::Scalar;
use x86::Exception;
use x86::addr::PAGE_MASK;
use x86::bits::rflags;

use super::alu::{Binary, Sub};
use super::{Handler, Op, Width, by_width};
use crate::cpu::{CodeSize, Cpu, FLAT, Step, Stop};
use crate::memory::Place;

/// `extra` without a REP prefix.
pub const ONCE: u8 = 0;
/// REP or REPE.
pub const REPE: u8 = 1;
/// REPNE.
pub const REPNE: u8 = 2;

const RCX: usize = 1;
const RSI: usize = 6;
const RDI: usize = 7;

/// Elements handled one by one before the run looks around again.
const PATIENCE: u32 = 512;

fn mask(op: &Op) -> u64 {
    match op.b {
        16 => 0xffff,
        32 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

/// Sets a register of an address size: 16-bit writes keep the rest, 32-bit ones clear the upper half.
fn set_address(cpu: &mut Cpu, r: usize, value: u64, op: &Op) {
    let old = cpu.gpr[r];
    cpu.gpr[r] = if op.b == 16 { old & !0xffff | value & 0xffff } else { value & mask(op) };
}

fn advance(cpu: &mut Cpu, r: usize, bytes: u64, op: &Op) {
    let step = if cpu.system_flag(rflags::DF) { 0u64.wrapping_sub(bytes) } else { bytes };
    let value = cpu.gpr[r].wrapping_add(step);
    set_address(cpu, r, value, op);
}

fn dest_segment(cpu: &Cpu) -> u8 {
    if cpu.code_size == CodeSize::Bits64 { FLAT } else { 0 }
}

/// One element's work.
trait Element: 'static {
    /// Compares: the repetition looks at ZF.
    const COMPARES: bool;
    /// Does one element and moves the index registers.
    fn one<W: Width>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception>;
    /// Does as many of at most `count` elements in one piece as is easy; 0 if it is not.
    fn many<W: Width>(_cpu: &mut Cpu, _op: &Op, _count: u64) -> Result<u64, Exception> {
        Ok(0)
    }
}

struct Movs;
struct Stos;
struct Lods;
struct Cmps;
struct Scas;
struct Ins;
struct Outs;

/// Elements of `W` from address `a` upwards to the end of its page.
fn room<W: Width>(a: u64) -> u64 {
    (PAGE_MASK + 1 - (a & PAGE_MASK)) / W::BYTES as u64
}

impl Element for Movs {
    const COMPARES: bool = false;

    fn one<W: Width>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
        let (from, to) = (cpu.gpr[RSI] & mask(op), cpu.gpr[RDI] & mask(op));
        let value: W::T = cpu.read(op.seg, from)?;
        cpu.write(dest_segment(cpu), to, value)?;
        advance(cpu, RSI, W::BYTES as u64, op);
        advance(cpu, RDI, W::BYTES as u64, op);
        Ok(())
    }

    fn many<W: Width>(cpu: &mut Cpu, op: &Op, count: u64) -> Result<u64, Exception> {
        let dest = dest_segment(cpu);
        let (from, to) = (cpu.gpr[RSI] & mask(op), cpu.gpr[RDI] & mask(op));
        if !bulk_allowed(cpu, op.seg, 1, op) || !bulk_allowed(cpu, dest, 2, op) {
            return Ok(0);
        }
        let (Some(source), Place::Direct(target)) =
            (readable::<W>(cpu, op.seg, from)?, cpu.place(dest, to, W::BYTES)?)
        else {
            return Ok(0);
        };
        let distance = target.0.wrapping_sub(source.0);
        if distance != 0 && distance < W::BYTES as u64 {
            return Ok(0);
        }
        let (la_from, la_to) = (linear(cpu, op.seg, from), linear(cpu, dest, to));
        let n = count.min(room::<W>(la_from)).min(room::<W>(la_to));
        let bytes = n * W::BYTES as u64;
        #[expect(clippy::cast_possible_truncation, reason = "at most a page")]
        cpu.mem.copy_machine(target, source, bytes as usize);
        advance(cpu, RSI, bytes, op);
        advance(cpu, RDI, bytes, op);
        Ok(n)
    }
}

/// Pieces go upwards, through flat segments, with addresses that do not wrap before 4 GiB.
fn bulk_allowed(cpu: &Cpu, seg: u8, rights: u8, op: &Op) -> bool {
    !cpu.system_flag(rflags::DF) && cpu.seg_fast[usize::from(seg & 7)] & rights == rights && op.b != 16
}

fn linear(cpu: &Cpu, seg: u8, offset: u64) -> u64 {
    cpu.seg_base[usize::from(seg & 7)].wrapping_add(offset) & cpu.linear_mask
}

/// The machine address to read an element from, if it lies in plain RAM within a page.
fn readable<W: Width>(cpu: &mut Cpu, seg: u8, offset: u64) -> Result<Option<guestmem::Hva>, Exception> {
    // Reads it once, which fills the TLB or faults.
    let _: W::T = cpu.read(seg, offset)?;
    let la = linear(cpu, seg, offset);
    let entry = cpu.tlb.entry(la, cpu.variant);
    let direct = entry.read_tag == cpu.tlb.tag(la) && room::<W>(la) > 0;
    Ok(direct.then(|| guestmem::Hva(la.wrapping_add(entry.addend))))
}

impl Element for Stos {
    const COMPARES: bool = false;

    fn one<W: Width>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
        let to = cpu.gpr[RDI] & mask(op);
        let value = W::T::from_u64(W::get(cpu, 0));
        cpu.write(dest_segment(cpu), to, value)?;
        advance(cpu, RDI, W::BYTES as u64, op);
        Ok(())
    }

    fn many<W: Width>(cpu: &mut Cpu, op: &Op, count: u64) -> Result<u64, Exception> {
        let dest = dest_segment(cpu);
        let to = cpu.gpr[RDI] & mask(op);
        let value = W::get(cpu, 0);
        if !bulk_allowed(cpu, dest, 2, op) {
            return Ok(0);
        }
        let Place::Direct(target) = cpu.place(dest, to, W::BYTES)? else { return Ok(0) };
        let n = count.min(room::<W>(linear(cpu, dest, to)));
        #[expect(clippy::cast_possible_truncation, reason = "the low byte is compared with the whole")]
        let byte = value as u8;
        if value == u64::from_le_bytes([byte; 8]) & W::MASK {
            #[expect(clippy::cast_possible_truncation, reason = "at most a page")]
            cpu.mem.fill_machine(target, n as usize * W::BYTES, byte);
        } else {
            for i in 0..n {
                cpu.mem.store(guestmem::Hva(target.0 + i * W::BYTES as u64), W::T::from_u64(value));
            }
        }
        advance(cpu, RDI, n * W::BYTES as u64, op);
        Ok(n)
    }
}

impl Element for Lods {
    const COMPARES: bool = false;

    fn one<W: Width>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
        let from = cpu.gpr[RSI] & mask(op);
        let value = cpu.read::<W::T>(op.seg, from)?.to_u64();
        W::set(cpu, 0, value);
        advance(cpu, RSI, W::BYTES as u64, op);
        Ok(())
    }
}

impl Element for Cmps {
    const COMPARES: bool = true;

    fn one<W: Width>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
        let (from, to) = (cpu.gpr[RSI] & mask(op), cpu.gpr[RDI] & mask(op));
        let a = cpu.read::<W::T>(op.seg, from)?.to_u64();
        let b = cpu.read::<W::T>(dest_segment(cpu), to)?.to_u64();
        cpu.flags = Sub::apply::<W>(a, b, cpu.flags).1;
        advance(cpu, RSI, W::BYTES as u64, op);
        advance(cpu, RDI, W::BYTES as u64, op);
        Ok(())
    }
}

impl Element for Scas {
    const COMPARES: bool = true;

    fn one<W: Width>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
        let to = cpu.gpr[RDI] & mask(op);
        let b = cpu.read::<W::T>(dest_segment(cpu), to)?.to_u64();
        cpu.flags = Sub::apply::<W>(W::get(cpu, 0), b, cpu.flags).1;
        advance(cpu, RDI, W::BYTES as u64, op);
        Ok(())
    }
}

#[expect(clippy::cast_possible_truncation, reason = "DX is 16 bits, elements at most 32")]
impl Element for Ins {
    const COMPARES: bool = false;

    fn one<W: Width>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
        let port = cpu.gpr[2] as u16;
        crate::system::io::check(cpu, port, W::BYTES as u8)?;
        let to = cpu.gpr[RDI] & mask(op);
        // The destination is checked before the device is read: a read may have an effect.
        let place = cpu.place(dest_segment(cpu), to, W::BYTES)?;
        let value = crate::system::io::port_in(cpu, port, W::BYTES as u8);
        cpu.place_store(&place, W::T::from_u64(u64::from(value)));
        advance(cpu, RDI, W::BYTES as u64, op);
        Ok(())
    }
}

#[expect(clippy::cast_possible_truncation, reason = "DX is 16 bits, elements at most 32")]
impl Element for Outs {
    const COMPARES: bool = false;

    fn one<W: Width>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
        let port = cpu.gpr[2] as u16;
        crate::system::io::check(cpu, port, W::BYTES as u8)?;
        let from = cpu.gpr[RSI] & mask(op);
        let value = cpu.read::<W::T>(op.seg, from)?.to_u64();
        crate::system::io::port_out(cpu, port, W::BYTES as u8, value as u32);
        advance(cpu, RSI, W::BYTES as u64, op);
        Ok(())
    }
}

fn string<W: Width, E: Element>(cpu: &mut Cpu, op: &Op) -> Step {
    if op.extra == ONCE {
        E::one::<W>(cpu, op)?;
        return cpu.wrote();
    }
    let mut patience = PATIENCE;
    loop {
        let count = cpu.gpr[RCX] & mask(op);
        if count == 0 {
            return cpu.wrote();
        }
        let careful = cpu.stepwise();
        let n = if careful { 0 } else { E::many::<W>(cpu, op, count)? };
        let n = if n == 0 {
            E::one::<W>(cpu, op)?;
            1
        } else {
            n
        };
        set_address(cpu, RCX, count - n, op);
        if count == n || E::COMPARES && cpu.flags.zf() != (op.extra == REPE) {
            return cpu.wrote();
        }
        patience -= 1;
        if careful || cpu.code_written || patience == 0 || cpu.poll() {
            return Err(Stop::Again);
        }
    }
}

/// Which string instruction.
#[derive(Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the manual's mnemonics")]
pub enum Kind {
    Movs,
    Stos,
    Lods,
    Cmps,
    Scas,
    Ins,
    Outs,
}

/// Handler of a string instruction.
pub fn select(kind: Kind, bits: u32) -> Handler {
    match kind {
        Kind::Movs => by_width!(bits, string, Movs),
        Kind::Stos => by_width!(bits, string, Stos),
        Kind::Lods => by_width!(bits, string, Lods),
        Kind::Cmps => by_width!(bits, string, Cmps),
        Kind::Scas => by_width!(bits, string, Scas),
        Kind::Ins => by_width!(bits, string, Ins),
        Kind::Outs => by_width!(bits, string, Outs),
    }
}
