//! XSAVEC, XSAVES, XRSTOR and XRSTORS in the cache (SDM 1 13.7 to 13.12).
//!
//! `trellis_bt_xsave` has the host save to [`frame::XSTATE`], and copies what it wrote to guest memory, piece by piece, or from the area if the state is there;
//! `trellis_bt_xrstor` copies the other way, looks at what it copied, and has the host load it. So the image goes through nobody else's hands: host addresses that the host put in place of
//! instruction pointers are wiped before the guest sees them, and what is checked is what is loaded. Where the pieces lie in the compacted format is
//! [`x86_interp::vector::compacted_pieces`]'s to say: [`learn`] tells the frame of the formats in use.
//!
//! INV-XS-1: nothing of guest memory or of the registers changes before every check has passed. Whatever is unusual goes to `trellis_bt_callout`
//! instead, as if the fragment had called that: a misaligned operand, a page that the TLB does not know, another format, an image that the
//! interpreter would refuse, or one that unmasks exceptions (`state::facts`).
//!
//! Which components count as in use is the host's to say here, and by contents where the interpreter says it: the manual permits both (SDM 1 13.6).

#![expect(unsafe_code, reason = "assembly that does a guest instruction")]
#![expect(
    clippy::cast_possible_truncation,
    reason = "components have numbers below 31, images have less than a page"
)]

use std::arch::global_asm;

use bt::frame;
use iced_x86::Mnemonic;
use x86_interp::cpu::Cpu;
use x86_interp::vector;

use crate::exec::Frame;
use crate::tables::Tables;

/// The distance from guest to host addresses of the page in RCX into RSI, by the TLB at the displacement in R15; else goes to 9.
macro_rules! distance {
    ($tag:literal) => {
        concat!(
            "mov esi, ecx\nshr esi, 7\nand esi, ({entries} - 1) << 5\nadd esi, r15d\n\
             cmp gs:[rsi + ",
            $tag,
            "], rcx\njne 9f\nmov rsi, gs:[rsi + 24]\n"
        )
    };
}

/// Both pages of the image at R14, of the size that the format at EBX says: distances into SPLIT_HOSTS, the address behind the first into RBP. Uses RCX and RSI.
macro_rules! pages {
    ($tag:literal) => {
        concat!(
            "mov rcx, r14\nand rcx, -4096\n",
            distance!($tag),
            "mov gs:[{hosts}], rsi\n\
             lea rbp, [rcx + 4096]\n\
             mov esi, gs:[rbx + {formats} + 4]\nlea rcx, [r14 + rsi - 1]\nand rcx, -4096\n\
             cmp rcx, rbp\njne 5f\n",
            distance!($tag),
            "mov gs:[{hosts} + 8], rsi\n5:\n"
        )
    };
}

/// For each piece of the format at EBX of a component in EAX: `$copy` its ECX bytes between the guest address in R15 and RSI; it may use RSI, RDI, RCX. RDX points at the image
/// or the area, where the field of a piece at EDI says where it lies. EBX is used up.
macro_rules! each_piece {
    ($copy:expr) => {
        concat!(
            "add ebx, {formats} + 16\n\
             21: mov ecx, gs:[rbx]\ntest ecx, ecx\nje 3f\ntest ecx, eax\nje 2f\n\
             mov esi, gs:[rbx + 4]\nmov ecx, gs:[rbx + 8]\nlea r15, [r14 + rsi]\n\
             mov edi, gs:[{place}]\nmov esi, gs:[rbx + rdi]\nadd rsi, rdx\n",
            $copy,
            "2: add ebx, 16\njmp 21b\n3:\n"
        )
    };
}

/// Copies between the guest's bytes and others, where the register `$guest` (RDI or RSI) is to point at the guest's and the other one points at theirs.
macro_rules! copy {
    ($guest:literal) => {
        concat!(
            "mov ",
            $guest,
            ", rbp\nsub ",
            $guest,
            ", r15\njle 7f\ncmp rcx, ",
            $guest,
            "\njbe 6f\nsub rcx, ",
            $guest,
            "\nmov gs:[{temp}], rcx\nmov rcx, ",
            $guest,
            "\nmov ",
            $guest,
            ", r15\nadd ",
            $guest,
            ", gs:[{hosts}]\nrep movsb\nmov rcx, gs:[{temp}]\nmov r15, rbp\n7: mov ",
            $guest,
            ", r15\nadd ",
            $guest,
            ", gs:[{hosts} + 8]\nrep movsb\njmp 2f\n6: mov ",
            $guest,
            ", r15\nadd ",
            $guest,
            ", gs:[{hosts}]\nrep movsb\n"
        )
    };
}

