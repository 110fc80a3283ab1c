//! The drivers of network cards are hostile: rings and registers of virtio-net and of the e1000 hold anything, change while
//! the card looks, and frames come in meanwhile.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use devices::net::e1000::E1000;
use devices::net::{CardOptions, Doorbell, Plug};
use devices::pci::PciDevice;
use devices::virtio::net::Net;
use devices::virtio::{Flavor, VirtioPci};
use guestmem::{Gpa, GuestMemory};
use hostnet::{Backend, Header, Interest, MAX_FRAME, Offloads};

use crate::input::Input;

const MEMORY: u64 = 1 << 20;
const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
/// What is done to a card in one input.
const STEPS: usize = 40;

/// A network that has frames to give and takes all.
struct Network {
    coming: VecDeque<(Header, Vec<u8>)>,
    offloads: Offloads,
}

impl Backend for Network {
    fn offloads(&self) -> Offloads {
        self.offloads
    }
    fn start(&mut self, _: Offloads) {}
    fn send(&mut self, _: &Header, frame: &[u8]) {
        assert!((1..=MAX_FRAME).contains(&frame.len()), "a frame of {} bytes", frame.len());
        if frame.len() < 3000 && self.coming.len() < 64 {
            self.coming.push_back((Header::default(), frame.to_vec()));
        }
    }
    fn receive(&mut self, to: &mut Vec<u8>) -> Option<Header> {
        let (header, frame) = self.coming.pop_front()?;
        to.extend(frame);
        Some(header)
    }
    fn sleep_on<'a>(&'a self, _: bool, _: &mut Vec<Interest<'a>>) -> Option<Duration> {
        None
    }
}

/// Drives a card as the input says.
pub fn target(data: &[u8]) {
    thread_local! {
        static MEM: Arc<GuestMemory> = GuestMemory::new(MEMORY).expect("memory");
    }
    MEM.with(|mem| run(mem, &mut Input::new(data)));
}

fn run(mem: &Arc<GuestMemory>, input: &mut Input<'_>) {
    let bits = input.byte();
    let offloads = Offloads { checksum: bits & 1 != 0, tso4: bits & 2 != 0, tso6: bits & 4 != 0 };
    let coming = (0..input.byte() & 31).map(|_| frame(input)).collect();
    let plug: Plug = Arc::new(Mutex::new(Box::new(Network { coming, offloads })));
    let options = CardOptions {
        combine: bits & 8 != 0,
        suppress: bits & 16 != 0,
        offload: bits & 32 != 0,
        // On the vCPU, so that an input does the same each time, as far as the thread sleeps.
        doorbell: Doorbell::Vcpu,
    };
    if bits & 64 == 0 {
        let card = Net::new("net", MAC, &plug, options).expect("a thread");
        virtio(&mut VirtioPci::new(Box::new(card), Arc::clone(mem), Flavor::Modern), mem, input);
    } else {
        let mut card = E1000::new("net", MAC, &plug, options, Arc::clone(mem)).expect("a thread");
        e1000(&mut card, mem, input);
    }
}

fn frame(input: &mut Input<'_>) -> (Header, Vec<u8>) {
    let mut frame =
        vec![0; 1 + usize::from(input.half()) % if input.byte() & 7 == 0 { 60_000 } else { 1600 }];
    let len = frame.len().min(40);
    input.fill(&mut frame[..len]);
    if let Some(to) = frame.get_mut(..6) {
        to.copy_from_slice(if input.byte() & 1 == 0 { &[0xff; 6] } else { &MAC });
    }
    let header =
        Header { flags: input.byte(), gso_type: input.byte(), gso_size: input.half(), ..Header::default() };
    (header, frame)
}

/// Scribbles over memory where rings and buffers are.
fn scribble(mem: &GuestMemory, input: &mut Input<'_>) {
    let at = u64::from(input.below(0x1000)) * 4;
    let mut bytes = vec![0; usize::from(input.byte())];
    input.fill(&mut bytes);
    let _ = mem.write(Gpa(0x1000 + at), &bytes);
}

fn descriptor(mem: &GuestMemory, at: u64, gpa: u64, second: u64) {
    let _ = mem.write(Gpa(at), &gpa.to_le_bytes());
    let _ = mem.write(Gpa(at).add(8), &second.to_le_bytes());
}

fn address(input: &mut Input<'_>) -> u64 {
    if input.byte() & 15 == 0 { input.number() } else { 0x1_0000 + u64::from(input.half()) * 8 }
}

