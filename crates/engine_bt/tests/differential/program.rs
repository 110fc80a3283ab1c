//! A random program: instructions, labels, loops, indirect jumps, system instructions, stores into its own code; and the machine
//! around it. All of it follows from a seed.

use iced_x86::{Code, Decoder, DecoderOptions, Encoder, FastFormatter, Instruction, OpKind, Register};
use x86::bits::rflags;

use crate::generate::{Catalogue, Group, Roles, instance};
use crate::initial;
use crate::machine::{Alias, Setup};
use crate::rng::Rng;
use crate::segments;
use crate::state::{CODE, CODE_BYTES, DATA, DATA_BYTES, Mode, READ_ONLY_BYTES, Registers};

/// What of an instruction names a label.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refers {
    Nothing,
    /// It is a direct branch.
    Branch,
    /// Its memory operand, relative to RIP; so many bytes into the item.
    Memory(u64),
    /// Its immediate of 32 bits.
    Immediate,
}

/// One instruction; `label` is the number of an item (or of what is behind the last).
#[derive(Clone)]
pub struct Item {
    pub instruction: Instruction,
    pub refers: Refers,
    pub label: usize,
}

/// A case.
#[derive(Clone)]
pub struct Program {
    pub seed: u64,
    pub setup: Setup,
    pub regs: Registers,
    pub data: Vec<u8>,
    pub read_only: Vec<u8>,
    pub items: Vec<Item>,
    /// The item at which the exceptions go on that do.
    pub resume: usize,
}

/// A program in memory.
pub struct Layout {
    pub code: Vec<u8>,
    /// Address of each item, and of the INT3 behind the last.
    pub starts: Vec<u64>,
}

/// Instructions that anybody may execute but that are not compared with the host, or that need a certain order.
const ANYBODY: &[&[u8]] = &[
    &[0x9c],                         // pushfq
    &[0x9d],                         // popfq
    &[0xfc],                         // cld
    &[0xfc],                         // cld
    &[0x0f, 0x05],                   // syscall
    &[0xf3, 0x48, 0x0f, 0xae, 0xc0], // rdfsbase rax
    &[0xf3, 0x49, 0x0f, 0xae, 0xc9], // rdgsbase r9
    &[0xf3, 0x49, 0x0f, 0xae, 0xc7], // rdfsbase r15
    &[0xf3, 0x0f, 0xae, 0xcb],       // rdgsbase ebx
    &[0xf3, 0x48, 0x0f, 0xae, 0xd6], // wrfsbase rsi
    &[0xf3, 0x48, 0x0f, 0xae, 0xdf], // wrgsbase rdi
    &[0xf3, 0x49, 0x0f, 0xae, 0xd6], // wrfsbase r14
    &[0xf3, 0x0f, 0xae, 0xd8],       // wrgsbase eax
    &[0x0f, 0x31],                   // rdtsc
    &[0x0f, 0x01, 0xf9],             // rdtscp
    &[0x0f, 0xa2],                   // cpuid
    &[0x8c, 0xd8],                   // mov eax, ds
    &[0x49, 0x8c, 0xe5],             // mov r13, fs
    &[0x66, 0x8c, 0xc9],             // mov cx, cs
    &[0xcc],                         // int3
    &[0xf3, 0x90],                   // pause
    &[0xf3, 0x0f, 0x1e, 0xfa],       // endbr64
];

/// Instructions of level 0.
const SUPERVISOR: &[&[u8]] = &[
    &[0xfa],                                                       // cli
    &[0xfb],                                                       // sti
    &[0x0f, 0x01, 0xf8],                                           // swapgs
    &[0x0f, 0x01, 0xcb],                                           // stac
    &[0x0f, 0x01, 0xca],                                           // clac
    &[0x0f, 0x01, 0xcb],                                           // stac
    &[0x48, 0x0f, 0x07],                                           // sysretq
    &[0x0f, 0x06],                                                 // clts
    &[0x0f, 0x20, 0xd8],                                           // mov rax, cr3
    &[0x0f, 0x20, 0xc1],                                           // mov rcx, cr0
    &[0x0f, 0x01, 0x3e],                                           // invlpg [rsi]
    &[0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8],                         // mov rax, cr3; mov cr3, rax
    &[0x0f, 0x20, 0xc0, 0x48, 0x83, 0xf0, 0x08, 0x0f, 0x22, 0xc0], // toggles CR0.TS
    &[0x48, 0xcf],                                                 // iretq
    &[0xec],                                                       // in al, dx
    &[0x44, 0x0f, 0x20, 0xc0],                                     // mov rax, cr8
];

