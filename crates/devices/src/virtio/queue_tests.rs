#![expect(clippy::cast_possible_truncation, reason = "tests take random numbers apart")]

use super::*;

const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;

fn setup(size: u16, event_idx: bool) -> (std::sync::Arc<GuestMemory>, Queue) {
    let mem = GuestMemory::new(1 << 20).unwrap();
    let layout = Layout { size, desc: DESC, avail: AVAIL, used: USED };
    (mem, Queue::new(layout, Position::default(), event_idx, true).unwrap())
}

fn put_desc(mem: &GuestMemory, table: u64, index: u64, gpa: u64, len: u32, flags: u16, next: u16) {
    let mut raw = gpa.to_le_bytes().to_vec();
    raw.extend(len.to_le_bytes());
    raw.extend(flags.to_le_bytes());
    raw.extend(next.to_le_bytes());
    mem.write(Gpa(table + 16 * index), &raw).unwrap();
}

fn offer(mem: &GuestMemory, size: u16, heads: &[u16], idx: u16) {
    for (i, head) in heads.iter().enumerate() {
        let slot = u64::from(idx.wrapping_sub(heads.len() as u16).wrapping_add(i as u16) % size);
        mem.write(Gpa(AVAIL + 4 + 2 * slot), &head.to_le_bytes()).unwrap();
    }
    mem.write(Gpa(AVAIL + 2), &idx.to_le_bytes()).unwrap();
}

#[test]
fn pop_direct_and_indirect_gives_segments_in_order() {
    let (mem, mut q) = setup(8, false);
    put_desc(&mem, DESC, 2, 0x8000, 16, 1, 5);
    put_desc(&mem, DESC, 5, 0x9000, 48, 4, 0);
    put_desc(&mem, 0x9000, 0, 0xa000, 7, 1, 2);
    put_desc(&mem, 0x9000, 2, 0xb000, 9, 2 | 1, 1);
    put_desc(&mem, 0x9000, 1, 0xc000, 1, 2, 0);
    offer(&mem, 8, &[2], 1);
    let mut chain = Chain::default();
    assert_eq!(q.pop(&mem, &mut chain), Ok(true));
    let seg = |gpa, len| Segment { gpa: Gpa(gpa), len };
    assert_eq!(chain.readable, [seg(0x8000, 16), seg(0xa000, 7)]);
    assert_eq!(chain.writable, [seg(0xb000, 9), seg(0xc000, 1)]);
    assert_eq!(q.pop(&mem, &mut chain), Ok(false));
    q.push(&mem, 2, 10).unwrap();
    assert_eq!(mem.load_gpa::<u64>(Gpa(USED + 4)), Some(10 << 32 | 2));
    assert_eq!(mem.load_gpa::<u16>(Gpa(USED + 2)), Some(1));
}

#[test]
fn pop_hostile_rings_are_errors() {
    let (mem, mut q) = setup(4, false);
    let mut chain = Chain::default();
    offer(&mem, 4, &[9], 1);
    assert_eq!(q.pop(&mem, &mut chain), Err(QueueError::DescriptorIndex { index: 9, len: 4 }));
    put_desc(&mem, DESC, 0, 0x8000, 1, 1, 0);
    offer(&mem, 4, &[0], 1);
    assert_eq!(q.pop(&mem, &mut chain), Err(QueueError::Loop { head: 0 }));
    put_desc(&mem, DESC, 0, u64::MAX, 2, 0, 0);
    assert_eq!(q.pop(&mem, &mut chain), Err(QueueError::Wraps { gpa: u64::MAX, len: 2 }));
    put_desc(&mem, DESC, 0, 0x8000, 2, 3, 1);
    put_desc(&mem, DESC, 1, 0x8000, 2, 0, 1);
    assert_eq!(q.pop(&mem, &mut chain), Err(QueueError::Order { head: 0 }));
    for (len, flags) in [(0, 4), (17, 4), (16, 5)] {
        put_desc(&mem, DESC, 0, 0x8000, len, flags, 1);
        assert_eq!(q.pop(&mem, &mut chain), Err(QueueError::Indirect { head: 0 }));
    }
    put_desc(&mem, DESC, 0, 0x8000, 32, 4, 0);
    put_desc(&mem, 0x8000, 0, 0x8000, 32, 4, 0);
    assert_eq!(q.pop(&mem, &mut chain), Err(QueueError::Indirect { head: 0 }));
    put_desc(&mem, DESC, 0, 0x8000, 0xffff_fff0, 4, 0);
    put_desc(&mem, 0x8000, 0, 0x8000, 32, 1, 0);
    assert_eq!(q.pop(&mem, &mut chain), Err(QueueError::Loop { head: 0 }));
    offer(&mem, 4, &[0], 5);
    assert!(matches!(q.pop(&mem, &mut chain), Err(QueueError::AvailIndex { .. })));
    assert_eq!(q.position(), Position::default());
}

