//! A gdb stub: `gdb` attaches to the machine over a socket and debugs the guest from outside (`docs/debugging.md`).
//!
//! Way of a command: a reader thread puts bytes from the socket into one queue, the run thread puts stops of vCPUs into the
//! same queue; the thread "gdb" works it off with `gdbstub`'s state machine, which calls [`target`]; that reaches vCPUs and
//! memory by orders that the run thread carries out with the machine at rest ([`crate::debug`]).
//!
//! The machine stands still while somebody holds a [`Paused`]: the debugger does from an attachment or a stop until gdb
//! resumes, and a stop brings its own, so that nothing runs between a breakpoint and gdb's answer. `pause` on the control
//! socket, `--timeout` and statistics work meanwhile as ever.
//!
//! INV-GDB-1: whatever ends a session (detach, kill, a lost connection, nonsense from the client), the machine is disarmed
//! and goes on, or ends.

mod memory;
mod registers;
mod target;
mod wire;

use std::collections::VecDeque;
use std::io::{self, Write as _};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::Builder;
use std::time::Duration;

use engine::DebugStop;
use engine::debug::WatchKind;
use gdbstub::common::Signal;
use gdbstub::stub::state_machine::GdbStubStateMachine;
use gdbstub::stub::{DisconnectReason, GdbStub, MultiThreadStopReason};
use gdbstub::target::ext::breakpoints::WatchKind as GdbWatchKind;

pub use registers::Arch;

use crate::debug::Stopped;
use crate::handle::{Paused, VmHandle};
use target::{Debuggee, tid};
use wire::{Stream, Wire};

/// The longest packet, either way.
const PACKET_BYTES: usize = 64 << 10;
/// How long the end of the machine waits for gdb to be told.
const FAREWELL: Duration = Duration::from_millis(500);
/// The packet "OK".
const KILLED: &[u8] = b"$OK#9a";
/// A pause after a connection that could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// What happens to the debugger.
pub(crate) enum Message {
    /// The client sent these.
    Bytes(Vec<u8>),
    /// The client is gone.
    Closed,
    /// A vCPU stopped.
    Stopped(Stopped),
    /// The machine has ended with this status.
    Ended(u8),
}

/// Where gdb is waited for.
#[derive(Debug)]
pub enum Listener {
    /// A TCP port.
    Tcp(TcpListener),
    /// A socket in the file system.
    Unix(UnixListener),
}

impl Listener {
    fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Tcp(listener) => listener.accept().map(|(stream, _)| Stream::Tcp(stream)),
            Self::Unix(listener) => listener.accept().map(|(stream, _)| Stream::Unix(stream)),
        }
    }
}

/// The stub of a machine. It lives as long as the process; one gdb is served at a time, the next one waits.
pub struct Stub {
    queue: Sender<Message>,
    busy: Arc<AtomicBool>,
    told: Receiver<()>,
}

impl Stub {
    /// Serves gdb at `listener`. With `wait` the machine does not run before the first gdb has attached. Without `arch` the
    /// guest is shown as what vCPU 0 executes when gdb attaches.
    ///
    /// # Errors
    /// When no thread can be had.
    pub fn start(listener: Listener, handle: VmHandle, wait: bool, arch: Option<Arch>) -> io::Result<Self> {
        let (queue, messages) = channel();
        let (tell, told) = channel();
        let busy = Arc::new(AtomicBool::new(false));
        let hold = wait.then(|| handle.hold());
        let server = Server { handle, arch, queue: queue.clone(), messages, busy: Arc::clone(&busy), tell };
        Builder::new().name("gdb".to_owned()).spawn(move || server.serve(&listener, hold))?;
        Ok(Self { queue, busy, told })
    }

    /// Tells an attached gdb that the machine has ended with this status.
    pub fn end(self, status: u8) {
        let _gone = self.queue.send(Message::Ended(status));
        if self.busy.load(Ordering::SeqCst) {
            let _slow = self.told.recv_timeout(FAREWELL);
        }
    }
}

/// The thread "gdb".
struct Server {
    handle: VmHandle,
    arch: Option<Arch>,
    queue: Sender<Message>,
    messages: Receiver<Message>,
    busy: Arc<AtomicBool>,
    tell: Sender<()>,
}

