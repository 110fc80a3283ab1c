//! Linux system calls (`arch/x86/entry/syscalls/syscall_64.tbl`), and memory from `mmap`.

use core::arch::asm;
use core::ffi::CStr;

pub const SYS_READ: usize = 0;
pub const SYS_WRITE: usize = 1;
pub const SYS_OPEN: usize = 2;
pub const SYS_CLOSE: usize = 3;
pub const SYS_MMAP: usize = 9;
pub const SYS_MPROTECT: usize = 10;
pub const SYS_MUNMAP: usize = 11;
pub const SYS_RT_SIGACTION: usize = 13;
pub const SYS_PIPE: usize = 22;
pub const SYS_MADVISE: usize = 28;
pub const SYS_IOCTL: usize = 16;
pub const SYS_DUP2: usize = 33;
pub const SYS_NANOSLEEP: usize = 35;
pub const SYS_ACCESS: usize = 21;
pub const SYS_GETPID: usize = 39;
pub const SYS_SOCKET: usize = 41;
pub const SYS_CONNECT: usize = 42;
pub const SYS_FORK: usize = 57;
pub const SYS_EXECVE: usize = 59;
pub const SYS_EXIT: usize = 60;
pub const SYS_WAIT4: usize = 61;
pub const SYS_KILL: usize = 62;
pub const SYS_CHDIR: usize = 80;
pub const SYS_RENAME: usize = 82;
pub const SYS_MKDIR: usize = 83;
pub const SYS_UNLINK: usize = 87;
pub const SYS_GETRUSAGE: usize = 98;
pub const SYS_GETPPID: usize = 110;
pub const SYS_PRCTL: usize = 157;
pub const SYS_CHROOT: usize = 161;
pub const SYS_MOUNT: usize = 165;
pub const SYS_IOPERM: usize = 173;
pub const SYS_REBOOT: usize = 169;
pub const SYS_SCHED_SETAFFINITY: usize = 203;
pub const SYS_CLOCK_GETTIME: usize = 228;
pub const SYS_UNSHARE: usize = 272;
pub const SYS_GETCPU: usize = 309;

pub const CLONE_NEWUSER: usize = 0x1000_0000;
pub const CLONE_NEWPID: usize = 0x2000_0000;
pub const O_RDONLY: usize = 0;
pub const O_WRONLY: usize = 1;
pub const O_CREAT: usize = 0o100;
pub const O_TRUNC: usize = 0o1000;

