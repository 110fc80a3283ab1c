//! Guests that mean harm: garbage as code, control structures where no memory is. Both engines come to an end, and to the same.

#![expect(unsafe_code, reason = "reads the bytes between two labels")]

use std::arch::global_asm;

use engine_bt::Knobs;

use crate::Verdict;
use crate::generate::Catalogue;
use crate::machine::HIGH;
use crate::oracle::Oracle;
use crate::program::{Layout, Program};
use crate::rng::Rng;
use crate::state::{CODE, CODE_BYTES, Mode};
use crate::subject::Subject;

/// Cases of each kind of garbage.
const CASES: u64 = 700;
/// Programs that do not end take the watch's time: no more than so many of them.
const ENDLESS: u32 = 2;

/// Garbage made of a program's code.
#[derive(Clone, Copy, Debug)]
enum Garbage {
    /// Nothing but random bytes.
    Noise,
    /// The program with some random bytes in it.
    Sprinkled,
    /// The program, entered in the middle of an instruction.
    Entered,
}

impl Garbage {
    fn spoil(self, rng: &mut Rng, program: &mut Program, layout: &mut Layout) {
        match self {
            Self::Noise => layout.code.iter_mut().for_each(|b| *b = rng.next() as u8),
            Self::Sprinkled => {
                let from = (program.regs.rip - CODE) as usize;
                for _ in 0..1 + rng.below(8) {
                    let at = (from + rng.below(200) as usize).min(CODE_BYTES - 1);
                    layout.code[at] = rng.next() as u8;
                }
            }
            Self::Entered => program.regs.rip = (program.regs.rip + 1 + rng.below(14)).min(CODE + 0x1fff),
        }
    }
}

fn run_garbage(garbage: Garbage, knobs: &str) {
    let catalogue = Catalogue::new(Mode::Long);
    let (mut oracle, mut subject) = (Oracle::new(), Subject::new(Knobs::parse(knobs)));
    let mut rng = Rng::new(0x6761_7262_6167_6500);
    let (mut same, mut endless, mut steps) = (0u64, 0, 0u64);
    for _ in 0..CASES {
        let mut program = Program::generate(rng.next(), &catalogue);
        let Some(mut layout) = program.layout() else { continue };
        garbage.spoil(&mut rng, &mut program, &mut layout);
        match crate::judge_layout(&program, &layout, &mut oracle, &mut subject, endless < ENDLESS) {
            Verdict::Same(n) => {
                same += 1;
                steps += u64::from(n);
            }
            Verdict::Unfit(crate::oracle::Unfit::Endless) => endless += 1,
            Verdict::Unfit(_) => {}
            Verdict::Different(text) => {
                panic!("{garbage:?}, code from RIP on: {:02x?}\n{text}", from_rip(&program, &layout));
            }
        }
    }
    println!("{garbage:?}: {same} agree ({steps} instructions), {endless} do not end");
    assert!(same > CASES / 4);
}

fn from_rip<'a>(program: &Program, layout: &'a Layout) -> &'a [u8] {
    let at = (program.regs.rip - CODE) as usize;
    &layout.code[at..(at + 64).min(CODE_BYTES)]
}

#[test]
fn noise_comes_to_the_same_end() {
    run_garbage(Garbage::Noise, "warm=0");
}

#[test]
fn programs_with_noise_in_them_come_to_the_same_end() {
    run_garbage(Garbage::Sprinkled, "warm=0");
    run_garbage(Garbage::Sprinkled, "warm=0,tlb=one,again=2,unit=3");
}

#[test]
fn programs_entered_in_the_middle_come_to_the_same_end() {
    run_garbage(Garbage::Entered, "warm=0");
}

/// Where the supervisor maps 2 MiB in which there is nothing, and its page-directory entry.
const NOTHING: u64 = HIGH + 0x20_0000;
const ENTRY: u64 = HIGH + 0x5008;
/// Its GDT, the descriptor of its task-state segment there, its page-directory-pointer table, and a place for pseudo-descriptors.
const GDT: u64 = HIGH + 0x8000;
const PDPT: u64 = HIGH + 0x3000;
const SCRATCH: u64 = HIGH + 0xe800;

/// Programs of level 0, each behind the code that maps [`NOTHING`] (RDI) and says where [`SCRATCH`] is (RSI).
macro_rules! programs {
    ($($name:ident: $($line:literal)*;)*) => {
        global_asm!(
            ".pushsection .rodata",
            "hostile_map:",
            "mov rax, {entry}",
            "mov rcx, 0x400000e3",
            "mov [rax], rcx",
            "mov rdi, {nothing}",
            "invlpg [rdi]",
            "mov rsi, {scratch}",
            "mov rbx, {gdt}",
            "mov rdx, {pdpt}",
            "hostile_map_end:",
            $(concat!("hostile_", stringify!($name), ":"), $($line,)* concat!("hostile_", stringify!($name), "_end:"),)*
            ".popsection",
            entry = const ENTRY,
            nothing = const NOTHING,
            scratch = const SCRATCH,
            gdt = const GDT,
            pdpt = const PDPT,
        );
        fn all() -> Vec<(&'static str, Vec<u8>)> {
            vec![$((stringify!($name), {
                unsafe extern "C" {
                    #[link_name = "hostile_map"]
                    static MAP: u8;
                    #[link_name = "hostile_map_end"]
                    static MAP_END: u8;
                    #[link_name = concat!("hostile_", stringify!($name))]
                    static FROM: u8;
                    #[link_name = concat!("hostile_", stringify!($name), "_end")]
                    static TO: u8;
                }
                [between(&raw const MAP, &raw const MAP_END), between(&raw const FROM, &raw const TO)].concat()
            }),)*]
        }
    };
}