/// Why a session is over.
#[derive(Debug)]
enum Over {
    /// The client left; the machine goes on.
    Left,
    /// The client wants the machine's end.
    Kill,
    /// The machine has ended.
    Ended,
}

impl Server {
    fn serve(&self, listener: &Listener, mut hold: Option<Paused>) {
        loop {
            let stream = match listener.accept() {
                Ok(stream) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept gdb's connection");
                    std::thread::sleep(ACCEPT_PAUSE);
                    continue;
                }
            };
            self.busy.store(true, Ordering::SeqCst);
            let over = self.session(stream, &mut hold);
            self.busy.store(false, Ordering::SeqCst);
            match over {
                Ok(Over::Left) => {}
                Ok(Over::Kill) => self.handle.quit(),
                Ok(Over::Ended) => {
                    let _gone = self.tell.send(());
                    return;
                }
                Err(error) => tracing::warn!(%error, "a session with gdb could not start"),
            }
        }
    }

    /// From a connection to its end.
    fn session(&self, stream: Stream, hold: &mut Option<Paused>) -> io::Result<Over> {
        let reader = stream.read_into(self.queue.clone())?;
        let Some(target) = Debuggee::attach(&self.handle, self.queue.clone(), self.arch) else {
            stream.shutdown();
            return Ok(Over::Ended);
        };
        *hold = None;
        let mut session = Session {
            target,
            messages: &self.messages,
            input: VecDeque::new(),
            later: VecDeque::new(),
            parting: None,
        };
        let wire = Wire::new(stream.try_clone()?);
        // A client's packet that breaks an invariant of gdbstub's must not leave the machine armed (INV-GDB-1).
        let over = catch_unwind(AssertUnwindSafe(|| session.converse(wire))).unwrap_or(Over::Left);
        if matches!(over, Over::Kill) {
            // `vKill` wants an answer, which gdbstub gives in extended mode only; after `k` nobody reads it.
            let _gone = stream.try_clone().and_then(|mut stream| stream.write_all(KILLED));
        }
        stream.shutdown();
        let _panicked = reader.join();
        if !matches!(over, Over::Ended) {
            session.target.detach();
        }
        let ended = self.messages.try_iter().any(|message| matches!(message, Message::Ended(_)));
        Ok(if ended { Over::Ended } else { over })
    }
}

struct Session<'a> {
    target: Debuggee,
    messages: &'a Receiver<Message>,
    /// Bytes that the state machine has not had yet.
    input: VecDeque<u8>,
    /// Stops that came while gdb dealt with another one, and that would not come again.
    later: VecDeque<(usize, DebugStop)>,
    /// The client's or the machine's end, found before its turn.
    parting: Option<Message>,
}

type Machine = GdbStubStateMachine<'static, Debuggee, Wire>;
type Error = gdbstub::stub::GdbStubError<std::convert::Infallible, io::Error>;
type Reason = MultiThreadStopReason<u64>;

