//! A driver's rings and descriptors are any bytes: the queue answers with chains within memory, or with an error.

use devices::virtio::chain::Chain;
use devices::virtio::queue::{Layout, Position, Queue};
use guestmem::{Gpa, GuestMemory};

use crate::input::Input;

const MEMORY: u64 = 1 << 20;
/// Chains that are taken of one input.
const CHAINS: usize = 64;

/// Runs a queue over memory made from the input.
pub fn target(data: &[u8]) {
    thread_local! {
        static MEM: std::sync::Arc<GuestMemory> = GuestMemory::new(MEMORY).expect("memory");
    }
    MEM.with(|mem| run(mem, &mut Input::new(data)));
}

fn layout(input: &mut Input<'_>) -> Layout {
    let anywhere = input.byte() & 7 == 0;
    let mut place = |align: u64, usual: u64| if anywhere { input.number() & !(align - 1) } else { usual };
    let (desc, avail, used) = (place(16, 0x1000), place(2, 0x3000), place(4, 0x5000));
    let size = if anywhere { input.half() } else { 1 << (input.byte() & 7) };
    Layout { size, desc, avail, used }
}

/// Descriptors that mostly make sense: addresses in memory, short lengths, indices in the table.
fn descriptors(input: &mut Input<'_>, mem: &GuestMemory, at: u64, count: u16) {
    for n in 0..count {
        let wild = input.byte() & 15 == 0;
        let gpa = if wild { input.number() } else { u64::from(input.half()) * 16 };
        let len = if wild { input.number() as u32 } else { u32::from(input.byte()) };
        let flags = input.half() & if wild { 0xffff } else { 7 };
        let next = if wild { input.half() } else { input.below(count) };
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&gpa.to_le_bytes());
        raw[8..12].copy_from_slice(&len.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        let _ = mem.write(Gpa(at).add(16 * u64::from(n)), &raw);
    }
}

fn run(mem: &GuestMemory, input: &mut Input<'_>) {
    let layout = layout(input);
    let bits = input.byte();
    let position = Position { next_avail: input.half(), next_used: input.half(), signalled: input.half() };
    let Some(mut queue) = Queue::new(layout, position, bits & 1 != 0, bits & 2 != 0) else { return };
    descriptors(input, mem, layout.desc, layout.size.min(128));
    let ready = position.next_avail.wrapping_add(input.half() % 80);
    let _ = mem.write(Gpa(layout.avail).add(2), &ready.to_le_bytes());
    for n in 0..layout.size.min(128) {
        let head = input.below(layout.size.max(1));
        let _ = mem.write(Gpa(layout.avail).add(4 + 2 * u64::from(n)), &head.to_le_bytes());
    }
    let mut chain = Chain::default();
    for _ in 0..CHAINS {
        let _ = queue.has_work(mem);
        match queue.pop(mem, &mut chain) {
            Ok(true) => serve(mem, &chain),
            Ok(false) | Err(_) => break,
        }
        if queue.push(mem, chain.head, input.half().into()).is_err() {
            break;
        }
        let _ = queue.should_signal(mem);
    }
    let _ = queue.suppress_notifications(mem);
    let _ = queue.want_notifications(mem);
}

/// What a device does: reads all, writes all (bounded: a chain may be 4 GiB long).
fn serve(mem: &GuestMemory, chain: &Chain) {
    let mut buffer = [0; 512];
    let mut reader = chain.reader(mem);
    let mut writer = chain.writer(mem);
    for _ in 0..8 {
        let _ = reader.read(&mut buffer);
        let _ = writer.write(&buffer);
        writer.skip(7);
    }
}
