//! Gathers and scatters, element by element (SDM 2C VPGATHERDD, VSCATTERDPS). An element that is done clears its mask
//! bit, so that after a fault the instruction goes on where it stopped. Elements are done from the lowest up.

use x86::Exception;

use super::layout;
use super::{VectorCpu, VectorOp};

/// A gather or scatter. Register numbers 0 to 31, sizes in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gather {
    pub scatter: bool,
    /// Destination of a gather, source of a scatter.
    pub data: u8,
    /// VSIB index register.
    pub index: u8,
    /// EVEX: opmask register, 1 to 7.
    pub opmask: Option<u8>,
    /// VEX: mask register; its elements' top bits count.
    pub mask: u8,
    /// Bytes of an index, 4 or 8.
    pub index_size: u8,
    /// Bytes of an element, 4 or 8.
    pub element: u8,
    /// How many.
    pub count: u8,
    /// Bytes of the data register's operand: 16, 32 or 64.
    pub vector: u8,
}

impl Gather {
    /// Address of element `i`.
    fn offset(&self, op: &VectorOp, base: u64, index: &[u8], i: usize) -> u64 {
        let size = usize::from(self.index_size);
        let mut raw = [0u8; 8];
        if let Some(bytes) = index.get(i * size..(i + 1) * size) {
            raw[..size].copy_from_slice(bytes);
        }
        let mut index = i64::from_le_bytes(raw);
        if size == 4 {
            index = index << 32 >> 32;
        }
        let scaled = index.cast_unsigned().wrapping_mul(u64::from(op.address.scale));
        base.wrapping_add(scaled) & op.address.mask
    }

    fn mask_bits<C: VectorCpu>(&self, cpu: &mut C) -> u64 {
        if let Some(k) = self.opmask {
            return layout::opmask(cpu.fpu(), usize::from(k));
        }
        let mut mask = [0u8; 32];
        let size = usize::from(self.vector).min(32);
        layout::get_vector(cpu.fpu(), usize::from(self.mask), &mut mask[..size]);
        mask.chunks_exact(usize::from(self.element.max(1)))
            .enumerate()
            .filter(|(_, e)| e.last().is_some_and(|b| b & 0x80 != 0))
            .fold(0, |bits, (i, _)| bits | 1 << (i & 63))
    }

    /// Writes the mask back after `done` elements, whose bits are now clear, with `bits` left over.
    fn set_mask<C: VectorCpu>(&self, cpu: &mut C, bits: u64) {
        if let Some(k) = self.opmask {
            layout::set_opmask(cpu.fpu(), usize::from(k), bits);
            return;
        }
        // VEX: remaining elements become all ones, the others zero (SDM: "if the instruction is suspended … the mask
        // bits are extended over the element").
        let mut mask = [0u8; 32];
        let element = usize::from(self.element.max(1));
        let size = usize::from(self.vector).min(32);
        for (i, e) in mask[..size].chunks_exact_mut(element).enumerate() {
            if bits >> (i & 63) & 1 != 0 {
                e.fill(0xff);
            }
        }
        layout::set_vector(cpu.fpu(), usize::from(self.mask), &mask[..size], true);
    }
}

pub(super) fn execute<C: VectorCpu>(g: &Gather, op: &VectorOp, cpu: &mut C) -> Result<(), Exception> {
    let base = op.address.unmasked(cpu, op.len);
    let (mut index, mut data) = ([0u8; 64], [0u8; 64]);
    layout::get_vector(cpu.fpu(), usize::from(g.index), &mut index);
    let vector = usize::from(g.vector).min(64);
    layout::get_vector(cpu.fpu(), usize::from(g.data), &mut data[..vector]);
    let element = usize::from(g.element.clamp(1, 8));
    let count = usize::from(g.count);
    let mut bits = g.mask_bits(cpu) & if count >= 64 { u64::MAX } else { (1 << count) - 1 };
    let mut outcome = Ok(());
    for i in 0..count {
        if bits >> i & 1 == 0 {
            continue;
        }
        let offset = g.offset(op, base, &index, i);
        let Some(slot) = data.get_mut(i * element..(i + 1) * element) else { break };
        outcome = if g.scatter {
            cpu.write(op.segment(), offset, slot)
        } else {
            let mut value = [0u8; 8];
            let read = cpu.read(op.segment(), offset, &mut value[..element]);
            if read.is_ok() {
                slot.copy_from_slice(&value[..element]);
            }
            read
        };
        if outcome.is_err() {
            break;
        }
        bits &= !(1 << i);
    }
    if !g.scatter {
        // Of a destination wider than the elements gathered, the rest is zeroed once all is done.
        if outcome.is_ok() {
            data[(count * element).min(vector)..].fill(0);
        }
        layout::set_vector(cpu.fpu(), usize::from(g.data), &data[..vector], true);
    }
    g.set_mask(cpu, bits);
    outcome
}
