//! Instructions that are not compared, each with its reason.

use iced_x86::{Code, EncodingKind, Mnemonic as M, OpCodeOperandKind as K};

/// Why an instruction cannot be compared with the host, or None.
pub fn reason(code: Code, bits: u32) -> Option<&'static str> {
    let oc = code.op_code();
    if !oc.is_instruction() {
        return Some("no instruction");
    }
    if !oc.is_available_in_mode(bits) || !oc.cpl3() && !faults_by_privilege(code) {
        return Some("not in this mode, or privileged in ways that need the host kernel's tables");
    }
    if matches!(oc.encoding(), EncodingKind::MVEX | EncodingKind::D3NOW) {
        return Some("no processor of ours has it");
    }
    if oc.fwait() {
        return Some("FWAIT and another instruction: generated as two");
    }
    for kind in oc.op_kinds() {
        match kind {
            K::cr_reg
            | K::dr_reg
            | K::tr_reg
            | K::bnd_reg
            | K::tmm_reg
            | K::tmm_rm
            | K::tmm_vvvv
            | K::sibmem => {
                return Some("registers that user code does not have here");
            }
            K::farbr2_2 | K::farbr4_2 => return Some("selectors of the host kernel's tables"),
            K::xbegin_2 | K::xbegin_4 => return Some("transactions"),
            K::mem_mpx | K::mem_mib | K::r32_or_mem_mpx | K::r64_or_mem_mpx | K::bnd_or_mem_mpx => {
                return Some("MPX");
            }
            K::br16_1 | K::br16_2 | K::brdisp_2 | K::brdisp_4 => {
                return Some("16-bit targets, which vendors do differently in 64-bit code");
            }
            _ => {}
        }
    }
    // Near returns and branches with 16-bit operands: vendors differ in 64-bit code (SDM 2A JMP, APM 3 JMP), and a
    // target below 64 KiB is never mapped in 32-bit code.
    if matches!(code, Code::Retnw | Code::Retnw_imm16 | Code::Jmp_rm16 | Code::Call_rm16 | Code::Popfw) {
        return Some("16-bit branch targets");
    }
    // "A zero-extended value is pushed, or the selector is written using a 16-bit move" (SDM 2B PUSH): AMD's do the one,
    // Intel's the other.
    if matches!(
        code,
        Code::Pushd_CS
            | Code::Pushd_DS
            | Code::Pushd_ES
            | Code::Pushd_SS
            | Code::Pushd_FS
            | Code::Pushd_GS
            | Code::Pushq_FS
            | Code::Pushq_GS
    ) {
        return Some("vendors differ");
    }
    // MOVSXD r16 reads 16 bits on Intel, 32 on AMD (SDM 2B MOVSXD, APM 3 MOVSXD).
    if code == Code::Movsxd_r16_rm16 {
        return Some("vendors differ");
    }
    // 0F 0D with a register: #UD on AMD (APM 3 PREFETCH), no operation on Intel.
    if matches!(
        code,
        Code::Reservednop_rm16_r16_0F0D | Code::Reservednop_rm32_r32_0F0D | Code::Reservednop_rm64_r64_0F0D
    ) {
        return Some("vendors differ");
    }
    if matches!(
        code,
        Code::Jmp_m1616
            | Code::Jmp_m1632
            | Code::Jmp_m1664
            | Code::Call_m1616
            | Code::Call_m1632
            | Code::Call_m1664
    ) {
        return Some("selectors of the host kernel's tables");
    }
    // MOV to and POP of a segment register.
    let segment = |k: &K| matches!(k, K::seg_reg | K::es | K::cs | K::ss | K::ds | K::fs | K::gs);
    if oc.mnemonic() != M::Push && oc.op_kinds().first().is_some_and(segment) {
        return Some("selectors of the host kernel's tables");
    }
    by_mnemonic(oc.mnemonic())
}

/// Privileged instructions that only raise #GP(0) at level 3, whatever their operands.
fn faults_by_privilege(code: Code) -> bool {
    matches!(
        code.mnemonic(),
        M::Hlt | M::Clts | M::Invd | M::Wbinvd | M::Invlpg | M::Rdmsr | M::Wrmsr | M::Swapgs | M::Lmsw
    )
}

fn by_mnemonic(m: M) -> Option<&'static str> {
    Some(match m {
        M::Syscall | M::Sysenter | M::Sysexit | M::Sysret | M::Int | M::Int1 | M::Int3 => {
            "enters the host kernel"
        }
        M::Vmcall | M::Vmmcall | M::Vmgexit | M::Tdcall | M::Seamcall => "a call to the host's hypervisor",
        M::Cpuid
        | M::Rdtsc
        | M::Rdtscp
        | M::Rdpmc
        | M::Rdpru
        | M::Rdpid
        | M::Rdrand
        | M::Rdseed
        | M::Xgetbv => "answers are the model's or chance",
        M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw | M::Lar | M::Lsl | M::Verr | M::Verw => {
            "answers depend on the host kernel's tables (UMIP: it emulates some)"
        }
        M::Retf | M::Iret | M::Iretd | M::Iretq => "selectors of the host kernel's tables",
        M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => "selectors of the host kernel's tables",
        M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase => "the host's thread-local storage",
        M::Rdpkru | M::Wrpkru => "protection keys are the test process's own",
        M::Monitor | M::Mwait | M::Monitorx | M::Mwaitx | M::Umonitor | M::Umwait | M::Tpause | M::Pause => {
            "waits"
        }
        M::Clzero | M::Cldemote | M::Clflush | M::Clflushopt | M::Clwb => "cache lines of the host's size",
        M::Xsave | M::Xsave64 | M::Xsavec | M::Xsavec64 | M::Xsaveopt | M::Xsaveopt64 => {
            "init and modified optimisation; the vector tests compare them"
        }
        M::Xrstor | M::Xrstor64 | M::Xsaves | M::Xsaves64 | M::Xrstors | M::Xrstors64 => {
            "init and modified optimisation; the vector tests compare them"
        }
        M::Fnstenv | M::Fnsave | M::Fstenv | M::Fsave => {
            "FCS, FDS and FOP, which newer processors do not keep"
        }
        M::Fldenv | M::Frstor => "instruction pointers of the 16-bit and 32-bit forms, kept differently",
        M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64 => {
            "MXCSR_MASK and reserved bytes; the vector tests do"
        }
        M::In | M::Out | M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd => {
            "ports: the order of the permission check and the page fault is checked in the contract suite"
        }
        M::Skinit | M::Clgi | M::Stgi | M::Vmrun | M::Vmload | M::Vmsave | M::Invlpga => "SVM",
        M::Llwpcb | M::Slwpcb | M::Lwpins | M::Lwpval => "LWP",
        M::Incsspd | M::Incsspq | M::Rdsspd | M::Rdsspq | M::Wrssd | M::Wrssq | M::Endbr32 | M::Endbr64 => {
            "CET"
        }
        M::Saveprevssp | M::Rstorssp | M::Setssbsy | M::Clrssbsy | M::Wrussd | M::Wrussq => "CET",
        M::Enclu | M::Encls | M::Enclv | M::Getsec | M::Pconfig | M::Xabort | M::Xend | M::Xtest => {
            "SGX, TXT, TSX"
        }
        M::Ptwrite | M::Serialize | M::Hreset | M::Senduipi | M::Uiret | M::Testui | M::Clui | M::Stui => {
            "rare"
        }
        // RCPSS and its kin are approximations that the manuals leave to the processor: same host, same answer, compared.
        _ => return None,
    })
}
