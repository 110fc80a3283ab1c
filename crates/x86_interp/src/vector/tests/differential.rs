//! Every instruction form that iced knows and this host has, with random operands, against the host's own execution.

use std::collections::{BTreeMap, BTreeSet};

use iced_x86::{
    Code, Decoder, DecoderOptions, Encoder, EncodingKind, Instruction, Mnemonic, OpCodeOperandKind as K,
    OpKind, Register, RflagsBits, RoundingControl,
};
use x86::bits::rflags;

use super::super::layout::{at, layout};
use super::super::{Kind, execute, prepare};
use super::{Mock, Random, oracle};

/// How a form's operand that can be either is chosen.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Register,
    Memory,
}

const BASE: Register = Register::R13;

struct Builder<'a> {
    random: &'a mut Random,
    form: Form,
    evex: bool,
    has_memory: bool,
    vsib: bool,
}

impl Builder<'_> {
    fn pick(&mut self, first: Register, n: u64) -> Register {
        first + u32::try_from(self.random.below(n)).unwrap()
    }

    /// Any general register but RSP and the base.
    fn gpr(&mut self, first: Register) -> Register {
        loop {
            let n = self.random.below(16);
            if n != 4 && n != 13 {
                return first + u32::try_from(n).unwrap();
            }
        }
    }

    fn vector(&mut self, first: Register) -> Register {
        let n = if self.evex { 32 } else { 16 };
        self.pick(first, n)
    }

    fn memory(&mut self, i: &mut Instruction, op: u32) {
        i.set_op_kind(op, OpKind::Memory);
        i.set_memory_base(BASE);
        i.set_memory_displ_size(1);
        i.set_memory_displacement64(0x40);
        self.has_memory = true;
    }

    fn vsib(&mut self, i: &mut Instruction, op: u32, first: Register) {
        self.memory(i, op);
        let index = self.vector(first);
        i.set_memory_index(index);
        i.set_memory_index_scale(1 << self.random.below(3));
        self.vsib = true;
    }

    fn set(&mut self, i: &mut Instruction, op: u32, r: Register) {
        i.set_op_kind(op, OpKind::Register);
        i.set_op_register(op, r);
    }

    /// Sets operand `op`; false: not a form tested here.
    fn operand(&mut self, i: &mut Instruction, op: u32, kind: K) -> bool {
        let memory = self.form == Form::Memory;
        match kind {
            K::mem => self.memory(i, op),
            K::r8_or_mem
            | K::r16_or_mem
            | K::r32_or_mem
            | K::r64_or_mem
            | K::mm_or_mem
            | K::xmm_or_mem
            | K::ymm_or_mem
            | K::zmm_or_mem
            | K::k_or_mem
                if memory =>
            {
                self.memory(i, op);
            }
            K::mem_vsib32x | K::mem_vsib64x => self.vsib(i, op, Register::XMM0),
            K::mem_vsib32y | K::mem_vsib64y => self.vsib(i, op, Register::YMM0),
            K::mem_vsib32z | K::mem_vsib64z => self.vsib(i, op, Register::ZMM0),
            K::r8_or_mem | K::r8_reg => {
                let r =
                    [Register::AL, Register::CL, Register::R9L, Register::SIL, Register::BH, Register::DH];
                let r = r[usize::try_from(self.random.below(6)).unwrap()];
                self.set(i, op, r);
            }
            K::r16_or_mem | K::r16_reg | K::r16_rm => {
                let r = self.gpr(Register::AX);
                self.set(i, op, r);
            }
            K::r32_or_mem | K::r32_reg | K::r32_rm | K::r32_vvvv => {
                let r = self.gpr(Register::EAX);
                self.set(i, op, r);
            }
            K::r64_or_mem | K::r64_reg | K::r64_rm | K::r64_vvvv => {
                let r = self.gpr(Register::RAX);
                self.set(i, op, r);
            }
            K::k_or_mem | K::k_reg | K::kp1_reg | K::k_rm | K::k_vvvv => {
                let r = self.pick(Register::K0, 8);
                self.set(i, op, r);
            }
            K::mm_or_mem | K::mm_reg | K::mm_rm => {
                let r = self.pick(Register::MM0, 8);
                self.set(i, op, r);
            }
            K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 => {
                let r = self.vector(Register::XMM0);
                self.set(i, op, r);
            }
            K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 => {
                let r = self.vector(Register::YMM0);
                self.set(i, op, r);
            }
            K::zmm_or_mem | K::zmm_reg | K::zmm_rm | K::zmm_vvvv => {
                let r = self.vector(Register::ZMM0);
                self.set(i, op, r);
            }
            K::st0 => self.set(i, op, Register::ST0),
            K::sti_opcode => {
                let r = self.pick(Register::ST0, 8);
                self.set(i, op, r);
            }
            K::ax => self.set(i, op, Register::AX),
            K::imm8 => {
                i.set_op_kind(op, OpKind::Immediate8);
                i.set_immediate8(u8::try_from(self.random.below(256)).unwrap());
            }
            K::seg_rDI => i.set_op_kind(op, OpKind::MemorySegRDI),
            _ => return false,
        }
        true
    }
}

