//! FXSAVE, FXRSTOR and the XSAVE family on the area, LDMXCSR and STMXCSR (SDM 1 10.5, 13).
//!
//! Which components are in their initial configuration (XINUSE) is judged by their contents, as SDM 1 13.6 permits.

use x86::Exception;
use x86::bits::efer;
use x86::state::{FPU_BYTES, FpuArea};

use super::layout::{self, at, component, is_zero, layout};
use super::{Control, VectorCpu, VectorOp};

/// An instruction done here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Xsave {
    Fxsave,
    Fxrstor,
    Ldmxcsr,
    Stmxcsr,
    /// XSAVE, XSAVEOPT.
    Save {
        optimized: bool,
    },
    /// XSAVEC, XSAVES.
    SaveCompacted {
        supervisor: bool,
    },
    /// XRSTOR.
    Restore,
    /// XRSTORS.
    RestoreSupervisor,
}

const MXCSR_INIT: u32 = 0x1f80;

/// Bytes of component `i` (extended) that exist in this mode: registers 8 to 31 only in 64-bit mode.
fn visible_len(i: usize, code64: bool) -> usize {
    let size = layout().components[i].size;
    match i {
        _ if code64 => size,
        component::AVX => size.min(8 * 16),
        component::ZMM_HI256 => size.min(8 * 32),
        component::HI16_ZMM => 0,
        _ => size,
    }
}

fn xmm_len(code64: bool) -> usize {
    if code64 { 256 } else { 128 }
}

/// Components not in their initial configuration. Component 1 without regard to MXCSR.
pub(super) fn in_use(area: &FpuArea) -> u64 {
    let mut bits = 0;
    let control = u64::from(layout::u16_at(area, at::FCW)) == 0x37f;
    if !control || !is_zero(&area.0[2..at::MXCSR]) || !is_zero(&area.0[at::ST..at::XMM]) {
        bits |= 1;
    }
    if !is_zero(&area.0[at::XMM..at::LEGACY_END]) {
        bits |= 2;
    }
    for (i, c) in layout().components.iter().enumerate().skip(2) {
        if c.size != 0 && !is_zero(&area.0[c.offset..c.offset + c.size]) {
            bits |= 1 << i;
        }
    }
    bits
}

/// XGETBV with ECX = 1: XCR0 AND XINUSE, the latter with MXCSR in bit 1 (SDM 1 13.6).
#[must_use]
pub fn xgetbv1(area: &FpuArea, xcr0: u64) -> u64 {
    (in_use(area) | mxcsr_in_use(area)) & xcr0
}

fn mxcsr_in_use(area: &FpuArea) -> u64 {
    if layout::mxcsr(area) == MXCSR_INIT { 0 } else { 2 }
}

fn check_mxcsr(value: u32) -> Result<u32, Exception> {
    if value & !layout().mxcsr_mask == 0 { Ok(value) } else { Err(Exception::GP0) }
}

/// A piece of the area and where it goes in the image.
#[derive(Clone, Copy, Default)]
struct Piece {
    image: usize,
    area: usize,
    len: usize,
}

/// At most this many pieces: x87 twice, MXCSR, XMM, header, the extended components.
const MAX_PIECES: usize = 6 + component::COUNT;

struct Pieces {
    list: [Piece; MAX_PIECES],
    count: usize,
}

impl Pieces {
    const fn new() -> Self {
        Self { list: [Piece { image: 0, area: 0, len: 0 }; MAX_PIECES], count: 0 }
    }

    fn add(&mut self, image: usize, area: usize, len: usize) {
        if len != 0
            && let Some(slot) = self.list.get_mut(self.count)
        {
            *slot = Piece { image, area, len };
            self.count += 1;
        }
    }

    fn iter(&self) -> impl Iterator<Item = Piece> + '_ {
        self.list[..self.count].iter().copied()
    }

    /// The legacy region's components of `bits`.
    fn add_legacy(&mut self, bits: u64, mxcsr: bool, code64: bool) {
        if bits & 1 != 0 {
            self.add(0, 0, at::MXCSR);
            self.add(at::ST, at::ST, at::XMM - at::ST);
        }
        if mxcsr {
            self.add(at::MXCSR, at::MXCSR, 8);
        }
        if bits & 2 != 0 {
            self.add(at::XMM, at::XMM, xmm_len(code64));
        }
    }
}

