//! Real programs, dynamically linked, out of a distribution's packages: what people run. The root that holds them is laid
//! by `trellis bench`, the same files for the host and for guests.
//!
//! A program writes into a file, which is read and digested after the second mark. One that ends with another status than
//! 0 is an error and no time. `sort` and `cc1` are told how much memory and how many CPUs to use: by themselves they ask
//! the machine, and do different work on different ones.

use core::ffi::CStr;

use crate::real_data::{self, MARK, Word, Writer};
use crate::{Bench, Ctx, size_percent, spawn, sys};

pub const BENCHES: &[Bench] = &[
    bench("bin-true", true_setup, bin_true),
    bench("sh-loop", loop_setup, sh_loop),
    bench("sh-files", files_setup, sh_files),
    bench("find-grep", tree_setup, find_grep),
    bench("sort", sort_setup, sort),
    bench("gzip", text_setup, gzip),
    bench("gunzip", packed_setup, gunzip),
    bench("sha256sum", hash_setup, sha256sum),
    bench("cc1-o0", || source_setup(4), |ctx, n| cc1(ctx, n, c"-O0")),
    bench("cc1-o2", || source_setup(2), |ctx, n| cc1(ctx, n, c"-O2")),
    bench("as", assembly_setup, assemble),
    bench("exec-pie", exec_setup, exec_pie),
];

pub const fn bench(
    name: &'static str,
    setup: fn() -> Result<Ctx, &'static str>,
    run: fn(&mut Ctx, u64) -> u64,
) -> Bench {
    Bench { name, ops: 1, setup, run, teardown }
}

/// Where a row's other program prints.
const SECOND_OUTPUT: &CStr = c"work/out2";

const TRUE_SCRIPT: &CStr =
    c"n=$1; shift; while [ $n -gt 0 ]; do \"$@\" bin/true || exit 1; n=$((n-1)); done; echo all";

const LOOP_SCRIPT: &CStr = c"i=0; s=1; w=a
mix() { s=$(( (s * 31 + $1) % 65521 )); }
while [ $i -lt $1 ]; do
  case $i in
    *7) w=${w#?}x$i;;
    *[02468]) mix $i;;
    *) s=$((s ^ i));;
  esac
  if [ ${#w} -gt 60 ]; then w=${w%????????}; fi
  i=$((i+1))
done
echo $s $w";

const FILES_SCRIPT: &CStr = c"n=$1; shift; i=0; s=0
while [ $i -lt $n ]; do echo \"file $i of many\" > work/files/$i; i=$((i+1)); done
while [ $i -gt 0 ]; do i=$((i-1)); read a b c < work/files/$i; s=$((s+b)); done
echo $s";

/// An empty working directory and what every program needs.
pub fn setup(ops: u64) -> Result<Ctx, &'static str> {
    if !spawn::has_programs() {
        return Err("the real programs are not in this root");
    }
    sys::pin();
    if !make_work() {
        // A run that was broken off may have left its own.
        remove_work();
        make_work();
    }
    let made = Writer::new(4096).is_some_and(|mut empty| empty.save(c"work/empty"));
    if made {
        Ok(Ctx { ops, digest: Some(output_digest), ..Ctx::default() })
    } else {
        Err("cannot write files")
    }
}

/// Everything that was made goes, for the next one begins anew.
pub fn teardown(_: &mut Ctx) {
    remove_work();
    sys::unpin();
}

fn make_work() -> bool {
    sys::make_directory(c"work")
}

fn remove_work() {
    spawn::run(&[c"bin/rm", c"-rf", c"work"]);
}

/// So much of `full` as `--quick` asks for.
pub fn scaled(full: u64) -> u64 {
    (full * size_percent() / 100).max(1)
}

/// A setup that writes one file of at most `capacity` bytes.
fn with_file(
    ops: u64,
    path: &CStr,
    capacity: usize,
    fill: impl FnOnce(&mut Writer),
) -> Result<Ctx, &'static str> {
    let ctx = setup(ops)?;
    let mut writer = Writer::new(capacity).ok_or("not enough memory")?;
    fill(&mut writer);
    if writer.save(path) { Ok(ctx) } else { Err("cannot write files") }
}

