//! Messages of drivers that mostly make sense: each field small, or anything.

use crate::devices::Kind;
use crate::input::Input;

/// A message for a queue of a device.
pub fn of(kind: Kind, queue: usize, input: &mut Input<'_>) -> Vec<u8> {
    let mut m = Message(Vec::new());
    match kind {
        Kind::Block => block(&mut m, input),
        Kind::Net => net(&mut m, input),
        Kind::Vsock => vsock(&mut m, input),
        Kind::Fuse => fuse(&mut m, input),
        Kind::P9 => p9(&mut m, input),
        Kind::Channel if queue == 3 => {
            // Port, event, value.
            m.u32(small(input) as u32 & 3).u16(u16::from(input.byte() & 7)).u16(u16::from(input.byte() & 1));
        }
        Kind::Balloon => (0..input.byte() & 63).for_each(|_| {
            m.u32(small(input) as u32 & 0x3ff);
        }),
        Kind::Console | Kind::Channel | Kind::Rng => {}
    }
    if input.byte() & 7 == 0 {
        m.bytes(input);
    }
    if input.byte() & 31 == 0 && !m.0.is_empty() {
        let at = usize::from(input.half()) % m.0.len();
        m.0[at] ^= 1 << (input.byte() & 7);
    }
    m.0
}

struct Message(Vec<u8>);

impl Message {
    fn u8(&mut self, value: u8) -> &mut Self {
        self.raw(&[value])
    }
    fn u16(&mut self, value: u16) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }
    fn u32(&mut self, value: u32) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }
    fn u64(&mut self, value: u64) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }
    fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend(bytes);
        self
    }
    /// Up to 255 bytes of anything.
    fn bytes(&mut self, input: &mut Input<'_>) -> &mut Self {
        let len = usize::from(input.byte());
        let start = self.0.len();
        self.0.resize(start + len, 0);
        input.fill(&mut self.0[start..]);
        self
    }
}

/// Mostly a number from 0 to 7.
fn small(input: &mut Input<'_>) -> u64 {
    match input.byte() & 15 {
        0 => input.number(),
        _ => u64::from(input.byte() & 7),
    }
}

/// The same, times `unit`.
fn scaled(input: &mut Input<'_>, unit: u64) -> u64 {
    small(input).wrapping_mul(unit)
}

/// A name: of a file that may be there, of a directory's links, or nonsense.
fn name(input: &mut Input<'_>) -> Vec<u8> {
    const NAMES: [&[u8]; 12] =
        [b"a", b"b", b"c", b"d", b"e", b"f", b"..", b".", b"a/b", b"", b"/etc", b"x y"];
    match input.byte() & 15 {
        0 => (0..input.byte()).map(|_| input.byte()).collect(),
        _ => NAMES[usize::from(input.byte()) % NAMES.len()].to_vec(),
    }
}

/// Type, reserved, sector; data (virtio 1.2 5.2.6).
fn block(m: &mut Message, input: &mut Input<'_>) {
    let kinds = [0, 1, 1, 4, 8, 11, 13, 14, small(input) as u32];
    m.u32(kinds[usize::from(input.byte()) % kinds.len()]).u32(0).u64(scaled(input, 9));
    m.raw(&[9; 512][..usize::from(input.half() & 0x3ff).min(512)]);
    // A range of a discard.
    if input.byte() & 1 == 0 {
        m.0.truncate(16);
        m.u64(small(input)).u32(scaled(input, 8) as u32).u32(u32::from(input.byte() & 3));
    }
}

/// Flags, kind, lengths, checksum, buffers (5.1.6); a frame.
fn net(m: &mut Message, input: &mut Input<'_>) {
    m.u8(input.byte() & 3).u8(small(input) as u8).u16(scaled(input, 9) as u16).u16(scaled(input, 300) as u16);
    m.u16(scaled(input, 7) as u16).u16(scaled(input, 4) as u16).u16(1);
    (0..input.byte() & 7).for_each(|_| {
        m.bytes(input);
    });
}

/// `struct virtio_vsock_hdr`, few ports, all operations (5.10.6).
fn vsock(m: &mut Message, input: &mut Input<'_>) {
    let odd = input.byte() & 31 == 0;
    m.u64(if odd { small(input) } else { 3 }).u64(if odd { small(input) } else { 2 });
    let host = [1, 2, 1 << 30, (1 << 30) + 1][usize::from(input.byte() & 3)];
    m.u32([1, 99, 1000, 1001][usize::from(input.byte() & 3)]).u32(host);
    let len = match input.byte() & 7 {
        0 => input.number() as u32,
        1 => 0,
        _ => u32::from(input.half() & 0x1ff),
    };
    m.u32(len).u16(if odd { 2 } else { 1 }).u16(u16::from(input.byte() % 9)).u32(u32::from(input.byte() & 3));
    m.u32(scaled(input, 1000) as u32).u32(if input.byte() & 7 == 0 { scaled(input, 100) as u32 } else { 0 });
    m.raw(&[3; 600][..(len as usize).min(600)]);
}

