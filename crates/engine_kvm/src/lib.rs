//! The engine on `/dev/kvm`: the guest's instructions run on the host's processor, Linux's KVM comes back with exits, and this crate turns
//! them into what every engine gives to the machine (`engine::Vcpu`, `engine::CpuIo`).
//!
//! # The way of an exit
//! [`vcpu`] enters by `KVM_RUN` → the kernel fills the shared page ([`run_page`]) → [`exit`] makes plain data of it → [`vcpu`] asks the machine
//! through `CpuIo` and writes the answer into the page → enters again. Signals of the outside reach a running vCPU by [`kick`].
//!
//! # Who holds what
//! - Registers, FP state and the registers of [`msr::HELD`] are KVM's while the vCPU runs; [`transfer`] brings them over and back.
//! - Everything else of `x86::CpuState` (other MSRs, the time-stamp offset, what the vCPU is doing) is in an interpreter that stands beside it,
//!   so that the meaning of an MSR is written in one place for all engines. KVM is told to refuse those registers, and asks us.
//! - Interrupt controllers are the machine's ([decision 0021](../../../docs/decisions/0021-kvm-with-our-interrupt-controllers.md)).
//!
//! INV-KVM-1: a state is either KVM's or the interpreter's, never both; `Home` in [`vcpu`] says whose.
//!
//! # Threading
//! A VM's descriptor is shared; a vCPU belongs to its thread. Others touch only `immediate_exit` ([`kick`]).

pub mod count;
pub mod cpuid;
pub mod debug;
pub mod error;
pub mod exit;
pub mod failure;
pub mod fallback;
pub mod kick;
pub mod msr;
pub mod probe;
mod raw;
pub mod registers;
mod run_page;
pub mod segment;
mod transfer;
mod trial;
pub mod vcpu;
pub mod vm;

pub use error::KvmError;
pub use vcpu::KvmVcpu;
pub use vm::KvmVm;