/// The same for 32-bit code, which as 16-bit code has prefixes.
const ANYBODY_32: &[&[u8]] = &[
    &[0x9c],                               // pushfd
    &[0x9d],                               // popfd
    &[0x66, 0x9c],                         // pushf
    &[0x66, 0x9d],                         // popf
    &[0xfc],                               // cld
    &[0xfc],                               // cld
    &[0xfd, 0xaa, 0xfc],                   // std; stosb; cld
    &[0x60],                               // pushad
    &[0x61],                               // popad
    &[0x66, 0x60],                         // pusha
    &[0x66, 0x61],                         // popa
    &[0x1e, 0x1f],                         // push ds; pop ds
    &[0x0e],                               // push cs
    &[0x1e, 0x07],                         // push ds; pop es
    &[0x06, 0x0f, 0xa1],                   // push es; pop fs
    &[0x66, 0x0f, 0xa0],                   // push fs, 16 bits
    &[0x0f, 0xa8],                         // push gs
    &[0x8c, 0xd0, 0x8e, 0xd8],             // mov eax, ss; mov ds, eax
    &[0x8c, 0xe2],                         // mov edx, fs
    &[0x66, 0x8c, 0xc9],                   // mov cx, cs
    &[0x8c, 0x06],                         // mov [esi], es
    &[0x31, 0xc0, 0x8e, 0xe8],             // xor eax, eax; mov gs, eax
    &[0x0f, 0x31],                         // rdtsc
    &[0x0f, 0xa2],                         // cpuid
    &[0xcc],                               // int3
    &[0xce],                               // into
    &[0xf3, 0x90],                         // pause
    &[0xf3, 0x0f, 0x1e, 0xfb],             // endbr32
    &[0x64, 0x8b, 0x4e, 0x08],             // mov ecx, fs:[esi + 8]
    &[0x65, 0x01, 0x07],                   // add gs:[edi], eax
    &[0x65, 0xa1, 8, 0, 0, 0],             // mov eax, gs:[8]
    &[0x64, 0xa3, 4, 0, 0, 0],             // mov fs:[4], eax
    &[0x2e, 0x8b, 0x1e],                   // mov ebx, cs:[esi]
    &[0x43],                               // inc ebx
    &[0x4a],                               // dec edx
    &[0x66, 0x40],                         // inc ax
    &[0x8a, 0x27],                         // mov ah, [edi]
    &[0x88, 0x76, 0x05],                   // mov [esi + 5], dh
    &[0x00, 0x2f],                         // add [edi], ch
    &[0x3a, 0x3e],                         // cmp bh, [esi]
    &[0xc8, 0x10, 0, 0],                   // enter 16, 0
    &[0xc9],                               // leave
    &[0x89, 0xe5, 0x83, 0xec, 0x20, 0xc9], // mov ebp, esp; sub esp, 32; leave
    &[0x67, 0x8b, 0x04],                   // mov eax, [si]
    &[0x67, 0x89, 0x51, 0x10],             // mov [bx + di + 16], edx
    &[0x67, 0x8d, 0x48, 0x10],             // lea ecx, [bx + si + 16]
    &[0x66, 0x8d, 0x44, 0x8b, 0x10],       // lea ax, [ebx + ecx * 4 + 16]
    &[0x67, 0xa4],                         // movsb [di], [si]
];