struct Case {
    bytes: Vec<u8>,
    instruction: Instruction,
    vsib: bool,
}

/// A random instruction of this form, if there is one.
fn build(code: Code, form: Form, random: &mut Random) -> Option<Case> {
    let oc = code.op_code();
    let evex = oc.encoding() == EncodingKind::EVEX;
    let mut i = Instruction::default();
    i.set_code(code);
    let mut b = Builder { random, form, evex, has_memory: false, vsib: false };
    for op in 0..oc.op_count() {
        if !b.operand(&mut i, op, oc.op_kind(op)) {
            return None;
        }
    }
    let (has_memory, vsib) = (b.has_memory, b.vsib);
    if evex {
        decorate(&mut i, has_memory, random);
    }
    let mut encoder = Encoder::new(64);
    encoder.encode(&i, 0x40_1000).ok()?;
    let bytes = encoder.take_buffer();
    let instruction = Decoder::with_ip(64, &bytes, 0x40_1000, DecoderOptions::NONE).decode();
    (instruction.code() == code).then_some(Case { bytes, instruction, vsib })
}

/// Opmask, zeroing, broadcast, rounding.
fn decorate(i: &mut Instruction, memory: bool, random: &mut Random) {
    let oc = i.op_code();
    if oc.require_op_mask_register() || oc.can_use_op_mask_register() && random.below(3) != 0 {
        i.set_op_mask(Register::K1 + u32::try_from(random.below(7)).unwrap());
        let to_register = i.op_kind(0) == OpKind::Register;
        i.set_zeroing_masking(oc.can_use_zeroing_masking() && to_register && random.below(2) == 0);
    }
    if memory && oc.can_broadcast() {
        i.set_is_broadcast(random.below(2) == 0);
    } else if !memory && oc.can_use_rounding_control() && random.below(2) == 0 {
        i.set_rounding_control(RoundingControl::RoundUp);
    } else if !memory && oc.can_suppress_all_exceptions() && random.below(2) == 0 {
        i.set_suppress_all_exceptions(true);
    }
}

/// Left out: random results; state whose hardware tracking differs (see `state`).
fn skipped(m: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        m,
        M::Rdrand
            | M::Rdseed
            | M::Xsave
            | M::Xsave64
            | M::Xsavec
            | M::Xsavec64
            | M::Xsaveopt
            | M::Xsaveopt64
            | M::Xsaves
            | M::Xsaves64
            | M::Xrstor
            | M::Xrstor64
            | M::Xrstors
            | M::Xrstors64
            | M::Fxrstor
            | M::Fxrstor64
            | M::Ldmxcsr
            | M::Vldmxcsr
    )
}

