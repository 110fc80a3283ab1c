//! Instructions that the engine's assembly does: against the interpreter, and that the assembly did them.

#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]
#![expect(unsafe_code, reason = "guest code is assembled with the test")]

#[macro_use]
mod both;

use std::arch::global_asm;

use both::{End, STACK, START, assert_same_registers, common, done_in_cache, run_both};
use engine::VcpuExit;
use guestmem::{Gpa, GuestMemory};
use x86::CpuState;
use x86::cpuid::CpuModel;
use x86_interp::vector::compacted_pieces;

/// Pages from here on are mapped in pairs, each the other way round.
const SWAPPED: u64 = 0x40_0000;

// ---- extended state -----------------------------------------------------------------------------------------------------

// RCX turns: loads the registers from [R10], saves to [RDI], changes registers, restores from [RSI] and from where it saved to, and saves once more to [R9]. In EBX the mask.
guest_code!(
    save_and_restore,
    "trellis_test_xsave",
    "trellis_test_xsave_end",
    "2:",
    "movups xmm0, [r10]",
    "vmovups ymm5, [r10 + 16]",
    "vmovups ymm7, [r10 + 48]",
    "mov eax, ebx",
    "xor edx, edx",
    "xsavec [rdi]",
    "paddd xmm0, xmm5",
    "vpaddd ymm5, ymm7, ymm5",
    "mov eax, r11d",
    "xrstor [rsi]",
    "mov eax, ebx",
    "xsaves [r9]",
    "mov eax, r11d",
    "xrstors [rdi]",
    "add r10, 3",
    "dec ecx",
    "jne 2b",
    // Everything, to be compared: by the interpreter.
    "mov eax, -1",
    "mov edx, -1",
    "xsave [r8]",
    "hlt",
);

const SAVED: u64 = 0xe00;
const IMAGE: u64 = 0x2f40;
const SECOND: u64 = 0x4f80;
const ALL: u64 = 0x1_0000;
const VALUES: u64 = 0x8000;

/// XCR0 with all that the CPU model has of AVX and AVX-512.
fn xcr0() -> u64 {
    CpuModel::parse("max").unwrap().xcr0_mask() & 0xe7
}

/// Memory with pages swapped from [`SWAPPED`] on, in which the addresses given lie apart, and noise in all of it.
fn lay_swapped(mem: &GuestMemory) -> CpuState {
    let mut state = common::long_mode(mem, START, STACK);
    mem.write(Gpa(0x3000 + 8 * 2), &0x5007u64.to_le_bytes()).unwrap();
    for n in 0..512u64 {
        mem.write(Gpa(0x5000 + 8 * n), &((SWAPPED + ((n ^ 1) << 12)) | 0x67).to_le_bytes()).unwrap();
    }
    let noise: Vec<u8> =
        (0..0x2_0000u64).map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect();
    mem.write(Gpa(SWAPPED), &noise).unwrap();
    state.xcr0 = xcr0();
    state
}

/// Writes at an address among the swapped pages; the bytes lie in one page.
fn write_swapped(mem: &GuestMemory, at: u64, bytes: &[u8]) {
    mem.write(Gpa(SWAPPED + (at ^ 0x1000)), bytes).unwrap();
}

fn read_swapped(memory: &[u8], at: u64, len: usize) -> Vec<u8> {
    (at..at + len as u64).map(|at| memory[(SWAPPED + (at ^ 0x1000)) as usize]).collect()
}

fn lay_save(mem: &GuestMemory, mask: u64, restored: u64, edit: &dyn Fn(&GuestMemory)) -> CpuState {
    let mut state = lay_swapped(mem);
    mem.write(Gpa(START), save_and_restore()).unwrap();
    // An image with all of the format, half of it in use.
    let format = xcr0() & mask;
    write_swapped(mem, IMAGE + 24, &0x1fa0u64.to_le_bytes());
    write_swapped(mem, IMAGE, &0x37fu64.to_le_bytes());
    let header: Vec<u8> = [format & 0xa6, format | 1 << 63, 0, 0, 0, 0, 0, 0]
        .iter()
        .flat_map(|w: &u64| w.to_le_bytes())
        .collect();
    write_swapped(mem, IMAGE + 512, &header);
    write_swapped(mem, SAVED + 512, &[0; 64]);
    edit(mem);
    (state.gpr[1], state.gpr[3], state.gpr[11]) = (6, mask, restored);
    (state.gpr[6], state.gpr[7]) = (SWAPPED + IMAGE, SWAPPED + SAVED);
    (state.gpr[8], state.gpr[9], state.gpr[10]) = (SWAPPED + ALL, SWAPPED + SECOND, SWAPPED + VALUES);
    state
}

