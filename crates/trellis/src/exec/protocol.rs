//! What `trellis exec` and its agent in the guest say to each other over the channel: frames of a kind, a 32-bit length and
//! so many bytes.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// Name of the channel's port in the guest.
pub const PORT: &str = "trellis.exec";
/// Most bytes of a frame; more is not ours.
pub const MAX_FRAME: usize = 4 << 20;
/// Bytes of data that go into a frame.
pub const BLOCK: usize = 32 << 10;

/// Kinds of frames.
pub mod kind {
    /// To the guest: a [`super::Start`], as JSON.
    pub const START: u8 = 0;
    /// To the guest: standard input; without bytes, its end.
    pub const STDIN: u8 = 1;
    /// To the guest: a signal's number, one byte.
    pub const SIGNAL: u8 = 2;
    /// To the guest: columns and rows of the terminal, 16 bits each.
    pub const SIZE: u8 = 3;
    /// To the host: standard output.
    pub const STDOUT: u8 = 16;
    /// To the host: standard error.
    pub const STDERR: u8 = 17;
    /// To the host: the exit status, one byte; nothing follows.
    pub const EXIT: u8 = 18;
    /// To the host: the agent is there.
    pub const READY: u8 = 19;
    /// To the host: so many bytes of standard input, 32 bits, went into the command.
    pub const TAKEN: u8 = 20;
}

/// A limit of a process (getrlimit(2)); `None` is infinite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// What holds.
    pub current: Option<u64>,
    /// What it may be raised to.
    pub maximum: Option<u64>,
}

/// What is to be run, and where. Strings are bytes, for names need not be text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// Program and arguments.
    pub command: Vec<Vec<u8>>,
    /// The whole environment.
    pub environment: Vec<(Vec<u8>, Vec<u8>)>,
    /// Working directory.
    pub directory: Vec<u8>,
    /// Who runs it.
    pub user: u32,
    /// His group.
    pub group: u32,
    /// His other groups.
    pub groups: Vec<u32>,
    /// File creation mask.
    pub umask: u32,
    /// Limits, in the order of `exec::child`.
    pub limits: Vec<Limit>,
    /// Columns and rows of the terminal that input and output are.
    pub terminal: Option<(u16, u16)>,
    /// Standard error is it, too.
    pub terminal_errors: bool,
}

/// Writes a frame, whole.
///
/// # Errors
/// Those of `to`.
pub fn write_frame(to: &mut impl Write, kind: u8, data: &[u8]) -> io::Result<()> {
    to.write_all(&frame(kind, data))
}

/// The bytes of a frame.
#[must_use]
pub fn frame(kind: u8, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(data.len() + 5);
    bytes.push(kind);
    bytes.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_le_bytes());
    bytes.extend(data);
    bytes
}

/// Reads a frame.
///
/// # Errors
/// Those of `from`; a frame that is too long.
pub fn read_frame(from: &mut impl Read) -> io::Result<(u8, Vec<u8>)> {
    let mut header = [0; 5];
    from.read_exact(&mut header)?;
    let mut data = vec![0; length(&header)?];
    from.read_exact(&mut data)?;
    Ok((header[0], data))
}

fn length(header: &[u8; 5]) -> io::Result<usize> {
    let [_, a, b, c, d] = *header;
    match usize::try_from(u32::from_le_bytes([a, b, c, d])) {
        Ok(len) if len <= MAX_FRAME => Ok(len),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "a frame of the channel is too long")),
    }
}

/// Puts frames together out of pieces of any length. What comes is the guest's: at most [`MAX_FRAME`] is kept.
#[derive(Debug, Default)]
pub struct Frames(Vec<u8>);

impl Frames {
    /// Takes bytes, hands on every frame that is whole.
    ///
    /// # Errors
    /// A frame that is too long; what comes then has no meaning any more.
    pub fn take(&mut self, bytes: &[u8], mut each: impl FnMut(u8, &[u8])) -> io::Result<()> {
        self.0.extend_from_slice(bytes);
        let mut rest = &self.0[..];
        while let Some((header, after)) = rest.split_first_chunk::<5>() {
            let Some((data, next)) = after.split_at_checked(length(header)?) else { break };
            each(header[0], data);
            rest = next;
        }
        let done = self.0.len() - rest.len();
        self.0.drain(..done);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_through_in_pieces() {
        let mut bytes = frame(16, b"one");
        bytes.extend(frame(18, b""));
        bytes.extend(frame(17, &[7; 1000]));
        let (mut frames, mut seen) = (Frames::default(), Vec::new());
        for piece in bytes.chunks(3) {
            frames.take(piece, |kind, data| seen.push((kind, data.to_vec()))).unwrap();
        }
        assert_eq!(seen, [(16, b"one".to_vec()), (18, vec![]), (17, vec![7; 1000])]);
        let (kind, data) = read_frame(&mut &bytes[..]).unwrap();
        assert_eq!((kind, &data[..]), (16, &b"one"[..]));
    }

    #[test]
    fn absurd_length_is_an_error() {
        assert!(Frames::default().take(&[16, 0xff, 0xff, 0xff, 0xff], |_, _| ()).is_err());
        assert!(read_frame(&mut &[16, 0xff, 0xff, 0xff, 0x7f, 1][..]).is_err());
    }
}
