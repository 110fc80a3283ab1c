//! The commonest moves and integer operations of compilers and C libraries, in plain Rust on the area: they need neither
//! MXCSR nor a stub. Every one has the stub of the same instruction as its oracle in the tests.

use iced_x86::Mnemonic;
use x86::Exception;

use super::layout::{self, at};
use super::{VectorCpu, VectorOp};

/// A function of two lanes of 16 bytes; the result replaces the first. By reference, so that it is compiled to SIMD.
pub(super) type Lanes = fn(&mut [u8; 16], &[u8; 16]);
/// A function of one lane and an immediate.
pub(super) type Immediate = fn(u128, u8) -> u128;

/// The last source operand.
#[derive(Clone, Copy, Debug)]
pub(super) enum Source {
    Register(u8),
    Memory,
}

/// A resolved instruction. Registers 0 to 31 (0 to 15 where a lane function is involved), `len` in bytes; `zero`: a
/// VEX or EVEX instruction, which zeroes what it does not write.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fast {
    Load {
        dst: u8,
        len: u8,
        zero: bool,
    },
    Store {
        src: u8,
        len: u8,
    },
    Copy {
        dst: u8,
        src: u8,
        len: u8,
        zero: bool,
    },
    /// MOVSS, MOVSD, MOVD, MOVQ from memory: the rest of the XMM register becomes zero.
    LoadLow {
        dst: u8,
        len: u8,
        zero: bool,
    },
    /// MOVSS, MOVSD, MOVD, MOVQ, MOVLPS, MOVHPS (`at` 8) to memory.
    StoreLow {
        src: u8,
        at: u8,
        len: u8,
    },
    /// MOVLPS, MOVHPS from memory: the other half from `keep`.
    LoadHalf {
        dst: u8,
        keep: u8,
        high: bool,
        zero: bool,
    },
    /// MOVSS, MOVSD between registers: low bytes of `low`, the rest of `keep`.
    Merge {
        dst: u8,
        keep: u8,
        low: u8,
        len: u8,
        zero: bool,
    },
    /// MOVQ between registers.
    CopyLow {
        dst: u8,
        src: u8,
        zero: bool,
    },
    FromGpr {
        dst: u8,
        gpr: u8,
        len: u8,
        zero: bool,
    },
    ToGpr {
        gpr: u8,
        src: u8,
        len: u8,
    },
    Binary {
        f: Lanes,
        dst: u8,
        a: u8,
        b: Source,
        len: u8,
        zero: bool,
    },
    Shift {
        f: Immediate,
        dst: u8,
        a: Source,
        imm: u8,
        len: u8,
        zero: bool,
    },
    /// PMOVMSKB.
    ByteMask {
        gpr: u8,
        src: u8,
        len: u8,
    },
}

/// Applies a function to each element of two lanes.
macro_rules! elements {
    ($t:ty, $a:expr, $b:expr, $f:expr) => {{
        const N: usize = size_of::<$t>();
        let f = $f;
        for (a, b) in $a.as_chunks_mut::<N>().0.iter_mut().zip($b.as_chunks::<N>().0) {
            let x: $t = f(<$t>::from_le_bytes(*a), <$t>::from_le_bytes(*b));
            *a = x.to_le_bytes();
        }
    }};
}

/// Interleaves the elements of two lanes' low or high halves.
macro_rules! unpack {
    ($bytes:literal, $high:literal, $a:expr, $b:expr) => {{
        let (x, y) = (*$a, *$b);
        let half = if $high { 8 } else { 0 };
        for (i, pair) in $a.as_chunks_mut::<{ 2 * $bytes }>().0.iter_mut().enumerate() {
            let from = half + i * $bytes;
            pair[..$bytes].copy_from_slice(&x[from..from + $bytes]);
            pair[$bytes..].copy_from_slice(&y[from..from + $bytes]);
        }
    }};
}

