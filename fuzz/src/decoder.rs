//! Any bytes in any mode decode to something executable, and nothing longer than 15 bytes.

use iced_x86::{Decoder, DecoderOptions, Instruction};
use x86_interp::decode::build::build;

use crate::interpreter::{MODES, Machine};

/// Decodes and builds every instruction in `data[1..]`, in the mode of `data[0]`.
pub fn target(data: &[u8]) {
    let Some((&mode, code)) = data.split_first() else { return };
    let mut machine = Machine::new();
    let mode = MODES[usize::from(mode) % MODES.len()];
    machine.enter(mode);
    let cpu = machine.vcpu.cpu();
    let mut decoder = Decoder::with_ip(mode.bits(), code, 0x1000, DecoderOptions::NONE);
    let mut instruction = Instruction::default();
    while decoder.can_decode() {
        let before = decoder.position();
        decoder.decode_out(&mut instruction);
        assert!(decoder.position() > before, "decoding makes progress");
        assert!(instruction.len() <= 15);
        let offset = u16::try_from(before & 0xfff).unwrap_or(0);
        let built = build(cpu, &instruction, offset);
        assert_eq!(usize::from(built.op.len), instruction.len());
        assert_eq!(built.op.ip, offset);
    }
}