/// A system call with up to six arguments; errors are small negative numbers.
#[inline(always)]
pub fn call(number: usize, args: [usize; 6]) -> isize {
    let result: isize;
    // SAFETY: what the call does to memory is what its caller asked for with pointers to its own memory.
    unsafe {
        asm!("syscall", inlateout("rax") number => result, in("rdi") args[0], in("rsi") args[1], in("rdx") args[2],
             in("r10") args[3], in("r8") args[4], in("r9") args[5], lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}

#[inline(always)]
pub fn call3(number: usize, a: usize, b: usize, c: usize) -> isize {
    call(number, [a, b, c, 0, 0, 0])
}

pub fn exit(status: usize) -> ! {
    loop {
        call3(SYS_EXIT, status, 0, 0);
    }
}

pub fn write_all(fd: i32, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        let n = call3(SYS_WRITE, fd as usize, bytes.as_ptr() as usize, bytes.len());
        if n <= 0 {
            return;
        }
        bytes = &bytes[n as usize..];
    }
}

pub fn read(fd: i32, bytes: &mut [u8]) -> isize {
    call3(SYS_READ, fd as usize, bytes.as_mut_ptr() as usize, bytes.len())
}

/// CLOCK_MONOTONIC, by the system call: the program has no vDSO.
pub fn now_ns() -> u64 {
    let mut time = [0u64; 2];
    call3(SYS_CLOCK_GETTIME, 1, time.as_mut_ptr() as usize, 0);
    time[0] * 1_000_000_000 + time[1]
}

pub const READ_WRITE: usize = 3;
pub const READ_WRITE_EXEC: usize = 7;

/// Anonymous memory; `None` if the system has none.
pub fn map(len: usize, protection: usize) -> Option<*mut u8> {
    let at = call(SYS_MMAP, [0, len, protection, 0x22, usize::MAX, 0]); // MAP_PRIVATE | MAP_ANONYMOUS
    (at > 0 || at < -4096).then_some(at as *mut u8)
}

pub fn unmap(at: *mut u8, len: usize) {
    call3(SYS_MUNMAP, at as usize, len, 0);
}

pub const MADV_HUGEPAGE: usize = 14;
pub const MADV_NOHUGEPAGE: usize = 15;

/// `madvise`; 0 if the kernel knows the advice.
pub fn advise(at: *mut u8, len: usize, advice: usize) -> isize {
    call3(SYS_MADVISE, at as usize, len, advice)
}

/// Mounts a kernel's file system of the kind `name` on a directory, which is made; who may not does not.
pub fn mount(name: &CStr, at: &CStr) {
    make_directory(at);
    let name = name.as_ptr() as usize;
    call(SYS_MOUNT, [name, at.as_ptr() as usize, name, 0, 0, 0]);
}

/// A file descriptor, or a small negative number. A file that is made is its owner's to read and write.
pub fn open(path: &CStr, flags: usize) -> i32 {
    call3(SYS_OPEN, path.as_ptr() as usize, flags, 0o600) as i32
}

pub fn make_directory(path: &CStr) -> bool {
    call3(SYS_MKDIR, path.as_ptr() as usize, 0o700, 0) == 0
}

pub fn close(fd: i32) {
    call3(SYS_CLOSE, fd as usize, 0, 0);
}

pub fn pipe() -> [i32; 2] {
    let mut fds = [-1; 2];
    call3(SYS_PIPE, fds.as_mut_ptr() as usize, 0, 0);
    fds
}

pub fn fork() -> isize {
    call3(SYS_FORK, 0, 0, 0)
}

pub fn wait(pid: isize) -> u64 {
    let mut status = 0u32;
    call(SYS_WAIT4, [pid as usize, &raw mut status as usize, 0, 0, 0, 0]);
    u64::from(status)
}

/// CPU time of all children that were waited for, in nanoseconds.
pub fn children_ns() -> u64 {
    const RUSAGE_CHILDREN: usize = usize::MAX;
    // User and system time in seconds and microseconds, and 14 words more.
    let mut usage = [0u64; 18];
    call3(SYS_GETRUSAGE, RUSAGE_CHILDREN, usage.as_mut_ptr() as usize, 0);
    (usage[0] + usage[2]) * 1_000_000_000 + (usage[1] + usage[3]) * 1000
}

/// Keeps this process and its children on the CPU it runs on, as a guest with one CPU does; `unpin` undoes it.
pub fn pin() {
    let mut cpu = 0u32;
    call3(SYS_GETCPU, &raw mut cpu as usize, 0, 0);
    let mut mask = [0u64; 16];
    mask[(cpu as usize / 64) % 16] = 1 << (cpu % 64);
    call3(SYS_SCHED_SETAFFINITY, 0, size_of_val(&mask), mask.as_ptr() as usize);
}

pub fn unpin() {
    let mask = [u64::MAX; 16];
    call3(SYS_SCHED_SETAFFINITY, 0, size_of_val(&mask), mask.as_ptr() as usize);
}

pub fn rename(from: &CStr, to: &CStr) -> bool {
    call3(SYS_RENAME, from.as_ptr() as usize, to.as_ptr() as usize, 0) == 0
}

pub fn kill(pid: isize, signal: usize) {
    call3(SYS_KILL, pid as usize, signal, 0);
}

pub fn sleep_ms(ms: u64) {
    let time = [ms / 1000, ms % 1000 * 1_000_000];
    call3(SYS_NANOSLEEP, time.as_ptr() as usize, 0, 0);
}

/// AF_INET, SOCK_STREAM.
fn tcp_socket() -> isize {
    call3(SYS_SOCKET, 2, 1, 0)
}

/// Brings the loopback interface up, which a new kernel has down (netdevice(7)); who may not has it up already.
pub fn loopback_up() {
    const SIOCSIFFLAGS: usize = 0x8914;
    const UP_AND_RUNNING: u8 = 0x41;
    let mut request = [0u8; 40];
    request[..2].copy_from_slice(b"lo");
    request[16] = UP_AND_RUNNING;
    let socket = tcp_socket();
    if socket >= 0 {
        call3(SYS_IOCTL, socket as usize, SIOCSIFFLAGS, request.as_ptr() as usize);
        close(socket as i32);
    }
}

/// Whether somebody listens at a port of 127.0.0.1.
pub fn can_connect(port: u16) -> bool {
    let mut address = [0u8; 16];
    address[0] = 2;
    address[2..4].copy_from_slice(&port.to_be_bytes());
    address[4..8].copy_from_slice(&[127, 0, 0, 1]);
    let socket = tcp_socket();
    if socket < 0 {
        return false;
    }
    let connected = call3(SYS_CONNECT, socket as usize, address.as_ptr() as usize, address.len()) == 0;
    close(socket as i32);
    connected
}
