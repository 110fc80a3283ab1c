//! Whole loads, good and bad.

use proptest::prelude::*;

use super::samples::PAYLOAD;
use super::state::gpr;
use super::*;

const MIB: u64 = 1 << 20;

fn source(kernel: Vec<u8>) -> BootSource {
    BootSource { kernel, kernel_name: "k".into(), cmdline: "console=ttyS0".into(), ..Default::default() }
}

fn boot(size: u64, source: &BootSource) -> Result<(std::sync::Arc<GuestMemory>, InitialState), BootError> {
    let mem = GuestMemory::new(size).unwrap();
    let state = load(&mem, source, &Platform { cpus: 2, vga: true, ecam: None })?;
    Ok((mem, state))
}

fn u32_of(mem: &GuestMemory, at: u64) -> u32 {
    mem.load_gpa(Gpa(at)).unwrap()
}

fn u64_of(mem: &GuestMemory, at: u64) -> u64 {
    mem.load_gpa(Gpa(at)).unwrap()
}

fn text(mem: &GuestMemory, at: u32) -> String {
    (at..)
        .map(|a| mem.load_gpa::<u8>(Gpa(a.into())).unwrap())
        .take_while(|&b| b != 0)
        .map(char::from)
        .collect()
}

fn has_payload(mem: &GuestMemory, at: u64) -> bool {
    let mut found = vec![0; PAYLOAD.len()];
    mem.read(Gpa(at), &mut found).unwrap();
    found == PAYLOAD
}

#[test]
fn bzimage_boots_by_64_bit_entry() {
    let mut s = source(samples::bzimage());
    s.initrd = Some(vec![0x5a; 5000]);
    let (mem, state) = boot(64 * MIB, &s).unwrap();
    assert_eq!((state.protocol, state.mode, state.rip), (Protocol::Linux64, EntryMode::Long64, 0x100_0200));
    assert!(has_payload(&mem, 0x100_0000));
    let page = state.gprs[gpr::RSI];
    assert_eq!(u32_of(&mem, page + 0x202), u32::from_le_bytes(*b"HdrS"));
    assert_eq!(mem.load_gpa::<u8>(Gpa(page + 0x210)), Some(0xff));
    assert_eq!(u32_of(&mem, page + 0x214), 0x100_0000);
    assert_eq!((u32_of(&mem, page + 0x218), u32_of(&mem, page + 0x21c)), (0x3ff_e000, 5000));
    assert_eq!(mem.load_gpa::<u16>(Gpa(0x3ff_e000 + 4998)), Some(0x5a5a));
    assert_eq!(text(&mem, u32_of(&mem, page + 0x228)), "console=ttyS0");
    assert_eq!(u64_of(&mem, page + 0x70), layout::ACPI_TABLES.start);
    assert_eq!(mem.load_gpa::<u8>(Gpa(page + 0x1e8)), Some(5));
    assert_eq!((u64_of(&mem, page + 0x2d0 + 60), u64_of(&mem, page + 0x2d0 + 68)), (MIB, 63 * MIB));
    // Page tables and GDT are where the registers say.
    assert_eq!(u64_of(&mem, state.cr3) & 0xfff, 3);
    assert_eq!(u64_of(&mem, state.gdtr.base + 0x10), 0x00af_9b00_0000_ffff);
}

#[test]
fn bzimage_forced_or_without_64_bit_entry_boots_by_32_bit_entry() {
    let mut s = source(samples::bzimage());
    s.protocol = Some(Protocol::Linux32);
    let (_, state) = boot(64 * MIB, &s).unwrap();
    assert_eq!((state.mode, state.rip, state.cr3), (EntryMode::Protected32, 0x100_0000, 0));
    assert_eq!((state.segments.cs.selector, state.segments.ds.selector), (0x10, 0x18));
    let mut s = source(samples::bzimage());
    s.kernel[0x236] = 0;
    assert_eq!(boot(64 * MIB, &s).unwrap().1.protocol, Protocol::Linux32);
}

#[test]
fn real_mode_finds_the_interrupt_vector_table() {
    for kernel in
        [samples::bzimage(), samples::multiboot_elf(true, false, 0), samples::elf(true, 0x20_0000, true)]
    {
        let (mem, state) = boot(64 * MIB, &source(kernel)).unwrap();
        assert_eq!((state.idtr.base, state.idtr.limit), (0, 0x3ff));
        for vector in 0..256 {
            assert_eq!(u32_of(&mem, 4 * vector) >> 16, 0xf000);
            // No gate of protected mode: an exception there ends at once, as without a table.
            assert_eq!(u32_of(&mem, 4 * vector) >> 8 & 0x1f, 0);
        }
    }
}

