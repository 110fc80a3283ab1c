//! A model check of the trace protocol: `guestmem::protocol` and `guestmem::Requests` themselves, used by vCPUs and devices that do in few lines what
//! `engine_bt`'s do. The checker (loom) tries every order of their atomic operations, and every old value that a load may see, with at most so many preemptions as
//! each test says. Nothing of it is there without `--cfg loom`; `cargo xtask test` runs it so.
//!
//! What is checked, whatever the order:
//! - INV-SMC-1, INV-SMC-2: no vCPU executes code made of bytes that it has itself overwritten, or of bytes that another had overwritten before something that
//!   it has read since, if it polled in between (as all serialising instructions do: SDM 3A 8.1.3 asks for one).
//! - INV-TR-1, INV-TR-2: nobody writes lines that are traced, and respected by everybody, but the slow way.
//! - No write to traced lines is missed: in the end, live code is made of what is in memory.
//! - Nobody waits for ever (loom knows deadlocks, and stops endless loops).
//!
//! LOOM_MAX_PREEMPTIONS sets another limit for all tests; three take minutes.
//!
//! Each rule that the proof in `guestmem::trace` rests on can be broken ([`Broken`]); that this is found is a test, too.

#![cfg(loom)]
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

#[path = "model/vm.rs"]
mod vm;

use loom::sync::Arc;
use loom::thread;
use vm::{Broken, Vcpu, Vm};

/// Tries every order with at most so many preemptions.
fn check(preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    // LOOM_MAX_PREEMPTIONS asks for more.
    builder.preemption_bound.get_or_insert(preemptions);
    builder.max_branches = 10_000;
    let runs = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let counted = std::sync::Arc::clone(&runs);
    let start = std::time::Instant::now();
    builder.check(move || {
        counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        model();
    });
    println!(
        "{} orders in {:.1} s",
        runs.load(std::sync::atomic::Ordering::Relaxed),
        start.elapsed().as_secs_f64()
    );
}

/// Has a vCPU in the guest do something.
fn run(vcpu: &mut Vcpu, what: impl FnOnce(&mut Vcpu)) {
    vcpu.start();
    what(vcpu);
    vcpu.stop();
}

/// Runs two vCPUs side by side.
fn side_by_side(
    [mut ours, mut theirs]: [Vcpu; 2],
    this: impl FnOnce(&mut Vcpu),
    other: impl FnOnce(&mut Vcpu) + 'static,
) -> [Vcpu; 2] {
    let running = thread::spawn(move || {
        run(&mut theirs, other);
        theirs
    });
    run(&mut ours, this);
    [ours, running.join().unwrap()]
}

/// A device writes a line once, while a vCPU makes code of it and executes it.
fn device_writes_what_is_decoded(broken: Broken) {
    let vm = Vm::new(broken);
    let mut vcpu = Vcpu::new(&vm, 0);
    let device = Arc::clone(&vm);
    let running = thread::spawn(move || {
        device.dma(0, 1);
        device.announce(1);
    });
    run(&mut vcpu, |vcpu| {
        for _ in 0..2 {
            vcpu.dispatch(0);
            vcpu.listen();
            vcpu.poll();
            vcpu.execute(0);
        }
    });
    running.join().unwrap();
    vcpu.settle();
}

#[test]
fn device_writes_what_is_decoded_and_it_is_noticed() {
    check(3, || device_writes_what_is_decoded(Broken::Nothing));
}

#[test]
#[should_panic(expected = "INV-SMC")]
fn bytes_read_before_their_line_is_traced_are_found() {
    check(2, || device_writes_what_is_decoded(Broken::ReadBeforeTracing));
}

/// A vCPU writes a line the fast way, then again, while another makes code of it.
fn writer_of_what_is_decoded(broken: Broken, shared: bool) {
    let vm = Vm::new(broken);
    if shared {
        // Code in another line, and data beside it: no permission is fast.
        vm.trace(1, None);
        vm.page.share();
    }
    side_by_side(
        Vcpu::both(&vm),
        |vcpu| {
            vcpu.dispatch(0);
            vcpu.listen();
            vcpu.poll();
            vcpu.execute(0);
        },
        |writer| {
            for value in 1..=2 {
                writer.write(0, value);
                writer.boundary();
            }
            writer.vm.announce(2);
        },
    )
    .into_iter()
    .for_each(Vcpu::settle);
}