/// The same of level 0.
const SUPERVISOR_32: &[&[u8]] = &[
    &[0xfa],                               // cli
    &[0xfb],                               // sti
    &[0xfb],                               // sti
    &[0x0f, 0x01, 0xcb],                   // stac
    &[0x0f, 0x01, 0xca],                   // clac
    &[0x0f, 0x06],                         // clts
    &[0x0f, 0x20, 0xd8],                   // mov eax, cr3
    &[0x0f, 0x20, 0xd2],                   // mov edx, cr2
    &[0x0f, 0x20, 0xc1],                   // mov ecx, cr0
    &[0x0f, 0x01, 0x3e],                   // invlpg [esi]
    &[0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8], // mov eax, cr3; mov cr3, eax
    &[0xec],                               // in al, dx
];

fn decode(bytes: &[u8]) -> Vec<Instruction> {
    decode_as(64, bytes)
}

fn decode_as(bits: u32, bytes: &[u8]) -> Vec<Instruction> {
    Decoder::with_ip(bits, bytes, 0, DecoderOptions::NONE).into_iter().collect()
}

fn plain_bytes_32(bytes: &[u8]) -> Vec<Item> {
    decode_as(32, bytes).into_iter().map(plain).collect()
}

/// The direct branch that 64-bit code has as `code`, of 16- or 32-bit code.
fn branch_code(code: Code, bits: u32) -> Code {
    // The three forms follow each other.
    let back = match bits {
        16 => 2,
        32 => 1,
        _ => 0,
    };
    Code::try_from(code as usize - back).unwrap()
}

fn plain(instruction: Instruction) -> Item {
    Item { instruction, refers: Refers::Nothing, label: 0 }
}

fn plain_bytes(bytes: &[u8]) -> Vec<Item> {
    decode(bytes).into_iter().map(plain).collect()
}

/// `lea register, [rip + label]`
fn address_of(register: Register, label: usize) -> Item {
    let mut i = Instruction::default();
    i.set_code(Code::Lea_r64_m);
    i.set_op0_kind(OpKind::Register);
    i.set_op0_register(register);
    i.set_op1_kind(OpKind::Memory);
    i.set_memory_base(Register::RIP);
    i.set_memory_displ_size(8);
    Item { instruction: i, refers: Refers::Memory(0), label }
}

fn with_register(code: Code, register: Register) -> Item {
    plain(Instruction::with1(code, register).unwrap())
}

const SCRATCH: [Register; 5] = [Register::RAX, Register::R10, Register::R13, Register::R14, Register::R15];

struct Builder<'a> {
    /// Of the code.
    bits: u32,
    rng: Rng,
    roles: Roles,
    catalogue: &'a Catalogue,
    flavour: Group,
    supervisor: bool,
    /// Some segments do not begin at 0.
    based: bool,
    items: Vec<Item>,
}