/// Offset of each extended component in an image with XCOMP_BV `format` (SDM 1 13.4.3), or in the standard format.
fn image_offsets(format: Option<u64>) -> [usize; component::COUNT] {
    let mut offsets = [0; component::COUNT];
    let mut next = at::EXTENDED;
    for (i, c) in layout().components.iter().enumerate().skip(2) {
        match format {
            None => offsets[i] = c.offset,
            Some(bits) if bits >> i & 1 != 0 => {
                if c.align64 {
                    next = next.next_multiple_of(64);
                }
                offsets[i] = next;
                next += c.size;
            }
            Some(_) => {}
        }
    }
    offsets
}

/// A piece of an image in the compacted format.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CompactedPiece {
    /// Of which component it is.
    pub component: usize,
    /// Where it lies in the image.
    pub offset: usize,
    /// Where it lies in [`FpuArea`].
    pub area: usize,
    /// Bytes.
    pub bytes: usize,
}

/// The pieces of an image of `components` in the compacted format but for the header, as 64-bit code writes and reads them, and its size in bytes.
#[must_use]
pub fn compacted_pieces(components: u64) -> (Vec<CompactedPiece>, usize) {
    let mut all = Vec::new();
    let offsets = image_offsets(Some(components));
    for n in (0..component::COUNT).filter(|n| components >> n & 1 != 0) {
        let mut pieces = Pieces::new();
        match n {
            0 | 1 => pieces.add_legacy(1 << n, n == 1, true),
            _ => pieces.add(offsets[n], layout().components[n].offset, visible_len(n, true)),
        }
        let of = |p: Piece| CompactedPiece { component: n, offset: p.image, area: p.area, bytes: p.len };
        all.extend(pieces.iter().map(of));
    }
    let bytes = all.iter().map(|p| p.offset + p.bytes).max().unwrap_or(0).max(at::EXTENDED);
    (all, bytes)
}

fn write_pieces<C: VectorCpu>(
    op: &VectorOp,
    cpu: &mut C,
    offset: u64,
    pieces: &Pieces,
    header: Option<(usize, &[u8])>,
) -> Result<(), Exception> {
    let place = |image: usize| offset.wrapping_add(image as u64) & op.address.mask;
    for p in pieces.iter() {
        cpu.probe_write(op.segment(), place(p.image), p.len)?;
    }
    if let Some((image, data)) = header {
        cpu.write(op.segment(), place(image), data)?;
    }
    // MXCSR_MASK in the area follows the host's.
    let mask = layout().mxcsr_mask;
    layout::put(cpu.fpu(), at::MXCSR_MASK, &mask.to_le_bytes());
    let mut copy = [0u8; 1024];
    for p in pieces.iter() {
        let mut done = 0;
        while done < p.len {
            let n = (p.len - done).min(copy.len());
            copy[..n].copy_from_slice(&cpu.fpu().0[p.area + done..p.area + done + n]);
            cpu.write(op.segment(), place(p.image + done), &copy[..n])?;
            done += n;
        }
    }
    Ok(())
}

fn aligned_operand<C: VectorCpu>(op: &VectorOp, cpu: &mut C, align: u64) -> Result<u64, Exception> {
    let offset = op.operand(cpu)?;
    if cpu.linear(op.segment(), offset) & (align - 1) != 0 { Err(Exception::GP0) } else { Ok(offset) }
}

/// AMD's fast FXSAVE leaves the XMM registers out at CPL 0 in 64-bit mode (APM 2 3.1.7).
fn fast_fxsave(c: &Control) -> bool {
    c.efer & efer::FFXSR != 0 && c.cpl == 0 && c.code64
}

fn fxsave<C: VectorCpu>(op: &VectorOp, cpu: &mut C) -> Result<(), Exception> {
    let c = cpu.control();
    let offset = aligned_operand(op, cpu, 16)?;
    layout::normalize_x87(cpu.fpu());
    let mut pieces = Pieces::new();
    pieces.add_legacy(if fast_fxsave(&c) { 1 } else { 3 }, true, c.code64);
    write_pieces(op, cpu, offset, &pieces, None)
}

fn fxrstor<C: VectorCpu>(op: &VectorOp, cpu: &mut C) -> Result<(), Exception> {
    let c = cpu.control();
    let offset = aligned_operand(op, cpu, 16)?;
    let mut image = [0u8; 512];
    cpu.read(op.segment(), offset, &mut image)?;
    check_mxcsr(image_u32(&image, at::MXCSR))?;
    let mut pieces = Pieces::new();
    pieces.add_legacy(if fast_fxsave(&c) { 1 } else { 3 }, true, c.code64);
    load_pieces(cpu.fpu(), &image, &pieces);
    Ok(())
}

