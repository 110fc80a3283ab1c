//! Small kernel files for the tests.

/// What a sample's code is.
pub(super) const PAYLOAD: &[u8] = b"\xf4\xeb\xfdpayload";

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

/// A relocatable 64-bit bzImage of protocol 2.15: 16 MiB preferred, 4 MiB init_size, 4 KiB of protected-mode code.
pub(super) fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 1024 + 4096];
    image[0x1f1] = 1;
    put(&mut image, 0x1f4, &256u32.to_le_bytes());
    put(&mut image, 0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, 0x206, &0x020fu16.to_le_bytes());
    image[0x211] = 0x81;
    put(&mut image, 0x214, &0x10_0000u32.to_le_bytes());
    put(&mut image, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut image, 0x230, &0x20_0000u32.to_le_bytes());
    image[0x234] = 1;
    put(&mut image, 0x236, &0x7fu16.to_le_bytes());
    put(&mut image, 0x238, &2047u32.to_le_bytes());
    put(&mut image, 0x258, &0x100_0000u64.to_le_bytes());
    put(&mut image, 0x260, &0x40_0000u32.to_le_bytes());
    put(&mut image, 1024, PAYLOAD);
    image
}

/// An ELF with one segment of 2000H bytes at `address`, entry 10H behind, and a PVH note (entry 20H behind) if asked.
pub(super) fn elf(class64: bool, address: u32, note: bool) -> Vec<u8> {
    let word = |v: u64| if class64 { v.to_le_bytes().to_vec() } else { v.to_le_bytes()[..4].to_vec() };
    let headers: u16 = if note { 2 } else { 1 };
    let (header_size, entry_size) = if class64 { (64u16, 56u16) } else { (52, 32) };
    let notes_at = u64::from(header_size + entry_size * headers);
    let data_at = notes_at + 24;
    let mut image = b"\x7fELF".to_vec();
    image.extend([if class64 { 2 } else { 1 }, 1, 1]);
    image.resize(16, 0);
    image.extend(2u16.to_le_bytes());
    image.extend(if class64 { 62u16 } else { 3 }.to_le_bytes());
    image.extend(1u32.to_le_bytes());
    image.extend(word(u64::from(address) + 0x10));
    image.extend(word(header_size.into()));
    image.extend(word(0));
    image.extend(0u32.to_le_bytes());
    for half in [header_size, entry_size, headers, 0, 0, 0] {
        image.extend(half.to_le_bytes());
    }
    let mut header = |kind: u32, offset: u64, size: u64, mem: u64, align: u64| {
        image.extend(kind.to_le_bytes());
        if class64 {
            image.extend(7u32.to_le_bytes());
        }
        image.extend([offset, address.into(), address.into(), size, mem].into_iter().flat_map(word));
        if !class64 {
            image.extend(7u32.to_le_bytes());
        }
        image.extend(word(align));
    };
    header(1, data_at, PAYLOAD.len() as u64, 0x2000, 0x1000);
    if note {
        header(4, notes_at, 20, 20, 4);
    }
    for field in [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), address + 0x20] {
        image.extend(field.to_le_bytes());
    }
    image.resize(usize::try_from(data_at).unwrap(), 0);
    image.extend(PAYLOAD);
    image
}

/// A multiboot header with `flags`, and addresses if given.
pub(super) fn multiboot_header(flags: u32, addresses: &[u32]) -> Vec<u8> {
    let magic = 0x1bad_b002u32;
    let words = [magic, flags, 0u32.wrapping_sub(magic).wrapping_sub(flags)];
    words.iter().chain(addresses).flat_map(|w| w.to_le_bytes()).collect()
}

/// A flat image with the load addresses in its header at file offset 20H: loads at 1 MiB, entry 40H behind, bss to 1 MiB + 3000H.
pub(super) fn multiboot_raw(flags: u32) -> Vec<u8> {
    let mut image = vec![0x90; 0x20];
    image.extend(multiboot_header(flags | 1 << 16, &[0x10_0020, 0x10_0000, 0, 0x10_3000, 0x10_0040]));
    image.extend(PAYLOAD);
    image
}

/// An ELF with a multiboot header behind it.
pub(super) fn multiboot_elf(class64: bool, note: bool, flags: u32) -> Vec<u8> {
    let mut image = elf(class64, 0x20_0000, note);
    image.resize(image.len().next_multiple_of(4), 0);
    image.extend(multiboot_header(flags, &[]));
    image
}