/// The image of a format at a place: components that are not in use with their initial contents, and everything in use. Whether that is said is the
/// processor's choice (SDM 1 13.6).
fn whole(memory: &[u8], at: u64, format: u64) -> Vec<u8> {
    let (pieces, bytes) = compacted_pieces(format);
    let mut image = read_swapped(memory, at, bytes);
    let used = u64::from_le_bytes(image[512..520].try_into().unwrap());
    assert_eq!(used & !format, 0);
    for piece in pieces {
        if used >> piece.component & 1 == 0 {
            let initial: &[u8] = match piece.offset {
                0 => &[0x7f, 3],
                24 => &[0x80, 0x1f],
                _ => &[],
            };
            let place = &mut image[piece.offset..piece.offset + piece.bytes];
            place.fill(0);
            place[..initial.len()].copy_from_slice(initial);
        }
    }
    // MXCSR_MASK comes and goes with MXCSR.
    image[28..32].fill(0);
    image[512..520].copy_from_slice(&format.to_le_bytes());
    image
}

fn compare_saved(mask: u64, restored: u64, knobs: &str) -> u64 {
    let [a, b] = run_both(&|mem| lay_save(mem, mask, restored, &|_| ()), knobs);
    let what = format!("mask {mask:#x}, restored {restored:#x}, {knobs}");
    assert_eq!(a.exit, VcpuExit::Halted, "{what}: at {:#x}", a.state.rip);
    assert_same_registers(&a, &b, &what);
    let format = xcr0() & mask;
    for at in [SAVED, SECOND] {
        assert!(whole(&a.memory, at, format) == whole(&b.memory, at, format), "{what}: image at {at:#x}");
    }
    let everything = |end: &End| {
        let mut image = read_swapped(&end.memory, ALL, 4096);
        image[512..520].fill(0);
        image
    };
    assert!(everything(&a) == everything(&b), "{what}: registers");
    // Nothing beside the images was written.
    let outside = |end: &End| {
        let mut memory = end.memory[SWAPPED as usize..SWAPPED as usize + 0x1_0000].to_vec();
        for at in [SAVED, SECOND] {
            let bytes = compacted_pieces(format).1 as u64;
            (at..at + bytes).for_each(|at| memory[(at ^ 0x1000) as usize] = 0);
        }
        memory
    };
    assert!(outside(&a) == outside(&b), "{what}: memory");
    done_in_cache(&b, "XSAVEC in the TC") + done_in_cache(&b, "XRSTOR in the TC")
}

#[test]
fn every_set_of_components_is_saved_and_restored_as_the_interpreter_does() {
    let has = std::is_x86_feature_detected!("xsavec") && xcr0() & 4 != 0;
    if !has {
        println!("skipped: the host has no XSAVEC or no AVX");
        return;
    }
    let components: Vec<u64> = (0..8).map(|n| 1 << n).filter(|bit| xcr0() & bit != 0).collect();
    let subsets = 1u64 << components.len();
    let mask_of =
        |n: u64| (0..components.len()).filter(|i| n >> i & 1 != 0).map(|i| components[i]).sum::<u64>();
    for n in 0..subsets {
        let mask = mask_of(n);
        let in_cache = compare_saved(mask, mask, "");
        // Of six turns, the first ones learn.
        assert!(mask & 0xe6 == 0 || in_cache >= 4, "mask {mask:#x}: {in_cache} in the cache");
        compare_saved(mask, mask_of(n.wrapping_mul(5) & (subsets - 1)), "");
        if n % 5 == 0 {
            compare_saved(xcr0(), mask, "unit=1");
        }
    }
    assert!(compare_saved(xcr0(), 6, "") >= 16);
    assert_eq!(compare_saved(xcr0(), 6, "helpers=off"), 0);
    compare_saved(xcr0(), 7, "tlb=one");
    compare_saved(xcr0(), 7, "tlb=off");
    compare_saved(u64::MAX, u64::MAX, "");
}

