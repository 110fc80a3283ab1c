//! TCP: each connection of the guest ends here, at smoltcp's implementation, and goes on as a connection of the host.
//!
//! Way of the data: guest → [`Wire`] → smoltcp's socket → host's socket, and back; each has its window, so that who is slow
//! stops who is fast and nothing piles up in between (INV-USER-1). A SYN waits here until the host is connected: the guest
//! is refused exactly when the host was. Frames to the guest are left to it to be segmented and summed, if it accepts that.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{set_tcp_nodelay, socket_error};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketFlags, SocketType, connect, recv, send, shutdown,
    socket_with,
};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::wire::{HardwareAddress, IpCidr, TcpPacket};

use super::outbox::Outbox;
use super::wire::{Wire, Wired};
use super::{GATEWAY, GATEWAY6, PREFIX6, Packet, Routes};
use crate::{Forward, NetError, Offloads};

/// Most connections (INV-USER-1).
const FLOWS: usize = 320;
/// Of each connection, what the guest sent and the host has not taken.
const FROM_GUEST: usize = 256 << 10;
/// And the other way.
const TO_GUEST: usize = 256 << 10;
/// A guest that does not acknowledge for so long is gone.
const PATIENCE: Duration = Duration::from_secs(300);
/// Ports that the router lends to peers of forwarded ports.
const LENT: std::ops::Range<u16> = 32_768..61_000;

/// The two ends as the guest sees them.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Ends {
    guest: SocketAddr,
    other: SocketAddr,
}

enum Stage {
    /// The host is being connected; the guest's SYN waits.
    Connecting(Vec<u8>),
    /// smoltcp has it.
    Open(SocketHandle),
}

struct Flow {
    ends: Ends,
    stage: Stage,
    host: OwnedFd,
    /// The host will send no more.
    host_ended: bool,
    /// The host was told that the guest will send no more.
    guest_ended: bool,
    /// The host takes no more for now.
    blocked: bool,
    /// The host's socket was found ready.
    ready: bool,
}

/// All connections.
pub(super) struct Tcp {
    wire: Wire,
    interface: Interface,
    sockets: SocketSet<'static>,
    flows: Vec<Flow>,
    listeners: Vec<(TcpListener, Forward)>,
    next_lent: u16,
    epoch: Instant,
    deadline: Option<Instant>,
    pub opened: u64,
    pub refused: u64,
}

/// A forward that cannot be had.
pub(super) fn cannot(forward: &Forward, source: io::Error) -> NetError {
    let hint = match source.kind() {
        io::ErrorKind::AddrInUse => "; take another port of the host",
        io::ErrorKind::PermissionDenied => "; ports below 1024 are the administrator's, take a higher one",
        io::ErrorKind::AddrNotAvailable => "; this host has no such address",
        _ => "",
    };
    NetError::Forward { forward: forward.to_string(), source, hint }
}