/// The lane function of an instruction.
pub(super) fn lanes(mnemonic: Mnemonic) -> Option<Lanes> {
    use Mnemonic as M;
    Some(match mnemonic {
        M::Pxor | M::Xorps | M::Xorpd | M::Vpxor | M::Vxorps | M::Vxorpd => {
            |a, b| elements!(u64, a, b, |x, y| x ^ y)
        }
        M::Por | M::Orps | M::Orpd | M::Vpor | M::Vorps | M::Vorpd => {
            |a, b| elements!(u64, a, b, |x, y| x | y)
        }
        M::Pand | M::Andps | M::Andpd | M::Vpand | M::Vandps | M::Vandpd => {
            |a, b| elements!(u64, a, b, |x, y| x & y)
        }
        M::Pandn | M::Andnps | M::Andnpd | M::Vpandn | M::Vandnps | M::Vandnpd => {
            |a, b| elements!(u64, a, b, |x: u64, y: u64| !x & y)
        }
        M::Pcmpeqb | M::Vpcmpeqb => |a, b| elements!(u8, a, b, |x, y| if x == y { u8::MAX } else { 0 }),
        M::Pcmpeqw | M::Vpcmpeqw => |a, b| elements!(u16, a, b, |x, y| if x == y { u16::MAX } else { 0 }),
        M::Pcmpeqd | M::Vpcmpeqd => |a, b| elements!(u32, a, b, |x, y| if x == y { u32::MAX } else { 0 }),
        M::Pcmpgtb | M::Vpcmpgtb => |a, b| elements!(i8, a, b, |x, y| if x > y { -1 } else { 0 }),
        M::Pcmpgtd | M::Vpcmpgtd => |a, b| elements!(i32, a, b, |x, y| if x > y { -1 } else { 0 }),
        M::Pminub | M::Vpminub => |a, b| elements!(u8, a, b, u8::min),
        M::Pmaxub | M::Vpmaxub => |a, b| elements!(u8, a, b, u8::max),
        M::Psubb | M::Vpsubb => |a, b| elements!(u8, a, b, u8::wrapping_sub),
        M::Psubw | M::Vpsubw => |a, b| elements!(u16, a, b, u16::wrapping_sub),
        M::Psubd | M::Vpsubd => |a, b| elements!(u32, a, b, u32::wrapping_sub),
        M::Psubq | M::Vpsubq => |a, b| elements!(u64, a, b, u64::wrapping_sub),
        M::Psubusb | M::Vpsubusb => |a, b| elements!(u8, a, b, u8::saturating_sub),
        M::Paddb | M::Vpaddb => |a, b| elements!(u8, a, b, u8::wrapping_add),
        M::Paddw | M::Vpaddw => |a, b| elements!(u16, a, b, u16::wrapping_add),
        M::Paddd | M::Vpaddd => |a, b| elements!(u32, a, b, u32::wrapping_add),
        M::Paddq | M::Vpaddq => |a, b| elements!(u64, a, b, u64::wrapping_add),
        M::Pmuludq | M::Vpmuludq => {
            |a, b| elements!(u64, a, b, |x: u64, y: u64| (x & 0xffff_ffff).wrapping_mul(y & 0xffff_ffff))
        }
        M::Punpcklbw | M::Vpunpcklbw => |a, b| unpack!(1, false, a, b),
        M::Punpcklwd | M::Vpunpcklwd => |a, b| unpack!(2, false, a, b),
        M::Punpckldq | M::Vpunpckldq | M::Unpcklps | M::Vunpcklps => |a, b| unpack!(4, false, a, b),
        M::Punpcklqdq | M::Vpunpcklqdq | M::Unpcklpd | M::Vunpcklpd => |a, b| unpack!(8, false, a, b),
        M::Punpckhqdq | M::Vpunpckhqdq | M::Unpckhpd | M::Vunpckhpd => |a, b| unpack!(8, true, a, b),
        M::Punpckhdq | M::Vpunpckhdq => |a, b| unpack!(4, true, a, b),
        M::Punpckhwd | M::Vpunpckhwd => |a, b| unpack!(2, true, a, b),
        M::Punpckhbw | M::Vpunpckhbw => |a, b| unpack!(1, true, a, b),
        _ => return None,
    })
}

/// The function of an instruction with one source and an immediate.
pub(super) fn immediate(mnemonic: Mnemonic) -> Option<Immediate> {
    use Mnemonic as M;
    Some(match mnemonic {
        M::Pshufd | M::Vpshufd => |a, order| {
            let dword = |i: u32| a >> (32 * (u32::from(order) >> (2 * i) & 3)) & 0xffff_ffff;
            dword(0) | dword(1) << 32 | dword(2) << 64 | dword(3) << 96
        },
        M::Pslldq | M::Vpslldq => |a, n| a.checked_shl(u32::from(n) * 8).unwrap_or(0),
        M::Psrldq | M::Vpsrldq => |a, n| a.checked_shr(u32::from(n) * 8).unwrap_or(0),
        M::Psllq | M::Vpsllq => |a, n| shift_each::<8>(a, |x| x.checked_shl(u32::from(n)).unwrap_or(0)),
        M::Psrlq | M::Vpsrlq => |a, n| shift_each::<8>(a, |x| x.checked_shr(u32::from(n)).unwrap_or(0)),
        M::Pslld | M::Vpslld => |a, n| shift_each::<4>(a, |x| x.checked_shl(u32::from(n)).unwrap_or(0)),
        M::Psrld | M::Vpsrld => |a, n| shift_each::<4>(a, |x| x.checked_shr(u32::from(n)).unwrap_or(0)),
        _ => return None,
    })
}

