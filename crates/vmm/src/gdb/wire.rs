//! The connection to gdb.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::Sender;
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use gdbstub::conn::Connection;

use super::Message;

/// A client that does not read for so long is given up.
const WRITE_LIMIT: Duration = Duration::from_secs(10);

/// Either kind of socket.
pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    pub fn try_clone(&self) -> io::Result<Self> {
        match self {
            Self::Tcp(stream) => stream.try_clone().map(Self::Tcp),
            Self::Unix(stream) => stream.try_clone().map(Self::Unix),
        }
    }

    /// Ends both directions, for all clones.
    pub fn shutdown(&self) {
        // The other side may have been faster.
        let _gone = match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
        };
    }

    /// Starts the thread that puts what comes into `queue`; it ends with the connection.
    pub fn read_into(&self, queue: Sender<Message>) -> io::Result<JoinHandle<()>> {
        match self {
            // Packets are small, and an answer is waited for.
            Self::Tcp(stream) => {
                stream.set_nodelay(true)?;
                stream.set_write_timeout(Some(WRITE_LIMIT))?;
            }
            Self::Unix(stream) => stream.set_write_timeout(Some(WRITE_LIMIT))?,
        }
        let mut stream = self.try_clone()?;
        Builder::new().name("gdb-reader".to_owned()).spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(len @ 1..) = stream.read(&mut buffer) {
                if queue.send(Message::Bytes(buffer[..len].to_vec())).is_err() {
                    return;
                }
            }
            let _gone = queue.send(Message::Closed);
        })
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(buffer),
            Self::Unix(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => Write::write(stream, bytes),
            Self::Unix(stream) => Write::write(stream, bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The writing end: whole packets at a time.
pub(super) struct Wire {
    stream: Stream,
    packet: Vec<u8>,
}

impl Wire {
    pub const fn new(stream: Stream) -> Self {
        Self { stream, packet: Vec::new() }
    }
}

impl Connection for Wire {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.packet.push(byte);
        Ok(())
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.packet.extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let packet = std::mem::take(&mut self.packet);
        self.stream.write_all(&packet)
    }
}
