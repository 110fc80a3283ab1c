use super::*;

/// A file of its own for each test, gone with it.
pub(crate) struct Scratch(pub PathBuf);

impl Scratch {
    pub(crate) fn new(name: &str, data: &[u8]) -> Self {
        let path = std::env::temp_dir().join(format!("trellis-{}-{name}.img", std::process::id()));
        std::fs::write(&path, data).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A host in memory that can be made to wait, and to be full.
#[derive(Debug, Default)]
pub(crate) struct Moody {
    data: std::sync::Mutex<Vec<u8>>,
    /// Reads of sector 0 wait while this is set.
    pub waits: std::sync::atomic::AtomicBool,
    /// Writes find no room while this is set.
    pub full: std::sync::atomic::AtomicBool,
}

impl Moody {
    /// An image of 1 MiB, and the host's end of it.
    pub(crate) fn image() -> (Arc<Image>, Arc<Self>) {
        let moody = Arc::new(Self::default());
        *moody.data.lock().unwrap() = vec![0; 1 << 20];
        let medium = Medium::Moody(Arc::clone(&moody));
        let image = Image { medium, path: "/moody".into(), len_bytes: 1 << 20, read_only: false };
        (Arc::new(image), moody)
    }

    pub(super) fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        while offset == 0 && self.waits.load(std::sync::atomic::Ordering::SeqCst) {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let from = usize::try_from(offset).unwrap();
        data.copy_from_slice(&self.data.lock().unwrap()[from..from + data.len()]);
        Ok(())
    }

    pub(super) fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        if self.full.load(std::sync::atomic::Ordering::SeqCst) {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        let from = usize::try_from(offset).unwrap();
        self.data.lock().unwrap()[from..from + data.len()].copy_from_slice(data);
        Ok(())
    }
}

fn open(path: &Path, read_only: bool) -> Result<Image, ImageError> {
    Image::open(&ImageOptions { read_only, ..ImageOptions::new(path) })
}

fn one_line(error: &ImageError) -> String {
    let text = error.to_string();
    assert!(!text.contains('\n') && text.len() < 600, "{text}");
    text
}

#[test]
fn open_busy_image_names_its_holder() {
    let file = Scratch::new("busy", &[1; 512]);
    let first = open(&file.0, false).unwrap();
    let error = open(&file.0, true).unwrap_err();
    let pid = std::process::id();
    assert!(matches!(error, ImageError::Busy { holder, .. } if holder.is_none_or(|p| p == pid)), "{error}");
    assert!(error.to_string().contains("is in use by "));
    drop(first);
    let shared = open(&file.0, true).unwrap();
    assert!(open(&file.0, true).is_ok());
    assert!(matches!(open(&file.0, false), Err(ImageError::Busy { .. })));
    drop(shared);
}

#[test]
fn open_odd_images_gives_clear_errors() {
    let file = Scratch::new("odd", &[7; 700]);
    let error = open(&file.0, false).unwrap_err();
    assert!(error.to_string().contains("700 bytes, not whole sectors"), "{error}");
    let image = open(&file.0, true).unwrap();
    assert_eq!(image.sectors(), 2);
    let mut sector = [1; 512];
    image.read(512, &mut sector).unwrap();
    assert_eq!((sector[187], sector[188]), (7, 0));
    let empty = Scratch::new("empty", &[]);
    assert!(matches!(open(&empty.0, false), Err(ImageError::Empty(_))));
    assert!(matches!(open(&std::env::temp_dir(), true), Err(ImageError::Kind(_))));
    assert!(matches!(open(&std::env::temp_dir(), false), Err(ImageError::Kind(_))));
    assert!(matches!(open(Path::new("/dev/null"), false), Err(ImageError::Kind(_))));
    assert!(matches!(open(Path::new("/nonexistent/x"), true), Err(ImageError::Open { .. })));
}

#[test]
fn write_zeroes_and_discard_read_as_zeros() {
    let file = Scratch::new("zeroes", &[9; 8192]);
    let image = open(&file.0, false).unwrap();
    image.write_zeroes(512, 512, false).unwrap();
    image.write_zeroes(4096, 4096, true).unwrap();
    let mut all = [1; 8192];
    image.read(0, &mut all).unwrap();
    assert!(all[..512].iter().chain(&all[1024..4096]).all(|&b| b == 9));
    assert!(all[512..1024].iter().chain(&all[4096..]).all(|&b| b == 0));
}

// ---- qcow2 --------------------------------------------------------------------------------------------------

const CLUSTER: usize = 64 << 10;

/// An empty version 3 image with clusters of 64 KiB and 16-bit counts: header, count table, count block, L1 table.
fn qcow2(size: u64, backing: Option<(&str, &str)>) -> Vec<u8> {
    let mut file = vec![0; 4 * CLUSTER];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &QCOW2_MAGIC);
    put(4, &3u32.to_be_bytes());
    put(20, &16u32.to_be_bytes()); // cluster_bits
    put(24, &size.to_be_bytes());
    let tables = u32::try_from(size.div_ceil(512 << 20)).unwrap().clamp(1, 8192);
    put(36, &tables.to_be_bytes());
    put(40, &(3 * CLUSTER as u64).to_be_bytes()); // L1 table
    put(48, &(CLUSTER as u64).to_be_bytes()); // count table
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes()); // refcount_order
    put(100, &104u32.to_be_bytes()); // header_length
    put(CLUSTER, &(2 * CLUSTER as u64).to_be_bytes());
    (0..4).for_each(|cluster| put(2 * CLUSTER + 2 * cluster, &1u16.to_be_bytes()));
    if let Some((name, format)) = backing {
        put(104, &0xe279_2acau32.to_be_bytes());
        put(108, &u32::try_from(format.len()).unwrap().to_be_bytes());
        put(112, format.as_bytes());
        let at = 0x200;
        put(8, &(at as u64).to_be_bytes());
        put(16, &u32::try_from(name.len()).unwrap().to_be_bytes());
        put(at, name.as_bytes());
    }
    file
}

