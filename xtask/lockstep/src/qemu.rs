//! QEMU with the guest, stopped.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;

use crate::gdb::Gdb;

/// What QEMU is started with.
pub struct Guest<'a> {
    pub kernel: &'a Path,
    pub initrd: Option<&'a Path>,
    pub append: Option<&'a str>,
    pub memory_mib: u64,
    pub cpu: &'a str,
}

/// A running QEMU; it ends with this value.
pub struct Qemu {
    child: Child,
    /// Its debug connection.
    pub gdb: Gdb,
    directory: tempfile::TempDir,
}

impl Qemu {
    /// Starts QEMU and stops it before its first instruction.
    pub fn start(guest: &Guest<'_>) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let socket = directory.path().join("gdb");
        let mut command = Command::new("qemu-system-x86_64");
        command.args([
            "-accel",
            "tcg",
            "-S",
            "-display",
            "none",
            "-monitor",
            "none",
            "-no-reboot",
            "-net",
            "none",
        ]);
        command.args(["-cpu", guest.cpu, "-m", &guest.memory_mib.to_string()]);
        command.arg("-gdb").arg(format!("unix:{},server=on,wait=off", socket.display()));
        command.arg("-serial").arg(format!("file:{}", directory.path().join("serial").display()));
        command.arg("-kernel").arg(guest.kernel);
        if let Some(initrd) = guest.initrd {
            command.arg("-initrd").arg(initrd);
        }
        if let Some(append) = guest.append {
            command.args(["-append", append]);
        }
        let child = command.stdin(Stdio::null()).spawn().context("cannot start qemu-system-x86_64")?;
        let gdb = Gdb::connect(&socket, Duration::from_secs(20))?;
        Ok(Self { child, gdb, directory })
    }

    /// All guest RAM below 3 GiB, from address 0.
    pub fn memory(&mut self, len_bytes: u64) -> anyhow::Result<Vec<u8>> {
        let file: PathBuf = self.directory.path().join("memory");
        let said = self.gdb.monitor(&format!("pmemsave 0 {len_bytes:#x} \"{}\"", file.display()))?;
        let content = std::fs::read(&file).with_context(|| format!("QEMU wrote no memory image: {said}"))?;
        std::fs::remove_file(&file)?;
        Ok(content)
    }

    /// What the guest has written to its serial port.
    pub fn serial(&self) -> String {
        let bytes = std::fs::read(self.directory.path().join("serial")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.gdb.kill();
        std::thread::sleep(Duration::from_millis(50));
        // It may be gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