/// Applies `f` to each element of `N` bytes, zero-extended; what it shifts out above them is lost.
#[inline(always)]
fn shift_each<const N: usize>(a: u128, f: impl Fn(u64) -> u64) -> u128 {
    let mut bytes = a.to_le_bytes();
    for element in bytes.as_chunks_mut::<N>().0 {
        let mut wide = [0; 8];
        wide[..N].copy_from_slice(element);
        element.copy_from_slice(&f(u64::from_le_bytes(wide)).to_le_bytes()[..N]);
    }
    u128::from_le_bytes(bytes)
}

/// The top bit of each of 16 bytes.
fn sign_bits(v: u128) -> u64 {
    let half = |x: u64| (x & 0x8080_8080_8080_8080).wrapping_mul(0x0002_0408_1020_4081) >> 56;
    let (low, high) = halves(v);
    half(low) | half(high) << 8
}

#[inline(always)]
const fn halves(v: u128) -> (u64, u64) {
    ((v & 0xffff_ffff_ffff_ffff) as u64, (v >> 64) as u64)
}

#[inline(always)]
const fn vector(low: u64, high: u64) -> u128 {
    low as u128 | (high as u128) << 64
}

#[inline(always)]
fn load<C: VectorCpu>(op: &VectorOp, cpu: &mut C) -> Result<u128, Exception> {
    let offset = op.operand(cpu)?;
    let mut data = [0; 16];
    cpu.read(op.segment(), offset, &mut data)?;
    Ok(u128::from_le_bytes(data))
}

#[inline(always)]
fn set<C: VectorCpu>(cpu: &mut C, dst: u8, v: u128, zero: bool) {
    let area = cpu.fpu();
    layout::set_xmm(area, usize::from(dst), v);
    if zero {
        layout::zero_above_128(area, usize::from(dst));
    }
}

fn source<C: VectorCpu>(op: &VectorOp, cpu: &mut C, source: Source, out: &mut [u8]) -> Result<(), Exception> {
    match source {
        Source::Register(r) => {
            layout::get_vector(cpu.fpu(), usize::from(r), out);
            Ok(())
        }
        Source::Memory => {
            let offset = op.operand(cpu)?;
            cpu.read(op.segment(), offset, out)
        }
    }
}

/// VEX.256 and wider: lane by lane.
fn wide_binary<C: VectorCpu>(
    f: Lanes,
    op: &VectorOp,
    cpu: &mut C,
    (dst, a, b): (u8, u8, Source),
    len: usize,
) -> Result<(), Exception> {
    let (mut x, mut y) = ([0u8; 64], [0u8; 64]);
    let len = len.min(64);
    source(op, cpu, b, &mut y[..len])?;
    layout::get_vector(cpu.fpu(), usize::from(a), &mut x[..len]);
    for (x, y) in x[..len].as_chunks_mut::<16>().0.iter_mut().zip(y.as_chunks::<16>().0) {
        f(x, y);
    }
    layout::set_vector(cpu.fpu(), usize::from(dst), &x[..len], true);
    Ok(())
}

#[inline(always)]
pub(super) fn execute<C: VectorCpu>(fast: Fast, op: &VectorOp, cpu: &mut C) -> Result<(), Exception> {
    match fast {
        Fast::Binary { f, dst, a, b, len, zero } => {
            if len != 16 {
                return wide_binary(f, op, cpu, (dst, a, b), usize::from(len));
            }
            let mut y = [0u8; 16];
            match b {
                Source::Register(r) => y = layout::lane(cpu.fpu(), usize::from(r)),
                Source::Memory => {
                    let offset = op.operand(cpu)?;
                    cpu.read(op.segment(), offset, &mut y)?;
                }
            }
            let area = cpu.fpu();
            let mut x = layout::lane(area, usize::from(a));
            f(&mut x, &y);
            layout::set_lane(area, usize::from(dst), &x);
            if zero {
                layout::zero_above_128(area, usize::from(dst));
            }
        }
        Fast::Load { dst, len: 16, zero } if dst < 16 => {
            let v = load(op, cpu)?;
            set(cpu, dst, v, zero);
        }
        Fast::Store { src, len: 16 } if src < 16 => {
            let offset = op.operand(cpu)?;
            let v = layout::xmm(cpu.fpu(), usize::from(src));
            cpu.write(op.segment(), offset, &v.to_le_bytes())?;
        }
        Fast::Copy { dst, src, len: 16, zero } if dst < 16 && src < 16 => {
            let v = layout::xmm(cpu.fpu(), usize::from(src));
            set(cpu, dst, v, zero);
        }
        Fast::Load { dst, len, zero } => {
            let offset = op.operand(cpu)?;
            let mut data = [0u8; 64];
            let len = usize::from(len).min(64);
            cpu.read(op.segment(), offset, &mut data[..len])?;
            layout::set_vector(cpu.fpu(), usize::from(dst), &data[..len], zero);
        }
        Fast::Store { src, len } => {
            let offset = op.operand(cpu)?;
            let mut data = [0u8; 64];
            let len = usize::from(len).min(64);
            layout::get_vector(cpu.fpu(), usize::from(src), &mut data[..len]);
            cpu.write(op.segment(), offset, &data[..len])?;
        }
        Fast::Copy { dst, src, len, zero } => {
            let mut data = [0u8; 64];
            let len = usize::from(len).min(64);
            layout::get_vector(cpu.fpu(), usize::from(src), &mut data[..len]);
            layout::set_vector(cpu.fpu(), usize::from(dst), &data[..len], zero);
        }
        _ => scalar(fast, op, cpu)?,
    }
    Ok(())
}

