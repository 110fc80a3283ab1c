//! Processes: creation, execution, switching, and what a shell does with them.

use core::arch::asm;

use crate::kernel::close_all;
use crate::{Bench, Ctx, no_teardown, own_path, sys};

pub const BENCHES: &[Bench] = &[
    Bench { name: "forkwait", ops: 1, setup: pinned, run: fork_wait, teardown: unpin },
    Bench { name: "vforkexec", ops: 1, setup: pinned, run: vfork_exec, teardown: unpin },
    Bench { name: "ctxswitch", ops: 2, setup: switch_setup, run: switch, teardown: switch_end },
    Bench { name: "shell", ops: 1, setup: pinned, run: shell, teardown: unpin },
    Bench { name: "files", ops: 32, setup: crate::no_setup, run: files, teardown: no_teardown },
];

/// What a child that was started as `PROGRAM WORD` does.
pub fn child(word: *const u8) -> ! {
    // SAFETY: `word` is argv[1], which is not empty.
    if unsafe { *word } == b'e' {
        for _ in 0..20 {
            sys::write_all(1, b"the quick brown fox jumps over the lazy dog\n");
        }
    }
    sys::exit(7)
}

fn pinned() -> Result<Ctx, &'static str> {
    sys::pin();
    Ok(Ctx::default())
}

fn unpin(_: &mut Ctx) {
    sys::unpin();
}

fn fork_wait(_: &mut Ctx, n: u64) -> u64 {
    let mut status = 0;
    for _ in 0..n {
        match sys::fork() {
            0 => sys::exit(3),
            pid => status = sys::wait(pid),
        }
    }
    status
}

/// vfork, execve in the child, without a stack frame between them. Returns the child's pid.
fn spawn_by_vfork(path: usize, argv: *const usize, envp: *const usize) -> isize {
    let pid: isize;
    // SAFETY: the child only executes or exits; it shares memory and stack with us meanwhile and writes neither.
    unsafe {
        asm!("mov eax, 58", "syscall", "test rax, rax", "jnz 2f", "mov eax, {exec}", "syscall",
             "mov edi, 127", "mov eax, {exit}", "syscall", "2:",
             exec = const sys::SYS_EXECVE, exit = const sys::SYS_EXIT,
             in("rdi") path, in("rsi") argv, in("rdx") envp, out("rax") pid, out("rcx") _, out("r11") _);
    }
    pid
}

fn vfork_exec(_: &mut Ctx, n: u64) -> u64 {
    let argv = [own_path(), c"quit".as_ptr() as usize, 0];
    let envp = [0usize];
    let mut status = 0;
    for _ in 0..n {
        status = sys::wait(spawn_by_vfork(own_path(), argv.as_ptr(), envp.as_ptr()));
    }
    status
}

/// Two processes and two pipes.
fn switch_setup() -> Result<Ctx, &'static str> {
    sys::pin();
    let (there, back) = (sys::pipe(), sys::pipe());
    let pid = sys::fork();
    if pid == 0 {
        sys::close(there[1]);
        sys::close(back[0]);
        let mut byte = [0];
        while sys::read(there[0], &mut byte) == 1 {
            sys::write_all(back[1], &[byte[0].wrapping_add(1)]);
        }
        sys::exit(0);
    }
    sys::close(there[0]);
    sys::close(back[1]);
    Ok(Ctx { fds: [there[1], back[0], -1, -1], pid, ..Ctx::default() })
}

fn switch(ctx: &mut Ctx, n: u64) -> u64 {
    let mut byte = [0];
    for _ in 0..n {
        sys::write_all(ctx.fds[0], &[41]);
        sys::read(ctx.fds[1], &mut byte);
    }
    u64::from(byte[0])
}

fn switch_end(ctx: &mut Ctx) {
    close_all(ctx);
    sys::wait(ctx.pid);
    sys::unpin();
}

/// As `$(echo … | wc)` in a shell: a pipe, a child that executes a program which writes, all read and counted here.
fn shell(_: &mut Ctx, n: u64) -> u64 {
    let argv = [own_path(), c"echo".as_ptr() as usize, 0];
    let envp = [0usize];
    let mut counts = 0;
    for _ in 0..n {
        let pipe = sys::pipe();
        let pid = sys::fork();
        if pid == 0 {
            sys::call3(sys::SYS_DUP2, pipe[1] as usize, 1, 0);
            sys::close(pipe[0]);
            sys::close(pipe[1]);
            sys::call3(sys::SYS_EXECVE, own_path(), argv.as_ptr() as usize, envp.as_ptr() as usize);
            sys::exit(127);
        }
        sys::close(pipe[1]);
        counts = count_words(pipe[0]);
        sys::close(pipe[0]);
        counts = counts << 16 | sys::wait(pid);
    }
    counts
}

fn count_words(fd: i32) -> u64 {
    let (mut lines, mut words, mut in_word) = (0u64, 0u64, false);
    let mut bytes = [0u8; 512];
    loop {
        let len = sys::read(fd, &mut bytes);
        if len <= 0 {
            return lines << 16 | words;
        }
        for &byte in &bytes[..len as usize] {
            let space = byte == b' ' || byte == b'\n';
            words += u64::from(!space && !in_word);
            in_word = !space;
            lines += u64::from(byte == b'\n');
        }
    }
}

/// 32 files in the current directory: created, written, read, removed.
fn files(_: &mut Ctx, n: u64) -> u64 {
    let content = [0x5au8; 3000];
    let mut read_back = [0u8; 4096];
    let mut total = 0;
    for _ in 0..n {
        total = 0;
        for i in 0..32u8 {
            let name = [b'b', b'e', b'n', b'c', b'-', b'a' + i % 16, b'a' + i / 16, 0];
            let path = name.as_ptr() as usize;
            let fd = sys::call3(sys::SYS_OPEN, path, 0o102, 0o600) as i32; // O_RDWR | O_CREAT
            sys::write_all(fd, &content);
            sys::close(fd);
            let fd = sys::call3(sys::SYS_OPEN, path, 0, 0) as i32;
            total += sys::read(fd, &mut read_back) as u64;
            sys::close(fd);
            sys::call3(sys::SYS_UNLINK, path, 0, 0);
        }
    }
    total
}