fn open_qcow2(path: &Path) -> Result<Image, ImageError> {
    Image::open(&ImageOptions { format: Some(ImageFormat::Qcow2), ..ImageOptions::new(path) })
}

fn get(image: &Image, offset: u64) -> u8 {
    let mut byte = [0xee; 512];
    image.read(offset, &mut byte).unwrap();
    byte[0]
}

#[test]
fn qcow2_keeps_what_was_flushed() {
    let file = Scratch::new("qcow2", &qcow2(1 << 30, None));
    let image = open_qcow2(&file.0).unwrap();
    assert_eq!(image.sectors(), 1 << 21);
    assert_eq!(get(&image, 1 << 20), 0);
    image.write(1 << 20, &[5; 100_000]).unwrap();
    image.write((1 << 30) - 512, &[6; 512]).unwrap();
    image.sync().unwrap();
    // A second look at the file, as after a crash: the first image is not closed.
    let copy = Scratch::new("qcow2-copy", &std::fs::read(&file.0).unwrap());
    let again = open_qcow2(&copy.0).unwrap();
    assert_eq!((get(&again, 1 << 20), get(&again, (1 << 20) + 99_000)), (5, 5));
    assert_eq!((get(&again, (1 << 30) - 512), get(&again, 0)), (6, 0));
    assert!(image.write(1 << 30, &[1; 512]).is_err(), "beyond the end");
    assert!(std::fs::metadata(&file.0).unwrap().len() < 1 << 20, "clusters are made when they are written");
}

#[test]
fn qcow2_discard_and_zeroes_read_as_zeros() {
    let file = Scratch::new("qcow2-zero", &qcow2(1 << 24, None));
    let image = open_qcow2(&file.0).unwrap();
    image.write(0, &[5; 4 * CLUSTER]).unwrap();
    image.discard(0, CLUSTER as u64).unwrap();
    image.write_zeroes(CLUSTER as u64 + 512, 512, false).unwrap();
    image.write_zeroes(2 * CLUSTER as u64 - 512, CLUSTER as u64 + 1024, true).unwrap();
    let at = |offset| get(&image, offset);
    let cluster = CLUSTER as u64;
    assert_eq!(
        (at(0), at(cluster - 512), at(cluster), at(cluster + 512), at(cluster + 1024)),
        (0, 0, 5, 0, 5)
    );
    assert_eq!((at(2 * cluster - 1024), at(2 * cluster - 512), at(2 * cluster)), (5, 0, 0));
    assert_eq!((at(3 * cluster), at(3 * cluster + 512)), (0, 5));
}

#[test]
fn backing_files_show_through_until_written() {
    let base = Scratch::new("chain-base", &[7; 1 << 20]);
    let middle = Scratch::new("chain-middle", &qcow2(1 << 20, Some((base.0.to_str().unwrap(), "raw"))));
    // A name relative to the file that it stands in.
    let name = middle.0.file_name().unwrap().to_str().unwrap();
    let top = Scratch::new("chain-top", &qcow2(1 << 21, Some((name, "qcow2"))));
    let image = open_qcow2(&top.0).unwrap();
    assert_eq!((get(&image, 0), get(&image, (1 << 20) - 512), get(&image, 1 << 20)), (7, 7, 0));
    image.write(4096, &[8; 512]).unwrap();
    assert_eq!((get(&image, 3584), get(&image, 4096), get(&image, 4608)), (7, 8, 7));
    assert!(matches!(open(&base.0, false), Err(ImageError::Busy { .. })), "a base in use is not written");
    drop(image);
    assert_eq!(std::fs::read(&base.0).unwrap(), [7; 1 << 20]);
    open(&base.0, false).unwrap();
}

