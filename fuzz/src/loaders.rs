//! Any kernel file is loaded or refused with an error, whatever its headers say.

use guestmem::GuestMemory;
use vmm::boot::{BootSource, Module, Platform, Protocol, load, recognise};

use crate::input::Input;

const MEMORY: u64 = 24 << 20;
const PROTOCOLS: [Option<Protocol>; 6] = [
    None,
    Some(Protocol::Linux64),
    Some(Protocol::Linux32),
    Some(Protocol::Pvh),
    Some(Protocol::Elf),
    Some(Protocol::Multiboot),
];

/// Gives random bytes the magic numbers of a format, so that what lies behind them is reached.
fn disguise(kernel: &mut [u8], as_what: u8) {
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = kernel.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    match as_what {
        0 => {}
        1 => {
            put(0x1fe, &[0x55, 0xaa]);
            put(0x202, b"HdrS");
            put(0x206, &[0x0f, 0x02]);
        }
        2 | 3 => {
            put(0, b"\x7fELF");
            put(4, &[as_what - 1, 1, 1]);
            put(16, &[2, 0, if as_what == 3 { 62 } else { 3 }, 0, 1, 0, 0, 0]);
            // Program headers behind the file header, of the right size.
            if as_what == 3 {
                put(32, &64u64.to_le_bytes());
                put(54, &[56, 0, 3, 0]);
            } else {
                put(28, &52u32.to_le_bytes());
                put(42, &[32, 0, 3, 0]);
            }
        }
        _ => {
            let flags = u32::from_le_bytes([kernel_byte(as_what), 0, as_what & 1, 0]);
            put(0, &0x1bad_b002u32.to_le_bytes());
            put(4, &flags.to_le_bytes());
            put(8, &0u32.wrapping_sub(0x1bad_b002).wrapping_sub(flags).to_le_bytes());
        }
    }
}

const fn kernel_byte(n: u8) -> u8 {
    n & 7
}

/// Loads the file that the input describes.
pub fn target(data: &[u8]) {
    thread_local! {
        static MEM: std::sync::Arc<GuestMemory> = GuestMemory::new(MEMORY).expect("memory");
    }
    let mut input = Input::new(data);
    let as_what = input.byte() % 6;
    let protocol = PROTOCOLS[usize::from(input.byte()) % PROTOCOLS.len()];
    let mut kernel = vec![0; usize::from(input.half())];
    input.fill(&mut kernel);
    disguise(&mut kernel, as_what);
    let initrd = (input.byte() & 1 != 0).then(|| vec![0x5a; usize::from(input.half())]);
    let module = Module { data: vec![1; usize::from(input.byte())], cmdline: "module".to_owned() };
    let source = BootSource {
        kernel_file: None,
        kernel,
        kernel_name: "kernel".to_owned(),
        initrd,
        modules: if input.byte() & 1 != 0 { vec![module] } else { Vec::new() },
        cmdline: "console=ttyS0".repeat(usize::from(input.byte())),
        protocol,
    };
    let _ = recognise(&source);
    MEM.with(|mem| {
        // An error is as good an answer as any.
        let _ = load(mem, &source, &Platform::default());
    });
}
