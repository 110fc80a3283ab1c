//! An empty disk image, for tests that write to one.

/// What one L1 entry covers with clusters of 64 KiB.
const MOST: u64 = 512 << 20;

/// An empty qcow2 image with clusters of 64 KiB (qcow2 specification: header, count table, count block, L1).
///
/// # Panics
/// When the disk is larger than one L1 entry covers, 512 MiB.
#[must_use]
pub fn empty_qcow2(disk_bytes: u64) -> Vec<u8> {
    assert!(disk_bytes <= MOST, "one L1 entry covers 512 MiB");
    let cluster = 64 << 10;
    let mut image = vec![0; 4 * cluster];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    let place = |clusters: u64| (clusters * 65536).to_be_bytes();
    put(0, b"QFI\xfb\0\0\0\x03");
    put(20, &16u32.to_be_bytes());
    put(24, &disk_bytes.to_be_bytes());
    put(36, &1u32.to_be_bytes());
    put(40, &place(3));
    put(48, &place(1));
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &104u32.to_be_bytes());
    put(cluster, &place(2));
    (0..4).for_each(|n| put(2 * cluster + 2 * n, &1u16.to_be_bytes()));
    image
}
