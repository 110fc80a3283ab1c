//! Accesses where a mask says which elements are touched: EVEX opmasks, VMASKMOV, MASKMOVDQU, compress and expand.
//! A masked-out element neither faults nor is written.

use x86::Exception;

use super::layout;
use super::{VectorCpu, VectorOp};

/// How an opmask governs a memory operand.
#[derive(Clone, Copy, Debug)]
pub(super) struct ElementMask {
    /// Opmask register, 1 to 7.
    pub register: u8,
    /// Bytes of an element in memory.
    pub element: u8,
    /// Elements of the destination: a broadcast's memory element serves several.
    pub lanes: u8,
    /// Masked-out elements do not fault (exception class E4 and kin); otherwise (E4NF) the whole operand is accessed.
    pub suppress: bool,
    /// The active elements lie next to each other in memory (VEXPAND, VCOMPRESS).
    pub packed: bool,
}

fn ones(bits: u32) -> u64 {
    if bits >= 64 { u64::MAX } else { (1 << bits) - 1 }
}

impl ElementMask {
    fn value<C: VectorCpu>(&self, cpu: &mut C) -> u64 {
        layout::opmask(cpu.fpu(), usize::from(self.register)) & ones(u32::from(self.lanes))
    }

    /// A bit per byte of an operand of `size` bytes that is accessed.
    fn bytes<C: VectorCpu>(&self, cpu: &mut C, size: usize) -> u64 {
        let mask = self.value(cpu);
        let element = usize::from(self.element.max(1));
        if self.packed {
            let n = mask.count_ones() * u32::from(self.element);
            return ones(n.min(u32::try_from(size).unwrap_or(64)));
        }
        let elements = (size / element).max(1);
        let mut bytes = 0;
        for lane in 0..usize::from(self.lanes) {
            if mask >> (lane & 63) & 1 != 0 {
                bytes |= ones(u32::from(self.element)) << ((lane % elements * element) & 63);
            }
        }
        bytes & ones(u32::try_from(size).unwrap_or(64))
    }

    /// Reads the operand; masked-out elements read as zero.
    pub fn read<C: VectorCpu>(
        &self,
        op: &VectorOp,
        cpu: &mut C,
        offset: u64,
        out: &mut [u8],
    ) -> Result<(), Exception> {
        if !self.suppress {
            return cpu.read(op.segment(), offset, out);
        }
        let bytes = self.bytes(cpu, out.len());
        if bytes == ones(u32::try_from(out.len()).unwrap_or(64)) {
            return cpu.read(op.segment(), offset, out);
        }
        read_bytes(op, cpu, offset, bytes, out)
    }

    pub fn probe_write<C: VectorCpu>(
        &self,
        op: &VectorOp,
        cpu: &mut C,
        offset: u64,
        size: usize,
    ) -> Result<(), Exception> {
        let bytes = self.bytes(cpu, size);
        probe_bytes(op, cpu, offset, bytes)
    }

    pub fn write<C: VectorCpu>(
        &self,
        op: &VectorOp,
        cpu: &mut C,
        offset: u64,
        data: &[u8],
    ) -> Result<(), Exception> {
        let bytes = self.bytes(cpu, data.len());
        write_bytes(op, cpu, offset, bytes, data)
    }
}

/// Runs of set bits: first byte and length.
fn runs(mut bytes: u64) -> impl Iterator<Item = (usize, usize)> {
    let mut base = 0;
    std::iter::from_fn(move || {
        if bytes == 0 {
            return None;
        }
        let skip = bytes.trailing_zeros();
        bytes >>= skip;
        let len = bytes.trailing_ones();
        bytes = if len >= 64 { 0 } else { bytes >> len };
        let start = base + skip as usize;
        base = start + len as usize;
        Some((start, len as usize))
    })
}

fn element_offset(op: &VectorOp, offset: u64, at: usize) -> u64 {
    offset.wrapping_add(at as u64) & op.address.mask
}

fn read_bytes<C: VectorCpu>(
    op: &VectorOp,
    cpu: &mut C,
    offset: u64,
    bytes: u64,
    out: &mut [u8],
) -> Result<(), Exception> {
    for (start, len) in runs(bytes) {
        if let Some(part) = out.get_mut(start..start + len) {
            cpu.read(op.segment(), element_offset(op, offset, start), part)?;
        }
    }
    Ok(())
}

fn probe_bytes<C: VectorCpu>(op: &VectorOp, cpu: &mut C, offset: u64, bytes: u64) -> Result<(), Exception> {
    for (start, len) in runs(bytes) {
        cpu.probe_write(op.segment(), element_offset(op, offset, start), len)?;
    }
    Ok(())
}