impl Tcp {
    pub fn new<'a>(forwards: impl Iterator<Item = &'a Forward>) -> Result<Self, NetError> {
        let open = |forward: &Forward| {
            let listener = TcpListener::bind((forward.address, forward.port))
                .and_then(|listener| listener.set_nonblocking(true).map(|()| listener));
            listener.map(|listener| (listener, *forward)).map_err(|source| cannot(forward, source))
        };
        let listeners = forwards.map(open).collect::<Result<_, _>>()?;
        let epoch = Instant::now();
        let mut wire = Wire::default();
        Ok(Self {
            interface: interface(&mut wire),
            wire,
            sockets: SocketSet::new(Vec::new()),
            flows: Vec::new(),
            listeners,
            next_lent: LENT.start,
            epoch,
            deadline: None,
            opened: 0,
            refused: 0,
        })
    }

    /// Ends all connections; the next guest accepts so much.
    pub fn start(&mut self, accepts: Offloads) {
        self.flows.clear();
        self.sockets = SocketSet::new(Vec::new());
        self.wire = Wire::new(accepts);
        self.interface = interface(&mut self.wire);
    }

    /// A packet of the guest.
    pub fn take(&mut self, bytes: &[u8], packet: Packet<'_>, routes: Routes) {
        let Ok(tcp) = TcpPacket::new_checked(packet.payload) else { return };
        let ends = Ends {
            guest: SocketAddr::new(packet.from, tcp.src_port()),
            other: SocketAddr::new(packet.to, tcp.dst_port()),
        };
        if tcp.syn() && !tcp.ack() && tcp.src_port() != 0 {
            match self.flows.iter().find(|flow| flow.ends == ends).map(|flow| &flow.stage) {
                // The guest repeats itself while the host is being connected.
                Some(Stage::Connecting(_)) => return,
                Some(Stage::Open(_)) => {}
                None => {
                    if self.begin(ends, bytes, routes) {
                        return;
                    }
                    self.refused += 1;
                }
            }
        }
        // What belongs to no connection is answered with a reset there.
        self.wire.receive(bytes);
    }

    /// Begins to connect the host.
    fn begin(&mut self, ends: Ends, syn: &[u8], routes: Routes) -> bool {
        if self.flows.len() >= FLOWS {
            return false;
        }
        let Some(Ok(host)) = routes.host(ends.other).map(begin_connect) else { return false };
        self.flows.push(Flow::new(ends, Stage::Connecting(syn.to_vec()), host));
        true
    }

    fn now(&self, now: Instant) -> smoltcp::time::Instant {
        let micros = now.duration_since(self.epoch).as_micros();
        smoltcp::time::Instant::from_micros(i64::try_from(micros).unwrap_or(i64::MAX))
    }

    /// Moves everything on that can move.
    pub fn work(&mut self, outbox: &mut Outbox, now: Instant) {
        self.find_ready();
        self.settle_connecting(outbox, now);
        self.accept(outbox);
        // First what the guest sent, so that there is something for the host and room for the guest.
        self.poll(outbox, now);
        for flow in &mut self.flows {
            if let Stage::Open(handle) = flow.stage {
                flow.pump(self.sockets.get_mut(handle));
            }
        }
        self.poll(outbox, now);
        self.drop_ended();
        let at = self.now(now);
        let delay = self.interface.poll_delay(at, &self.sockets);
        self.deadline = delay.map(|delay| now + Duration::from(delay));
    }

    fn poll(&mut self, outbox: &mut Outbox, now: Instant) {
        let at = self.now(now);
        self.interface.poll(at, &mut Wired { wire: &mut self.wire, outbox }, &mut self.sockets);
    }

    /// When to work again whatever happens; with a full outbox nothing can be done before the guest takes something.
    pub fn deadline(&self, outbox: &Outbox) -> Option<Instant> {
        self.deadline.filter(|_| outbox.has_room())
    }

    /// Marks the connections whose host's socket is ready.
    fn find_ready(&mut self) {
        let (mut list, mut of) = (Vec::new(), Vec::new());
        self.interests(|index, fd, flags| {
            if let Some(index) = index {
                list.push(PollFd::from_borrowed_fd(fd, flags));
                of.push(index);
            }
        });
        if list.is_empty() || poll(&mut list, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_err() {
            return;
        }
        let ready: Vec<bool> = list.iter().map(|fd| !fd.revents().is_empty()).collect();
        for (index, ready) in of.into_iter().zip(ready) {
            self.flows[index].ready = ready;
        }
    }

    /// What is waited for: the number of the flow (none: a forwarded port), its socket, and for what.
    pub fn interests<'a>(&'a self, mut add: impl FnMut(Option<usize>, BorrowedFd<'a>, PollFlags)) {
        for (index, flow) in self.flows.iter().enumerate() {
            let flags = match flow.stage {
                Stage::Connecting(_) => PollFlags::OUT,
                Stage::Open(handle) => {
                    let socket: &Socket<'_> = self.sockets.get(handle);
                    let read = !flow.host_ended && socket.can_send();
                    let write = flow.blocked && socket.can_recv();
                    let only = |wanted, flag| if wanted { flag } else { PollFlags::empty() };
                    only(read, PollFlags::IN) | only(write, PollFlags::OUT)
                }
            };
            if !flags.is_empty() {
                add(Some(index), flow.host.as_fd(), flags);
            }
        }
        if self.flows.len() < FLOWS {
            for (listener, _) in &self.listeners {
                add(None, listener.as_fd(), PollFlags::IN);
            }
        }
    }

    /// Connections of the host that are made, or refused.
    fn settle_connecting(&mut self, outbox: &mut Outbox, now: Instant) {
        let mut index = 0;
        while index < self.flows.len() {
            let flow = &mut self.flows[index];
            let Stage::Connecting(syn) = &mut flow.stage else {
                index += 1;
                continue;
            };
            if !std::mem::take(&mut flow.ready) {
                index += 1;
                continue;
            }
            let syn = std::mem::take(syn);
            if matches!(socket_error(&flow.host), Ok(Ok(()))) {
                let mut socket = new_socket();
                let at = (flow.ends.other.ip(), flow.ends.other.port());
                if socket.listen(at).is_ok() {
                    flow.stage = Stage::Open(self.sockets.add(socket));
                    self.opened += 1;
                }
                index += 1;
            } else {
                self.flows.swap_remove(index);
                self.refused += 1;
            }
            // The socket that listens is there for this SYN alone; without one smoltcp refuses.
            self.poll(outbox, now);
            self.wire.receive(&syn);
            self.poll(outbox, now);
        }
    }

    /// Takes who came to a forwarded port.
    fn accept(&mut self, outbox: &Outbox) {
        for index in 0..self.listeners.len() {
            while self.flows.len() < FLOWS {
                let (listener, forward) = &self.listeners[index];
                let (guest_port, Ok((stream, _))) = (forward.guest_port, listener.accept()) else { break };
                if stream.set_nonblocking(true).and_then(|()| stream.set_nodelay(true)).is_err() {
                    continue;
                }
                let ends = Ends {
                    guest: SocketAddr::new(outbox.guest.into(), guest_port),
                    other: SocketAddr::new(GATEWAY.into(), self.lend()),
                };
                let mut socket = new_socket();
                if socket.connect(self.interface.context(), ends.guest, ends.other).is_ok() {
                    let handle = self.sockets.add(socket);
                    self.flows.push(Flow::new(ends, Stage::Open(handle), stream.into()));
                    self.opened += 1;
                }
            }
        }
    }

    /// A port of the router that no connection has.
    fn lend(&mut self) -> u16 {
        loop {
            let port = self.next_lent;
            self.next_lent = if port + 1 < LENT.end { port + 1 } else { LENT.start };
            // There are many times as many ports as connections.
            if !self
                .flows
                .iter()
                .any(|flow| flow.ends.other.ip() == GATEWAY && flow.ends.other.port() == port)
            {
                return port;
            }
        }
    }

    /// Lets go of connections that both sides have ended. What a last acknowledgement got lost for is answered with a reset.
    fn drop_ended(&mut self) {
        let sockets = &mut self.sockets;
        self.flows.retain(|flow| {
            let Stage::Open(handle) = flow.stage else { return true };
            let state = sockets.get::<Socket<'_>>(handle).state();
            // A socket that still listens heard a SYN that it did not like.
            let ended = matches!(state, State::Closed | State::TimeWait | State::Listen);
            if ended {
                sockets.remove(handle);
            }
            !ended
        });
    }
}

