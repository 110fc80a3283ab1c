//! The x87 instructions that move control and environment rather than numbers, in all formats of the environment
//! (SDM 1 8.1.10); and what MMX does to the x87 state.

use x86::Exception;
use x86::state::FpuArea;

use super::layout::{self, at, u16_at};
use super::{VectorCpu, VectorOp};

/// An instruction done here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum X87 {
    /// WAIT and the no-operations of old coprocessors: the checks are all.
    Wait,
    /// FNINIT.
    Init,
    /// FNCLEX.
    Clear,
    /// FNSTSW AX.
    StoreStatusAx,
    /// FNSTSW m16.
    StoreStatus,
    /// FNSTCW m16.
    StoreControl,
    /// FLDCW m16.
    LoadControl,
    /// FNSTENV; operand size 32.
    StoreEnvironment(bool),
    /// FLDENV.
    LoadEnvironment(bool),
    /// FNSAVE.
    Save(bool),
    /// FRSTOR.
    Restore(bool),
    /// EMMS.
    Emms,
}

/// Bits of FCW that can be written; bit 6 always reads as one.
const FCW_WRITABLE: u16 = 0x1f3f;
const FCW_FIXED: u16 = 0x40;

/// Sets the top of stack. The area holds the registers in stack order, so the physical ones move.
fn set_top(area: &mut FpuArea, new: usize) {
    let turn = new.wrapping_sub(top(area)) & 7;
    area.0[at::ST..at::XMM].rotate_left(16 * turn);
    let fsw = u16_at(area, at::FSW) & !0x3800 | [0, 1, 2, 3, 4, 5, 6, 7][new & 7] << 11;
    layout::put(area, at::FSW, &fsw.to_le_bytes());
}

/// After an MMX instruction: top of stack 0, all tags valid (SDM 1 9.5.1).
pub(super) fn enter_mmx(area: &mut FpuArea) {
    set_top(area, 0);
    layout::put(area, at::FTW, &[0xff]);
}

/// MMX register `i` (0 to 7), which is the physical x87 register.
pub(super) fn mm(area: &FpuArea, i: u8) -> [u8; 8] {
    layout::bytes(area, at::ST + 16 * (usize::from(i).wrapping_sub(top(area)) & 7))
}

/// The state after FNINIT (SDM 2A): registers stay.
fn init(area: &mut FpuArea) {
    set_top(area, 0);
    area.0[..at::MXCSR].fill(0);
    layout::put(area, at::FCW, &0x37fu16.to_le_bytes());
}

fn set_control_word(area: &mut FpuArea, value: u16) {
    layout::put(area, at::FCW, &(value & FCW_WRITABLE | FCW_FIXED).to_le_bytes());
    layout::normalize_x87(area);
}

fn top(area: &FpuArea) -> usize {
    usize::from(u16_at(area, at::FSW) >> 11 & 7)
}

/// The full tag word: two bits a register (SDM 1 8.1.7), from FXSAVE's one bit and the register's contents.
fn full_tags(area: &FpuArea) -> u16 {
    let valid = area.0[at::FTW];
    let top = top(area);
    (0..8usize).fold(0, |tags, physical| {
        let tag = if valid >> physical & 1 == 0 {
            3
        } else {
            classify(&layout::bytes(area, at::ST + 16 * ((physical.wrapping_sub(top)) & 7)))
        };
        tags | tag << (2 * physical)
    })
}

/// 0 valid, 1 zero, 2 special.
fn classify(st: &[u8; 10]) -> u16 {
    let mut low = [0u8; 8];
    low.copy_from_slice(&st[..8]);
    let significand = u64::from_le_bytes(low);
    let exponent = u16::from_le_bytes([st[8], st[9]]) & 0x7fff;
    match (exponent, significand) {
        (0, 0) => 1,
        (0 | 0x7fff, _) => 2,
        (_, s) if s >> 63 == 0 => 2,
        _ => 0,
    }
}

fn abridge(tags: u16) -> u8 {
    (0..8).fold(0, |valid, i| if tags >> (2 * i) & 3 == 3 { valid } else { valid | 1 << i })
}

/// Instruction and data pointer as the environment holds them.
struct Pointers {
    ip: u32,
    cs: u16,
    dp: u32,
    ds: u16,
    opcode: u16,
}