#[test]
fn bzimage_without_protected_mode_entry_is_refused() {
    let mut s = source(samples::bzimage());
    s.kernel[0x214..0x218].fill(0);
    let error = boot(64 * MIB, &s).err().expect("refused").to_string();
    assert!(error.contains("no protected-mode entry"), "{error}");
}

#[test]
fn pvh_note_is_preferred_and_start_information_is_complete() {
    let mut s = source(samples::multiboot_elf(true, true, 0));
    s.initrd = Some(b"first".to_vec());
    s.modules = vec![Module { data: b"second".to_vec(), cmdline: "arg".into() }];
    let (mem, state) = boot(16 * MIB, &s).unwrap();
    assert_eq!((state.protocol, state.mode, state.rip), (Protocol::Pvh, EntryMode::Protected32, 0x20_0020));
    assert!(has_payload(&mem, 0x20_0000));
    let info = state.gprs[gpr::RBX];
    assert_eq!([0, 4, 8, 12].map(|o| u32_of(&mem, info + o)), [0x336e_c578, 1, 0, 2]);
    let list = u64_of(&mem, info + 16);
    assert_eq!((u64_of(&mem, list), u64_of(&mem, list + 8)), (16 * MIB - 4096, 5));
    assert_eq!(u64_of(&mem, list + 40), 6);
    assert_eq!(text(&mem, u32_of(&mem, list + 48)), "arg");
    assert_eq!(text(&mem, u32_of(&mem, info + 24)), "console=ttyS0");
    assert_eq!(u64_of(&mem, info + 32), layout::ACPI_TABLES.start);
    let map = u64_of(&mem, info + 40);
    assert_eq!((u64_of(&mem, map), u64_of(&mem, map + 8), u64_of(&mem, map + 16)), (0, 0x9_fc00, 1));
    assert_eq!(u32_of(&mem, info + 48), 5);
}

#[test]
fn elf_without_marks_is_entered_by_its_class() {
    for (class64, mode) in [(true, EntryMode::Long64), (false, EntryMode::Protected32)] {
        let (mem, state) = boot(16 * MIB, &source(samples::elf(class64, 0x20_0000, false))).unwrap();
        assert_eq!((state.protocol, state.mode, state.rip), (Protocol::Elf, mode, 0x20_0010));
        assert!(has_payload(&mem, 0x20_0000));
        assert_eq!(text(&mem, u32_of(&mem, state.gprs[gpr::RSI] + 0x228)), "console=ttyS0");
    }
}

#[test]
fn multiboot_images_of_all_kinds_boot() {
    // With and without alignment and memory map flags; flat with addresses, ELF32, ELF64.
    for flags in [0, 1, 2, 3, 4] {
        let images = [
            (samples::multiboot_raw(flags), 0x10_0040),
            (samples::multiboot_elf(false, false, flags), 0x20_0010),
            (samples::multiboot_elf(true, false, flags), 0x20_0010),
        ];
        for (image, entry) in images {
            let (mem, state) = boot(16 * MIB, &source(image)).unwrap();
            assert_eq!(
                (state.protocol, state.mode, state.rip),
                (Protocol::Multiboot, EntryMode::Protected32, entry)
            );
            assert_eq!(state.gprs[gpr::RAX], 0x2bad_b002);
            let info = state.gprs[gpr::RBX];
            assert_eq!([0, 4, 8].map(|o| u32_of(&mem, info + o)), [0x124d, 639, 15 * 1024]);
            assert_eq!(text(&mem, u32_of(&mem, info + 16)), "k console=ttyS0");
            assert_eq!(text(&mem, u32_of(&mem, info + 64)), "trellis");
            let (len, map) = (u32_of(&mem, info + 44), u64::from(u32_of(&mem, info + 48)));
            assert_eq!((len, u32_of(&mem, map)), (5 * 24, 20));
            assert_eq!(
                (u64_of(&mem, map + 76), u64_of(&mem, map + 84), u32_of(&mem, map + 92)),
                (MIB, 15 * MIB, 1)
            );
        }
    }
}

#[test]
fn multiboot_modules_stand_page_aligned_behind_the_kernel() {
    let mut s = source(samples::multiboot_raw(0));
    s.initrd = Some(b"first".to_vec());
    s.modules = vec![Module { data: vec![7; 4097], cmdline: "arg".into() }];
    let (mem, state) = boot(16 * MIB, &s).unwrap();
    let info = state.gprs[gpr::RBX];
    assert_eq!(u32_of(&mem, info + 20), 2);
    let list = u64::from(u32_of(&mem, info + 24));
    assert_eq!([0, 4, 16, 20].map(|o| u32_of(&mem, list + o)), [0x10_3000, 0x10_3005, 0x10_4000, 0x10_5001]);
    assert_eq!(text(&mem, u32_of(&mem, list + 24)), "arg");
    assert_eq!(u32_of(&mem, 0x10_3000), u32::from_le_bytes(*b"firs"));
}