global_asm!(
    // Linear address in R14, displacement of the TLB in R15; behind the call that came here stands the number of the site. Flags are free.
    ".globl trellis_bt_xsave",
    "trellis_bt_xsave:",
    "mov gs:[{address}], r14",
    "test r14b, 63\njne trellis_bt_callout",
    "push rax\npush rcx\npush rdx\npush rbx\npush rsi\npush rdi\npush rbp",
    "and eax, gs:[{xcr0}]",
    "mov ebx, eax\nand ebx, 1\nimul ebx, ebx, {stride}",
    "mov ecx, eax\nbts ecx, 31\ncmp gs:[rbx + {formats}], ecx\njne 9f",
    pages!("8"),
    "mov rcx, gs:[{image}]\nxor edx, edx",
    "cmp dword ptr gs:[{loaded}], 0\nje 7f",
    "xsavec64 [rcx]",
    // The instruction pointers are the host's (`exec`).
    "mov [rcx + 8], rdx\nmov [rcx + 16], rdx\nmov [rcx + 6], dx",
    "mov rdx, rcx\nmov eax, [rdx + 512]\nmov dword ptr gs:[{place}], 4\njmp 6f",
    // The state is in the area, whose header says what is in use; MXCSR counts with component 1 (SDM 1 13.10).
    "7: mov edi, eax\nbts rdi, 63\nmov [rcx + 520], rdi",
    "mov rdx, gs:[{area}]\nmov edi, [rdx + 512]\ncmp dword ptr [rdx + 24], 0x1f80\nje 8f\nor edi, 2\n8: and eax, edi",
    "mov [rcx + 512], rax\nmov dword ptr gs:[{place}], 12",
    // The header, which lies in one page.
    "6: lea rdi, [r14 + 512]\nmov rsi, rdi\nsub rsi, rbp\nsbb rsi, rsi\nnot rsi\nand esi, 8\nadd rdi, gs:[rsi + {hosts}]",
    "mov rsi, [rcx + 512]\nmov [rdi], rsi\nmov rsi, [rcx + 520]\nmov [rdi + 8], rsi",
    each_piece!(copy!("rdi")),
    "inc qword ptr gs:[{count}]",
    "pop rbp\npop rdi\npop rsi\npop rbx\npop rdx\npop rcx\npop rax",
    "add qword ptr [rsp], 4\nret",
    "9:\npop rbp\npop rdi\npop rsi\npop rbx\npop rdx\npop rcx\npop rax",
    "jmp trellis_bt_callout",
    address = const frame::ADDRESS,
    loaded = const frame::FP_LOADED,
    xcr0 = const frame::XCR0,
    stride = const frame::XSTATE_FORMAT_STRIDE,
    formats = const frame::XSTATE_FORMATS,
    entries = const frame::TLB_ENTRIES,
    hosts = const frame::SPLIT_HOSTS,
    image = const frame::XSTATE_ADDRESS,
    temp = const frame::TEMP,
    place = const frame::TEMP + 16,
    area = const frame::FP_AREA,
    count = const frame::COUNT_HELPED + 8,
);

global_asm!(
    // As above.
    ".globl trellis_bt_xrstor",
    "trellis_bt_xrstor:",
    "mov gs:[{address}], r14",
    "test r14b, 63\njne trellis_bt_callout",
    "push rax\npush rcx\npush rdx\npush rbx\npush rsi\npush rdi\npush rbp",
    "and eax, gs:[{xcr0}]\nje 9f",
    // The header, which lies in one page, to its place.
    "lea rcx, [r14 + 512]\nand rcx, -4096",
    distance!("0"),
    "lea rsi, [r14 + rsi + 512]\nmov rdx, gs:[{image}]\nlea rdi, [rdx + 512]\nmov ecx, 8\nrep movsq",
    // Compacted, of components that are enabled, with nothing in use that has no place, and nothing in what is reserved (SDM 1 13.8.2).
    "mov rcx, [rdx + 520]\nbtr rcx, 63\njnc 9f",
    "mov esi, gs:[{xcr0}]\nnot rsi\ntest rcx, rsi\njne 9f",
    "mov rdi, [rdx + 512]\nmov rsi, rcx\nnot rsi\ntest rdi, rsi\njne 9f",
    "mov rsi, [rdx + 528]\nor rsi, [rdx + 536]\nor rsi, [rdx + 544]\nor rsi, [rdx + 552]\nor rsi, [rdx + 560]\nor rsi, [rdx + 568]\njne 9f",
    "mov ebx, ecx\nand ebx, 1\nimul ebx, ebx, {stride}",
    "bts ecx, 31\ncmp gs:[rbx + {formats}], ecx\njne 9f",
    pages!("0"),
    // What is loaded.
    "mov gs:[{temp} + 8], eax\nand eax, [rdx + 512]\nmov dword ptr gs:[{place}], 4",
    each_piece!(concat!("mov rdi, rsi\n", copy!("rsi"))),
    // MXCSR and x87's control and status: no exception unmasked, none waiting, nothing reserved.
    "test eax, 2\nje 4f\nmov ecx, [rdx + 24]\ntest ecx, 0xffff0000\njne 9f\nand ecx, 0x1f80\ncmp ecx, 0x1f80\njne 9f",
    "4: test eax, 1\nje 4f\nmov ecx, [rdx]\ntest ecx, 0x800000\njne 9f\nand ecx, 0x3f\ncmp ecx, 0x3f\njne 9f",
    "4: mov rcx, rdx\nmov eax, gs:[{temp} + 8]\nxor edx, edx",
    // What is not loaded from the image has to be there.
    "cmp eax, gs:[{mask}]\nje 6f\ncall trellis_bt_fp_load\n6:",
    "xrstor64 [rcx]\nmov dword ptr gs:[{loaded}], 1",
    "inc qword ptr gs:[{count}]",
    "pop rbp\npop rdi\npop rsi\npop rbx\npop rdx\npop rcx\npop rax",
    "add qword ptr [rsp], 4\nret",
    "9:\npop rbp\npop rdi\npop rsi\npop rbx\npop rdx\npop rcx\npop rax",
    "jmp trellis_bt_callout",
    address = const frame::ADDRESS,
    loaded = const frame::FP_LOADED,
    xcr0 = const frame::XCR0,
    stride = const frame::XSTATE_FORMAT_STRIDE,
    formats = const frame::XSTATE_FORMATS,
    entries = const frame::TLB_ENTRIES,
    hosts = const frame::SPLIT_HOSTS,
    image = const frame::XSTATE_ADDRESS,
    temp = const frame::TEMP,
    place = const frame::TEMP + 16,
    mask = const frame::FP_MASK,
    count = const frame::COUNT_HELPED + 16,
);