fn write_bytes<C: VectorCpu>(
    op: &VectorOp,
    cpu: &mut C,
    offset: u64,
    bytes: u64,
    data: &[u8],
) -> Result<(), Exception> {
    if runs(bytes).nth(1).is_some() {
        probe_bytes(op, cpu, offset, bytes)?;
    }
    for (start, len) in runs(bytes) {
        if let Some(part) = data.get(start..start + len) {
            cpu.write(op.segment(), element_offset(op, offset, start), part)?;
        }
    }
    Ok(())
}

/// Masked moves that are done here entirely.
#[derive(Clone, Copy, Debug)]
pub(super) enum Masked {
    /// VMASKMOVPS/PD, VPMASKMOVD/Q from memory: destination, mask register, bytes of a vector and an element.
    Load { dst: u8, mask: u8, size: u8, element: u8 },
    /// The same to memory.
    Store { src: u8, mask: u8, size: u8, element: u8 },
    /// MASKMOVDQU, VMASKMOVDQU.
    Bytes { src: u8, mask: u8 },
    /// MASKMOVQ.
    BytesMmx { src: u8, mask: u8 },
    /// VCOMPRESSPS/PD, VPCOMPRESSB/W/D/Q to memory. Opmask 0: all elements.
    Compress { src: u8, opmask: u8, size: u8, element: u8 },
    /// VMOVDQU8 to VMOVAPD with an opmask, to memory; the opmask is not 0.
    Move { src: u8, size: u8, mask: ElementMask },
}

/// A bit per byte whose element has its top bit set in `mask`.
fn sign_bytes(mask: &[u8], element: usize) -> u64 {
    let mut bytes = 0;
    for (i, e) in mask.chunks_exact(element.max(1)).enumerate() {
        if e.last().is_some_and(|b| b & 0x80 != 0) {
            bytes |= ones(u32::try_from(element).unwrap_or(8)) << ((i * element) & 63);
        }
    }
    bytes
}

pub(super) fn execute<C: VectorCpu>(m: &Masked, op: &VectorOp, cpu: &mut C) -> Result<(), Exception> {
    let offset = op.operand(cpu)?;
    let (mut data, mut mask) = ([0u8; 64], [0u8; 64]);
    match *m {
        Masked::Load { dst, mask: register, size, element } => {
            let size = usize::from(size);
            layout::get_vector(cpu.fpu(), usize::from(register), &mut mask[..size]);
            let bytes = sign_bytes(&mask[..size], usize::from(element));
            read_bytes(op, cpu, offset, bytes, &mut data[..size])?;
            layout::set_vector(cpu.fpu(), usize::from(dst), &data[..size], true);
            Ok(())
        }
        Masked::Store { src, mask: register, size, element } => {
            let size = usize::from(size);
            layout::get_vector(cpu.fpu(), usize::from(register), &mut mask[..size]);
            layout::get_vector(cpu.fpu(), usize::from(src), &mut data[..size]);
            let bytes = sign_bytes(&mask[..size], usize::from(element));
            write_bytes(op, cpu, offset, bytes, &data[..size])
        }
        Masked::Bytes { src, mask: register } => {
            layout::get_vector(cpu.fpu(), usize::from(register), &mut mask[..16]);
            layout::get_vector(cpu.fpu(), usize::from(src), &mut data[..16]);
            write_bytes(op, cpu, offset, sign_bytes(&mask[..16], 1), &data[..16])
        }
        Masked::BytesMmx { src, mask: register } => {
            let (data, mask) = (super::x87::mm(cpu.fpu(), src), super::x87::mm(cpu.fpu(), register));
            write_bytes(op, cpu, offset, sign_bytes(&mask, 1), &data)?;
            super::x87::enter_mmx(cpu.fpu());
            Ok(())
        }
        Masked::Compress { src, opmask, size, element } => {
            let (size, element) = (usize::from(size), usize::from(element.max(1)));
            layout::get_vector(cpu.fpu(), usize::from(src), &mut data[..size]);
            let k = match opmask {
                0 => u64::MAX,
                n => layout::opmask(cpu.fpu(), usize::from(n)),
            };
            let mut out = [0u8; 64];
            let mut used = 0;
            for (i, e) in data[..size].chunks_exact(element).enumerate() {
                if k >> i & 1 != 0 {
                    out[used..used + element].copy_from_slice(e);
                    used += element;
                }
            }
            if used == 0 { Ok(()) } else { cpu.write(op.segment(), offset, &out[..used]) }
        }
        Masked::Move { src, size, mask } => {
            let data = &mut data[..usize::from(size)];
            layout::get_vector(cpu.fpu(), usize::from(src), data);
            mask.write(op, cpu, offset, data)
        }
    }
}
