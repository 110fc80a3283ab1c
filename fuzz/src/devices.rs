//! Every virtio device behind its PCI registers, driven by a guest that keeps the protocol only as far as it gets somewhere:
//! rings that mostly make sense, requests that mostly make sense, and nonsense in between, while the host's end lives, too.

use std::collections::VecDeque;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use devices::pci::PciDevice;
use devices::snapshot::Snapshot;
use devices::virtio::balloon::{Balloon, BalloonHandle, BalloonOptions};
use devices::virtio::block::{Block, BlockOptions};
use devices::virtio::channel::{Channel, ChannelHandle};
use devices::virtio::console::{Console, ConsoleHandle};
use devices::virtio::net::Net;
use devices::virtio::rng::{Entropy, Rng};
use devices::virtio::share::{Share, ShareOptions, ShareProtocol};
use devices::virtio::vsock::{Endpoint, Vsock};
use devices::virtio::{Flavor, VirtioDevice, VirtioPci};
use guestmem::{Gfn, Gpa, GuestMemory};
use hostnet::{Backend, Header, Interest, Offloads};

use crate::input::Input;
use crate::messages;

const MEMORY: u64 = 2 << 20;
/// Queue n's structures begin here, plus n times [`QUEUE_SPACE`]: descriptors, available ring, used ring.
const QUEUES: u64 = 0x10_0000;
const QUEUE_SPACE: u64 = 0x1_0000;
const AVAIL: u64 = 0x4000;
const USED: u64 = 0x8000;
/// Where requests and buffers lie.
const DATA: u64 = 0x8_0000;
const SLOT: u64 = 0x800;
const SLOTS: u16 = 32;
/// The BAR with the structures of a modern device, and where they are in it.
const BAR: usize = 4;
const NOTIFY: u64 = 0x3000;
const DEVICE: u64 = 0x2000;

/// A kind of device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Kind {
    Block,
    Net,
    Console,
    Channel,
    Rng,
    Balloon,
    Vsock,
    Fuse,
    P9,
}

const KINDS: [Kind; 9] = [
    Kind::Block,
    Kind::Net,
    Kind::Console,
    Kind::Channel,
    Kind::Rng,
    Kind::Balloon,
    Kind::Vsock,
    Kind::Fuse,
    Kind::P9,
];

impl Kind {
    const fn queues(self) -> u8 {
        match self {
            Self::Rng | Self::P9 => 1,
            Self::Block | Self::Net | Self::Console | Self::Fuse => 2,
            Self::Vsock => 3,
            Self::Channel | Self::Balloon => 4,
        }
    }
}

/// Runs the device that the first byte names.
pub fn target(data: &[u8]) {
    let first = usize::from(data.first().copied().unwrap_or(0));
    drive(KINDS[first % KINDS.len()], data.get(1..).unwrap_or_default());
}

/// Runs a device of one kind.
pub fn drive(kind: Kind, data: &[u8]) {
    thread_local! {
        static PLACE: Place = Place::new();
    }
    PLACE.with(|place| {
        let mut input = Input::new(data);
        // All of it is zero at the beginning of each input.
        place.memory.discard(Gfn(0)..Gfn(MEMORY / 4096)).expect("the host takes its pages");
        let (device, host) = place.device(kind, &mut input);
        let function = VirtioPci::new(device, Arc::clone(&place.memory), Flavor::Modern);
        let mut guest = Guest { kind, memory: &place.memory, function, next: [0; 4], wraps: [0; 4], host };
        guest.live(&mut input);
        // A save waits until all that was notified is done.
        let blob = guest.function.save();
        let _ = guest.function.restore(&blob);
    });
}