/// `struct fuse_in_header` and the fields of a request.
fn fuse(m: &mut Message, input: &mut Input<'_>) {
    const OPS: [u32; 32] = [
        1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 20, 26, 27, 28, 29, 30, 35, 36, 38, 42,
        43, 45, 46, 1, 14,
    ];
    let op = match input.byte() & 15 {
        0 => small(input) as u32,
        1..=3 => 26,
        _ => OPS[usize::from(input.byte() & 31)],
    };
    let mut fields = Message(Vec::new());
    let f = &mut fields;
    match op {
        // INIT
        26 => drop(f.u32(7).u32(31).u32(1 << 16).u32(input.word() as u32)),
        1 | 10 | 11 => drop(f.raw(&name(input)).u8(0)),
        // SETATTR
        4 => {
            f.u32(input.half().into()).u32(0).u64(small(input)).u64(scaled(input, 100)).u64(0);
            f.u64(small(input)).u64(input.number()).u64(0).u32(0).u32(input.word() as u32).u32(0);
            f.u32(u32::from(input.half() & 0o777)).u32(0).u32(0).u32(0).u32(0);
        }
        6 => drop(f.raw(&name(input)).u8(0).raw(&name(input)).u8(0)),
        // MKNOD, MKDIR, CREATE
        8 => drop(f.u32(u32::from(input.half())).u32(0).u32(0).u32(0).raw(&name(input)).u8(0)),
        9 => drop(f.u32(0o755).u32(0).raw(&name(input)).u8(0)),
        35 => drop(f.u32(small(input) as u32).u32(0o644).u32(0).u32(0).raw(&name(input)).u8(0)),
        // RENAME, LINK, RENAME2
        12 => drop(f.u64(small(input)).raw(&name(input)).u8(0).raw(&name(input)).u8(0)),
        13 => drop(f.u64(small(input)).raw(&name(input)).u8(0)),
        45 => drop(
            f.u64(small(input))
                .u32(small(input) as u32)
                .u32(0)
                .raw(&name(input))
                .u8(0)
                .raw(&name(input))
                .u8(0),
        ),
        // READ, READDIR
        15 | 28 => drop(f.u64(small(input)).u64(small(input)).u32(input.half().into()).u32(0).u64(0).u64(0)),
        // WRITE
        16 => drop(f.u64(small(input)).u64(scaled(input, 50)).u32(64).u32(0).u64(0).u64(0).raw(&[5; 64])),
        // FALLOCATE: little, for the host's disk is real.
        43 => drop(f.u64(small(input)).u64(small(input) & 0xffff).u64(small(input) & 0xffff).u32(3).u32(0)),
        // BATCH_FORGET
        42 => drop(f.u32(small(input) as u32).u32(0).u64(small(input)).u64(1)),
        _ => drop(f.u64(small(input)).u64(small(input)).u32(small(input) as u32).u32(0)),
    }
    let len = if input.byte() & 31 == 0 { small(input) as u32 } else { 40 + fields.0.len() as u32 };
    m.u32(len).u32(op).u64(7).u64(small(input)).u32(0).u32(0).u32(1).u32(0).raw(&fields.0);
}

/// Size, type, tag and fields of 9P2000.L.
fn p9(m: &mut Message, input: &mut Input<'_>) {
    const TYPES: [u8; 32] = [
        8, 12, 14, 16, 18, 22, 24, 26, 40, 50, 52, 54, 70, 72, 74, 76, 100, 104, 108, 110, 116, 118, 120,
        122, 110, 104, 12, 14, 116, 118, 40, 110,
    ];
    let kind = if input.byte() & 15 == 0 { input.byte() } else { TYPES[usize::from(input.byte() & 31)] };
    let mut fields = Message(Vec::new());
    let f = &mut fields;
    let string = |f: &mut Message, text: &[u8]| {
        f.u16(text.len() as u16).raw(text);
    };
    match kind {
        100 => {
            f.u32(if input.byte() & 3 == 0 { small(input) as u32 } else { 8192 });
            string(f, b"9P2000.L");
        }
        104 => {
            f.u32(small(input) as u32).u32(u32::MAX);
            string(f, b"root");
            string(f, b"");
            f.u32(0);
        }
        110 => {
            let count = small(input) & 3;
            f.u32(small(input) as u32).u32(small(input) as u32).u16(count as u16);
            (0..count).for_each(|_| string(f, &name(input)));
        }
        14 | 16 | 18 | 72 => {
            f.u32(small(input) as u32);
            string(f, &name(input));
            if kind == 16 {
                string(f, &name(input));
            }
            f.u32(small(input) as u32).u32(u32::from(input.half())).u32(0).u32(0);
        }
        70 => {
            f.u32(small(input) as u32).u32(small(input) as u32);
            string(f, &name(input));
        }
        74 => {
            f.u32(small(input) as u32);
            string(f, &name(input));
            f.u32(small(input) as u32);
            string(f, &name(input));
        }
        76 => {
            f.u32(small(input) as u32);
            string(f, &name(input));
            f.u32(if input.byte() & 1 == 0 { 0 } else { 0x200 });
        }
        118 => drop(f.u32(small(input) as u32).u64(scaled(input, 50)).u32(32).raw(&[6; 32])),
        26 => {
            f.u32(small(input) as u32)
                .u32(input.half().into())
                .u32(u32::from(input.half() & 0o777))
                .u32(0)
                .u32(0);
            f.u64(scaled(input, 100)).u64(small(input)).u64(input.number()).u64(0).u64(0);
        }
        _ => drop(f.u32(small(input) as u32).u64(small(input)).u32(input.half().into())),
    }
    let size = if input.byte() & 31 == 0 { small(input) as u32 } else { 7 + fields.0.len() as u32 };
    m.u32(size).u8(kind).u16(1).raw(&fields.0);
}