#[test]
fn boot_again_in_dirty_memory_gives_the_same() {
    let s = source(samples::multiboot_raw(0));
    let (mem, state) = boot(4 * MIB, &s).unwrap();
    mem.fill(Gpa(0x10_0000), 0x3000, 0xcc).unwrap();
    let again = load(&mem, &s, &Platform { cpus: 2, vga: true, ecam: None }).unwrap();
    assert_eq!(state, again);
    assert_eq!(u32_of(&mem, 0x10_2ffc), 0);
}

#[test]
fn forced_protocol_that_is_not_there_is_an_error() {
    let mut s = source(samples::multiboot_elf(true, true, 0));
    for wanted in [Protocol::Multiboot, Protocol::Elf, Protocol::Pvh] {
        s.protocol = Some(wanted);
        assert_eq!(boot(16 * MIB, &s).unwrap().1.protocol, wanted);
    }
    s.protocol = Some(Protocol::Linux64);
    let message = recognise(&s).unwrap_err().to_string();
    assert!(message.contains("Linux 64-bit") && message.contains("PVH, multiboot and ELF"), "{message}");
}

#[test]
fn files_that_are_no_kernels_get_their_own_message() {
    let message = |kernel: &[u8]| boot(16 * MIB, &source(kernel.to_vec())).err().unwrap().to_string();
    assert!(message(b"").contains("empty"));
    assert!(message(b"short").contains("only 5 bytes"));
    assert!(message(b"\x1f\x8b\x08 and so on").contains("gunzip"));
    assert!(message(b"#!/bin/sh\n").contains("script"));
    assert!(message(&[0; 4096]).contains("not a kernel"));
    let mut sector = vec![0; 512];
    sector.extend([0; 512]);
    sector[510..512].copy_from_slice(&[0x55, 0xaa]);
    assert!(message(&sector).contains("disk"));
    for message in [message(b""), message(&[0; 4096]), message(b"x")] {
        assert!(!message.contains('\n'));
    }
}

#[test]
fn kernel_larger_than_memory_is_an_error() {
    for size in [1, 2, 4, 16] {
        assert!(matches!(boot(size * MIB, &source(samples::bzimage())), Err(BootError::OutsideRam { .. })));
    }
    let message = boot(16 * MIB, &source(samples::bzimage())).err().unwrap().to_string();
    assert!(message.contains("at least 20 MiB"), "{message}");
    let elf = source(samples::elf(true, 0x20_0000, true));
    assert!(matches!(boot(2 * MIB, &elf), Err(BootError::OutsideRam { .. })));
    assert!(boot(4 * MIB, &elf).is_ok());
    let in_hole = source(samples::elf(false, 0xa_0000, true));
    assert!(matches!(boot(4 * MIB, &in_hole), Err(BootError::OutsideRam { .. })));
}

#[test]
fn memory_below_one_megabyte_and_cpus_out_of_range_are_errors() {
    let s = source(samples::multiboot_raw(0));
    assert!(matches!(boot(4096, &s), Err(BootError::MemoryTooSmall { .. })));
    assert!(matches!(boot(MIB, &s), Err(BootError::OutsideRam { .. })));
    let mem = GuestMemory::new(4 * MIB).unwrap();
    for cpus in [0, 17, 1000] {
        let platform = Platform { cpus, ..Default::default() };
        assert!(matches!(load(&mem, &s, &platform), Err(BootError::Cpus { .. })));
    }
}

#[test]
fn low_kernel_boots_in_one_megabyte() {
    let (mem, state) = boot(MIB, &source(samples::elf(true, 0x1_0000, false))).unwrap();
    assert!(has_payload(&mem, 0x1_0000) && state.cr3 >= 0x1_2000);
}

#[test]
fn initrd_too_large_or_above_the_kernels_limit_is_an_error() {
    let mut s = source(samples::bzimage());
    s.initrd = Some(vec![0; 45 << 20]);
    assert!(matches!(boot(64 * MIB, &s), Err(BootError::NoRoom { what: "the initrd", .. })));
    s.initrd = Some(vec![0; 8 << 20]);
    s.kernel[0x22c..0x230].copy_from_slice(&0x17f_ffffu32.to_le_bytes());
    let (mem, state) = boot(64 * MIB, &s).unwrap();
    assert_eq!(u32_of(&mem, state.gprs[gpr::RSI] + 0x218), 0x80_0000);
    s.kernel[0x22c..0x230].copy_from_slice(&0x7f_ffffu32.to_le_bytes());
    assert!(matches!(boot(64 * MIB, &s), Err(BootError::NoRoom { .. })));
}

