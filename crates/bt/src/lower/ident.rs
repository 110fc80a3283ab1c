//! Integer instructions that are themselves again.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::Lowering;
use super::memory::Operand;
use super::registers::{frame_slot, host_number, in_frame, rename, rename_value};
use super::scratch::Scratch;
use super::segment::{address_bits, displacement, names_high_byte};
use crate::emit::{S0, S1};
use crate::frame;
use crate::unit::STATUS;

/// Puts a host operand in place of the instruction's memory operand.
pub(super) fn set_memory(i: &mut Instruction, at: Operand) {
    let register = |n: u8| Register::RAX + u32::from(n);
    i.set_memory_base(register(at.base));
    i.set_memory_index(at.index.map_or(Register::None, register));
    i.set_memory_index_scale(1);
    i.set_segment_prefix(Register::None);
    i.set_memory_displacement64(i64::from(at.disp) as u64);
    i.set_memory_displ_size(match at.disp {
        0 if at.base & 7 != 5 => 0,
        -128..=127 => 1,
        _ => 8,
    });
}

impl Lowering<'_, '_> {
    pub(super) fn ident(&mut self, i: &Instruction, live_before: u32, reads: bool) -> bool {
        let super::Look { written, touches, memory, .. } = self.look;
        // Flags that the instruction keeps must be in the host's when it writes others.
        let needs = reads
            || touches && live_before & !written != 0
            || touches && written != STATUS && live_before != 0;
        if i.mnemonic() == Mnemonic::Lea {
            return self.lea(i);
        }
        if memory {
            let bits = matches!(i.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc);
            if bits && i.op1_kind() == OpKind::Register {
                return self.bit_string(i, live_before, needs);
            }
            return self.ident_memory(i, live_before, needs, touches);
        }
        if needs {
            self.need_flags();
        }
        if i.mnemonic() == Mnemonic::Mov && self.frame_move(i) {
            return true;
        }
        let done = self.on_registers(i);
        if done && touches {
            self.in_host = true;
        }
        done
    }

    fn lea(&mut self, i: &Instruction) -> bool {
        if self.facts.legacy.is_some() {
            return self.lea_legacy(i);
        }
        if i.op0_register().size() == 2 || !self.address(i, 0, false) {
            return false;
        }
        let to = i.op0_register();
        if to.size() == 4 {
            self.asm.zero_extend(S0);
        }
        if in_frame(to) {
            self.asm.store(frame_slot(to), S0);
        } else {
            self.asm.mov(host_number(to), S0);
        }
        true
    }

    fn ident_memory(&mut self, i: &Instruction, live_before: u32, needs: bool, touches: bool) -> bool {
        let size = i.memory_size().size();
        if size == 0 || size > 16 {
            return false;
        }
        let write = self.look.writes;
        let aligned = i.mnemonic() == Mnemonic::Cmpxchg16b;
        let Some(operand) = self.operand(i, live_before, size, write, aligned) else { return false };
        self.with_operand(i, needs, touches, operand)
    }

    /// The host operand of a memory operand, checked with others or by itself.
    pub(super) fn operand(
        &mut self,
        i: &Instruction,
        live_before: u32,
        size: usize,
        write: bool,
        aligned: bool,
    ) -> Option<Operand> {
        if let Some(operand) = self.grouped(i, live_before) {
            return Some(operand);
        }
        self.own_operand(i, live_before, size, write, aligned)
    }

    /// Address and check of a memory operand by itself: [`S0`] + [`S1`].
    pub(super) fn own_operand(
        &mut self,
        i: &Instruction,
        live_before: u32,
        size: usize,
        write: bool,
        aligned: bool,
    ) -> Option<Operand> {
        self.spill(live_before);
        self.held = Scratch::default();
        let first = self.room.misses.len();
        let retry = self.asm.here();
        if !self.address(i, size, write) {
            return None;
        }
        self.check_aligned(size, write, retry, aligned);
        Some(Operand::checked(first))
    }

