//! Where things lie in [`FpuArea`]: the legacy region (SDM 1 table 10-2) at fixed offsets, the extended components
//! where the host's CPUID leaf 0DH says (SDM 1 13.4). The area holds every component at all times; its header
//! (bytes 512–575) means nothing between two instructions (INV-VEC-2).

#![expect(clippy::cast_possible_truncation, reason = "taking a field out of a register image is truncation")]

use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::sync::OnceLock;

use x86::state::{FPU_BYTES, FpuArea};

/// Numbers of the state components (SDM 1 13.1).
pub(super) mod component {
    pub const AVX: usize = 2;
    pub const OPMASK: usize = 5;
    pub const ZMM_HI256: usize = 6;
    pub const HI16_ZMM: usize = 7;
    pub const PKRU: usize = 9;
    /// How many this module knows.
    pub const COUNT: usize = 10;
}

/// Offsets in the legacy region.
pub(super) mod at {
    pub const FCW: usize = 0;
    pub const FSW: usize = 2;
    pub const FTW: usize = 4;
    pub const FOP: usize = 6;
    pub const FIP: usize = 8;
    pub const FDP: usize = 16;
    pub const MXCSR: usize = 24;
    pub const MXCSR_MASK: usize = 28;
    pub const ST: usize = 32;
    pub const XMM: usize = 160;
    pub const LEGACY_END: usize = 416;
    pub const HEADER: usize = 512;
    pub const EXTENDED: usize = 576;
}

/// One component of the extended region.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Component {
    /// Offset in the standard format, in bytes; 0 if the host has no such component.
    pub offset: usize,
    /// Bytes.
    pub size: usize,
    /// In the compacted format it starts at a multiple of 64 (CPUID.(0DH,i):ECX\[1\]).
    pub align64: bool,
}

/// The host's layout.
#[derive(Debug)]
pub(super) struct Layout {
    pub components: [Component; component::COUNT],
    /// Components that the host has and this module keeps.
    pub supported: u64,
    /// AVX-512 state exists, so that VEX instructions zero bits 511:256 too.
    pub avx512: bool,
    /// KMOVQ exists (AVX512BW).
    pub kmovq: bool,
    /// The host's MXCSR_MASK: bits of MXCSR that may be set (SDM 1 11.6.6).
    pub mxcsr_mask: u32,
}

impl Layout {
    fn read() -> Self {
        let mut components = [Component::default(); component::COUNT];
        let mut supported = 3;
        let has_xsave = __cpuid(0).eax >= 0xd && is_x86_feature_detected!("xsave");
        let user = if has_xsave { u64::from(__cpuid_count(0xd, 0).eax) } else { 0 };
        for i in
            [component::AVX, component::OPMASK, component::ZMM_HI256, component::HI16_ZMM, component::PKRU]
        {
            if user >> i & 1 == 0 {
                continue;
            }
            let leaf = __cpuid_count(0xd, i as u32);
            let (offset, size) = (leaf.ebx as usize, leaf.eax as usize);
            if offset >= at::EXTENDED && size > 0 && offset + size <= FPU_BYTES {
                components[i] = Component { offset, size, align64: leaf.ecx & 2 != 0 };
                supported |= 1 << i;
            }
        }
        let avx512 = supported & 0xe0 == 0xe0 && is_x86_feature_detected!("avx512f");
        Self {
            components,
            supported,
            avx512,
            kmovq: avx512 && is_x86_feature_detected!("avx512bw"),
            mxcsr_mask: super::native::mxcsr_mask(),
        }
    }

    /// Where bits 255:128 of YMM register `i` (0 to 15) lie.
    pub fn ymm_hi(&self, i: usize) -> usize {
        self.components[component::AVX].offset + 16 * (i & 15)
    }

    /// Where bits 511:256 of ZMM register `i` (0 to 15) lie.
    pub fn zmm_hi(&self, i: usize) -> usize {
        self.components[component::ZMM_HI256].offset + 32 * (i & 15)
    }

    /// Where ZMM register `i` (16 to 31) lies.
    pub fn hi16(&self, i: usize) -> usize {
        self.components[component::HI16_ZMM].offset + 64 * (i & 15)
    }