impl Builder<'_> {
    /// A label: mostly a little ahead, sometimes behind.
    fn label(&mut self) -> usize {
        let here = self.items.len();
        if self.rng.chance(22) {
            here - self.rng.below(6.min(here as u64 + 1)) as usize
        } else {
            here + 1 + self.rng.below(6) as usize
        }
    }

    fn ordinary(&mut self) {
        let group =
            if self.flavour != Group::Integer && self.rng.chance(35) { Group::Integer } else { self.flavour };
        let codes = self.catalogue.codes(group);
        if codes.is_empty() {
            return;
        }
        let code = *self.rng.pick(codes);
        let mut instruction = instance(&mut self.rng, &self.roles, code);
        let direct = (0..instruction.op_count())
            .any(|n| matches!(instruction.op_kind(n), OpKind::NearBranch64 | OpKind::NearBranch32));
        let segment = instruction.memory_segment();
        if self.bits != 64 {
            self.fit(&mut instruction);
        } else if !direct && segment == Register::DS && self.rng.chance(5) {
            instruction.set_segment_prefix(*self.rng.pick(&[Register::FS, Register::GS]));
            if instruction.memory_base() != Register::RIP {
                // The bases point into the data: the offset is small.
                instruction.set_memory_base(Register::None);
                instruction.set_memory_index(Register::None);
                instruction.set_memory_displ_size(8);
                instruction.set_memory_displacement64(self.rng.below(0x800));
            }
        }
        let label = self.label();
        let refers = if direct { Refers::Branch } else { Refers::Nothing };
        if encode(&Item { instruction, refers, label }, CODE, CODE, self.bits, CODE).is_some() {
            self.items.push(Item { instruction, refers, label });
        }
    }

    /// An ordinary instruction with a memory operand, if one of some turns up.
    fn access(&mut self) {
        let before = self.items.len();
        for _ in 0..30 {
            self.items.truncate(before);
            self.ordinary();
            let Some(item) = self.items.get_mut(before) else { continue };
            let i = &mut item.instruction;
            let based = i.memory_base().is_gpr64() && i.memory_displ_size() != 0;
            if i.op_kinds().any(|k| k == OpKind::Memory) && based && !i.is_vsib() {
                i.set_memory_displacement64(self.rng.below(8));
                i.set_memory_index(Register::None);
                return;
            }
        }
    }

    /// A conditional jump or a jump; the catalogue seldom picks one.
    fn branch(&mut self) {
        if self.bits == 64 && self.rng.chance(12) {
            return self.branch_by_count();
        }
        let code = match self.rng.below(8) {
            0 => Code::Jmp_rel32_64,
            1 => Code::Call_rel32_64,
            _ => {
                const JCC: [Code; 16] = [
                    Code::Jo_rel32_64,
                    Code::Jno_rel32_64,
                    Code::Jb_rel32_64,
                    Code::Jae_rel32_64,
                    Code::Je_rel32_64,
                    Code::Jne_rel32_64,
                    Code::Jbe_rel32_64,
                    Code::Ja_rel32_64,
                    Code::Js_rel32_64,
                    Code::Jns_rel32_64,
                    Code::Jp_rel32_64,
                    Code::Jnp_rel32_64,
                    Code::Jl_rel32_64,
                    Code::Jge_rel32_64,
                    Code::Jle_rel32_64,
                    Code::Jg_rel32_64,
                ];
                *self.rng.pick(&JCC)
            }
        };
        let label = self.label();
        let bits = if self.bits == 16 && self.rng.chance(30) { 32 } else { self.bits };
        let instruction = Instruction::with_branch(branch_code(code, bits), 0).unwrap();
        self.items.push(Item { instruction, refers: Refers::Branch, label });
    }

    /// LOOP, JRCXZ and their kin, to a place that is near enough.
    fn branch_by_count(&mut self) {
        const CODES: [Code; 6] = [
            Code::Jrcxz_rel8_64,
            Code::Jecxz_rel8_64,
            Code::Loop_rel8_64_RCX,
            Code::Loop_rel8_64_ECX,
            Code::Loope_rel8_64_RCX,
            Code::Loopne_rel8_64_RCX,
        ];
        if self.rng.chance(50) {
            // mov ecx, a few: else it is mostly as good as infinite.
            let few = self.rng.below(3) as u32;
            self.items.push(plain(Instruction::with2(Code::Mov_r32_imm32, Register::ECX, few).unwrap()));
        }
        let instruction = Instruction::with_branch(*self.rng.pick(&CODES), 0).unwrap();
        let here = self.items.len();
        let label =
            if self.rng.chance(30) { here.saturating_sub(1) } else { here + 1 + self.rng.below(3) as usize };
        self.items.push(Item { instruction, refers: Refers::Branch, label });
    }

    /// Makes an instruction's operands fit segments that do not begin at 0, and sometimes its addresses 16 bits wide.
    fn fit(&mut self, i: &mut Instruction) {
        let memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
        let plain = i.memory_index() == Register::None || i.memory_index().is_gpr32();
        if !memory || !plain || i.mnemonic() == iced_x86::Mnemonic::Xlatb {
            return;
        }
        let absolute = i.memory_base() == Register::None && i.memory_index() == Register::None;
        if absolute && self.based {
            i.set_memory_displacement64(i.memory_displacement64() & 0xffff);
        }
        let narrow = if self.bits == 16 {
            60
        } else if self.based {
            15
        } else {
            3
        };
        if self.rng.chance(narrow)
            && !(absolute && i.code().op_code().op_count() > 0 && i.memory_displ_size() != 4)
        {
            let pair = *self.rng.pick(&[
                (Register::BX, Register::SI),
                (Register::BX, Register::DI),
                (Register::BP, Register::SI),
                (Register::BP, Register::DI),
                (Register::SI, Register::None),
                (Register::DI, Register::None),
                (Register::BP, Register::None),
                (Register::BX, Register::None),
            ]);
            if absolute {
                i.set_memory_displ_size(2);
            } else {
                i.set_memory_base(pair.0);
                i.set_memory_index(pair.1);
                i.set_memory_index_scale(1);
                i.set_memory_displ_size(if i.memory_displ_size() == 1 { 1 } else { 2 });
            }
            let disp = i.memory_displacement64() as u16;
            i.set_memory_displacement64(disp.into());
        }
        if self.rng.chance(8) {
            i.set_segment_prefix(*self.rng.pick(&[
                Register::FS,
                Register::GS,
                Register::ES,
                Register::SS,
                Register::CS,
            ]));
        }
    }

    fn indirect_32(&mut self) {
        let register = *self.rng.pick(&[Register::EAX, Register::EDX, Register::EBX]);
        let label = self.items.len() + 2 + self.rng.below(5) as usize;
        let instruction = Instruction::with2(Code::Mov_r32_imm32, register, 0u32).unwrap();
        self.items.push(Item { instruction, refers: Refers::Immediate, label });
        match self.rng.below(6) {
            0 => self.items.push(with_register(Code::Jmp_rm32, register)),
            1 => self.items.push(with_register(Code::Call_rm32, register)),
            2 => {
                self.items.push(with_register(Code::Push_r32, register));
                self.items.push(plain(Instruction::with(Code::Retnd)));
            }
            3 => {
                // 16 bits of it.
                let half = Register::AX + register.number() as u32;
                self.items.push(with_register(Code::Push_r16, half));
                let drop = Instruction::with1(Code::Retnw_imm16, 2u32).unwrap();
                self.items.push(plain(drop));
            }
            n => {
                let operand = iced_x86::MemoryOperand::with_base_displ(Register::ESI, 0x40);
                let store = Instruction::with2(Code::Mov_rm32_r32, operand, register).unwrap();
                self.items.push(plain(store));
                let code = if n == 4 { Code::Jmp_rm32 } else { Code::Call_rm32 };
                self.items.push(plain(Instruction::with1(code, operand).unwrap()));
            }
        }
    }

    fn indirect(&mut self) {
        if self.bits != 64 {
            return self.indirect_32();
        }
        let register = *self.rng.pick(&SCRATCH);
        let label = self.items.len() + 2 + self.rng.below(5) as usize;
        self.items.push(address_of(register, label));
        match self.rng.below(5) {
            0 => self.items.push(with_register(Code::Jmp_rm64, register)),
            1 => self.items.push(with_register(Code::Call_rm64, register)),
            2 => {
                self.items.push(with_register(Code::Push_r64, register));
                self.items.push(plain(Instruction::with(Code::Retnq)));
            }
            n => {
                // Through memory at [rsi + 40h].
                let operand = iced_x86::MemoryOperand::with_base_displ(Register::RSI, 0x40);
                let store = Instruction::with2(Code::Mov_rm64_r64, operand, register).unwrap();
                self.items.push(plain(store));
                let code = if n == 3 { Code::Jmp_rm64 } else { Code::Call_rm64 };
                self.items.push(plain(Instruction::with1(code, operand).unwrap()));
            }
        }
    }

    /// Puts a counted loop around the last few items.
    fn close_loop(&mut self) {
        let from = self.items.len() - self.rng.below(8.min(self.items.len() as u64 + 1)) as usize;
        let legacy = self.bits != 64;
        let (set, down): (&[u8], &[u8]) = match self.rng.below(3) {
            _ if legacy => (&[0xbb], &[0x4b]),         // mov ebx, n; dec ebx
            0 => (&[0xbb], &[0xff, 0xcb]),             // mov ebx, n; dec ebx
            1 => (&[0x41, 0xbc], &[0x41, 0xff, 0xcc]), // mov r12d, n; dec r12d
            _ => (&[0x41, 0xbf], &[0x41, 0xff, 0xcf]), // mov r15d, n; dec r15d
        };
        let mut start = set.to_vec();
        start.extend((1 + self.rng.below(9) as u32).to_le_bytes());
        for item in self.items.iter_mut().filter(|i| i.label >= from) {
            item.label += 1;
        }
        let decoded = |bytes: &[u8]| if legacy { plain_bytes_32(bytes) } else { plain_bytes(bytes) };
        self.items.splice(from..from, decoded(&start));
        self.items.extend(decoded(down));
        let code = branch_code(Code::Jne_rel32_64, self.bits);
        let instruction = Instruction::with_branch(code, 0).unwrap();
        self.items.push(Item { instruction, refers: Refers::Branch, label: from + 1 });
    }

    /// `mov eax, imm32`, and somewhere before or behind it a store that changes the immediate.
    fn patch(&mut self) {
        let imm = self.rng.next().to_le_bytes();
        let bits = self.bits.max(32);
        let target: Vec<Item> =
            decode_as(bits, &[0xb8, imm[0], imm[1], imm[2], imm[3]]).into_iter().map(plain).collect();
        let ahead = self.rng.chance(70);
        let here = self.items.len();
        let label = if ahead { here + 1 + self.rng.below(3) as usize } else { here };
        if !ahead {
            self.items.extend(target.clone());
        }
        let mut store = decode_as(bits, &[0xc6, 0x05, 0, 0, 0, 0, imm[4]])[0];
        store.set_memory_displ_size(bits / 8);
        let refers = Refers::Memory(1 + self.rng.below(4));
        self.items.push(Item { instruction: store, refers, label });
        if ahead {
            while self.items.len() < label {
                self.ordinary();
            }
            // Composite items may have come further.
            let at = self.items.len();
            if let Some(item) = self.items.get_mut(here) {
                item.label = at;
            }
            self.items.extend(target);
        }
    }

    fn system(&mut self) {
        if self.bits != 64 {
            let level0 = self.supervisor && self.rng.chance(40) || self.rng.chance(3);
            let bytes = *self.rng.pick(if level0 { SUPERVISOR_32 } else { ANYBODY_32 });
            return self.items.extend(plain_bytes_32(bytes));
        }
        let bytes = if self.supervisor && self.rng.chance(60) || self.rng.chance(3) {
            *self.rng.pick(SUPERVISOR)
        } else {
            *self.rng.pick(ANYBODY)
        };
        self.items.extend(plain_bytes(bytes));
    }
}