fn pointers(area: &FpuArea) -> Pointers {
    Pointers {
        ip: layout::u32_at(area, at::FIP),
        cs: u16_at(area, at::FIP + 4),
        dp: layout::u32_at(area, at::FDP),
        ds: u16_at(area, at::FDP + 4),
        opcode: u16_at(area, at::FOP) & 0x7ff,
    }
}

fn set_pointers(area: &mut FpuArea, p: &Pointers) {
    layout::put(area, at::FOP, &(p.opcode & 0x7ff).to_le_bytes());
    let far = |ip: u32, selector: u16| (u64::from(ip) | u64::from(selector) << 32).to_le_bytes();
    layout::put(area, at::FIP, &far(p.ip, p.cs));
    layout::put(area, at::FDP, &far(p.dp, p.ds));
}

const fn low(x: u32) -> u16 {
    (x & 0xffff) as u16
}

const fn linear(selector: u16, offset: u32) -> u32 {
    ((selector as u32) << 4).wrapping_add(offset)
}

/// The environment image: 28 bytes with 32-bit operand size, else 14 (SDM 1 figures 8-9 to 8-12).
fn environment(area: &FpuArea, wide: bool, real: bool) -> [u8; 28] {
    let p = pointers(area);
    let (fcw, fsw, ftw) = (u16_at(area, at::FCW), u16_at(area, at::FSW), full_tags(area));
    let mut image = [0u8; 28];
    if wide {
        let reserved = 0xffff_0000;
        let (ip, dp) = (linear(p.cs, p.ip), linear(p.ds, p.dp));
        let opcode = u32::from(p.opcode);
        let words = if real {
            [
                reserved | u32::from(low(ip)),
                ip >> 16 << 12 | opcode,
                reserved | u32::from(low(dp)),
                dp >> 16 << 12,
            ]
        } else {
            [p.ip, u32::from(p.cs) | opcode << 16, p.dp, reserved | u32::from(p.ds)]
        };
        let head = [fcw, fsw, ftw].map(|w| reserved | u32::from(w));
        for (slot, word) in image.chunks_exact_mut(4).zip(head.into_iter().chain(words)) {
            slot.copy_from_slice(&word.to_le_bytes());
        }
    } else {
        let words = if real {
            let (ip, dp) = (linear(p.cs, p.ip), linear(p.ds, p.dp));
            [low(ip), low(ip >> 16 << 12) | p.opcode, low(dp), low(dp >> 16 << 12)]
        } else {
            [low(p.ip), p.cs, low(p.dp), p.ds]
        };
        for (slot, word) in image.chunks_exact_mut(2).zip([fcw, fsw, ftw].into_iter().chain(words)) {
            slot.copy_from_slice(&word.to_le_bytes());
        }
    }
    image
}

/// The inverse of [`environment`].
fn load_environment(area: &mut FpuArea, image: &[u8; 28], wide: bool, real: bool) {
    let step = if wide { 4 } else { 2 };
    let half = |i: usize| u16::from_le_bytes([image[i], image[i + 1]]);
    let word = |i: usize| u32::from(half(i)) | u32::from(half(i + 2)) << 16;
    let p = match (wide, real) {
        (true, false) => {
            Pointers { ip: word(12), cs: half(16), opcode: half(18) & 0x7ff, dp: word(20), ds: half(24) }
        }
        (true, true) => Pointers {
            ip: u32::from(half(12)) | word(16) >> 12 << 16,
            cs: 0,
            opcode: half(16) & 0x7ff,
            dp: u32::from(half(20)) | word(24) >> 12 << 16,
            ds: 0,
        },
        (false, false) => {
            Pointers { ip: half(6).into(), cs: half(8), opcode: 0, dp: half(10).into(), ds: half(12) }
        }
        (false, true) => Pointers {
            ip: u32::from(half(6)) | u32::from(half(8) >> 12) << 16,
            cs: 0,
            opcode: half(8) & 0x7ff,
            dp: u32::from(half(10)) | u32::from(half(12) >> 12) << 16,
            ds: 0,
        },
    };
    set_top(area, usize::from(half(step) >> 11 & 7));
    layout::put(area, at::FSW, &half(step).to_le_bytes());
    layout::put(area, at::FTW, &[abridge(half(2 * step)), 0]);
    set_pointers(area, &p);
    set_control_word(area, half(0));
}