#[test]
fn command_line_limit_is_the_kernels() {
    let mut s = source(samples::bzimage());
    s.cmdline = "x".repeat(2047);
    assert!(boot(64 * MIB, &s).is_ok());
    s.cmdline.push('x');
    assert_eq!(boot(64 * MIB, &s).err(), Some(BootError::CommandLineTooLong { len: 2048, max: 2047 }));
}

#[test]
fn multiboot_with_bad_fields_is_an_error() {
    let bad = |at: usize, value: u32| {
        let mut image = samples::multiboot_raw(0);
        image[0x20 + at..0x24 + at].copy_from_slice(&value.to_le_bytes());
        boot(4 * MIB, &source(image)).err().unwrap()
    };
    assert!(matches!(bad(12, 0x0f_0000), BootError::Malformed { .. })); // header before the image
    assert!(matches!(bad(12, 0x10_1000), BootError::Malformed { .. })); // image before the file
    assert!(matches!(bad(20, 0x20_0000), BootError::Truncated { .. })); // load_end_addr
    assert!(matches!(bad(20, 0x0f_0000), BootError::Malformed { .. }));
    assert!(matches!(bad(24, 0x80_0000), BootError::OutsideRam { .. })); // bss_end_addr
    assert!(matches!(bad(28, 0), BootError::Malformed { .. })); // entry_addr
    let unknown = boot(4 * MIB, &source(samples::multiboot_raw(1 << 5))).err().unwrap();
    assert!(matches!(unknown, BootError::Malformed { .. }));
}

#[test]
fn every_truncation_of_every_sample_is_survived() {
    let mem = GuestMemory::new(64 * MIB).unwrap();
    let samples = [samples::bzimage(), samples::elf(true, 0x20_0000, true), samples::multiboot_raw(0)];
    for image in samples.iter().chain([&samples::multiboot_elf(false, false, 3)]) {
        let step = if image.len() > 2000 { 7 } else { 1 };
        for len in (0..image.len()).step_by(step) {
            let _ = load(&mem, &source(image[..len].to_vec()), &Platform::default());
        }
    }
}

/// Debian's kernel and memtest86+, where they are installed.
#[test]
fn real_kernels_on_this_host_load() {
    let expected = [
        ("/boot/memtest86+ia32.bin", Protocol::Linux32, 16),
        ("/boot/memtest86+x64.bin", Protocol::Linux64, 16),
        ("/boot/vmlinuz", Protocol::Linux64, 512),
    ];
    for (path, protocol, megabytes) in expected {
        match std::fs::read(path) {
            Ok(kernel) => {
                let state = boot(megabytes * MIB, &source(kernel)).unwrap().1;
                assert_eq!(state.protocol, protocol, "{path}");
            }
            Err(error) => eprintln!("skipped {path}: {error}"),
        }
    }
}

fn mutated() -> impl Strategy<Value = Vec<u8>> {
    let base = prop_oneof![
        Just(samples::bzimage()),
        Just(samples::elf(true, 0x20_0000, true)),
        Just(samples::elf(false, 0x20_0000, true)),
        Just(samples::multiboot_raw(3)),
        Just(samples::multiboot_elf(false, false, 3)),
    ];
    let interesting = prop_oneof![any::<u8>(), Just(0), Just(0xff), Just(0x7f)];
    (base, prop::collection::vec((0..0x300usize, interesting), 0..12)).prop_map(|(mut image, changes)| {
        for (at, value) in changes {
            let at = at % image.len();
            image[at] = value;
        }
        image
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn changed_headers_never_panic(image in mutated()) {
        let _ = boot(32 * MIB, &source(image));
    }

    #[test]
    fn random_files_never_panic(mut image in prop::collection::vec(any::<u8>(), 0..2000), kind in 0..3) {
        match kind {
            0 if image.len() > 0x300 => {
                image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
                image[0x202..0x206].copy_from_slice(b"HdrS");
            }
            1 if image.len() > 64 => image[..7].copy_from_slice(b"\x7fELF\x02\x01\x01"),
            _ => {}
        }
        let _ = boot(4 * MIB, &source(image));
    }
}

#[test]
fn kernel_that_can_be_read_again_is_not_kept() {
    let mut file = tempfile::tempfile().unwrap();
    std::io::Write::write_all(&mut file, b"a kernel").unwrap();
    let file = Some(std::sync::Arc::new(file));
    let mut again = BootSource { kernel_file: file, ..source(b"a kernel".to_vec()) };
    let mut kept = source(b"a kernel".to_vec());
    for s in [&mut again, &mut kept] {
        for _ in 0..2 {
            s.let_go();
            assert_eq!(s.kernel.is_empty(), s.kernel_file.is_some());
            s.recall().unwrap();
            assert_eq!(s.kernel, b"a kernel");
        }
    }
}
