//! The seam between the program and the machine: assembles a `vmm` machine out of what [`crate::prepare`] prepared, runs it
//! on a [`Console`](crate::terminal::Console), and turns the reason of its end into an exit status.

use std::process::ExitCode;

use crate::prepare::Prepared;

/// Exit statuses of a run that is not ended by the guest's own word.
pub mod status {
    /// Triple fault.
    pub const TRIPLE_FAULT: u8 = 3;
    /// `--timeout` ran out (as timeout(1)).
    pub const TIME_OUT: u8 = 124;
}

/// Runs the machine to its end.
///
/// # Errors
/// A fault of the host; what the guest does is a status.
pub fn launch(prepared: Prepared) -> anyhow::Result<ExitCode> {
    anyhow::bail!(
        "the machine is not assembled yet ({}, {} bytes of kernel); use a later version",
        prepared.kernel_name,
        prepared.kernel.len()
    )
}