#[test]
fn images_that_may_not_be_loaded_are_refused() {
    if !std::is_x86_feature_detected!("xsavec") || xcr0() & 4 == 0 {
        println!("skipped: the host has no XSAVEC or no AVX");
        return;
    }
    let all = xcr0();
    // What stands at an offset of the image, and whether it is loaded all the same.
    let cases: &[(u64, u64, bool)] = &[
        (512, 2, true),
        (512, all | 1 << 8, false),
        (520, all, false),
        (520, all | 1 << 62 | 1 << 63, false),
        (520, all | 1 << 33 | 1 << 63, false),
        (520, 2 | 1 << 63, false),
        (528, 1, false),
        (568, 1 << 63, false),
        (24, 0x1_0000_1f80, true),
        (24, 0xffff_ffff, false),
        (24, 0x1f00, true),
        (0, 0x37e, true),
    ];
    for &(at, value, good) in cases {
        let edit = |mem: &GuestMemory| write_swapped(mem, IMAGE + at, &value.to_le_bytes());
        let [a, b] = run_both(&|mem| lay_save(mem, all, all, &edit), "");
        assert_same_registers(&a, &b, &format!("{value:#x} at {at}"));
        assert_eq!(a.exit == VcpuExit::Halted, good, "{value:#x} at {at}");
    }
}

// ---- CPUID -----------------------------------------------------------------------------------------------------------------

// RSI turns, each with another CR4.OSXSAVE; what leaf 1 and leaf 0DH say is added up in RBX and RBP. In between XCR0 changes.
guest_code!(
    changing_cpuid,
    "trellis_test_cpuid",
    "trellis_test_cpuid_end",
    "2:",
    "mov edi, 3",
    "3:",
    "mov eax, 1",
    "xor ecx, ecx",
    "push rbx",
    "cpuid",
    "pop rbx",
    "bt ecx, 27",
    "adc rbp, rbp",
    "mov eax, 0xd",
    "xor ecx, ecx",
    "push rbx",
    "cpuid",
    "mov rax, rbx",
    "pop rbx",
    "rol rbx, 3",
    "add rbx, rax",
    "dec edi",
    "jne 3b",
    "mov rax, cr4",
    "bt rax, 18",
    "jnc 4f",
    "xor ecx, ecx",
    "xgetbv",
    "xor eax, 4",
    "xsetbv",
    "4:",
    "mov rax, cr4",
    "btc rax, 18",
    "mov cr4, rax",
    "dec esi",
    "jne 2b",
    "hlt",
);

#[test]
fn cpuid_says_what_holds_now() {
    let lay = |mem: &GuestMemory| {
        let mut state = common::long_mode(mem, START, STACK);
        mem.write(Gpa(START), changing_cpuid()).unwrap();
        state.gpr[6] = 40;
        state
    };
    let [a, b] = run_both(&lay, "");
    assert_eq!(a.exit, VcpuExit::Halted);
    assert_same_registers(&a, &b, "CPUID");
    let in_cache = done_in_cache(&b, "CPUID in the TC");
    assert!(in_cache >= 40 * 3 * 2 / 2, "{in_cache}");
}

// ---- address spaces ----------------------------------------------------------------------------------------------------------

const HIGH: u64 = 0xffff_8000_0000_0000;
const WINDOW: u64 = 0x80_0000_0000;

// RSI turns: R8 and R9 are two values of CR3, R10 the window, which in each space holds other data, and at 800h other code. RDI: where the window's entry in the second
// space's page table is; at every eighth turn it changes, and that space is entered with a flush.
guest_code!(
    switching,
    "trellis_test_switch",
    "trellis_test_switch_end",
    "2:",
    "mov cr3, r8",
    "add rbx, [r10]",
    "lea rax, [r10 + 0x800]",
    "call rax",
    "rol rbx, 5",
    "mov rax, r9",
    "test esi, 7",
    "jne 3f",
    "btr rax, 63",
    "xor dword ptr [rdi], 0x1000",
    "3:",
    "mov cr3, rax",
    "add rbx, [r10]",
    "add qword ptr [r10 + 8], 1",
    "lea rax, [r10 + 0x800]",
    "call rax",
    "rol rbx, 5",
    "dec esi",
    "jne 2b",
    "hlt",
);