#[test]
fn snapshot_leaves_the_image_and_lets_others_read_it() {
    for (format, content) in [(ImageFormat::Raw, vec![7; 1000]), (ImageFormat::Qcow2, qcow2(1 << 20, None))] {
        let file = Scratch::new("snapshot", &content);
        let options = ImageOptions { snapshot: true, format: Some(format), ..ImageOptions::new(&file.0) };
        let (one, two) = (Image::open(&options).unwrap(), Image::open(&options).unwrap());
        let before = get(&two, 512);
        one.write(512, &[9; 512]).unwrap();
        one.sync().unwrap();
        assert_eq!((get(&one, 512), get(&two, 512)), (9, before));
        drop((one, two));
        assert_eq!(std::fs::read(&file.0).unwrap(), content);
    }
}

#[test]
fn format_is_not_guessed_from_what_a_guest_can_write() {
    let file = Scratch::new("guess", &qcow2(1 << 20, None));
    let error = open(&file.0, false).unwrap_err();
    assert!(matches!(error, ImageError::WhichFormat(_)), "{error}");
    assert!(one_line(&error).contains("format=raw"));
    let raw = ImageOptions { format: Some(ImageFormat::Raw), ..ImageOptions::new(&file.0) };
    assert_eq!(Image::open(&raw).unwrap().sectors(), 4 * CLUSTER as u64 / 512);
    let named = file.0.with_extension("qcow2");
    std::fs::rename(&file.0, &named).unwrap();
    assert_eq!(open(&named, false).unwrap().sectors(), 2048);
    std::fs::remove_file(&named).unwrap();
}

#[test]
fn bad_backing_files_are_one_clear_line() {
    let says = |backing: &str, format: &str, expected: &str| {
        let file = Scratch::new("bad-backing", &qcow2(1 << 20, Some((backing, format))));
        let text = one_line(&open_qcow2(&file.0).unwrap_err());
        assert!(text.contains(expected), "{text}");
    };
    says("/nonexistent/base", "raw", "/nonexistent/base");
    says("/dev/zero", "raw", "neither a regular file");
    says("/tmp", "qcow2", "neither a regular file");
    says("/etc/passwd", "qcow2", "Not a qcow2 file");
    says("/etc/passwd", "vmdk", "vmdk");
    says("json:{}", "qcow2", "json:{}");
    says("a\nb\u{1b}[31m", "raw", "cannot use disk image");
    let own = Scratch::new("own-backing", &[]);
    let name = own.0.to_str().unwrap();
    std::fs::write(&own.0, qcow2(1 << 20, Some((name, "qcow2")))).unwrap();
    let text = one_line(&Image::open(&read_only(&own.0)).unwrap_err());
    assert!(text.contains("loop"), "{text}");
}

fn read_only(path: &Path) -> ImageOptions {
    ImageOptions { read_only: true, format: Some(ImageFormat::Qcow2), ..ImageOptions::new(path) }
}

#[test]
fn chain_of_two_that_name_each_other_is_a_loop() {
    let (one, two) = (Scratch::new("loop-one", &[]), Scratch::new("loop-two", &[]));
    std::fs::write(&one.0, qcow2(1 << 20, Some((two.0.to_str().unwrap(), "qcow2")))).unwrap();
    std::fs::write(&two.0, qcow2(1 << 20, Some((one.0.to_str().unwrap(), "qcow2")))).unwrap();
    let text = one_line(&Image::open(&read_only(&one.0)).unwrap_err());
    assert!(text.contains("loop"), "{text}");
    // Writable: the lock of the top one is in the way already.
    let text = one_line(&open_qcow2(&one.0).unwrap_err());
    assert!(text.contains("loop") || text.contains("in use"), "{text}");
}

#[test]
fn damaged_headers_are_errors() {
    let cases: &[(usize, &[u8])] = &[
        (4, &[0, 0, 0, 9]),                 // version
        (20, &[0, 0, 0, 63]),               // cluster_bits
        (20, &[0xff; 4]),                   //
        (24, &[0xff; 8]),                   // size
        (36, &[0xff; 4]),                   // L1 entries
        (40, &[0xff; 8]),                   // L1 table
        (48, &[0x7f; 8]),                   // count table
        (56, &[0xff; 4]),                   // its clusters
        (72, &[0, 0, 0, 0, 0, 0, 0, 0x80]), // an unknown feature that must be known
        (72, &[0, 0, 0, 0, 0, 0, 0, 4]),    // external data file
        (96, &[0, 0, 0, 7]),                // refcount_order
        (100, &[0xff; 4]),                  // header_length
        (8, &[0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0xff, 0xff]),
        (104, &[0xe2, 0x79, 0x2a, 0xca, 0xff, 0xff, 0xff, 0xff]),
    ];
    for (at, bytes) in cases {
        let mut content = qcow2(1 << 20, None);
        content[*at..at + bytes.len()].copy_from_slice(bytes);
        let file = Scratch::new("bad-header", &content);
        match open_qcow2(&file.0) {
            Err(error) => drop(one_line(&error)),
            // What the header says may be usable after all; using it must not panic or hang.
            Ok(image) => {
                let _ = image.read(0, &mut [0; 512]);
                let _ = image.write(0, &[1; 512]);
                let _ = image.sync();
            }
        }
    }
    let short = Scratch::new("short-header", b"QFI\xfb\0\0\0\x03");
    drop(one_line(&open_qcow2(&short.0).unwrap_err()));
}