impl Flow {
    fn new(ends: Ends, stage: Stage, host: OwnedFd) -> Self {
        Self { ends, stage, host, host_ended: false, guest_ended: false, blocked: false, ready: true }
    }

    /// Carries data both ways, as far as it goes.
    fn pump(&mut self, socket: &mut Socket<'_>) {
        if std::mem::take(&mut self.ready) {
            self.blocked = false;
            self.serve_guest(socket);
        }
        self.serve_host(socket);
    }

    fn serve_guest(&mut self, socket: &mut Socket<'_>) {
        while !self.host_ended && socket.can_send() {
            let host = &self.host;
            let receive = |room: &mut [u8]| match recv(host, &mut *room, RecvFlags::DONTWAIT) {
                Ok((len, _)) => (len, Ok(len)),
                Err(error) => (0, Err(error)),
            };
            match socket.send(receive) {
                Ok(Ok(0)) => {
                    self.host_ended = true;
                    socket.close();
                }
                Ok(Ok(_)) => {}
                Ok(Err(Errno::WOULDBLOCK)) | Err(_) => return,
                Ok(Err(Errno::INTR)) => {}
                Ok(Err(_)) => return socket.abort(),
            }
        }
    }

    fn serve_host(&mut self, socket: &mut Socket<'_>) {
        while !self.blocked && socket.can_recv() {
            let host = &self.host;
            let give = |data: &mut [u8]| match send(host, data, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(len) => (len, Ok(())),
                Err(error) => (0, Err(error)),
            };
            match socket.recv(give) {
                Ok(Ok(())) | Ok(Err(Errno::INTR)) => {}
                Ok(Err(Errno::WOULDBLOCK)) => self.blocked = true,
                Err(_) => return,
                Ok(Err(_)) => return socket.abort(),
            }
        }
        let ended =
            matches!(socket.state(), State::CloseWait | State::LastAck | State::Closing | State::TimeWait);
        if ended && !self.guest_ended && !socket.can_recv() {
            self.guest_ended = true;
            // It fails only where the connection is gone already.
            let _ = shutdown(&self.host, Shutdown::Write);
        }
    }
}

fn begin_connect(to: SocketAddr) -> rustix::io::Result<OwnedFd> {
    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let host = socket_with(family, SocketType::STREAM, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, None)?;
    set_tcp_nodelay(&host, true)?;
    match connect(&host, &to) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(host),
        Err(error) => Err(error),
    }
}

fn new_socket() -> Socket<'static> {
    let buffer = |len| SocketBuffer::new(vec![0; len]);
    let mut socket = Socket::new(buffer(FROM_GUEST), buffer(TO_GUEST));
    socket.set_timeout(Some(PATIENCE.into()));
    // Data comes in the pieces that its sender made; acknowledgements are combined by the rounds of work.
    socket.set_nagle_enabled(false);
    socket.set_ack_delay(None);
    socket
}

/// smoltcp's end of the wire, which has every address that the guest may ask for.
fn interface(wire: &mut Wire) -> Interface {
    let mut seed = [0; 8];
    // Without randomness sequence numbers are guessable, for a guest that has nobody but itself to fool.
    let _ = rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty());
    let mut config = Config::new(HardwareAddress::Ip);
    config.random_seed = u64::from_ne_bytes(seed);
    let mut unused = Outbox::default();
    let mut device = Wired { wire, outbox: &mut unused };
    let mut interface = Interface::new(config, &mut device, smoltcp::time::Instant::ZERO);
    interface.update_ip_addrs(|addresses| {
        let _fits = addresses.push(IpCidr::new(IpAddr::V4(GATEWAY).into(), 24));
        let _fits = addresses.push(IpCidr::new(IpAddr::V6(GATEWAY6).into(), PREFIX6));
    });
    let _fits = interface.routes_mut().add_default_ipv4_route(GATEWAY);
    let _fits = interface.routes_mut().add_default_ipv6_route(GATEWAY6);
    interface.set_any_ip(true);
    interface
}