fn load_pieces(area: &mut FpuArea, image: &[u8], pieces: &Pieces) {
    for p in pieces.iter() {
        if let Some(data) = image.get(p.image..p.image + p.len) {
            layout::put(area, p.area, data);
        }
    }
    tidy_x87(area);
}

/// What loading x87 state from memory does to bits that do not exist.
fn tidy_x87(area: &mut FpuArea) {
    let fcw = layout::u16_at(area, at::FCW) & 0x1f3f | 0x40;
    layout::put(area, at::FCW, &fcw.to_le_bytes());
    let fop = layout::u16_at(area, at::FOP) & 0x7ff;
    layout::put(area, at::FOP, &fop.to_le_bytes());
    area.0[at::FTW + 1] = 0;
    for i in 0..8 {
        layout::put(area, at::ST + 16 * i + 10, &[0; 6]);
    }
    layout::normalize_x87(area);
}

fn image_u32(image: &[u8], at: usize) -> u32 {
    let mut b = [0; 4];
    b.copy_from_slice(&image[at..at + 4]);
    u32::from_le_bytes(b)
}

fn image_u64(image: &[u8], at: usize) -> u64 {
    u64::from(image_u32(image, at)) | u64::from(image_u32(image, at + 4)) << 32
}

/// EDX:EAX.
fn instruction_mask<C: VectorCpu>(cpu: &C) -> u64 {
    cpu.gpr(0) & 0xffff_ffff | cpu.gpr(2) << 32
}

fn save<C: VectorCpu>(op: &VectorOp, cpu: &mut C, optimized: bool) -> Result<(), Exception> {
    let c = cpu.control();
    let offset = aligned_operand(op, cpu, 64)?;
    let rfbm = c.xcr0 & instruction_mask(cpu) & layout().supported;
    layout::normalize_x87(cpu.fpu());
    let used = in_use(cpu.fpu());
    let header_at = offset.wrapping_add(at::HEADER as u64) & op.address.mask;
    // The header is read and written: a fault on it is a write's.
    let mut old = [0u8; 8];
    cpu.probe_write(op.segment(), header_at, old.len())?;
    cpu.read(op.segment(), header_at, &mut old)?;
    let bv = u64::from_le_bytes(old) & !rfbm | used & rfbm;
    let written = if optimized { rfbm & used } else { rfbm };
    let mut pieces = Pieces::new();
    pieces.add_legacy(written, rfbm & 6 != 0, c.code64);
    let offsets = image_offsets(None);
    for i in (2..component::COUNT).filter(|i| written >> i & 1 != 0) {
        pieces.add(offsets[i], layout().components[i].offset, visible_len(i, c.code64));
    }
    write_pieces(op, cpu, offset, &pieces, Some((at::HEADER, &bv.to_le_bytes())))
}

fn save_compacted<C: VectorCpu>(op: &VectorOp, cpu: &mut C, supervisor: bool) -> Result<(), Exception> {
    let c = cpu.control();
    if supervisor && c.cpl != 0 {
        return Err(Exception::GP0);
    }
    let offset = aligned_operand(op, cpu, 64)?;
    let enabled = if supervisor { c.xcr0 | c.xss } else { c.xcr0 };
    let rfbm = enabled & instruction_mask(cpu) & layout().supported;
    layout::normalize_x87(cpu.fpu());
    let used = in_use(cpu.fpu()) | mxcsr_in_use(cpu.fpu());
    let written = rfbm & used;
    let mut header = [0u8; 16];
    header[..8].copy_from_slice(&written.to_le_bytes());
    header[8..].copy_from_slice(&(rfbm | 1 << 63).to_le_bytes());
    let mut pieces = Pieces::new();
    pieces.add_legacy(written, written & 2 != 0, c.code64);
    let offsets = image_offsets(Some(rfbm));
    for i in (2..component::COUNT).filter(|i| written >> i & 1 != 0) {
        pieces.add(offsets[i], layout().components[i].offset, visible_len(i, c.code64));
    }
    write_pieces(op, cpu, offset, &pieces, Some((at::HEADER, &header)))
}