#[test]
fn counts_that_do_not_cover_the_file_are_refused_to_a_writer() {
    let mut content = qcow2(1 << 20, None);
    content[CLUSTER..CLUSTER + 8].fill(0);
    let file = Scratch::new("no-counts", &content);
    let text = one_line(&open_qcow2(&file.0).unwrap_err());
    assert!(text.contains("qemu-img check"), "{text}");
    assert_eq!(get(&Image::open(&read_only(&file.0)).unwrap(), 0), 0, "it can be read");
}

#[test]
fn tables_that_overlap_or_point_anywhere_are_survived() {
    let mut rng = crate::virtio::rng::SplitMix64::new(0x9c0);
    for _ in 0..300 {
        let mut content = qcow2(1 << 24, None);
        // L1 and count entries to anywhere, to each other, to the header.
        for place in [CLUSTER, CLUSTER + 8, 3 * CLUSTER, 2 * CLUSTER, 2 * CLUSTER + 8] {
            if rng.next() & 1 == 0 {
                let cluster = match rng.next() % 4 {
                    0 => rng.next() % 6,
                    1 => rng.next() & 0xff_ffff_ffff,
                    2 => u64::MAX >> 8,
                    _ => 3,
                };
                let flags = rng.next() & 0xc000_0000_0000_01ff;
                content[place..place + 8].copy_from_slice(&((cluster << 16) | flags).to_be_bytes());
            }
        }
        let file = Scratch::new("tables", &content);
        let Ok(image) = open_qcow2(&file.0) else { continue };
        for n in 0..8u64 {
            let at = (rng.next() % (1 << 15)) * 512;
            let mut data = [0; 512];
            let _ = image.read(at, &mut data);
            let _ = image.write(at, &[3; 512]);
            let _ = if n & 1 == 0 { image.discard(at & !0xffff, 0x1_0000) } else { image.sync() };
        }
    }
}

/// Cluster n of an image of [`qcow2`], as a table's entry that has it alone.
fn entry(cluster: u64) -> [u8; 8] {
    (1 << 63 | cluster << 16).to_be_bytes()
}

#[test]
fn tables_that_overlap_are_refused_to_a_writer_in_one_line() {
    const L1: usize = 3 << 16;
    let l2 = |entries: &[[u8; 8]]| {
        let mut image = qcow2(64 << 20, None);
        image.resize(6 << 16, 0);
        image[L1..L1 + 8].copy_from_slice(&entry(4));
        image[4 << 16..][..8 * entries.len()].copy_from_slice(entries.as_flattened());
        image
    };
    let mut loops = qcow2(64 << 20, None);
    loops[L1..L1 + 8].copy_from_slice(&entry(3));
    for (what, image) in [
        ("a table that is its own second level", loops),
        ("data over the header", l2(&[entry(0)])),
        ("data over the counts", l2(&[entry(5), entry(2)])),
        ("data over its own table", l2(&[entry(4)])),
        ("two places in one cluster", l2(&[entry(5), entry(5)])),
    ] {
        let file = Scratch::new("overlap.qcow2", &image);
        let error = open_qcow2(&file.0).expect_err(what);
        assert!(one_line(&error).contains("overlaps"), "{what}: {error}");
    }
    let sound = Scratch::new("sound.qcow2", &l2(&[entry(5)]));
    assert!(open_qcow2(&sound.0).is_ok());
}

#[test]
fn encrypted_and_impossibly_large_images_are_one_clear_line() {
    let mut encrypted = qcow2(64 << 20, None);
    encrypted[35] = 1;
    let file = Scratch::new("encrypted.qcow2", &encrypted);
    assert!(one_line(&open_qcow2(&file.0).unwrap_err()).contains("encrypted"));
    for size in [1u64 << 63, u64::MAX - 511, 1 << 52] {
        let mut image = qcow2(64 << 20, None);
        image[24..32].copy_from_slice(&size.to_be_bytes());
        let file = Scratch::new("huge.qcow2", &image);
        assert!(one_line(&open_qcow2(&file.0).unwrap_err()).contains("larger than its format"), "{size:#x}");
    }
}