    /// Where opmask register `i` (0 to 7) lies.
    pub fn opmask(&self, i: usize) -> usize {
        self.components[component::OPMASK].offset + 8 * (i & 7)
    }
}

/// The host's layout, read once.
pub(super) fn layout() -> &'static Layout {
    static LAYOUT: OnceLock<Layout> = OnceLock::new();
    LAYOUT.get_or_init(Layout::read)
}

/// `N` bytes at `offset`. Offsets come from [`Layout`] and [`at`], never from the guest.
#[inline(always)]
pub(super) fn bytes<const N: usize>(area: &FpuArea, offset: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&area.0[offset..offset + N]);
    out
}

#[inline(always)]
pub(super) fn put(area: &mut FpuArea, offset: usize, data: &[u8]) {
    area.0[offset..offset + data.len()].copy_from_slice(data);
}

pub(super) fn u16_at(area: &FpuArea, offset: usize) -> u16 {
    u16::from_le_bytes(bytes(area, offset))
}

pub(super) fn u32_at(area: &FpuArea, offset: usize) -> u32 {
    u32::from_le_bytes(bytes(area, offset))
}

#[inline(always)]
pub(super) fn u64_at(area: &FpuArea, offset: usize) -> u64 {
    u64::from_le_bytes(bytes(area, offset))
}

pub(super) fn mxcsr(area: &FpuArea) -> u32 {
    u32_at(area, at::MXCSR)
}

pub(super) fn set_mxcsr(area: &mut FpuArea, value: u32) {
    put(area, at::MXCSR, &value.to_le_bytes());
}

/// XMM register `i`, 0 to 15.
#[inline(always)]
pub(super) fn xmm(area: &FpuArea, i: usize) -> u128 {
    u128::from_le_bytes(bytes(area, at::XMM + 16 * (i & 15)))
}

#[inline(always)]
pub(super) fn set_xmm(area: &mut FpuArea, i: usize, v: u128) {
    put(area, at::XMM + 16 * (i & 15), &v.to_le_bytes());
}

/// The bytes of XMM register `i`, 0 to 15.
#[inline(always)]
pub(super) fn lane(area: &FpuArea, i: usize) -> [u8; 16] {
    bytes(area, at::XMM + 16 * (i & 15))
}

#[inline(always)]
pub(super) fn set_lane(area: &mut FpuArea, i: usize, v: &[u8; 16]) {
    put(area, at::XMM + 16 * (i & 15), v);
}

/// Zeroes bits MAXVL-1:128 of register `i`, as VEX.128 instructions do (SDM 1 14.1.3).
#[inline]
pub(super) fn zero_above_128(area: &mut FpuArea, i: usize) {
    let l = layout();
    if i >= 16 {
        if l.avx512 {
            let offset = l.hi16(i) + 16;
            area.0[offset..offset + 48].fill(0);
        }
        return;
    }
    if l.components[component::AVX].size != 0 {
        let offset = l.ymm_hi(i);
        area.0[offset..offset + 16].fill(0);
    }
    zero_above_256(area, i);
}

/// Zeroes bits 511:256 of register `i`.
#[inline]
pub(super) fn zero_above_256(area: &mut FpuArea, i: usize) {
    let l = layout();
    if l.avx512 {
        let offset = if i >= 16 { l.hi16(i) + 32 } else { l.zmm_hi(i) };
        area.0[offset..offset + 32].fill(0);
    }
}

/// Reads the low `out.len()` bytes (at most 64) of vector register `i` (0 to 31).
#[inline]
pub(super) fn get_vector(area: &FpuArea, i: usize, out: &mut [u8]) {
    let l = layout();
    let n = out.len().min(64);
    let out = &mut out[..n];
    if i >= 16 {
        let offset = l.hi16(i);
        out.copy_from_slice(&area.0[offset..offset + n]);
        return;
    }
    let offset = at::XMM + 16 * i;
    let first = n.min(16);
    out[..first].copy_from_slice(&area.0[offset..offset + first]);
    if n > 16 {
        let offset = l.ymm_hi(i);
        out[16..n.min(32)].copy_from_slice(&area.0[offset..offset + n.min(32) - 16]);
    }
    if n > 32 {
        let offset = l.zmm_hi(i);
        out[32..n].copy_from_slice(&area.0[offset..offset + n - 32]);
    }
}