/// Runs a command `n` times.
fn repeat(n: u64, command: &[&CStr]) -> u64 {
    for _ in 0..n {
        spawn::run(command);
    }
    0
}

/// Runs a script with a number and the words that start a program.
fn script(n: u64, text: &CStr, number: u64) -> u64 {
    let number = Word::new(format_args!("{number}"));
    let mut command = [c"bin/dash", c"-c", text, c"dash", number.as_c_str(), c"", c"", c""];
    let len = 5 + spawn::prefix().len();
    command[5..len].copy_from_slice(spawn::prefix());
    repeat(n, &command[..len])
}

// --- the shell ---

const TRUES: u64 = 200;
const LOOPS: u64 = 40_000;
const FILES: u64 = 1000;

fn true_setup() -> Result<Ctx, &'static str> {
    setup(scaled(TRUES))
}

fn bin_true(_: &mut Ctx, n: u64) -> u64 {
    script(n, TRUE_SCRIPT, scaled(TRUES))
}

fn loop_setup() -> Result<Ctx, &'static str> {
    setup(scaled(LOOPS))
}

fn sh_loop(_: &mut Ctx, n: u64) -> u64 {
    script(n, LOOP_SCRIPT, scaled(LOOPS))
}

fn files_setup() -> Result<Ctx, &'static str> {
    setup(scaled(FILES))
}

/// Makes, reads and removes; what the shell prints stays as the output.
fn sh_files(_: &mut Ctx, n: u64) -> u64 {
    for _ in 0..n {
        spawn::run_to(&[c"bin/mkdir", c"work/files"], SECOND_OUTPUT);
        script(1, FILES_SCRIPT, scaled(FILES));
        spawn::run_to(&[c"bin/rm", c"-r", c"work/files"], SECOND_OUTPUT);
    }
    0
}

// --- text ---

const TREE: u64 = 80;
const TREE_FILES: u64 = 40;
const LINES: u64 = 100_000;
const TEXT: u64 = 1 << 20;
const HASHED: u64 = 12 << 20;

fn tree_setup() -> Result<Ctx, &'static str> {
    let ctx = setup(scaled(TREE) * TREE_FILES)?;
    let mut writer = Writer::new(8192).ok_or("not enough memory")?;
    if !real_data::tree(&mut writer, scaled(TREE), TREE_FILES) {
        return Err("cannot write files");
    }
    Ok(Ctx { digest: Some(lines_digest), ..ctx })
}

fn find_grep(_: &mut Ctx, n: u64) -> u64 {
    for _ in 0..n {
        let find = [c"bin/find", c"work/tree", c"-type", c"f", c"-name", c"*.c", c"-size", c"+1k"];
        spawn::run_to(&find, SECOND_OUTPUT);
        spawn::run(&[c"bin/grep", c"-rn", c"-e", c"needle[0-9]*2 \\|^zq*[aeiou]..ly ", c"work/tree"]);
    }
    0
}

fn sort_setup() -> Result<Ctx, &'static str> {
    let count = scaled(LINES);
    with_file(count, c"work/lines", count as usize * 32, |writer| real_data::lines(writer, count))
}

fn sort(_: &mut Ctx, n: u64) -> u64 {
    repeat(n, &[c"bin/sort", c"--parallel=1", c"-S", c"32M", c"work/lines"])
}

pub fn text_file(path: &CStr, len: u64) -> Result<Ctx, &'static str> {
    with_file(len, path, len as usize + 64, |writer| real_data::text(writer, len as usize, 1))
}

fn text_setup() -> Result<Ctx, &'static str> {
    text_file(c"work/text", scaled(TEXT))
}

fn gzip(_: &mut Ctx, n: u64) -> u64 {
    repeat(n, &[c"bin/gzip", c"-nc", c"work/text"])
}

fn packed_setup() -> Result<Ctx, &'static str> {
    let ctx = text_file(c"work/text", scaled(4 * TEXT))?;
    spawn::run(&[c"bin/gzip", c"-n1", c"work/text"]);
    Ok(ctx)
}

