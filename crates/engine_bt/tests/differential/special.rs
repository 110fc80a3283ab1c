//! Programs that once differed, or that chance seldom finds.

use engine_bt::Knobs;

use crate::machine::HIGH;
use crate::oracle::Oracle;
use crate::program::Program;
use crate::subject::Subject;
use crate::{Verdict, judge};

/// The system-call entry that ends with SYSRET, mapped for level 0.
const ENTRY: u64 = HIGH + 0xd000;

/// Runs `code` on some states changed by `set`, in both engines.
fn agree(code: &[u8], supervisor: bool, set: impl Fn(&mut Program)) {
    let (mut oracle, mut subject) = (Oracle::new(), Subject::new(Knobs::parse("warm=0")));
    let mut compared = 0;
    for seed in 0..8 {
        let mut program = Program::of_bytes(code, seed, supervisor);
        set(&mut program);
        match judge(&program, &mut oracle, &mut subject) {
            Verdict::Different(text) => panic!("{text}"),
            Verdict::Same(_) => compared += 1,
            Verdict::Unfit(_) => {}
        }
    }
    assert!(compared > 0);
}

#[test]
fn access_to_the_last_page_faults() {
    // mov rdx, [rax]; in an empty entry nothing may match.
    for rax in [u64::MAX - 7, u64::MAX - 0xffe, !0x3f_f000, 1 << 63, 0x7fff_ffff_ffff_f000] {
        agree(&[0x48, 0x8b, 0x10], false, |p| p.regs.gpr[0] = rax);
        agree(&[0x48, 0x89, 0x10], true, |p| p.regs.gpr[0] = rax);
    }
}

#[test]
fn jump_to_the_last_byte_faults() {
    // jmp rax
    for rax in [u64::MAX, u64::MAX - 1, 1, 0, 1 << 63] {
        agree(&[0xff, 0xe0], false, |p| p.regs.gpr[0] = rax);
        agree(&[0xff, 0xe0], true, |p| p.regs.gpr[0] = rax);
    }
}

#[test]
fn jump_to_a_non_canonical_alias_of_supervisor_code_faults() {
    // syscall; jmp rbx: what the entry was found by, as a level-3 address whose tag in the second-level table would be the same.
    for bits in 1..64u64 {
        agree(&[0x0f, 0x05, 0xff, 0xe3], false, |p| p.regs.gpr[3] = ENTRY ^ bits << 58);
    }
}

#[test]
fn flags_before_an_indirect_jump_that_is_interpreted_are_kept() {
    // cmp rax, rbx; jmp [esi - 28h] (a negative displacement of 32 bits is not translated) to whatever is there; and call.
    for jump in [[0x67, 0xff, 0x66, 0xd8], [0x67, 0xff, 0x56, 0xd8]] {
        let code = [&[0x48, 0x39, 0xd8], &jump[..]].concat();
        agree(&code, false, |_| {});
        agree(&code, true, |_| {});
    }
}

#[test]
fn refused_call_that_pushes_over_its_target_faults() {
    // mov rax, 1 << 62; mov [rsp - 8], rax; call [rsp - 8]
    let mut code = vec![0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0x40];
    code.extend([0x48, 0x89, 0x44, 0x24, 0xf8, 0xff, 0x54, 0x24, 0xf8]);
    agree(&code, false, |p| p.regs.gpr[4] = crate::state::DATA + 0x1800);
    agree(&code, true, |p| p.regs.gpr[4] = crate::state::DATA + 0x1800);
}

#[test]
fn branches_of_16_bits_cut_their_target() {
    // stc; jc, jmp, call with an operand-size prefix: on AMD the target is cut (APM 3 Jcc), and there is nothing.
    for branch in [
        &[0x66, 0x72, 0x20][..],
        &[0x66, 0x73, 0x20],
        &[0x66, 0xeb, 0x20],
        &[0x66, 0xe8, 0x10, 0],
        &[0x66, 0x0f, 0x82, 5, 0],
    ] {
        let code = [&[0xf9], branch].concat();
        for supervisor in [false, true] {
            agree_raw(&code, supervisor);
        }
    }
}

/// Runs bytes as they are (the assembler would know better), in both engines.
fn agree_raw(code: &[u8], supervisor: bool) {
    let (mut oracle, mut subject) = (Oracle::new(), Subject::new(Knobs::parse("warm=0")));
    let mut program = Program::of_bytes(&[0x90], 1, supervisor);
    program.regs.gpr[4] = crate::state::DATA + 0x1800;
    let mut layout = program.layout().unwrap();
    let at = (program.regs.rip - crate::state::CODE) as usize;
    layout.code[at..at + code.len()].copy_from_slice(code);
    match crate::judge_layout(&program, &layout, &mut oracle, &mut subject, false) {
        Verdict::Same(_) => {}
        Verdict::Different(text) => panic!("{code:02x?}:\n{text}"),
        Verdict::Unfit(why) => panic!("{code:02x?}: {why:?}"),
    }
}

/// A run over equal elements with one that differs, at `differs` bytes from RDI; every size.
fn agree_on_runs(opcode: u8, repeat: u8, from: u64, differs: u64, count: u64) {
    for prefix in [&[repeat][..], &[repeat, 0x66], &[repeat, 0x48]] {
        for opcode in [opcode, opcode + 1] {
            let code = [prefix, &[opcode]].concat();
            agree(&code, differs.is_multiple_of(2), |p| {
                p.data.fill(0x5a);
                p.read_only.fill(0x5a);
                (p.regs.gpr[0], p.regs.gpr[1]) = (0x5a5a_5a5a_5a5a_5a5a, count);
                (p.regs.gpr[6], p.regs.gpr[7]) = (crate::state::DATA + from / 2, crate::state::DATA + from);
                if let Some(byte) = p.data.get_mut((from + differs) as usize) {
                    *byte ^= 0x81;
                }
            });
        }
    }
}

#[test]
fn repeated_comparisons_end_where_they_must() {
    const REPE: u8 = 0xf3;
    const REPNE: u8 = 0xf2;
    for opcode in [0xa6, 0xae] {
        // Within a page, in the third, at the last element, behind a page's end, never: then they run into what is not mapped.
        for (from, differs, count) in [
            (0x100, 0x40, 0x1000),
            (0x100, 0x2345, 0x10_0000),
            (0x103, 0x1fff, 0x2000),
            (0xff8, 8, 9),
            (0x7, 0x10_0000, u64::MAX),
            (0x7, 0x10_0000, 3),
            (0x200, 3, 0),
        ] {
            agree_on_runs(opcode, REPE, from, differs, count);
            agree_on_runs(opcode, REPNE, from, differs, count);
        }
    }
    for opcode in [0xa4, 0xaa, 0xac] {
        for (from, count) in [(0x100, 0x7f3), (0xffd, 0x900), (0x7, u64::MAX)] {
            agree_on_runs(opcode, REPE, from, 5, count);
        }
    }
}
