//! The seam between the program and the machine: assembles a `vmm` machine out of what [`crate::prepare`] prepared, runs it
//! on a [`Console`](crate::terminal::Console), and turns the reason of its end into an exit status.

use std::process::ExitCode;

use crate::prepare::Prepared;
use crate::terminal::QuitReason;

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest powered off, or reset itself under `--no-reboot`.
    GuestDone,
    /// The guest wrote this to port 0xf4 under `--isa-debug-exit`.
    DebugExit(u32),
    /// A vCPU shut down by a triple fault.
    TripleFault,
    /// `--timeout` ran out.
    TimeOut,
    /// The user or the system ended it.
    Quit(QuitReason),
}

impl End {
    /// The exit status of the program; the operating system keeps its low eight bits, as it does for QEMU.
    #[must_use]
    pub fn exit_status(self) -> u8 {
        match self {
            Self::GuestDone => 0,
            Self::DebugExit(value) => (value << 1 | 1).to_le_bytes()[0],
            Self::TripleFault => 3,
            Self::TimeOut => 124, // as timeout(1)
            Self::Quit(reason) => reason.exit_status(),
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_statuses_are_as_documented() {
        let ends = [
            (End::GuestDone, 0),
            (End::DebugExit(0), 1),
            (End::DebugExit(0x10), 33),
            (End::DebugExit(0x8000_0080), 1),
            (End::TripleFault, 3),
            (End::TimeOut, 124),
            (End::Quit(QuitReason::Key), 0),
        ];
        for (end, status) in ends {
            assert_eq!(end.exit_status(), status, "{end:?}");
        }
    }
}
