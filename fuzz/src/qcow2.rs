//! A qcow2 file is any bytes: it is refused, or answers requests with data or errors, and never panics, hangs or reaches
//! another file.

use devices::virtio::block::{Image, ImageFormat, ImageOptions};

use crate::input::Input;

const CLUSTER: usize = 4096;
const CLUSTERS: usize = 8;

/// Makes an image that is sound but for what the input says, and uses it.
pub fn target(data: &[u8]) {
    let mut input = Input::new(data);
    let directory = std::env::temp_dir();
    let name = format!("trellis-fuzz-{}-{:?}.img", std::process::id(), std::thread::current().id());
    let path = directory.join(name.replace(['(', ')'], ""));
    if std::fs::write(&path, image(&mut input)).is_err() {
        return;
    }
    let options = ImageOptions {
        read_only: input.byte() & 7 == 0,
        snapshot: input.byte() & 7 == 0,
        format: Some(ImageFormat::Qcow2),
        ..ImageOptions::new(&path)
    };
    if let Ok(image) = Image::open(&options) {
        requests(&image, &mut input);
    }
    let _ = std::fs::remove_file(&path);
}

/// Header, count table, count block, L1 table, L2 table, data; then changes.
fn image(input: &mut Input<'_>) -> Vec<u8> {
    let mut file = vec![0; CLUSTERS * CLUSTER];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    let cluster = CLUSTER as u64;
    put(0, b"QFI\xfb\0\0\0\x03");
    put(20, &12u32.to_be_bytes());
    put(24, &(1u64 << 24).to_be_bytes());
    put(36, &8u32.to_be_bytes());
    put(40, &(3 * cluster).to_be_bytes());
    put(48, &cluster.to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &104u32.to_be_bytes());
    put(CLUSTER, &(2 * cluster).to_be_bytes());
    (0..6).for_each(|n| put(2 * CLUSTER + 2 * n, &1u16.to_be_bytes()));
    put(3 * CLUSTER, &((4 * cluster) | (1 << 63)).to_be_bytes());
    put(4 * CLUSTER, &((5 * cluster) | (1 << 63)).to_be_bytes());
    for _ in 0..input.byte() & 15 {
        let place = match input.byte() & 7 {
            0 => usize::from(input.half()) % 112,
            table @ 1..=4 => usize::from(table) * CLUSTER + usize::from(input.byte()) * 8 % 64,
            _ => usize::from(input.half()) % (CLUSTERS * CLUSTER - 8),
        };
        let entry = match input.byte() & 3 {
            0 => input.number(),
            1 => (u64::from(input.byte() % 10) << 12) | (u64::from(input.byte() & 3) << 62),
            2 => u64::from(input.byte()),
            _ => u64::MAX >> (input.byte() & 63),
        };
        put(place, &entry.to_be_bytes());
    }
    let keep = if input.byte() & 15 == 0 { usize::from(input.half()) } else { file.len() };
    file.truncate(keep);
    file
}

fn requests(image: &Image, input: &mut Input<'_>) {
    let sectors = image.sectors().max(1);
    let mut data = vec![0; 8 * 512];
    for _ in 0..24 {
        let offset = input.number() % sectors.min(1 << 16) * 512;
        let len = 512 * (1 + usize::from(input.byte() & 7));
        let _ = match input.byte() & 7 {
            0..=2 => image.read(offset, &mut data[..len]),
            3 | 4 if !image.read_only() => image.write(offset, &data[..len]),
            5 if !image.read_only() => image.discard(offset & !4095, 8192),
            6 if !image.read_only() => image.write_zeroes(offset, len as u64, input.byte() & 1 != 0),
            _ => image.sync(),
        };
    }
}