fn random_mock(case: &Case, random: &mut Random) -> Mock {
    let l = layout();
    let mut m = Mock::new(oracle::data_base());
    for r in &mut m.gpr {
        *r = random.number();
    }
    let operand = m.base + 0x1000;
    m.gpr[13] = operand - 0x40;
    m.gpr[7] = operand;
    m.flags = 2 | random.next() & rflags::STATUS;
    random.fill(&mut m.memory);
    let area = &mut m.fpu.0;
    random.fill(&mut area[at::ST..at::LEGACY_END]);
    for c in l.components.iter().skip(2).take(6).filter(|c| c.size != 0) {
        random.fill(&mut area[c.offset..c.offset + c.size]);
    }
    for st in 0..8 {
        let at = at::ST + 16 * st;
        area[at + 10..at + 16].fill(0);
        if random.below(4) != 0 {
            // A normal number near one.
            area[at + 7] |= 0x80;
            area[at + 8..at + 10]
                .copy_from_slice(&(0x3ff0 + u16::try_from(random.below(32)).unwrap()).to_le_bytes());
        }
    }
    let fcw = 0x7f
        | u16::try_from(random.below(4)).unwrap() << 10
        | [0, 0x200, 0x300][usize::try_from(random.below(3)).unwrap()];
    area[at::FCW..at::FCW + 2].copy_from_slice(&fcw.to_le_bytes());
    let top = u16::try_from(random.below(8)).unwrap();
    let fsw = top << 11 | u16::try_from(random.next() & 0x4700).unwrap();
    area[at::FSW..at::FSW + 2].copy_from_slice(&fsw.to_le_bytes());
    area[at::FTW] = if random.below(2) == 0 { 0xff } else { random.next().to_le_bytes()[0] };
    let mxcsr = 0x1f80 | u32::try_from(random.next() & 0xe07f).unwrap();
    area[at::MXCSR..at::MXCSR + 4].copy_from_slice(&mxcsr.to_le_bytes());
    area[at::MXCSR_MASK..at::MXCSR_MASK + 4].copy_from_slice(&l.mxcsr_mask.to_le_bytes());
    for k in 0..8 {
        if random.below(4) == 0 {
            let at = l.opmask(k);
            area[at..at + 8].fill(0xff);
        }
    }
    if case.vsib {
        small_indices(&mut m, case, random);
    }
    m
}

/// Makes the elements of the index register small.
fn small_indices(m: &mut Mock, case: &Case, random: &mut Random) {
    let size = if format!("{:?}", case.instruction.code().op_code().op_kind(memory_op(&case.instruction)))
        .contains("vsib32")
    {
        4
    } else {
        8
    };
    let mut index = [0u8; 64];
    for e in index.chunks_exact_mut(size) {
        let v = i64::try_from(random.below(200)).unwrap() - 100;
        e.copy_from_slice(&v.to_le_bytes()[..size]);
    }
    let number = case.instruction.memory_index().number();
    super::super::layout::set_vector(&mut m.fpu, number, &index, false);
}

fn memory_op(i: &Instruction) -> u32 {
    (0..i.op_count()).find(|&op| i.op_kind(op) == OpKind::Memory).unwrap_or(0)
}