/// What a thread of tests has of its own.
struct Place {
    memory: Arc<GuestMemory>,
    directory: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        std::fs::write(directory.path().join("disk"), [7; 1 << 16]).expect("a file");
        Self { memory: GuestMemory::new(MEMORY).expect("memory"), directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn device(&self, kind: Kind, input: &mut Input<'_>) -> (Box<dyn VirtioDevice>, Host) {
        match kind {
            Kind::Block => {
                let options = BlockOptions::open(&self.path("disk")).expect("an image");
                let options = BlockOptions { synchronous: input.byte() & 7 != 0, queues: 2, ..options };
                (Box::new(Block::new("disk", &options).expect("a disk")), Host::None)
            }
            Kind::Net => {
                let plug = Arc::new(Mutex::new(Box::new(Echo::default()) as Box<dyn Backend>));
                (
                    Box::new(
                        Net::new("net", [2, 0, 0, 0, 0, 1], &plug, devices::net::CardOptions::default())
                            .expect("a card"),
                    ),
                    Host::None,
                )
            }
            Kind::Console => {
                let (console, handle) = Console::new("console", Box::new(std::io::sink()), 80, 25);
                (Box::new(console), Host::Console(handle))
            }
            Kind::Channel => {
                let (channel, handle) = Channel::new("channel", "port", Box::new(std::io::sink()));
                (Box::new(channel), Host::Channel(handle))
            }
            Kind::Rng => (Box::new(Rng::new("rng", Entropy::seeded(1))), Host::None),
            Kind::Balloon => {
                let (balloon, handle) = Balloon::new("balloon", BalloonOptions::default());
                (Box::new(balloon), Host::Balloon(handle))
            }
            Kind::Vsock => self.vsock(),
            Kind::Fuse => self.share(ShareProtocol::Fuse, input),
            Kind::P9 => self.share(ShareProtocol::P9, input),
        }
    }

    fn vsock(&self) -> (Box<dyn VirtioDevice>, Host) {
        let (path, service) = (self.path("vsock"), self.path("vsock_1"));
        for old in [&path, &service] {
            let _ = std::fs::remove_file(old);
        }
        let endpoint =
            Endpoint::new(UnixListener::bind(&path).expect("a socket"), &path).expect("an endpoint");
        let service = UnixListener::bind(service).expect("a socket");
        service.set_nonblocking(true).expect("a socket that does not wait");
        let plug = Arc::new(Mutex::new(endpoint));
        let device = Vsock::new("vsock", 3, &plug).expect("a device");
        (Box::new(device), Host::Vsock { path, service, streams: Vec::new() })
    }

    fn share(&self, protocol: ShareProtocol, input: &mut Input<'_>) -> (Box<dyn VirtioDevice>, Host) {
        let path = self.path("share");
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(path.join("a/b")).expect("a directory");
        std::fs::write(path.join("c"), b"content").expect("a file");
        std::os::unix::fs::symlink("..", path.join("d")).expect("a link");
        let options = ShareOptions {
            path: path.clone(),
            tag: "tag".to_owned(),
            read_only: input.byte() & 15 == 0,
            protocol,
            is_static: input.byte() & 1 == 0,
        };
        let device = Share::new("share", &options, input.byte() & 7 != 0).expect("a share");
        (Box::new(device), Host::Share(path))
    }
}

/// The host's end of a device.
enum Host {
    None,
    Console(ConsoleHandle),
    Channel(ChannelHandle),
    Balloon(BalloonHandle),
    Vsock { path: PathBuf, service: UnixListener, streams: Vec<UnixStream> },
    Share(PathBuf),
}

impl Host {
    fn act(&mut self, input: &mut Input<'_>) {
        let mut bytes = [0; 300];
        let len = usize::from(input.byte());
        input.fill(&mut bytes[..len]);
        match self {
            Self::None => {}
            Self::Console(console) => {
                let _ = console.receive(&bytes[..len]);
                console.resize(input.half(), input.half());
            }
            Self::Channel(channel) => {
                let _ = channel.send(&bytes[..len]);
            }
            Self::Balloon(balloon) => {
                balloon.set_size(input.number());
                let _ = balloon.report(Duration::ZERO);
            }
            Self::Vsock { path, service, streams } => talk(path, service, streams, input),
            Self::Share(path) => change(path, input),
        }
    }
}

/// What programs of the host do with sockets.
fn talk(path: &Path, service: &UnixListener, streams: &mut Vec<UnixStream>, input: &mut Input<'_>) {
    use std::io::{Read as _, Write as _};
    while let Ok((stream, _)) = service.accept() {
        let _ = stream.set_nonblocking(true);
        streams.push(stream);
    }
    match input.byte() & 3 {
        0 => {
            if let Ok(mut stream) = UnixStream::connect(path) {
                let _ = stream.set_nonblocking(true);
                let lines = ["CONNECT 1\n", "CONNECT 99\nmore", "CONN", "\n", "CONNECT x\n"];
                let _ = stream.write_all(lines[usize::from(input.byte()) % lines.len()].as_bytes());
                streams.push(stream);
            }
        }
        1 if input.byte() & 1 == 0 => drop(streams.pop()),
        _ => {
            for stream in streams {
                let _ = stream.write(&[1; 700]);
                let _ = stream.read(&mut [0; 5000]);
            }
        }
    }
}

/// What programs of the host do to a shared directory: files vanish, change, become links.
fn change(path: &Path, input: &mut Input<'_>) {
    let name = path.join(["a", "a/b", "c", "d", "e"][usize::from(input.byte()) % 5]);
    match input.byte() & 7 {
        0 => drop(std::fs::remove_file(&name)),
        1 => drop(std::fs::remove_dir_all(&name)),
        2 => drop(std::fs::write(&name, b"new")),
        3 => drop(std::fs::create_dir(&name)),
        4 => drop(std::fs::rename(&name, path.join("e"))),
        5 => {
            let _ = std::fs::remove_file(&name);
            drop(std::os::unix::fs::symlink("/etc", &name));
        }
        6 => drop(std::fs::OpenOptions::new().write(true).open(&name).map(|file| file.set_len(1))),
        _ => {}
    }
}

/// A network that gives back what it gets.
#[derive(Default)]
struct Echo(VecDeque<(Header, Vec<u8>)>);

impl Backend for Echo {
    fn offloads(&self) -> Offloads {
        Offloads { checksum: true, tso4: true, tso6: true }
    }
    fn start(&mut self, _accepts: Offloads) {
        self.0.clear();
    }
    fn send(&mut self, header: &Header, frame: &[u8]) {
        if self.0.len() < 64 {
            self.0.push_back((*header, frame.to_vec()));
        }
    }
    fn receive(&mut self, to: &mut Vec<u8>) -> Option<Header> {
        let (header, frame) = self.0.pop_front()?;
        to.extend(frame);
        Some(header)
    }
    fn sleep_on<'a>(&'a self, _room: bool, _list: &mut Vec<Interest<'a>>) -> Option<Duration> {
        None
    }
}