/// Writes the low bytes of vector register `i` (0 to 31) and, for a VEX or EVEX instruction (`zero`), zeroes the rest.
/// `data` is 16, 32 or 64 bytes long.
#[inline]
pub(super) fn set_vector(area: &mut FpuArea, i: usize, data: &[u8], zero: bool) {
    let l = layout();
    let n = data.len().min(64);
    if i >= 16 {
        put(area, l.hi16(i), &data[..n]);
    } else {
        put(area, at::XMM + 16 * i, &data[..n.min(16)]);
        if n > 16 {
            put(area, l.ymm_hi(i), &data[16..n.min(32)]);
        }
        if n > 32 {
            put(area, l.zmm_hi(i), &data[32..n]);
        }
    }
    if zero && n <= 16 {
        zero_above_128(area, i);
    } else if zero && n <= 32 {
        zero_above_256(area, i);
    }
}

/// Opmask register `i` (0 to 7).
pub(super) fn opmask(area: &FpuArea, i: usize) -> u64 {
    u64_at(area, layout().opmask(i))
}

pub(super) fn set_opmask(area: &mut FpuArea, i: usize, value: u64) {
    put(area, layout().opmask(i), &value.to_le_bytes());
}

/// Whether an x87 exception is pending: an unmasked flag is set (FSW.ES, SDM 1 8.1.3.3).
#[inline]
pub(super) fn x87_pending(area: &FpuArea) -> bool {
    u16_at(area, at::FSW) & !u16_at(area, at::FCW) & 0x3f != 0
}

/// Makes FSW.ES and FSW.B agree with flags and masks, as loading the state does.
pub(super) fn normalize_x87(area: &mut FpuArea) {
    let fsw = u16_at(area, at::FSW);
    let summary = if x87_pending(area) { 0x8080 } else { 0 };
    put(area, at::FSW, &(fsw & !0x8080 | summary).to_le_bytes());
}

/// Whether all bytes are zero, 64 at a time (components are multiples of 8 bytes).
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<64>();
    let word = |w: &[u8; 8]| u64::from_ne_bytes(*w);
    rest.iter().all(|&b| b == 0)
        && chunks.iter().all(|c| c.as_chunks::<8>().0.iter().map(word).fold(0, |a, w| a | w) == 0)
}

/// The components that this host has and the area keeps, but for PKRU: the guest's is in force only for the guest's own checks.
#[must_use]
pub fn host_components() -> u64 {
    let has_xsave = __cpuid(1).ecx >> 27 & 1 != 0;
    if has_xsave { layout().supported & !(1 << component::PKRU) } else { 0 }
}

/// Where the opmask registers and vector registers 16 to 31 lie in the area, if the host has them and KMOVQ.
#[must_use]
pub fn upper_registers() -> Option<[usize; 2]> {
    let l = layout();
    l.kmovq.then(|| [l.opmask(0), l.hi16(16)])
}

/// Makes an area that was filled by hand ready for XRSTOR: the header (SDM 1 13.4.2) names the components that differ from their initial
/// state, so that the host's registers do not count as used for nothing.
pub fn prepare_restore(area: &mut FpuArea) {
    let l = layout();
    let used = super::xsave::in_use(area) & !(1 << component::PKRU);
    put(area, at::HEADER, &used.to_le_bytes());
    area.0[at::HEADER + 8..at::EXTENDED].fill(0);
    let clean = mxcsr(area) & l.mxcsr_mask;
    put(area, at::MXCSR, &clean.to_le_bytes());
}

/// Whether all exceptions are masked and none waits: x87 and SIMD instructions then raise nothing but faults of memory and mode.
#[must_use]
pub fn exceptions_masked(area: &FpuArea) -> bool {
    const MISALIGNED_MODE: u32 = 1 << 17;
    let m = mxcsr(area);
    let fcw = u16_at(area, at::FCW);
    let waiting = u16_at(area, at::FSW) & 0x80 != 0;
    m & 0x1f80 == 0x1f80 && m & MISALIGNED_MODE == 0 && fcw & 0x3f == 0x3f && !waiting
}