fn gunzip(_: &mut Ctx, n: u64) -> u64 {
    repeat(n, &[c"bin/gzip", c"-dc", c"work/text.gz"])
}

fn hash_setup() -> Result<Ctx, &'static str> {
    text_file(c"work/text", scaled(HASHED))
}

fn sha256sum(_: &mut Ctx, n: u64) -> u64 {
    repeat(n, &[c"bin/sha256sum", c"work/text"])
}

// --- the compiler ---

const ASSEMBLIES: u64 = 40;
const SOURCE: &CStr = c"work/program.c";
const ASSEMBLY: &CStr = c"work/program.s";
const OBJECT: &CStr = c"work/program.o";

fn source_setup(copies: u64) -> Result<Ctx, &'static str> {
    let copies = scaled(copies);
    let ctx =
        with_file(copies, SOURCE, 16384 * copies as usize, |writer| real_data::c_source(writer, copies))?;
    Ok(Ctx { digest: Some(|_| file_digest(ASSEMBLY)), ..ctx })
}

fn compile(level: &CStr) {
    spawn::run(&[
        c"bin/cc1",
        c"-quiet",
        level,
        c"--param",
        c"ggc-min-expand=30",
        c"--param",
        c"ggc-min-heapsize=16384",
        // Where it looks for a header that it always wants and need not find.
        c"-I",
        c"work",
        SOURCE,
        c"-o",
        ASSEMBLY,
    ]);
}

fn cc1(_: &mut Ctx, n: u64, level: &CStr) -> u64 {
    (0..n).for_each(|_| compile(level));
    0
}

fn assembly_setup() -> Result<Ctx, &'static str> {
    let copies = scaled(ASSEMBLIES);
    let ctx = with_file(copies, SOURCE, 16384, |writer| real_data::one_source(writer, MARK))?;
    compile(c"-O2");
    let mut writer = Writer::new(copies as usize * 65536).ok_or("not enough memory")?;
    real_data::multiply_assembly(&mut writer, ASSEMBLY, copies).ok_or("there is no compiler output")?;
    if !writer.save(ASSEMBLY) {
        return Err("cannot write files");
    }
    Ok(Ctx { digest: Some(|_| file_digest(OBJECT)), ..ctx })
}

fn assemble(_: &mut Ctx, n: u64) -> u64 {
    repeat(n, &[c"bin/as", c"--64", c"-o", OBJECT, ASSEMBLY])
}

// --- execution ---

const EXECS: u64 = 50;

fn exec_setup() -> Result<Ctx, &'static str> {
    setup(scaled(EXECS))
}

fn exec_pie(_: &mut Ctx, n: u64) -> u64 {
    repeat(n * scaled(EXECS), &[c"bin/ls", c"-d", c"work", c"usr"])
}

// --- digests ---

fn fnv(hash: u64, byte: u8) -> u64 {
    (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
}

const FNV_START: u64 = 0xcbf2_9ce4_8422_2325;

/// The digest of a file; 0 if there is none.
pub fn file_digest(path: &CStr) -> u64 {
    let mut hash = FNV_START;
    let read =
        real_data::read_into(path, |bytes| hash = bytes.iter().fold(hash, |hash, byte| fnv(hash, *byte)));
    read.map_or(0, |()| hash)
}

/// A digest of a file's lines that does not depend on their order: file systems list names in different ones.
fn unordered_digest(path: &CStr) -> u64 {
    let (mut sum, mut line) = (0u64, FNV_START);
    let read = real_data::read_into(path, |bytes| {
        for &byte in bytes {
            line = fnv(line, byte);
            if byte == b'\n' {
                sum = sum.wrapping_add(line);
                line = FNV_START;
            }
        }
    });
    read.map_or(0, |()| sum)
}

fn output_digest(_: &mut Ctx) -> u64 {
    file_digest(spawn::OUTPUT)
}

fn lines_digest(_: &mut Ctx) -> u64 {
    unordered_digest(spawn::OUTPUT) ^ unordered_digest(SECOND_OUTPUT).rotate_left(1)
}