struct Guest<'a> {
    kind: Kind,
    memory: &'a Arc<GuestMemory>,
    function: VirtioPci,
    /// Next descriptor and available index, by queue.
    next: [u16; 4],
    wraps: [u16; 4],
    host: Host,
}

impl Guest<'_> {
    fn write(&mut self, at: u64, len: usize, value: u64) {
        self.function.bar_write(BAR, at, &value.to_le_bytes()[..len]);
    }

    fn read(&mut self, at: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.function.bar_read(BAR, at, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    fn live(&mut self, input: &mut Input<'_>) {
        self.start(input);
        let steps = 4 + input.byte() % 40;
        if input.byte() & 31 != 0 {
            (0..steps).for_each(|_| self.step(input));
            return;
        }
        // Another vCPU that writes everywhere meanwhile.
        let (stop, memory) = (AtomicBool::new(false), Arc::clone(self.memory));
        let seed = input.word() | 1;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut state = seed;
                while !stop.load(Ordering::Relaxed) {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let at = QUEUES + (state >> 33) % (4 * QUEUE_SPACE);
                    let _ = memory.write(Gpa(at), &(state >> 40).to_le_bytes()[..2]);
                }
            });
            let ends = StopOnDrop(&stop);
            (0..steps).for_each(|_| self.step(input));
            drop(ends);
        });
    }

    /// Virtio 1.2 3.1.1, with queues of a few sizes.
    fn start(&mut self, input: &mut Input<'_>) {
        for status in [0, 1, 3] {
            self.write(20, 1, status);
        }
        let (mut offered, mut wanted) = (0, u64::MAX);
        for half in 0..2 {
            self.write(0, 4, half);
            offered |= self.read(4, 4) << (32 * half);
        }
        if input.byte() & 3 == 0 {
            wanted = input.word() | 1 << 32;
        }
        for half in 0..2 {
            self.write(8, 4, half);
            self.write(12, 4, (offered & wanted) >> (32 * half) & 0xffff_ffff);
        }
        self.write(20, 1, 11);
        (self.next, self.wraps) = ([0; 4], [0; 4]);
        for queue in 0..4 {
            self.write(22, 2, queue);
            self.write(24, 2, 1 << (3 + (input.byte() & 3)));
            let base = QUEUES + queue * QUEUE_SPACE;
            let odd = if input.byte() & 63 == 0 { input.number() } else { 0 };
            for (at, address) in [(32, base ^ odd), (40, base + AVAIL), (48, base + USED)] {
                self.write(at, 4, address & 0xffff_ffff);
                self.write(at + 4, 4, address >> 32);
            }
            self.write(28, 2, u64::from(input.byte() & 15 != 0));
        }
        self.write(20, 1, 15);
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() & 31 {
            0..=17 => {
                let queue = usize::from(input.byte() % self.kind.queues());
                for _ in 0..=input.byte() & 3 {
                    self.request(queue, input);
                }
                self.notify(queue as u64);
            }
            18..=20 => self.notify(u64::from(input.byte())),
            21 => {
                let (at, value) = (DEVICE + u64::from(input.byte() & 63), input.word());
                self.write(at, 1 << (input.byte() & 3), value);
            }
            22 => {
                let at = u64::from(input.half() & 0x3fff).min(0x3ff8);
                self.read(at, 1 << (input.byte() & 3));
            }
            23 => {
                let (at, value) = (u64::from(input.byte() & 63), input.number());
                self.write(at, 1 << (input.byte() & 3), value);
            }
            24 => self.scribble(input),
            25 if input.byte() & 3 == 0 => self.start(input),
            26 if input.byte() & 7 == 0 => {
                let blob = self.function.save();
                let _ = self.function.restore(&blob);
            }
            _ => self.host.act(input),
        }
    }

    fn notify(&mut self, queue: u64) {
        self.write(NOTIFY + 4 * (queue & 7), 2, queue);
        if matches!(self.kind, Kind::Net | Kind::Vsock) {
            // Their threads do the work.
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Nonsense in a ring or a buffer.
    fn scribble(&mut self, input: &mut Input<'_>) {
        let base = [QUEUES, QUEUES + AVAIL, QUEUES + USED, DATA][usize::from(input.byte() & 3)];
        let at = base + u64::from(input.byte() & 3) * QUEUE_SPACE + u64::from(input.byte());
        let mut bytes = [0; 32];
        input.fill(&mut bytes);
        let _ = self.memory.write(Gpa(at), &bytes);
    }

    /// Makes a chain available: a message in its readable part, room in its writable part.
    fn request(&mut self, queue: usize, input: &mut Input<'_>) {
        let message = messages::of(self.kind, queue, input);
        let slot = DATA + u64::from(input.below(SLOTS)) * SLOT;
        let _ = self.memory.write(Gpa(slot), &message[..message.len().min(SLOT as usize)]);
        let reads = (slot, message.len() as u32, 0);
        // 513: a sector and its status.
        let room = [0, 1, 64, 300, 513, 513, 4096, u64::from(input.half())][usize::from(input.byte() & 7)];
        let place = DATA + u64::from(input.below(SLOTS)) * SLOT;
        let writes = (place, room as u32, 2);
        let mut pieces = match input.byte() & 7 {
            0 => vec![reads],
            1 => vec![writes],
            2 => {
                vec![(slot, 7, 0), (slot + 7, reads.1.saturating_sub(7), 0), writes, (place + 0x800, 900, 2)]
            }
            _ => vec![reads, writes],
        };
        if input.byte() & 15 == 0 {
            let which = usize::from(input.byte()) % pieces.len();
            pieces[which] = (input.number(), input.number() as u32, u16::from(input.byte() & 2));
        }
        self.publish(queue, &pieces, input);
    }

    fn publish(&mut self, queue: usize, pieces: &[(u64, u32, u16)], input: &mut Input<'_>) {
        let base = QUEUES + queue as u64 * QUEUE_SPACE;
        let head = self.next[queue] & 7;
        let wild = input.byte() & 31 == 0;
        for (n, &(gpa, len, flags)) in pieces.iter().enumerate() {
            let last = n + 1 == pieces.len();
            let at = self.next[queue] & 7;
            self.next[queue] = self.next[queue].wrapping_add(1);
            let next = if wild { input.half() & 15 } else { self.next[queue] & 7 };
            let mut raw = gpa.to_le_bytes().to_vec();
            raw.extend(len.to_le_bytes());
            let odd = if wild { input.half() & 7 } else { 0 };
            raw.extend((flags | u16::from(!last) | odd).to_le_bytes());
            raw.extend(next.to_le_bytes());
            let _ = self.memory.write(Gpa(base + 16 * u64::from(at)), &raw);
        }
        let slot = u64::from(self.wraps[queue] & 7);
        // The rings have 8 to 64 places: both are right often enough.
        let size = [8, 16, 32, 64][usize::from(input.byte() & 3)];
        let slot = if input.byte() & 1 == 0 { slot } else { u64::from(self.wraps[queue] % size) };
        let _ = self.memory.write(Gpa(base + AVAIL + 4 + 2 * slot), &head.to_le_bytes());
        self.wraps[queue] = self.wraps[queue].wrapping_add(if wild { input.half() } else { 1 });
        let _ = self.memory.write(Gpa(base + AVAIL + 2), &self.wraps[queue].to_le_bytes());
    }
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