unsafe extern "C" {
    fn trellis_bt_xsave();
    fn trellis_bt_xrstor();
}

/// Address of the code that fragments call for XSAVEC and XSAVES.
pub fn save_address() -> u64 {
    trellis_bt_xsave as *const () as u64
}

/// Address of the code that fragments call for XRSTOR and XRSTORS.
pub fn restore_address() -> u64 {
    trellis_bt_xrstor as *const () as u64
}

const fn saves(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(mnemonic, M::Xsavec | M::Xsavec64 | M::Xsaves | M::Xsaves64)
}

const fn is_done_here(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    saves(mnemonic) || matches!(mnemonic, M::Xrstor | M::Xrstor64 | M::Xrstors | M::Xrstors64)
}

/// The interpreter is about to do an instruction for a fragment: if it saves state in the compacted format, the format is one that the frame knows from now on.
pub fn learn(cpu: &Cpu, frame: &Frame, mnemonic: Mnemonic) {
    if !saves(mnemonic) {
        return;
    }
    let components = cpu.gpr[0] as u32 & frame.get32(frame::XCR0);
    let at = frame::XSTATE_FORMATS + (components & 1) as i32 * frame::XSTATE_FORMAT_STRIDE;
    if components == 0 || frame.get32(at) == components | frame::XSTATE_VALID {
        return;
    }
    let (pieces, bytes) = vector::compacted_pieces(u64::from(components));
    // The last place is the end of the list.
    if pieces.len() >= frame::XSTATE_PIECES || bytes > frame::XSTATE_BYTES as usize {
        return;
    }
    frame.set32(at, components | frame::XSTATE_VALID);
    frame.set32(at + 4, bytes as u32);
    for (piece, at) in pieces.iter().zip((at + 16..).step_by(16)) {
        frame.set32(at, 1 << piece.component);
        frame.set32(at + 4, piece.offset as u32);
        frame.set32(at + 8, piece.bytes as u32);
        frame.set32(at + 12, piece.area as u32);
    }
    frame.set32(at + 16 + 16 * pieces.len() as i32, 0);
}

/// The interpreter has done an instruction of these for a fragment: the frame's TLB gets to know what it found out about the image's pages. Asks for nothing
/// that it did not touch, so no bit of the guest's tables is set for it.
pub fn learn_pages(cpu: &Cpu, frame: &Frame, tables: &mut Tables, mnemonic: Mnemonic) {
    if !is_done_here(mnemonic) {
        return;
    }
    let la = frame.get(frame::ADDRESS);
    let bytes = [0, 1].map(|n| frame.get32(frame::XSTATE_FORMATS + n * frame::XSTATE_FORMAT_STRIDE + 4));
    let last = la.wrapping_add(u64::from(bytes[0].max(bytes[1]).max(1)) - 1);
    for la in [la, last] {
        let (entry, tag) = (cpu.tlb.entry(la, cpu.variant), cpu.tlb.tag(la));
        if entry.read_tag == tag {
            tables.fill_tlb(la, cpu.variant, &entry, tag);
        }
    }
}

/// What the frame has to know of XCR0.
pub fn fill(cpu: &Cpu, frame: &Frame) {
    let can = frame.get32(frame::FP_MASK);
    let fits = cpu.s.msr.xss == 0 && cpu.s.xcr0 & !u64::from(can) == 0;
    frame.set32(frame::XCR0, if fits { cpu.s.xcr0 as u32 } else { 0 });
}