const fn environment_len(wide: bool) -> usize {
    if wide { 28 } else { 14 }
}

fn store_environment<C: VectorCpu>(
    op: &VectorOp,
    cpu: &mut C,
    wide: bool,
    registers: bool,
) -> Result<(), Exception> {
    let offset = op.operand(cpu)?;
    let real = cpu.control().real_or_v86;
    let head = environment_len(wide);
    let mut image = [0u8; 28 + 80];
    image[..head].copy_from_slice(&environment(cpu.fpu(), wide, real)[..head]);
    let mut len = head;
    if registers {
        for i in 0..8 {
            let st: [u8; 10] = layout::bytes(cpu.fpu(), at::ST + 16 * i);
            image[len..len + 10].copy_from_slice(&st);
            len += 10;
        }
    }
    cpu.write(op.segment(), offset, &image[..len])?;
    if registers {
        init(cpu.fpu());
    } else {
        // FNSTENV masks all exceptions after storing.
        let fcw = u16_at(cpu.fpu(), at::FCW) | 0x3f;
        set_control_word(cpu.fpu(), fcw);
    }
    Ok(())
}

fn restore_environment<C: VectorCpu>(
    op: &VectorOp,
    cpu: &mut C,
    wide: bool,
    registers: bool,
) -> Result<(), Exception> {
    let offset = op.operand(cpu)?;
    let real = cpu.control().real_or_v86;
    let head = environment_len(wide);
    let mut image = [0u8; 28 + 80];
    let len = if registers { head + 80 } else { head };
    cpu.read(op.segment(), offset, &mut image[..len])?;
    let mut environment = [0u8; 28];
    environment[..head].copy_from_slice(&image[..head]);
    load_environment(cpu.fpu(), &environment, wide, real);
    if registers {
        for (i, st) in image[head..len].chunks_exact(10).enumerate() {
            layout::put(cpu.fpu(), at::ST + 16 * i, st);
            layout::put(cpu.fpu(), at::ST + 16 * i + 10, &[0; 6]);
        }
    }
    Ok(())
}

fn store_u16<C: VectorCpu>(op: &VectorOp, cpu: &mut C, from: usize) -> Result<(), Exception> {
    let offset = op.operand(cpu)?;
    let value = u16_at(cpu.fpu(), from);
    cpu.write(op.segment(), offset, &value.to_le_bytes())
}

pub(super) fn execute<C: VectorCpu>(x: X87, op: &VectorOp, cpu: &mut C) -> Result<(), Exception> {
    match x {
        X87::Wait => {}
        X87::Init => init(cpu.fpu()),
        X87::Clear => {
            let fsw = u16_at(cpu.fpu(), at::FSW) & 0x7f00;
            layout::put(cpu.fpu(), at::FSW, &fsw.to_le_bytes());
        }
        X87::StoreStatusAx => {
            layout::normalize_x87(cpu.fpu());
            let rax = cpu.gpr(0) & !0xffff | u64::from(u16_at(cpu.fpu(), at::FSW));
            cpu.set_gpr(0, rax);
        }
        X87::StoreStatus => {
            layout::normalize_x87(cpu.fpu());
            store_u16(op, cpu, at::FSW)?;
        }
        X87::StoreControl => store_u16(op, cpu, at::FCW)?,
        X87::LoadControl => {
            let offset = op.operand(cpu)?;
            let mut value = [0; 2];
            cpu.read(op.segment(), offset, &mut value)?;
            set_control_word(cpu.fpu(), u16::from_le_bytes(value));
        }
        X87::StoreEnvironment(wide) => store_environment(op, cpu, wide, false)?,
        X87::LoadEnvironment(wide) => restore_environment(op, cpu, wide, false)?,
        X87::Save(wide) => store_environment(op, cpu, wide, true)?,
        X87::Restore(wide) => restore_environment(op, cpu, wide, true)?,
        X87::Emms => {
            set_top(cpu.fpu(), 0);
            layout::put(cpu.fpu(), at::FTW, &[0]);
        }
    }
    Ok(())
}