fn differences(a: &Mock, b: &Mock, mask: u64) -> Vec<String> {
    let mut out = Vec::new();
    for (i, (x, y)) in a.gpr.iter().zip(&b.gpr).enumerate() {
        if x != y {
            out.push(format!("gpr {i}: {x:#x}, host {y:#x}"));
        }
    }
    if (a.flags ^ b.flags) & rflags::STATUS != 0 {
        out.push(format!("flags {:#x}, host {:#x}", a.flags & rflags::STATUS, b.flags & rflags::STATUS));
    }
    let mut bytes = |name: &str, at: usize, len: usize| {
        for i in (at..at + len).filter(|&i| a.fpu.0[i] != b.fpu.0[i]).take(4) {
            out.push(format!("{name}+{:#x}: {:#x}, host {:#x}", i - at, a.fpu.0[i], b.fpu.0[i]));
        }
    };
    bytes("x87", 0, 6);
    bytes("mxcsr", at::MXCSR, 4);
    bytes("st", at::ST, 128);
    bytes("xmm", at::XMM, 256);
    for (i, c) in layout().components.iter().enumerate().skip(2) {
        if mask >> i & 1 != 0 {
            bytes(&format!("component {i}"), c.offset, c.size);
        }
    }
    for i in (0..a.memory.len()).filter(|&i| a.memory[i] != b.memory[i]).take(4) {
        out.push(format!("memory {i:#x}: {:#x}, host {:#x}", a.memory[i], b.memory[i]));
    }
    out
}

/// The flags that the manual calls undefined.
fn undefined_flags(i: &Instruction) -> u64 {
    let names = [
        (RflagsBits::CF, rflags::CF),
        (RflagsBits::PF, rflags::PF),
        (RflagsBits::AF, rflags::AF),
        (RflagsBits::ZF, rflags::ZF),
        (RflagsBits::SF, rflags::SF),
        (RflagsBits::OF, rflags::OF),
    ];
    names.into_iter().filter(|n| i.rflags_undefined() & n.0 != 0).map(|n| n.1).sum()
}

/// Executes both ways; the differences.
fn compare(case: &Case, random: &mut Random) -> Option<Vec<String>> {
    let op = prepare(&case.instruction)?;
    if matches!(op.kind, Kind::Undefined) {
        return None;
    }
    let mask = layout().supported & 0xe7;
    let mut ours = random_mock(case, random);
    let mut host = ours.clone();
    let result = execute(&op, &mut ours);
    if let Err(e) = result {
        return Some(vec![format!("raised {e:?}")]);
    }
    oracle::run(&case.bytes, &mut host.gpr, &mut host.flags, &mut host.fpu, mask, &mut host.memory);
    if matches!(op.kind, Kind::Scalar(_)) {
        // In Rust, and as one family of processors does it: of another host, only defined flags count.
        let defined = !undefined_flags(&case.instruction);
        ours.flags &= defined;
        host.flags &= defined;
    }
    Some(differences(&ours, &host, mask))
}

#[test]
fn every_form_matches_the_host() {
    if layout().supported & 4 == 0 {
        return eprintln!("skipped: the oracle needs a host with AVX");
    }
    let rounds: u64 = std::env::var("VECTOR_ROUNDS").ok().and_then(|v| v.parse().ok()).unwrap_or(3);
    let mut tested = BTreeSet::new();
    let mut wrong: BTreeMap<String, String> = BTreeMap::new();
    let mut undefined = 0;
    for code in Code::values() {
        let oc = code.op_code();
        if !oc.is_instruction() || !oc.mode64() || skipped(code.mnemonic()) {
            continue;
        }
        for form in [Form::Register, Form::Memory] {
            for round in 0..rounds {
                let seed = code as u64 * 1000 + round * 2 + u64::from(form == Form::Memory);
                let mut random = Random(seed);
                let Some(case) = build(code, form, &mut random) else { continue };
                let Some(different) = compare(&case, &mut random) else {
                    undefined += 1;
                    continue;
                };
                tested.insert((code as u64, form == Form::Memory));
                if !different.is_empty() {
                    let text = format!("{:02x?} seed {seed}: {}", case.bytes, different.join("; "));
                    wrong.entry(format!("{code:?}")).or_insert(text);
                }
            }
        }
    }
    for (code, text) in &wrong {
        println!("{code}: {text}");
    }
    println!("{} forms tested, {undefined} cases not on this host, {} wrong", tested.len(), wrong.len());
    assert!(wrong.is_empty(), "{} instructions differ from the host", wrong.len());
    assert!(tested.len() > 600, "only {} forms tested", tested.len());
}