fn scalar<C: VectorCpu>(fast: Fast, op: &VectorOp, cpu: &mut C) -> Result<(), Exception> {
    match fast {
        Fast::LoadLow { dst, len, zero } => {
            let offset = op.operand(cpu)?;
            let mut data = [0u8; 8];
            cpu.read(op.segment(), offset, &mut data[..usize::from(len).min(8)])?;
            set(cpu, dst, vector(u64::from_le_bytes(data), 0), zero);
        }
        Fast::StoreLow { src, at: half, len } => {
            let offset = op.operand(cpu)?;
            let from = at::XMM + 16 * usize::from(src & 15) + usize::from(half);
            let data: [u8; 8] = layout::bytes(cpu.fpu(), from);
            cpu.write(op.segment(), offset, &data[..usize::from(len).min(8)])?;
        }
        Fast::LoadHalf { dst, keep, high, zero } => {
            let offset = op.operand(cpu)?;
            let mut data = [0u8; 8];
            cpu.read(op.segment(), offset, &mut data)?;
            let data = u64::from_le_bytes(data);
            let (l, h) = halves(layout::xmm(cpu.fpu(), usize::from(keep)));
            set(cpu, dst, if high { vector(l, data) } else { vector(data, h) }, zero);
        }
        Fast::Merge { dst, keep, low, len, zero } => {
            let (l, h) = halves(layout::xmm(cpu.fpu(), usize::from(keep)));
            let (new, _) = halves(layout::xmm(cpu.fpu(), usize::from(low)));
            let new = if len == 4 { l & !0xffff_ffff | new & 0xffff_ffff } else { new };
            set(cpu, dst, vector(new, h), zero);
        }
        Fast::CopyLow { dst, src, zero } => {
            let (l, _) = halves(layout::xmm(cpu.fpu(), usize::from(src)));
            set(cpu, dst, vector(l, 0), zero);
        }
        Fast::FromGpr { dst, gpr, len, zero } => {
            let value = cpu.gpr(usize::from(gpr));
            let value = if len == 4 { value & 0xffff_ffff } else { value };
            set(cpu, dst, vector(value, 0), zero);
        }
        Fast::ToGpr { gpr, src, len } => {
            let (value, _) = halves(layout::xmm(cpu.fpu(), usize::from(src)));
            let value = if len == 4 { value & 0xffff_ffff } else { value };
            cpu.set_gpr(usize::from(gpr), value);
        }
        Fast::Shift { f, dst, a, imm, len, zero } => {
            let mut data = [0u8; 64];
            let data = &mut data[..usize::from(len).min(64)];
            source(op, cpu, a, data)?;
            for part in data.as_chunks_mut::<16>().0 {
                *part = f(u128::from_le_bytes(*part), imm).to_le_bytes();
            }
            layout::set_vector(cpu.fpu(), usize::from(dst), data, zero);
        }
        Fast::ByteMask { gpr, src, len } => {
            let mut data = [0u8; 32];
            let len = usize::from(len).min(32);
            layout::get_vector(cpu.fpu(), usize::from(src), &mut data[..len]);
            let parts = data[..len].as_chunks::<16>().0.iter().enumerate();
            let mask =
                parts.fold(0, |bits, (i, part)| bits | sign_bits(u128::from_le_bytes(*part)) << (16 * i));
            cpu.set_gpr(usize::from(gpr), mask);
        }
        Fast::Binary { .. } | Fast::Load { .. } | Fast::Store { .. } | Fast::Copy { .. } => {}
    }
    Ok(())
}