#[test]
fn fast_writer_gives_up_before_code_is_made() {
    check(2, || writer_of_what_is_decoded(Broken::Nothing, false));
}

#[test]
#[should_panic(expected = "INV-")]
fn fast_writer_that_is_not_waited_for_is_found() {
    check(2, || writer_of_what_is_decoded(Broken::NobodyWaits, false));
}

#[test]
fn writer_of_a_shared_page_gives_up_before_code_is_made() {
    check(2, || writer_of_what_is_decoded(Broken::Nothing, true));
}

#[test]
#[should_panic(expected = "INV-")]
fn writer_of_a_shared_page_that_is_not_waited_for_is_found() {
    check(2, || writer_of_what_is_decoded(Broken::NobodyWaits, true));
}

/// Two vCPUs have code of the same line. One writes it, so that it is not traced any more; the other writes it then and executes it.
fn both_write_what_both_execute(broken: Broken, shared: bool) {
    let vm = Vm::new(broken);
    let mut vcpus = Vcpu::both(&vm);
    for vcpu in &mut vcpus {
        run(vcpu, |vcpu| vcpu.dispatch(0));
    }
    if shared {
        // Code in another line, so that no permission is fast.
        vm.trace(1, None);
        vm.page.share();
    }
    let write_and_execute = |value| {
        move |vcpu: &mut Vcpu| {
            vcpu.write(0, value);
            // A direct jump to it.
            vcpu.execute(0);
        }
    };
    side_by_side(vcpus, write_and_execute(2), write_and_execute(1)).into_iter().for_each(Vcpu::settle);
}

#[test]
fn own_code_is_not_executed_after_a_line_that_another_freed_was_written() {
    check(2, || both_write_what_both_execute(Broken::Nothing, false));
}

#[test]
#[should_panic(expected = "INV-SMC")]
fn lines_cleared_before_everybody_is_told_are_found() {
    check(2, || both_write_what_both_execute(Broken::ClearBeforeTelling, false));
}

#[test]
#[should_panic(expected = "INV-SMC")]
fn a_fast_permission_taken_without_a_look_at_what_was_told_is_found() {
    check(2, || both_write_what_both_execute(Broken::FillsWithoutLooking, false));
}

#[test]
fn own_code_is_not_executed_after_a_line_of_a_shared_page_that_another_freed_was_written() {
    check(2, || both_write_what_both_execute(Broken::Nothing, true));
}

#[test]
#[should_panic(expected = "INV-SMC")]
fn a_write_to_a_shared_page_without_a_look_at_the_alarm_is_found() {
    check(2, || both_write_what_both_execute(Broken::PassesWithoutLooking, true));
}

/// A vCPU goes on from the dispatcher to a piece of code that must be traced again and is linked to another piece, which a device changes meanwhile.
fn device_writes_while_other_code_is_traced(broken: Broken) {
    let vm = Vm::new(broken);
    let mut vcpu = Vcpu::new(&vm, 0);
    run(&mut vcpu, |vcpu| {
        vcpu.dispatch(0);
        vcpu.dispatch(1);
    });
    // Its bytes were written, and are the same.
    vm.dma(1, 0);
    let device = Arc::clone(&vm);
    let running = thread::spawn(move || {
        device.dma(0, 1);
        device.announce(1);
    });
    run(&mut vcpu, |vcpu| {
        vcpu.dispatch(1);
        vcpu.execute(1);
        vcpu.listen();
        vcpu.poll();
        vcpu.execute(0);
    });
    running.join().unwrap();
    vcpu.settle();
}

#[test]
fn code_told_of_while_other_code_is_traced_is_acted_on() {
    check(3, || device_writes_while_other_code_is_traced(Broken::Nothing));
}

#[test]
#[should_panic(expected = "INV-SMC")]
fn entering_without_a_look_at_what_was_told_during_tracing_is_found() {
    check(2, || device_writes_while_other_code_is_traced(Broken::EntersWithoutLooking));
}

