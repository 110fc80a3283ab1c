//! The guest's x87 and vector registers between the host's and the area ([`frame::FP_AREA`]).
//!
//! INV-FP-1: between a store and the next load the host's x87 state is as FNINIT makes it, for nothing in Rust uses x87. So a load need not touch it if the
//! guest's is so, too. XRSTOR takes some 400 cycles whatever it loads; where only registers are in use that plain moves load, those do it in 50. The area is
//! whole at all times, so a register that is not in use is loaded with its initial contents.

#![expect(unsafe_code, reason = "assembly that loads and stores the guest's registers")]
#![expect(clippy::cast_possible_truncation, reason = "offsets in the area")]

use std::arch::global_asm;

use bt::frame;
use x86_interp::vector;

use crate::exec::Frame;

global_asm!(
    // All general registers are in the frame. The instruction pointers that XSAVE found are the host's: they are wiped.
    // DEVIATION: so FIP, FDP and FOP of x87 instructions that ran in fragments read as zero.
    ".globl trellis_bt_fp_store",
    "trellis_bt_fp_store:",
    "mov rcx, gs:[{area}]\nmov eax, gs:[{mask}]\nxor edx, edx",
    "xsave64 [rcx]",
    "xor edx, edx",
    "mov [rcx + 8], rdx\nmov [rcx + 16], rdx\nmov [rcx + 6], dx",
    "mov gs:[{loaded}], edx",
    // x87 state that is not in use is as FNINIT makes it.
    "test byte ptr [rcx + 512], 1\nje 7f\nfninit\n7:\nldmxcsr gs:[{host_mxcsr}]",
    "test eax, 4\nje 8f\nvzeroupper\n8:",
    "ret",
    // Uses R14 and flags only.
    ".globl trellis_bt_fp_load",
    "trellis_bt_fp_load:",
    "cmp dword ptr gs:[{loaded}], 0\nje 8f\nret\n8:",
    "mov dword ptr gs:[{loaded}], 1",
    "mov r14, gs:[{area}]",
    // Of x87, upper halves of YMM and of ZMM registers, none may be in use.
    "test byte ptr [r14 + 512], 0x45\njne 9f",
    "cmp dword ptr gs:[{quick}], {sse}\njb 9f\nje 7f",
    "vzeroupper\ncmp dword ptr gs:[{quick}], {avx512}\njb 7f",
    "push r15",
    "mov r15d, gs:[{quick} + 4]\nadd r15, r14",
    "kmovq k0, [r15 + 0]\nkmovq k1, [r15 + 8]\nkmovq k2, [r15 + 16]\nkmovq k3, [r15 + 24]\nkmovq k4, [r15 + 32]\nkmovq k5, [r15 + 40]\nkmovq k6, [r15 + 48]\nkmovq k7, [r15 + 56]",
    "mov r15d, gs:[{quick} + 8]\nadd r15, r14",
    "vmovdqu64 zmm16, [r15 + 0]\nvmovdqu64 zmm17, [r15 + 64]\nvmovdqu64 zmm18, [r15 + 128]\nvmovdqu64 zmm19, [r15 + 192]\nvmovdqu64 zmm20, [r15 + 256]\nvmovdqu64 zmm21, [r15 + 320]\nvmovdqu64 zmm22, [r15 + 384]\nvmovdqu64 zmm23, [r15 + 448]",
    "vmovdqu64 zmm24, [r15 + 512]\nvmovdqu64 zmm25, [r15 + 576]\nvmovdqu64 zmm26, [r15 + 640]\nvmovdqu64 zmm27, [r15 + 704]\nvmovdqu64 zmm28, [r15 + 768]\nvmovdqu64 zmm29, [r15 + 832]\nvmovdqu64 zmm30, [r15 + 896]\nvmovdqu64 zmm31, [r15 + 960]",
    "pop r15",
    "7:",
    "movups xmm0, [r14 + 160]\nmovups xmm1, [r14 + 176]\nmovups xmm2, [r14 + 192]\nmovups xmm3, [r14 + 208]\nmovups xmm4, [r14 + 224]\nmovups xmm5, [r14 + 240]\nmovups xmm6, [r14 + 256]\nmovups xmm7, [r14 + 272]",
    "movups xmm8, [r14 + 288]\nmovups xmm9, [r14 + 304]\nmovups xmm10, [r14 + 320]\nmovups xmm11, [r14 + 336]\nmovups xmm12, [r14 + 352]\nmovups xmm13, [r14 + 368]\nmovups xmm14, [r14 + 384]\nmovups xmm15, [r14 + 400]",
    "ldmxcsr [r14 + 24]",
    "ret",
    "9:\npush rax\npush rcx\npush rdx",
    "mov rcx, r14\nmov eax, gs:[{mask}]\nxor edx, edx",
    "xrstor64 [rcx]",
    "pop rdx\npop rcx\npop rax",
    "ret",
    loaded = const frame::FP_LOADED,
    area = const frame::FP_AREA,
    mask = const frame::FP_MASK,
    host_mxcsr = const frame::HOST_MXCSR,
    quick = const frame::FP_QUICK,
    sse = const SSE,
    avx512 = const AVX512,
);

/// Which registers plain moves can load: those of SSE.
const SSE: u32 = 1;
/// And the upper halves can be cleared.
const AVX: u32 = 2;
/// And the opmasks and registers 16 to 31.
const AVX512: u32 = 3;

unsafe extern "C" {
    fn trellis_bt_fp_load();
    fn trellis_bt_fp_store();
}

/// Address of the code that loads the guest's registers.
pub fn load_address() -> u64 {
    trellis_bt_fp_load as *const () as u64
}

/// Address of the code that stores them.
pub fn store_address() -> u64 {
    trellis_bt_fp_store as *const () as u64
}

/// Before fragments run: what the host has, of these components.
pub fn begin(frame: &Frame, components: u64) {
    frame.set32(frame::FP_MASK, components as u32);
    frame.set32(frame::HOST_MXCSR, 0x1f80);
    frame.set32(frame::FP_LOADED, 0);
    let upper = vector::upper_registers();
    let quick = match (components, upper) {
        (3, _) => SSE,
        (7, _) => AVX,
        (0xe7, Some(_)) => AVX512,
        _ => 0,
    };
    let [opmasks, registers] = upper.unwrap_or_default();
    frame.set32(frame::FP_QUICK, quick);
    frame.set32(frame::FP_QUICK + 4, opmasks as u32);
    frame.set32(frame::FP_QUICK + 8, registers as u32);
}