fn between(from: *const u8, to: *const u8) -> &'static [u8] {
    // SAFETY: both are labels of the section above, `to` behind `from`, and the bytes between them are constant.
    unsafe { std::slice::from_raw_parts(from, to.offset_from(from).unsigned_abs()) }
}

programs! {
    stack: "lea rsp, [rdi + 0x800]" "push rax" "pop rbx" "push 5" "pushfq" "popfq" "enter 32, 3" "leave" "call 2f" "2: ret";
    stack_behind_memory: "mov rsp, rdi" "push rax" "pop rbx" "add rsp, 4" "push rax" "pop rcx" "ret";
    gdt: "mov word ptr [rsi], 0xfff" "mov [rsi + 2], rdi" "lgdt [rsi]" "mov ecx, 0x28" "lar eax, ecx" "mov ds, ecx" "int3" "nop";
    idt: "mov word ptr [rsi], 0xfff" "mov [rsi + 2], rdi" "lidt [rsi]" "ud2";
    idt_of_a_breakpoint: "mov word ptr [rsi], 0xfff" "mov [rsi + 2], rdi" "lidt [rsi]" "int3";
    idt_without_a_limit: "mov word ptr [rsi], 0" "mov [rsi + 2], rdi" "lidt [rsi]" "div dl" "int 0x80";
    tss: "mov rax, 0x0000890000000067" "mov rcx, rdi" "and ecx, 0xffffff" "shl rcx, 16" "or rax, rcx" "mov rcx, rdi" "shr rcx, 24"
        "movzx r8d, cl" "shl r8, 56" "or rax, r8" "shr rcx, 8" "mov [rbx + 0x50], rax" "mov [rbx + 0x58], rcx" "mov ecx, 0x50"
        "ltr cx" "ud2";
    cr3: "mov rax, 0x40000000" "mov cr3, rax" "nop" "nop";
    cr3_beyond_any_memory: "mov rax, 0x000ffffffffff000" "mov cr3, rax" "nop" "nop";
    page_directory: "mov rax, 0x40000063" "mov [rdx + 8], rax" "mov rax, 0x40000000" "mov rcx, [rdi + rax]" "nop";
    own_page_directory: "mov rax, 0x40000063" "mov [rdx], rax" "mov rax, cr3" "mov cr3, rax" "nop";
    code: "jmp rdi";
    code_half_in_memory: "lea rdi, [rdi - 3]" "mov dword ptr [rdi], 0x909090b8" "jmp rdi";
    system_call_entry: "mov ecx, 0xc0000082" "mov eax, edi" "mov rdx, rdi" "shr rdx, 32" "wrmsr" "syscall";
    gs_base: "wrgsbase rdi" "mov rax, gs:[0]" "mov gs:[8], rax" "lock inc qword ptr gs:[16]" "lock cmpxchg16b gs:[32]" "swapgs"
        "nop";
    floating_point_area: "fxsave [rdi]" "xsave [rdi]" "fxrstor [rdi]" "nop";
    floating_point_area_across: "mov rax, cr0" "fxsave [rdi - 256]" "fxrstor [rdi - 256]" "nop";
    strings: "mov r8, rdi" "mov ecx, 40" "rep movsq" "mov rdi, r8" "mov rsi, r8" "mov ecx, 50" "repe cmpsb" "mov rdi, r8"
        "mov ecx, 70" "repne scasw" "lea rsi, [r8 - 16]" "mov ecx, 9" "rep lodsd" "mov rdi, r8" "mov ecx, 5" "rep stosd" "nop";
    operands: "mov rax, [rdi]" "add [rdi + 7], rax" "lock xadd [rdi], rcx" "xchg [rdi + 3], rdx" "bts qword ptr [rdi], 70"
        "push [rdi]" "pop [rdi]" "movups xmm1, [rdi + 1]" "movaps [rdi], xmm2" "cmpxchg8b [rdi]" "div qword ptr [rdi]" "nop";
    far_pointers: "jmp fword ptr [rdi]";
    return_frame: "lea rsp, [rdi + 64]" "iretq";
    descriptor_tables: "sgdt [rdi]" "sidt [rdi + 32]" "sldt [rdi + 5]" "lgdt [rdi]" "nop";
}

#[test]
fn control_structures_where_no_memory_is() {
    for knobs in ["warm=0", "warm=0,unit=1,tlb=one", "warm=200"] {
        let (mut oracle, mut subject) = (Oracle::new(), Subject::new(Knobs::parse(knobs)));
        for (name, code) in all() {
            for seed in 0..4 {
                let mut program = Program::of_bytes(&code, seed, true);
                program.setup.smap = false;
                let Some(layout) = program.layout() else { panic!("{name} has no layout") };
                match crate::judge_layout(&program, &layout, &mut oracle, &mut subject, true) {
                    Verdict::Same(_) | Verdict::Unfit(_) => {}
                    Verdict::Different(text) => panic!("{name} with {knobs}:\n{text}"),
                }
            }
        }
    }
}