/// A vCPU executes code that a device changes, while another waits for it to give up the page.
fn two_signal_at_once(broken: Broken) {
    let vm = Vm::new(broken);
    let mut vcpu = Vcpu::new(&vm, 0);
    run(&mut vcpu, |vcpu| vcpu.dispatch(0));
    vm.page.share();
    let device = Arc::clone(&vm);
    let running = thread::spawn(move || {
        device.dma(0, 1);
        device.announce(1);
    });
    let tracing = Arc::clone(&vm);
    // Outside of the guest, as Cpu::trace_code.
    let other = thread::spawn(move || tracing.trace(1, Some(1)));
    run(&mut vcpu, |vcpu| {
        vcpu.listen();
        vcpu.poll();
        vcpu.execute(0);
    });
    running.join().unwrap();
    other.join().unwrap();
    vcpu.settle();
}

#[test]
fn whoever_is_told_while_another_signals_hears_it() {
    check(2, || two_signal_at_once(Broken::Nothing));
}

#[test]
#[should_panic(expected = "INV-SMC")]
fn ringing_only_for_a_signal_that_was_not_pending_is_found() {
    check(2, || two_signal_at_once(Broken::RingsOnlyFirst));
}

#[test]
fn a_page_taken_for_data_while_code_is_made_of_it_is_written_after_all_were_told() {
    check(2, || {
        let vm = Vm::new(Broken::Nothing);
        let mut vcpus = Vcpu::both(&vm);
        run(&mut vcpus[0], |vcpu| vcpu.dispatch(1));
        let decode = |vcpu: &mut Vcpu| {
            vcpu.dispatch(0);
            vcpu.execute(0);
            vcpu.execute(1);
        };
        let take_for_data = |vcpu: &mut Vcpu| {
            // The end of `BtVcpu::code_written`.
            vcpu.vm.untrace();
            vcpu.boundary();
            vcpu.write(0, 1);
            vcpu.write(1, 1);
        };
        side_by_side(vcpus, decode, take_for_data).into_iter().for_each(Vcpu::settle);
    });
}

#[test]
fn two_that_trace_what_the_other_writes_do_not_lock_up() {
    check(2, || {
        let vm = Vm::new(Broken::Nothing);
        let work = |mine: usize| {
            move |vcpu: &mut Vcpu| {
                vcpu.write(1 - mine, 1);
                vcpu.dispatch(mine);
                vcpu.execute(mine);
            }
        };
        side_by_side(Vcpu::both(&vm), work(0), work(1)).into_iter().for_each(Vcpu::settle);
    });
}

#[test]
fn a_line_cleared_during_the_look_at_it_is_not_taken_for_traced() {
    check(3, || {
        let vm = Vm::new(Broken::Nothing);
        let [mut vcpu, mut other] = Vcpu::both(&vm);
        run(&mut other, |other| other.dispatch(0));
        let device = Arc::clone(&vm);
        let running = thread::spawn(move || device.dma(0, 1));
        run(&mut vcpu, |vcpu| {
            vcpu.dispatch(0);
            vcpu.write(0, 2);
            vcpu.execute(0);
        });
        running.join().unwrap();
        [vcpu, other].into_iter().for_each(Vcpu::settle);
    });
}

#[test]
fn two_vcpus_and_a_device_agree_on_the_bytes() {
    check(1, || {
        let vm = Vm::new(Broken::Nothing);
        let device = Arc::clone(&vm);
        let running = thread::spawn(move || device.dma(0, 2));
        let decode = |vcpu: &mut Vcpu| {
            vcpu.dispatch(0);
            vcpu.execute(0);
        };
        let vcpus = side_by_side(Vcpu::both(&vm), decode, move |vcpu| {
            decode(vcpu);
            vcpu.write(0, 1);
            vcpu.execute(0);
        });
        running.join().unwrap();
        vcpus.into_iter().for_each(Vcpu::settle);
    });
}

/// Who is told by two at once hears of all lines.
#[test]
fn no_line_told_is_lost() {
    check(3, || {
        let vm = Vm::new(Broken::Nothing);
        vm.vcpus[0].watch();
        let teller = |line: usize| {
            let vm = Arc::clone(&vm);
            thread::spawn(move || vm.tell(1 << line))
        };
        let tellers = [teller(0), teller(1)];
        let mut heard = vm.vcpus[0].take_written();
        for teller in tellers {
            teller.join().unwrap();
        }
        assert!(heard == 0b11 || vm.vcpus[0].requests.has_written(), "a line is left, and nobody says so");
        heard |= vm.vcpus[0].take_written();
        assert_eq!(heard, 0b11, "a line that was told is lost");
    });
}