/// Checks the header and gives XSTATE_BV and the compacted format's bits, if it is one (SDM 1 13.8, 13.12).
fn check_header(
    header: &[u8],
    enabled: u64,
    must_be_compacted: bool,
) -> Result<(u64, Option<u64>), Exception> {
    let (bv, comp) = (image_u64(header, 0), image_u64(header, 8));
    let compacted = comp >> 63 != 0;
    let format = comp & !(1 << 63);
    let valid = if compacted {
        format & !enabled == 0 && bv & !format == 0 && is_zero(&header[16..])
    } else {
        !must_be_compacted && comp == 0 && bv & !enabled == 0 && is_zero(&header[16..24])
    };
    if valid { Ok((bv, compacted.then_some(format))) } else { Err(Exception::GP0) }
}

fn restore<C: VectorCpu>(op: &VectorOp, cpu: &mut C, supervisor: bool) -> Result<(), Exception> {
    let c = cpu.control();
    if supervisor && c.cpl != 0 {
        return Err(Exception::GP0);
    }
    let offset = aligned_operand(op, cpu, 64)?;
    let enabled = if supervisor { c.xcr0 | c.xss } else { c.xcr0 };
    let rfbm = enabled & instruction_mask(cpu) & layout().supported;
    let mut image = [0u8; FPU_BYTES];
    let place = |image: usize| offset.wrapping_add(image as u64) & op.address.mask;
    cpu.read(op.segment(), offset, &mut image[..at::EXTENDED])?;
    let (bv, format) = check_header(&image[at::HEADER..at::EXTENDED], enabled, supervisor)?;
    let loaded = rfbm & bv;
    let mut pieces = Pieces::new();
    let mxcsr = if format.is_some() { loaded & 2 != 0 } else { rfbm & 6 != 0 };
    if mxcsr {
        check_mxcsr(image_u32(&image[..], at::MXCSR))?;
    }
    pieces.add_legacy(loaded, mxcsr, c.code64);
    let offsets = image_offsets(format);
    for i in (2..component::COUNT).filter(|i| loaded >> i & 1 != 0) {
        let len = visible_len(i, c.code64);
        if len != 0
            && let Some(part) = image.get_mut(offsets[i]..offsets[i] + len)
        {
            cpu.read(op.segment(), place(offsets[i]), part)?;
            pieces.add(offsets[i], layout().components[i].offset, len);
        }
    }
    initialize(cpu.fpu(), rfbm & !bv, format.is_some(), c.code64);
    load_pieces(cpu.fpu(), &image[..], &pieces);
    Ok(())
}

/// Puts components in their initial configuration; MXCSR with component 1 in the compacted format only.
fn initialize(area: &mut FpuArea, bits: u64, compacted: bool, code64: bool) {
    if bits & 1 != 0 {
        area.0[..at::MXCSR].fill(0);
        layout::put(area, at::FCW, &0x37fu16.to_le_bytes());
        area.0[at::ST..at::XMM].fill(0);
    }
    if bits & 2 != 0 {
        area.0[at::XMM..at::XMM + xmm_len(code64)].fill(0);
        if compacted {
            layout::set_mxcsr(area, MXCSR_INIT);
        }
    }
    for (i, c) in layout().components.iter().enumerate().skip(2) {
        if bits >> i & 1 != 0 {
            area.0[c.offset..c.offset + visible_len(i, code64)].fill(0);
        }
    }
}

pub(super) fn execute<C: VectorCpu>(x: Xsave, op: &VectorOp, cpu: &mut C) -> Result<(), Exception> {
    match x {
        Xsave::Fxsave => fxsave(op, cpu),
        Xsave::Fxrstor => fxrstor(op, cpu),
        Xsave::Save { optimized } => save(op, cpu, optimized),
        Xsave::SaveCompacted { supervisor } => save_compacted(op, cpu, supervisor),
        Xsave::Restore => restore(op, cpu, false),
        Xsave::RestoreSupervisor => restore(op, cpu, true),
        Xsave::Ldmxcsr => {
            let offset = op.operand(cpu)?;
            let mut value = [0; 4];
            cpu.read(op.segment(), offset, &mut value)?;
            let value = check_mxcsr(u32::from_le_bytes(value))?;
            layout::set_mxcsr(cpu.fpu(), value);
            Ok(())
        }
        Xsave::Stmxcsr => {
            let offset = op.operand(cpu)?;
            let value = layout::mxcsr(cpu.fpu());
            cpu.write(op.segment(), offset, &value.to_le_bytes())
        }
    }
}