/// Upper half: all memory; lower half, in each space: the window.
fn lay_spaces(mem: &GuestMemory, global: u64) -> CpuState {
    let mut state = common::long_mode(mem, START, STACK);
    let put = |at: u64, value: u64| mem.write(Gpa(at), &value.to_le_bytes()).unwrap();
    for n in 0..512 {
        put(0x3000 + 8 * n, n << 21 | 0xe7 | global);
    }
    put(0x1000 + 8 * 256, 0x2007);
    for (space, root) in [(0, 0x6_0000u64), (1, 0x7_0000)] {
        put(root + 8 * 256, 0x2007);
        put(root + 8, root + 0x1007);
        put(root + 0x1000, root + 0x2007);
        put(root + 0x2000, root + 0x3007);
        let data = 0x10_0000 + 0x2000 * space;
        put(root + 0x3000, data | 7);
        for page in [data, data + 0x1000] {
            put(page, page * 7);
            // add rbx, page; ret
            let [a, b, c, d] = (page as u32).to_le_bytes();
            mem.write(Gpa(page + 0x800), &[0x48, 0x81, 0xc3, a, b, c, d, 0xc3]).unwrap();
        }
    }
    mem.write(Gpa(START), switching()).unwrap();
    state.cr4 |= 1 << 17;
    state.cr3 = 0x6_0001;
    state.rip += HIGH;
    state.gpr[4] += HIGH;
    state.gpr[6] = 200;
    state.gpr[7] = HIGH + 0x7_3000;
    (state.gpr[8], state.gpr[9], state.gpr[10]) = (0x6_0001 | 1 << 63, 0x7_0002 | 1 << 63, WINDOW);
    state
}

#[test]
fn switches_of_address_spaces_show_what_each_has() {
    for (global, knobs) in [
        (0x100, ""),
        (0x100, "unit=1"),
        (0x100, "log=1"),
        (0x100, "context=off"),
        (0, ""),
        (0x100, "tlb=one"),
    ] {
        let [a, b] = run_both(&|mem| lay_spaces(mem, global), knobs);
        let what = format!("{knobs}, global {global:#x}");
        assert_eq!(a.exit, VcpuExit::Halted, "{what}");
        assert_same_registers(&a, &b, &what);
        assert!(a.memory[0x10_0000..0x10_4000] == b.memory[0x10_0000..0x10_4000], "{what}");
        let in_cache = done_in_cache(&b, "MOV to CR3 in the TC");
        match (global, knobs) {
            (0x100, "" | "unit=1") => assert!(in_cache > 300, "{what}: {in_cache}"),
            // Without global pages each switch takes translations of the upper half back.
            (0, _) | (_, "context=off" | "log=1") => assert_eq!(in_cache, 0, "{what}"),
            _ => {}
        }
    }
}

// RSI turns: the code at 900h of the window's page calls what switches to the other address space, in two turns of four, and returns.
guest_code!(
    switching_in_a_call,
    "trellis_test_call",
    "trellis_test_call_end",
    "lea r11, [rip + 5f]",
    "2:",
    "lea rax, [r10 + 0x900]",
    "call rax",
    "rol rbx, 5",
    "dec rsi",
    "jnz 2b",
    "hlt",
    "5:",
    "test esi, 2",
    "jz 6f",
    "mov cr3, r9",
    "xchg r8, r9",
    "6:",
    "ret",
);

