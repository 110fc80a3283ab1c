//! A small client of the GDB remote serial protocol (GDB manual, appendix E), as far as QEMU's stub speaks it.

use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};

/// A connection to a stub.
pub struct Gdb {
    stream: UnixStream,
    buffer: Vec<u8>,
    /// QEMU has ended: the guest powered off.
    pub ended: bool,
}

impl Gdb {
    /// Connects to the stub's socket, waiting until it is there.
    pub fn connect(socket: &Path, patience: Duration) -> anyhow::Result<Self> {
        let deadline = Instant::now() + patience;
        loop {
            match UnixStream::connect(socket) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(Duration::from_secs(120)))?;
                    let mut gdb = Self { stream, buffer: Vec::new(), ended: false };
                    gdb.start()?;
                    return Ok(gdb);
                }
                Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
                Err(error) => return Err(error).context("QEMU opened no GDB socket"),
            }
        }
    }

    fn start(&mut self) -> anyhow::Result<()> {
        self.ask("qSupported:xmlRegisters=i386")?;
        // Having read the description is what makes QEMU answer `g` in the 64-bit layout with control registers.
        let description = self.ask("qXfer:features:read:target.xml:0,ffb")?;
        ensure!(description.starts_with(['l', 'm']), "QEMU has no target description: {description}");
        self.ask("?")?;
        Ok(())
    }

    /// Sends a command and returns the answer.
    pub fn ask(&mut self, command: &str) -> anyhow::Result<String> {
        self.send(command)?;
        self.receive()
    }

    fn send(&mut self, command: &str) -> anyhow::Result<()> {
        let sum = command.bytes().fold(0u8, u8::wrapping_add);
        let sent = self.stream.write_all(format!("${command}#{sum:02x}").as_bytes());
        self.ended |= sent.as_ref().is_err_and(|error| error.kind() == ErrorKind::BrokenPipe);
        Ok(sent?)
    }

    /// The next packet, acknowledged.
    fn receive(&mut self) -> anyhow::Result<String> {
        loop {
            if let Some(packet) = self.take_packet() {
                self.stream.write_all(b"+")?;
                return Ok(packet);
            }
            let mut chunk = [0; 4096];
            let count =
                self.stream.read(&mut chunk).context("QEMU does not answer (is the guest halted?)")?;
            self.ended |= count == 0;
            ensure!(count > 0, "QEMU closed the GDB connection");
            self.buffer.extend_from_slice(&chunk[..count]);
        }
    }

    /// A whole packet out of the buffer; acknowledgements before it are dropped.
    fn take_packet(&mut self) -> Option<String> {
        let start = self.buffer.iter().position(|&b| b == b'$')?;
        let end = start + self.buffer[start..].iter().position(|&b| b == b'#')?;
        if self.buffer.len() < end + 3 {
            return None;
        }
        let packet = String::from_utf8_lossy(&self.buffer[start + 1..end]).into_owned();
        self.buffer.drain(..end + 3);
        Some(packet)
    }

    /// Continues until a breakpoint.
    pub fn go_on(&mut self) -> anyhow::Result<()> {
        self.stopped("c")
    }

    /// Executes one instruction without taking interrupts (QEMU's default for single steps).
    pub fn step(&mut self) -> anyhow::Result<()> {
        self.stopped("s")
    }

    fn stopped(&mut self, command: &str) -> anyhow::Result<()> {
        let answer = self.ask(command)?;
        self.ended |= answer.starts_with(['W', 'X']);
        ensure!(answer.starts_with(['T', 'S']), "QEMU stopped with '{answer}'");
        Ok(())
    }

    /// Sets or removes a hardware breakpoint at a linear address.
    pub fn breakpoint(&mut self, address: u64, set: bool) -> anyhow::Result<()> {
        let answer = self.ask(&format!("{}1,{address:x},1", if set { 'Z' } else { 'z' }))?;
        ensure!(answer == "OK", "QEMU refuses a breakpoint at {address:#x}: {answer}");
        Ok(())
    }

    /// All registers, in QEMU's layout (see `compare`).
    pub fn registers(&mut self) -> anyhow::Result<Vec<u8>> {
        from_hex(&self.ask("g")?)
    }

    /// Memory at a linear address.
    pub fn memory(&mut self, address: u64, len_bytes: usize) -> anyhow::Result<Vec<u8>> {
        let answer = self.ask(&format!("m{address:x},{len_bytes:x}"))?;
        if answer.starts_with('E') {
            bail!("QEMU cannot read memory at {address:#x}");
        }
        from_hex(&answer)
    }

    /// A command of QEMU's monitor and what it prints.
    pub fn monitor(&mut self, command: &str) -> anyhow::Result<String> {
        let hex: String = command.bytes().map(|b| format!("{b:02x}")).collect();
        let mut answer = self.ask(&format!("qRcmd,{hex}"))?;
        let mut text = Vec::new();
        while answer != "OK" {
            let Some(hex) = answer.strip_prefix('O') else { bail!("QEMU's monitor answers '{answer}'") };
            text.extend(from_hex(hex)?);
            answer = self.receive()?;
        }
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// Ends QEMU.
    pub fn kill(&mut self) {
        // It closes the connection instead of answering.
        let _ = self.send("k");
    }
}

/// Bytes of hex digits; `x` (not available) counts as 0.
fn from_hex(text: &str) -> anyhow::Result<Vec<u8>> {
    let text = text.replace('x', "0");
    ensure!(text.len().is_multiple_of(2) && text.is_ascii(), "odd hex string");
    (0..text.len()).step_by(2).map(|i| Ok(u8::from_str_radix(&text[i..i + 2], 16)?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_is_decoded_and_unknown_is_zero() {
        assert_eq!(from_hex("00ffxx10").expect("hex"), [0, 255, 0, 16]);
        assert!(from_hex("0").is_err() && from_hex("zz").is_err());
    }

    #[test]
    fn packets_are_taken_one_by_one() {
        let (stream, _other) = UnixStream::pair().expect("a socket pair");
        let mut gdb = Gdb { stream, buffer: b"+$OK#9a+$T05#b9$half".to_vec(), ended: false };
        assert_eq!(gdb.take_packet().as_deref(), Some("OK"));
        assert_eq!(gdb.take_packet().as_deref(), Some("T05"));
        assert_eq!(gdb.take_packet(), None);
    }
}