fn virtio(card: &mut VirtioPci, mem: &GuestMemory, input: &mut Input<'_>) {
    const BAR: usize = 4;
    let write = |card: &mut VirtioPci, at: u64, bytes: &[u8]| card.bar_write(BAR, at, bytes);
    write(card, 20, &[1]);
    for half in 0..2u32 {
        write(card, 8, &half.to_le_bytes());
        let wanted = if half == 1 { 1 } else { input.word() as u32 };
        write(card, 12, &wanted.to_le_bytes());
    }
    write(card, 20, &[11]);
    for queue in 0..2u64 {
        let base = 0x1000 + queue * 0x2000;
        write(card, 22, &(queue as u16).to_le_bytes());
        write(card, 24, &(1u16 << (input.byte() & 7)).to_le_bytes());
        for (at, place) in [(32, base), (40, base + 0x1000), (48, base + 0x1800)] {
            let place = if input.byte() & 63 == 0 { input.number() } else { place };
            write(card, at, &(place as u32).to_le_bytes());
            write(card, at + 4, &((place >> 32) as u32).to_le_bytes());
        }
        write(card, 28, &1u16.to_le_bytes());
    }
    write(card, 20, &[15]);
    let mut ready = [0u16; 2];
    for _ in 0..STEPS {
        let queue = usize::from(input.byte() & 1);
        let base = 0x1000 + 0x2000 * queue as u64;
        match input.byte() & 15 {
            0 => scribble(mem, input),
            1 => card.bar_read(BAR, u64::from(input.half()), &mut [0; 4]),
            2 => write(card, u64::from(input.half() & 63), &input.word().to_le_bytes()[..4]),
            3 => write(card, 20, &[input.byte() & 0x8f]),
            4..10 => write(card, 0x3000 + 4 * queue as u64, &(queue as u16).to_le_bytes()),
            _ => {
                let index = u64::from(ready[queue] & 127);
                let (len, flags) = (u64::from(input.half() & 0xfff), u64::from(input.byte() & 7));
                let flags = if input.byte() & 7 == 0 { flags } else { 2 - 2 * queue as u64 };
                let second = len | flags << 32 | u64::from(input.byte() & 15) << 48;
                descriptor(mem, base + 16 * index, address(input), second);
                let _ = mem.write(Gpa(base + 0x1004 + 2 * index), &(index as u16).to_le_bytes());
                ready[queue] = ready[queue].wrapping_add(1);
                let told = if input.byte() & 31 == 0 { input.half() } else { ready[queue] };
                let _ = mem.write(Gpa(base + 0x1002), &told.to_le_bytes());
            }
        }
    }
}

fn e1000(card: &mut E1000, mem: &GuestMemory, input: &mut Input<'_>) {
    const REGISTERS: [u32; 22] = [
        0x0, 0x8, 0x10, 0x14, 0x20, 0x38, 0xc0, 0xc4, 0xc8, 0xd0, 0xd8, 0x100, 0x400, 0x2800, 0x2808, 0x2810,
        0x2818, 0x3800, 0x3808, 0x3810, 0x3818, 0x5000,
    ];
    let set = |card: &mut E1000, at: u32, value: u32| card.bar_write(0, at.into(), &value.to_le_bytes());
    card.config_write(4, &[7, 0]);
    for (ring, base) in [(0x2800, 0x1000), (0x3800, 0x3000)] {
        set(card, ring, base);
        set(card, ring + 8, 2048);
    }
    // Promiscuous, all sizes; tags, padding.
    set(card, 0x100, 2 | u32::from(input.half()) << 16 | u32::from(input.half()) | 0x18);
    set(card, 0x400, 2 | u32::from(input.byte()));
    set(card, 0, u32::from(input.byte() & 1) << 30);
    set(card, 0x5000, 0x300);
    set(card, 0xd0, u32::MAX);
    let (mut sent, mut offered) = (0u32, 0u32);
    for _ in 0..STEPS {
        match input.byte() & 15 {
            0 => scribble(mem, input),
            1 => {
                let register = REGISTERS[usize::from(input.byte()) % REGISTERS.len()];
                set(card, register, input.number() as u32);
            }
            2 => card.bar_read(0, input.word() & 0x1_ffff, &mut [0; 4]),
            3 => card.bar_write(
                (input.byte() & 1).into(),
                u64::from(input.half()),
                &input.word().to_le_bytes(),
            ),
            4..7 => {
                offered = (offered + u32::from(input.byte() & 31)) % 128;
                for n in 0..4 {
                    descriptor(mem, 0x1000 + u64::from((offered + n) % 128) * 16, address(input), 0);
                }
                set(card, 0x2818, offered);
            }
            7..10 => set(card, 0x3818, sent % 128),
            _ => {
                let command = u64::from(input.byte()) << 24;
                let second = match input.byte() & 3 {
                    // A legacy descriptor, a context that mostly makes sense, data.
                    0 => input.half() as u64 & 0x7ff | command & !(0x20 << 24) | input.word() << 32,
                    1 => command | 0x2000_0000 | u64::from(input.half()) << 48 | 54 << 40,
                    _ => u64::from(input.half()) | 0x2010_0000 | command | u64::from(input.byte()) << 40,
                };
                let context = second >> 20 & 0x20f == 0x200;
                let first = if context && input.byte() & 3 != 0 {
                    14 | 24 << 8 | 33 << 16 | 34 << 32 | 50 << 40
                } else {
                    address(input)
                };
                descriptor(mem, 0x3000 + u64::from(sent % 128) * 16, first, second);
                sent += 1;
            }
        }
    }
    let saved = devices::snapshot::Snapshot::save(card);
    let _ = devices::snapshot::Snapshot::restore(card, &saved);
}
