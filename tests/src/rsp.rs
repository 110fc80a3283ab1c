//! A client of gdb's remote protocol (gdb manual, appendix E), for what a test wants to see byte by byte.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// A connection without surprises: every request is answered in this time.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection to a stub.
pub struct Rsp {
    stream: UnixStream,
}

/// Joins hexadecimal digits.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Rsp {
    /// Connects as soon as the socket is there.
    ///
    /// # Panics
    /// When it does not come.
    #[must_use]
    pub fn connect(path: &Path) -> Self {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(PATIENCE)).expect("a socket takes a limit");
                    return Self { stream };
                }
                Err(error) if Instant::now() > deadline => panic!("{}: {error}", path.display()),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// Sends a packet.
    ///
    /// # Panics
    /// When the connection is gone.
    pub fn send(&mut self, packet: &str) {
        let sum = packet.bytes().fold(0u8, u8::wrapping_add);
        self.raw(format!("${packet}#{sum:02x}").as_bytes());
    }

    /// Sends bytes as they are; 3 interrupts.
    ///
    /// # Panics
    /// When the connection is gone.
    pub fn raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("the stub reads");
    }

    fn byte(&mut self) -> u8 {
        let mut byte = [0];
        self.stream.read_exact(&mut byte).expect("the stub answers");
        byte[0]
    }

    /// The next packet, run lengths expanded.
    ///
    /// # Panics
    /// When none comes, or a damaged one.
    pub fn receive(&mut self) -> String {
        while self.byte() != b'$' {}
        let (mut text, mut sum) = (String::new(), 0u8);
        loop {
            let byte = self.byte();
            match byte {
                b'#' => break,
                b'*' => {
                    let count = self.byte();
                    sum = sum.wrapping_add(byte).wrapping_add(count);
                    let last = text.chars().next_back().expect("a run repeats something");
                    text.extend(std::iter::repeat_n(last, usize::from(count) - 29));
                    continue;
                }
                _ => text.push(char::from(byte)),
            }
            sum = sum.wrapping_add(byte);
        }
        let expected = [self.byte(), self.byte()];
        assert_eq!(format!("{sum:02x}").as_bytes(), expected, "checksum of {text}");
        // After the last answer nobody may read it any more.
        let _gone = self.stream.write_all(b"+");
        text
    }

    /// Sends a packet and waits for its answer.
    pub fn ask(&mut self, packet: &str) -> String {
        self.send(packet);
        self.receive()
    }

    /// Sends a packet that is answered by OK.
    ///
    /// # Panics
    /// When it is not.
    pub fn command(&mut self, packet: &str) {
        assert_eq!(self.ask(packet), "OK", "{packet}");
    }

    /// A register by its number, as a little-endian number.
    ///
    /// # Panics
    /// When there is none.
    pub fn register(&mut self, number: usize) -> u64 {
        let answer = self.ask(&format!("p{number:x}"));
        let byte = |i: usize| u64::from_str_radix(&answer[i..i + 2], 16).expect("hexadecimal");
        (0..answer.len().min(16)).step_by(2).rev().fold(0, |n, i| n << 8 | byte(i))
    }

    /// Bytes of memory, as hexadecimal digits.
    pub fn memory(&mut self, address: u64, len: usize) -> String {
        self.ask(&format!("m{address:x},{len:x}"))
    }
}
