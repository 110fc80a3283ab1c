//! The CPUID model: which processor a guest sees, and what follows from it.
//!
//! [`CpuModel::parse`] makes a model from a user's words (`max,-avx512f`) and this host; the model then answers the
//! CPUID instruction ([`CpuModel::cpuid`]), says which bits of CR4, EFER, XCR0 and the speculation MSRs exist (the
//! `*_mask` functions), and which instructions exist ([`CpuModel::gate`]). It is plain data without link to the host
//! it was made on, so a snapshot carries it; [`CpuModel::check_host`] says whether a host can run it.
//!
//! - `features`: one row per CPUID bit, with what we implement. Start there to announce something new.
//! - `host`: what this host's CPUID says.
//! - `model`: names, parsing, register masks.
//! - `leaves`: the CPUID instruction.
//! - `gate`: the meaning of instructions that are not announced.
//!
//! Invariants:
//! - **INV-CPUID-1**: a feature of class `Native` is announced only if the host has it, because its instructions are
//!   executed by the host CPU.
//! - **INV-CPUID-2**: the XSAVE layout of leaf 0DH is the host's for every announced component, because the guest's
//!   XSAVE area is written by the host CPU.
//! - **INV-CPUID-3**: no feature of class `Never` is announced, and no feature without what it requires.
//!
//! # Speculation
//!
//! A guest of this VMM shares no address space with a secret that it may not read by design (one VM, one process; see
//! the threat model), so the models announce a processor without Meltdown and its kin. Linux then runs without
//! page-table isolation, without retpolines and without return thunks (`arch/x86/kernel/cpu/{common,bugs}.c`):
//!
//! - Intel: `IA32_ARCH_CAPABILITIES` with RDCL_NO and the other *_NO bits, and IBRS_ALL, so that spectre_v2 is
//!   "Enhanced IBRS": one write of SPEC_CTRL at boot.
//! - AMD: SSB_NO, BTC_NO (retbleed), SRSO_NO, TSA_*_NO and Automatic IBRS: one write of EFER.AIBRSE at boot. Meltdown,
//!   L1TF, MDS are unset by vendor. `IA32_ARCH_CAPABILITIES` is not announced: no AMD processor has it, and Windows
//!   does not boot where one seems to.
//! - IBPB, STIBP and SSBD are not announced on AMD but can be asked for (`+ibpb`); then Linux writes PRED_CMD and
//!   SPEC_CTRL at context switches of processes that asked for protection.
//!
//! A user who wants the guest's kernel to protect its processes from each other by the old means takes them away:
//! `max,-auto-ibrs` (AMD) or `max,-arch-capabilities` (Intel).

mod features;
mod gate;
mod host;
mod leaves;
mod model;
#[cfg(test)]
mod tests;

pub use features::{Class, Feature, FeatureSet, Info, Maker, Register, TABLE};
pub use gate::{Gate, OlderMeaning};
pub use host::{Host, Identity, OsState, Vendor, XsaveComponent};
pub use leaves::{APIC_BUS_HZ, CpuidContext, CpuidResult, ignores_subleaf};
pub use model::{CpuModel, EFER_AIBRSE, ModelError, arch_capabilities, spec_ctrl};