impl Session<'_> {
    fn converse(&mut self, wire: Wire) -> Over {
        let stub = GdbStub::builder(wire).packet_buffer_size(PACKET_BYTES).build();
        // A buffer was given, so it builds.
        let Ok(stub) = stub else { return Over::Left };
        let mut machine = match stub.run_state_machine(&mut self.target) {
            Ok(machine) => machine,
            Err(error) => return Self::broken(&error),
        };
        loop {
            match self.advance(machine) {
                Ok(Ok(next)) => machine = next,
                Ok(Err(over)) => return over,
                Err(error) => return Self::broken(&error),
            }
        }
    }

    fn broken(error: &Error) -> Over {
        // A client that goes without a word is no news.
        if error.is_connection_error() {
            tracing::debug!(%error, "gdb is gone");
        } else {
            tracing::warn!(%error, "gdb's connection is given up");
        }
        Over::Left
    }

    /// One event: a byte, a stop, the end.
    fn advance(&mut self, machine: Machine) -> Result<Result<Machine, Over>, Error> {
        match machine {
            GdbStubStateMachine::Idle(gdb) => match self.next_byte() {
                Some(byte) => gdb.incoming_data(&mut self.target, byte).map(Ok),
                None => match self.next_message() {
                    Some(Message::Stopped(stopped)) => {
                        self.keep(&stopped);
                        Ok(Ok(gdb.into()))
                    }
                    Some(Message::Ended(_)) => Ok(Err(Over::Ended)),
                    Some(Message::Bytes(_)) => Ok(Ok(gdb.into())),
                    Some(Message::Closed) | None => Ok(Err(Over::Left)),
                },
            },
            GdbStubStateMachine::Running(gdb) => {
                if let Some(byte) = self.next_byte() {
                    return gdb.incoming_data(&mut self.target, byte).map(Ok);
                }
                if let Some((vcpu, stop)) = self.later.pop_front() {
                    self.stop();
                    let reason = self.reason(vcpu, stop);
                    return gdb.report_stop(&mut self.target, reason).map(Ok);
                }
                match self.next_message() {
                    Some(Message::Stopped(Stopped { vcpu, stop, paused })) => {
                        self.target.take(paused);
                        let reason = self.reason(vcpu, stop);
                        gdb.report_stop(&mut self.target, reason).map(Ok)
                    }
                    Some(Message::Ended(status)) => {
                        gdb.report_stop(&mut self.target, Reason::Exited(status)).map(|_| Err(Over::Ended))
                    }
                    Some(Message::Bytes(_)) => Ok(Ok(gdb.into())),
                    Some(Message::Closed) | None => Ok(Err(Over::Left)),
                }
            }
            GdbStubStateMachine::CtrlCInterrupt(gdb) => {
                self.stop();
                // A breakpoint may have been hit meanwhile.
                let reason = match self.later.pop_front() {
                    Some((vcpu, stop)) => self.reason(vcpu, stop),
                    None => {
                        Reason::SignalWithThread { tid: tid(self.target.busiest()), signal: Signal::SIGINT }
                    }
                };
                gdb.interrupt_handled(&mut self.target, Some(reason)).map(Ok)
            }
            GdbStubStateMachine::Disconnected(gdb) => Ok(Err(match gdb.get_reason() {
                DisconnectReason::Kill => Over::Kill,
                DisconnectReason::Disconnect => Over::Left,
                DisconnectReason::TargetExited(_) | DisconnectReason::TargetTerminated(_) => Over::Ended,
            })),
        }
    }

    fn next_byte(&mut self) -> Option<u8> {
        self.input.pop_front()
    }

    /// The next message; bytes have gone to [`Session::input`] by then.
    fn next_message(&mut self) -> Option<Message> {
        let message = self.parting.take().map_or_else(|| self.messages.recv().ok(), Some)?;
        Some(match message {
            Message::Bytes(bytes) => {
                self.input.extend(bytes);
                Message::Bytes(Vec::new())
            }
            other => other,
        })
    }

    /// Stops the machine by our own will.
    fn stop(&mut self) {
        if !self.target.pause() {
            // It has ended: the message that says so follows.
            return;
        }
        while let Ok(message) = self.messages.try_recv() {
            match message {
                Message::Stopped(Stopped { vcpu, stop, .. }) => self.later.push_back((vcpu, stop)),
                Message::Bytes(bytes) => self.input.extend(bytes),
                other => self.parting = Some(other),
            }
        }
    }

    /// A stop while the machine stands still already. Breakpoints are hit again when it goes on.
    fn keep(&mut self, stopped: &Stopped) {
        if matches!(stopped.stop, DebugStop::Watch { .. }) {
            self.later.push_back((stopped.vcpu, stopped.stop));
        }
    }

    fn reason(&mut self, vcpu: usize, stop: DebugStop) -> Reason {
        let tid = tid(vcpu);
        match stop {
            DebugStop::Step => Reason::SignalWithThread { tid, signal: Signal::SIGTRAP },
            DebugStop::Breakpoint if self.target.is_hardware_breakpoint(vcpu) => Reason::HwBreak(tid),
            DebugStop::Breakpoint => Reason::SwBreak(tid),
            DebugStop::Watch { address, kind } => {
                let kind = match kind {
                    WatchKind::Read => GdbWatchKind::Read,
                    WatchKind::Write => GdbWatchKind::Write,
                    WatchKind::Access => GdbWatchKind::ReadWrite,
                };
                Reason::Watch { tid, kind, addr: address }
            }
        }
    }
}