impl Program {
    /// The program of a seed.
    pub fn generate(seed: u64, catalogue: &Catalogue) -> Self {
        Self::generate_with(seed, catalogue, false)
    }

    fn generate_with(seed: u64, catalogue: &Catalogue, accesses: bool) -> Self {
        let mut rng = Rng::new(seed);
        let mode = catalogue.mode;
        let roles = initial::roles(&mut rng, mode);
        let mut setup = setup(&mut rng);
        let mut regs = initial::initial(&mut rng, &roles);
        let (mut bits, mut based) = (64, false);
        if mode == Mode::Compat {
            let segments = segments::choose(&mut rng, setup.supervisor);
            setup.segments = Some(segments.descriptors);
            (bits, based) = (if segments.descriptors.bits16 { 16 } else { 32 }, segments.based);
            if based {
                // Pointers are offsets now.
                for &n in &roles.pointers {
                    regs.gpr[n as usize] &= 0xffff;
                }
            }
        }
        if rng.chance(80) {
            regs.rflags &= !(rflags::DF | rflags::TF | rflags::AC);
        }
        if rng.chance(50) {
            // No unmasked exceptions, so that x87 and vector instructions are translated.
            regs.fpu[0..4].copy_from_slice(&[0x7f, 0x03, 0, 0]);
            regs.fpu[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        }
        let data = initial::memory(&mut rng, &regs, DATA_BYTES);
        let read_only = initial::memory(&mut rng, &regs, READ_ONLY_BYTES);
        regs.rip = CODE + start(&mut rng);
        let flavour = match rng.below(100) {
            0..55 => Group::Integer,
            55..68 => Group::X87,
            68..82 => Group::Sse,
            82..92 => Group::Avx,
            _ => Group::Avx512,
        };
        let wanted = if rng.chance(25) { 1 + rng.below(4) } else { 4 + rng.below(36) } as usize;
        let (branches, systems) = (rng.below(25), rng.below(25));
        let supervisor = setup.supervisor;
        let mut b = Builder { bits, rng, roles, catalogue, flavour, supervisor, based, items: Vec::new() };
        while b.items.len() < wanted {
            if accesses {
                b.access();
                continue;
            }
            match b.rng.below(100) {
                n if n < branches => b.branch(),
                n if n < branches + systems => b.system(),
                n if n < branches + systems + 4 => b.indirect(),
                n if n < branches + systems + 7 => b.close_loop(),
                n if n < branches + systems + 8 && setup.code_writable && !based => b.patch(),
                _ => b.ordinary(),
            }
        }
        // The flags at the end are shown.
        b.items.extend(if bits == 64 { plain_bytes(&[0x9c]) } else { plain_bytes_32(&[0x9c]) });
        let resume = b.rng.below(b.items.len() as u64 + 1) as usize;
        let mut items = b.items;
        let count = items.len();
        for item in &mut items {
            item.label = item.label.min(count);
        }
        Self { seed, setup, regs, data, read_only, items, resume }
    }

    /// The program of a seed, of accesses to memory, with its pointers just before page ends, so that many accesses cross.
    pub fn of_crossing_accesses(seed: u64, catalogue: &Catalogue) -> Self {
        Self::generate_with(seed, catalogue, true).at_page_ends()
    }

    fn at_page_ends(mut self) -> Self {
        for (n, r) in self.regs.gpr.iter_mut().enumerate() {
            if (DATA..DATA + DATA_BYTES as u64).contains(r) {
                let before = (self.seed >> (2 * n)) & 15;
                *r = (*r & !0xfff) + 0x1000 - before;
            }
        }
        self
    }

    /// Given instructions on a random state without anything special, at a level.
    pub fn of_bytes(bytes: &[u8], seed: u64, supervisor: bool) -> Self {
        let mut rng = Rng::new(seed);
        let roles = initial::roles(&mut rng, Mode::Long);
        let mut setup = setup(&mut rng);
        (setup.supervisor, setup.smap, setup.task_switched, setup.survive) = (supervisor, false, false, 0);
        (setup.syscall, setup.sfmask) = (0, 0x4_7700);
        let mut regs = initial::initial(&mut rng, &roles);
        regs.rflags &= !(rflags::DF | rflags::TF | rflags::AC);
        regs.fpu[0..4].copy_from_slice(&[0x7f, 0x03, 0, 0]);
        regs.fpu[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        let data = initial::memory(&mut rng, &regs, DATA_BYTES);
        let read_only = initial::memory(&mut rng, &regs, READ_ONLY_BYTES);
        regs.rip = CODE + 0x40;
        Self { seed, setup, regs, data, read_only, items: plain_bytes(bytes), resume: 0 }
    }

    /// The program in memory; None if a branch does not reach its label.
    pub fn layout(&self) -> Option<Layout> {
        let mut starts = vec![self.regs.rip];
        for item in &self.items {
            let at = *starts.last()?;
            starts.push(at + encode(item, at, at, self.bits(), self.setup.code_base())?.len() as u64);
        }
        let mut code = vec![0xcc; CODE_BYTES];
        for (n, item) in self.items.iter().enumerate() {
            let bytes = encode(
                item,
                starts[n],
                starts[item.label.min(self.items.len())],
                self.bits(),
                self.setup.code_base(),
            )?;
            // What does not fit lies beyond the mapped pages.
            for (k, byte) in bytes.iter().enumerate() {
                if let Some(to) = code.get_mut((starts[n] - CODE) as usize + k) {
                    *to = *byte;
                }
            }
        }
        Some(Layout { code, starts })
    }

    /// Size of the code.
    fn bits(&self) -> u32 {
        self.setup.segments.map_or(64, |s| if s.bits16 { 16 } else { 32 })
    }

    /// The program without item `n`.
    pub fn without(&self, n: usize) -> Self {
        let mut smaller = self.clone();
        smaller.items.remove(n);
        for item in &mut smaller.items {
            item.label -= usize::from(item.label > n);
        }
        smaller.resume -= usize::from(smaller.resume > n);
        smaller
    }

    /// Addresses, bytes and text.
    pub fn listing(&self, layout: &Layout) -> String {
        let mut out = String::new();
        for window in layout.starts.windows(2) {
            let from = (window[0] - CODE) as usize;
            let bytes = layout.code.get(from..(window[1] - CODE) as usize).unwrap_or(&[]);
            let hex: String = bytes.iter().map(|b| format!("{b:02x} ")).collect();
            let mut text = String::new();
            let i = Decoder::with_ip(self.bits(), bytes, window[0], DecoderOptions::NONE).decode();
            FastFormatter::new().format(&i, &mut text);
            out += &format!("  {:#x}  {hex:45} {text}\n", window[0]);
        }
        out
    }
}

fn setup(rng: &mut Rng) -> Setup {
    let supervisor = rng.chance(45);
    let mut base = || match rng.below(4) {
        0 => 0,
        1 => DATA + rng.below(DATA_BYTES as u64),
        _ => DATA + 0x1000 * rng.below(4),
    };
    let bases = [base(), base()];
    Setup {
        supervisor,
        code_writable: rng.chance(30),
        user_pages: if rng.chance(60) { 0 } else { rng.next() as u8 },
        alias: match rng.below(12) {
            0 => Alias::Data,
            1 => Alias::Code,
            _ => Alias::None,
        },
        smap: supervisor && rng.chance(50),
        task_switched: rng.chance(3),
        fresh: rng.chance(20),
        survive: if rng.chance(40) { 1 + rng.below(3) as u32 } else { 0 },
        syscall: rng.below(2) as usize,
        sfmask: if rng.chance(85) { 0x4_7700 } else { rng.next() & 0x25_7fd5 },
        bases,
        segments: None,
    }
}

/// In the first page, before its end, or at the end of the mapped pages.
fn start(rng: &mut Rng) -> u64 {
    match rng.below(20) {
        0..4 => 0x1000 - rng.below(200),
        4 => CODE_BYTES as u64 - 1 - rng.below(60),
        _ => rng.below(0x100),
    }
}

/// The bytes of an item at `at` whose label is at `target`, in code of so many bits in a segment at `base`.
fn encode(item: &Item, at: u64, target: u64, bits: u32, base: u64) -> Option<Vec<u8>> {
    let mut i = item.instruction;
    let (at, target) = if bits == 64 {
        (at, target)
    } else {
        (at.wrapping_sub(base) & 0xffff_ffff, target.wrapping_sub(base) & 0xffff_ffff)
    };
    match (item.refers, i.op0_kind()) {
        (Refers::Nothing, _) => {}
        (Refers::Branch, OpKind::NearBranch16) => i.set_near_branch16(target as u16),
        (Refers::Branch, OpKind::NearBranch32) => i.set_near_branch32(target as u32),
        (Refers::Branch, _) => i.set_near_branch64(target),
        (Refers::Memory(plus), _) => i.set_memory_displacement64(target + plus),
        (Refers::Immediate, _) => i.set_immediate32(target as u32),
    }
    let mut encoder = Encoder::new(bits);
    encoder.encode(&i, at).ok()?;
    Some(encoder.take_buffer())
}