    /// The instruction itself, on a host operand. `needs`: with the guest's flags.
    pub(super) fn with_operand(
        &mut self,
        i: &Instruction,
        needs: bool,
        touches: bool,
        operand: Operand,
    ) -> bool {
        let free = if operand.uses(S0) { [S1] } else { [S0] };
        if names_high_byte(i) {
            return self.with_high_byte(i, needs, touches, operand);
        }
        let Some((mut renamed, used)) = rename(i, &free, &mut self.room.info) else {
            return self.with_value(i, needs, touches, operand);
        };
        let mut at = operand;
        if operand.uses(S0) && !used.is_empty() {
            self.asm.lea(S0, operand.base, operand.index.map(|x| (x, 0)), operand.disp);
            at = Operand { base: S0, index: None, disp: 0, ..operand };
            self.kept = Scratch::default();
            self.held = Scratch::default();
        }
        set_memory(&mut renamed, at);
        if needs && !self.in_host {
            self.asm.restore_flags_on_stack(frame::FLAGS);
        }
        self.load_borrowed(&used);
        if !self.asm.instruction(&renamed) {
            return false;
        }
        self.store_borrowed(&used);
        // Whoever comes back from a miss brings nothing.
        if operand.first == self.room.misses.len() && !operand.uses(S0) {
            let delta = self.kept.delta;
            self.kept = self.held;
            self.kept.delta = delta;
            used.iter().for_each(|b| self.kept.hold(b.host, b.guest));
        }
        if touches || needs {
            self.in_host = true;
        }
        let flags_in_host = self.in_host;
        self.complete(operand.first, flags_in_host);
        true
    }

    /// As [`Lowering::with_operand`] for what names more of the frame's registers than there is room for beside the operand: its value is
    /// loaded first. (MULX of two of them; bignum libraries are full of it.)
    fn with_value(&mut self, i: &Instruction, needs: bool, touches: bool, operand: Operand) -> bool {
        let Some((renamed, used)) = rename_value(i, &mut self.room.info) else { return false };
        self.asm.load_from(i.memory_size().size(), S1, operand.place());
        self.held = Scratch::default();
        self.kept = Scratch::default();
        if needs && !self.in_host {
            self.asm.restore_flags_on_stack(frame::FLAGS);
        }
        self.load_borrowed(&used);
        if !self.asm.instruction(&renamed) {
            return false;
        }
        self.store_borrowed(&used);
        if touches || needs {
            self.in_host = true;
        }
        let flags_in_host = self.in_host;
        self.complete(operand.first, flags_in_host);
        true
    }

    /// BT and its kin with a register as bit offset: the offset reaches beyond the operand (SDM 2A 3.1.1.9).
    fn bit_string(&mut self, i: &Instruction, live_before: u32, needs: bool) -> bool {
        let size = i.memory_size().size();
        let offset = i.op1_register();
        let legacy = self.facts.legacy.is_some();
        // What the offset adds is cut to the address's size: only in flat 32-bit code that is done here.
        let narrow = address_bits(i) != if legacy { 32 } else { 64 };
        if !matches!(size, 4 | 8) || narrow || legacy && !self.is_flat(i.memory_segment()) {
            return false;
        }
        self.spill(live_before);
        self.held = Scratch::default();
        let retry = self.asm.here();
        let mapped =
            if legacy { self.effective_legacy(i, displacement(i)) } else { self.address(i, size, true) };
        if !mapped {
            return false;
        }
        self.bit_offset(offset, size);
        // Bytes: (offset >> log2(bits)) * size.
        self.asm.sar(S1, if size == 8 { 6 } else { 5 });
        self.asm.lea(S0, S0, Some((S1, size.trailing_zeros() as u8)), 0);
        if legacy {
            self.asm.zero_extend(S0);
        }
        let write = i.mnemonic() != Mnemonic::Bt;
        let first = self.check(size, write, retry);
        self.asm.lea(S0, S0, Some((S1, 0)), 0);
        self.bit_offset(offset, size);
        self.asm.and32(S1, size as u32 * 8 - 1);
        if needs {
            self.asm.restore_flags_on_stack(frame::FLAGS);
        }
        let mut masked = *i;
        masked.set_op1_register(if size == 8 { Register::R15 } else { Register::R15D });
        set_memory(&mut masked, Operand { base: S0, index: None, disp: 0, first });
        if !self.asm.instruction(&masked) {
            return false;
        }
        self.in_host = true;
        self.complete(first, true);
        true
    }

    /// The signed bit offset into [`S1`].
    fn bit_offset(&mut self, r: Register, size: usize) {
        if in_frame(r) {
            self.asm.load(S1, frame_slot(r));
        } else {
            self.asm.mov(S1, host_number(r));
        }
        if size == 4 {
            // movsxd r15, r15d
            self.asm.bytes(&[0x4d, 0x63, 0xff]);
        }
    }
}