#[test]
fn signal_without_event_idx_follows_the_flag() {
    let (mem, mut q) = setup(4, false);
    assert_eq!(q.should_signal(&mem), Ok(false), "nothing was pushed");
    q.push(&mem, 0, 0).unwrap();
    assert_eq!(q.should_signal(&mem), Ok(true));
    assert_eq!(q.should_signal(&mem), Ok(false));
    q.push(&mem, 0, 0).unwrap();
    mem.write(Gpa(AVAIL), &1u16.to_le_bytes()).unwrap();
    assert_eq!(q.should_signal(&mem), Ok(false));
}

#[test]
fn signal_with_event_idx_fires_only_when_crossed() {
    let (mem, mut q) = setup(4, true);
    let event = |v: u16| mem.write(Gpa(AVAIL + 4 + 8), &v.to_le_bytes()).unwrap();
    event(0);
    q.push(&mem, 0, 0).unwrap();
    assert_eq!(q.should_signal(&mem), Ok(true));
    event(3);
    q.push(&mem, 0, 0).unwrap();
    q.push(&mem, 0, 0).unwrap();
    assert_eq!(q.should_signal(&mem), Ok(false));
    q.push(&mem, 0, 0).unwrap();
    assert_eq!(q.should_signal(&mem), Ok(true));
    assert!(crossed(0xffff, 0, 0xffff) && !crossed(0, 0, 0xffff));
}

#[test]
fn want_notifications_publishes_and_rechecks() {
    let (mem, mut q) = setup(4, true);
    put_desc(&mem, DESC, 0, 0x8000, 1, 0, 0);
    assert_eq!(q.want_notifications(&mem), Ok(false));
    offer(&mem, 4, &[0], 1);
    assert_eq!(q.want_notifications(&mem), Ok(true));
    assert_eq!(q.pop(&mem, &mut Chain::default()), Ok(true));
    assert_eq!(q.want_notifications(&mem), Ok(false));
    assert_eq!(mem.load_gpa::<u16>(Gpa(USED + 4 + 32)), Some(1));
}

#[test]
fn layout_unusable_makes_no_queue() {
    let ok = Layout { size: 4, desc: DESC, avail: AVAIL, used: USED };
    let bad = [
        Layout { size: 0, ..ok },
        Layout { size: 3, ..ok },
        Layout { desc: 8, ..ok },
        Layout { avail: 1, ..ok },
        Layout { used: 2, ..ok },
        Layout { desc: !15, ..ok },
        Layout { avail: !1, ..ok },
        Layout { used: !3, ..ok },
    ];
    assert!(bad.iter().all(|&l| Queue::new(l, Position::default(), true, true).is_none()));
}

#[test]
fn rings_outside_ram_or_wrapping_are_errors() {
    let mem = GuestMemory::new(1 << 20).unwrap();
    for at in [1 << 20, !0xfff, 0xa_0000] {
        let layout = Layout { size: 8, desc: at, avail: at, used: at };
        let mut q = Queue::new(layout, Position::default(), true, true).unwrap();
        let mut chain = Chain::default();
        assert!(q.pop(&mem, &mut chain).is_err());
        assert!(q.push(&mem, 0, 0).is_err());
        let _ = q.should_signal(&mem);
        let _ = q.want_notifications(&mem);
        let _ = q.suppress_notifications(&mem);
    }
}

/// Random rings: whatever they hold, every pop ends, in bounds.
#[test]
fn pop_random_rings_never_hangs_or_panics() {
    let seed = 0x5eed_cafe_u64;
    let mut rng = super::super::rng::SplitMix64::new(seed);
    let mem = GuestMemory::new(1 << 16).unwrap();
    for round in 0..3000u32 {
        let size = 1u16 << (rng.next() % 6);
        let layout = Layout { size, desc: 0x1000, avail: 0x2000, used: 0x3000 };
        let mut q =
            Queue::new(layout, Position::default(), rng.next() & 1 == 0, rng.next() & 7 != 0).unwrap();
        for word in 0..(0x3000 / 8) {
            let value = match rng.next() % 4 {
                0 => rng.next(),
                1 => rng.next() & 0x0007_0007_0000_ffff,
                2 => rng.next() & 0xfff0,
                _ => 0,
            };
            mem.write(Gpa(0x1000 + word * 8), &value.to_le_bytes()).unwrap();
        }
        mem.write(Gpa(0x2002), &(rng.next() as u16 % (size + 1)).to_le_bytes()).unwrap();
        let mut chain = Chain::default();
        for _ in 0..size + 1 {
            match q.pop(&mem, &mut chain) {
                Ok(true) => {
                    assert!(chain.readable.len() + chain.writable.len() <= MAX_SEGMENTS as usize);
                    let _ = chain.reader(&mem).read(&mut [0; 64]);
                    let _ = q.push(&mem, chain.head, 1);
                    let _ = q.should_signal(&mem);
                }
                Ok(false) | Err(_) => break,
            }
        }
        assert!(round < 3000, "seed {seed:#x}");
    }
}