#[test]
fn returns_find_the_code_of_the_address_space_that_is_in_force() {
    let lay = |mem: &GuestMemory| {
        let state = lay_spaces(mem, 0x100);
        for page in [0x10_0000u64, 0x10_2000] {
            // call r11; add rbx, page; ret
            let [a, b, c, d] = (page as u32).to_le_bytes();
            let code = [0x41, 0xff, 0xd3, 0x48, 0x81, 0xc3, a, b, c, d, 0xc3];
            mem.write(Gpa(page + 0x900), &code).unwrap();
        }
        mem.write(Gpa(START), switching_in_a_call()).unwrap();
        state
    };
    for knobs in ["", "unit=1", "chain=off", "context=off"] {
        let [a, b] = run_both(&lay, knobs);
        assert_eq!(a.exit, VcpuExit::Halted, "{knobs}");
        assert_same_registers(&a, &b, knobs);
        if knobs != "context=off" {
            assert!(done_in_cache(&b, "MOV to CR3 in the TC") > 80, "{knobs}");
        }
    }
}

// RSI turns: the window gets another page, and at every fourth turn so does the code behind it, at 8000h; both are then used. R12 is a page of the upper half, which a large
// page maps, and R9 no canonical address. RDI: where the window's entry in the page table is.
guest_code!(
    invalidating,
    "trellis_test_invlpg",
    "trellis_test_invlpg_end",
    "2:",
    "add rbx, [r10]",
    "xor dword ptr [rdi], 0x1000",
    "invlpg [r10 + 0x123]",
    "add rbx, [r10]",
    "add qword ptr [r10 + 8], 1",
    "rol rbx, 5",
    "invlpg [r9]",
    "test esi, 3",
    "jne 3f",
    "xor dword ptr [rdi + 8 * 8], 0x1000",
    "invlpg [r10 + 0x8000]",
    "invlpg [r12]",
    "3:",
    "lea rax, [r10 + 0x8800]",
    "call rax",
    "dec esi",
    "jne 2b",
    "hlt",
);

#[test]
fn pages_that_are_invalidated_are_looked_up_anew() {
    for knobs in ["", "unit=1", "log=1", "tlb=one", "tlb=off", "chain=off"] {
        let lay = |mem: &GuestMemory| {
            let mut state = lay_spaces(mem, 0x100);
            mem.write(Gpa(START), invalidating()).unwrap();
            mem.write(Gpa(0x6_3000 + 8 * 8), &0x10_2007u64.to_le_bytes()).unwrap();
            state.gpr[7] = HIGH + 0x6_3000;
            (state.gpr[9], state.gpr[12]) = (1 << 62, HIGH + 0x30_0000);
            state
        };
        let [a, b] = run_both(&lay, knobs);
        assert_eq!(a.exit, VcpuExit::Halted, "{knobs}");
        assert_same_registers(&a, &b, knobs);
        assert!(a.memory[0x10_0000..0x10_4000] == b.memory[0x10_0000..0x10_4000], "{knobs}");
        let in_cache = done_in_cache(&b, "INVLPG in the TC");
        assert!(in_cache > 150, "{knobs}: {in_cache}");
    }
}

// ---- segment registers -------------------------------------------------------------------------------------------------------

// Loads data segments with null selectors, of which one has a level; bases are written before and behind.
guest_code!(
    null_segments,
    "trellis_test_null",
    "trellis_test_null_end",
    "mov eax, 0x1234000",
    "wrfsbase rax",
    "wrgsbase rax",
    "mov ecx, 0x10000",
    "mov ds, ecx",
    "mov es, ecx",
    "mov fs, ecx",
    "mov gs, ecx",
    "wrgsbase rax",
    "rdfsbase rbx",
    "mov esi, 2",
    "mov es, esi",
    "mov edi, ds",
    "hlt",
);

#[test]
fn null_selectors_are_loaded_as_the_interpreter_does() {
    let lay = |mem: &GuestMemory| {
        let mut state = common::long_mode(mem, START, STACK);
        mem.write(Gpa(START), null_segments()).unwrap();
        state.cr4 |= 1 << 16;
        state
    };
    let [a, b] = run_both(&lay, "");
    assert_eq!(a.exit, VcpuExit::Halted);
    assert_same_registers(&a, &b, "segments");
    let callouts = b
        .report
        .unwrap()
        .breakdowns
        .iter()
        .find(|b| b.name == "callouts by instruction")
        .unwrap()
        .rows
        .clone();
    assert_eq!(callouts.get("MOV Sreg, r32/m16"), Some(&1), "the one with a level");
}
