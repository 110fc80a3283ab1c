//! A command of the user's: what `trellis bakeoff -- CMD…` runs. It is no benchmark of the list; its name is `command`.
//!
//! The root has a directory `bakeoff` with `command`: words that end with a zero byte, namely `pin` or nothing (one CPU, as in the guest),
//! the working directory, the path of the program, and its arguments from its own name on; with `input`, which it reads; and
//! where `output` is made, which nobody compares.

use core::sync::atomic::{AtomicUsize, Ordering};

use crate::{Bench, Ctx, Mem, output, real_data, spawn, sys};

pub const BENCH: Bench = Bench { name: "command", ops: 1, setup, run, teardown };

const FILE: &core::ffi::CStr = c"bakeoff/command";
const INPUT: &core::ffi::CStr = c"bakeoff/input";
const OUTPUT: &core::ffi::CStr = c"bakeoff/output";
/// Bytes of all words together, and their number.
const MAX_LEN: usize = 64 << 10;
const MAX_WORDS: usize = 1024;
/// Words before the program's own name.
const BEFORE: usize = 3;

/// How many bytes the words have.
static LEN: AtomicUsize = AtomicUsize::new(0);

fn setup() -> Result<Ctx, &'static str> {
    if !spawn::is_in_own_root() {
        return Err("this host lets no process change its root");
    }
    let at = sys::map(MAX_LEN, sys::READ_WRITE).ok_or("not enough memory")?;
    let mut ctx = Ctx { mem: Mem { at, len: MAX_LEN }, digest: Some(tell_cpu), ..Ctx::default() };
    let mut len = 0;
    let words = ctx.mem.slice::<u8>();
    let read = real_data::read_into(FILE, |bytes| {
        for byte in bytes {
            if len < MAX_LEN - 1 {
                words[len] = *byte;
                len += 1;
            }
        }
    });
    if read.is_none() {
        return Err("there is no command in this root");
    }
    LEN.store(len, Ordering::Relaxed);
    if words[0] != 0 {
        sys::pin();
    }
    if sys::call3(sys::SYS_GETPID, 0, 0, 0) == 1 {
        sys::mount(c"proc", c"proc");
    }
    Ok(ctx)
}

fn teardown(_: &mut Ctx) {
    sys::unpin();
}

/// After the second mark: how much CPU time the work took, which a busy host does not lengthen.
fn tell_cpu(ctx: &mut Ctx) -> u64 {
    output::line(format_args!("CPU {}", sys::children_ns() - ctx.place as u64));
    0
}

fn run(ctx: &mut Ctx, n: u64) -> u64 {
    ctx.place = sys::children_ns() as usize;
    let len = LEN.load(Ordering::Relaxed);
    let words = &ctx.mem.slice::<u8>()[..len];
    let mut at = [0usize; MAX_WORDS + 1];
    let (mut start, mut count) = (0, 0);
    for (i, byte) in words.iter().enumerate() {
        if *byte == 0 && count < MAX_WORDS {
            at[count] = words.as_ptr() as usize + start;
            count += 1;
            start = i + 1;
        }
    }
    if count <= BEFORE {
        return 0;
    }
    for _ in 0..n {
        spawn::run_words(at[2], &at[BEFORE..=count], at[1], INPUT, OUTPUT);
    }
    0
}
