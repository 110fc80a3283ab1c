//! How other threads reach a running machine: its user's terminal, a control program, tests.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use devices::bus::lock;
use devices::chipset::text_screen::TextScreen;
use devices::virtio::balloon::{BalloonHandle, BalloonReport};
use engine::signals::Signal;

use crate::control::{Control, Event};
use crate::input::{Input, Typed};
use crate::machine::Machine;
use crate::snapshot::{Snapshot, SnapshotError};
use crate::stats::Stats;
use crate::vm::{Slot, Vm};

/// A way to a machine. Cloned freely; it outlives the machine, and then does nothing.
#[derive(Clone)]
pub struct VmHandle {
    control: Arc<Control>,
    input: Arc<Input>,
    slot: Slot,
}

/// The machine stands still until this is dropped.
#[must_use = "the machine goes on when this is dropped"]
pub struct Paused(Arc<Control>);

impl Paused {
    /// The machine stands still as soon as it comes to rest.
    pub(crate) fn new(control: &Arc<Control>) -> Self {
        control.hold();
        Self(Arc::clone(control))
    }

    /// Has something done with the vCPUs at rest; `None` when the machine has ended.
    pub(crate) fn order<R: Send + 'static>(
        &self,
        f: impl FnOnce(&mut Vm) -> R + Send + 'static,
    ) -> Option<R> {
        let (to, from) = channel();
        self.0.post(Event::Order(Box::new(move |vm| {
            // Whoever asked may have gone away.
            let _gone = to.send(f(vm));
        })));
        from.recv().ok()
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        self.0.release();
    }
}

impl VmHandle {
    pub(crate) const fn new(control: Arc<Control>, input: Arc<Input>, slot: Slot) -> Self {
        Self { control, input, slot }
    }

    fn with<R>(&self, f: impl FnOnce(&Machine) -> R) -> Option<R> {
        lock(&self.slot).as_ref().map(f)
    }

    /// Ends the run.
    pub fn quit(&self) {
        self.control.post(Event::Quit);
    }

    /// Types bytes into COM1; says how many were taken. They wait until the guest reads them.
    #[must_use]
    pub fn serial_input(&self, bytes: &[u8]) -> usize {
        let taken = self.input.serial(bytes);
        self.control.note_input();
        taken
    }

    /// Sleeps until [`VmHandle::serial_input`] would take something, or `limit` has passed.
    pub fn wait_serial_room(&self, limit: Duration) {
        self.input.wait_room(limit);
    }

    /// Types on the PS/2 keyboard; says how many keys were taken.
    #[must_use]
    pub fn type_keys(&self, keys: &[Typed]) -> usize {
        let taken = self.input.keys(keys);
        self.control.note_input();
        taken
    }

    /// Types bytes into the virtio console; says how many were taken.
    #[must_use]
    pub fn console_input(&self, bytes: &[u8]) -> usize {
        self.with(|m| m.ends.console.as_ref().map_or(0, |console| console.receive(bytes))).unwrap_or(0)
    }

    /// Sends bytes to the program at the other end of the channel; says how many were taken.
    #[must_use]
    pub fn channel_send(&self, bytes: &[u8]) -> usize {
        self.with(|m| m.ends.channel.as_ref().map_or(0, |channel| channel.send(bytes))).unwrap_or(0)
    }

    /// The virtio console has a new size.
    pub fn resize(&self, columns: u16, rows: u16) {
        self.with(|m| m.ends.console.as_ref().inspect(|console| console.resize(columns, rows)).is_some());
    }

    /// A number that changes whenever the display may have changed.
    #[must_use]
    pub fn screen_generation(&self) -> u64 {
        self.with(|m| lock(&m.vga).generation()).unwrap_or(0)
    }

    /// What the display shows.
    #[must_use]
    pub fn text_screen(&self) -> Option<TextScreen> {
        self.with(|m| lock(&m.vga).text_screen())
    }

    /// What the display shows, as plain text.
    #[must_use]
    pub fn screendump(&self) -> String {
        self.with(|m| lock(&m.vga).screendump()).unwrap_or_default()
    }

    /// A non-maskable interrupt for every vCPU, as from a front panel's button.
    pub fn nmi(&self) {
        self.with(|m| m.signals.iter().for_each(|signals| signals.raise(Signal::NMI)));
    }

    /// Presses the power button: the guest may shut down. False where nobody in the guest listens to it.
    #[must_use]
    pub fn power_button(&self) -> bool {
        self.with(|m| lock(&m.power_button).power_button()).unwrap_or(false)
    }

    fn balloon(&self) -> Option<BalloonHandle> {
        self.with(|m| m.ends.balloon.clone()).flatten()
    }

    /// From now on the balloon is to have this size; false when the machine has none.
    #[must_use]
    pub fn set_balloon(&self, bytes: u64) -> bool {
        self.balloon().inspect(|balloon| balloon.set_size(bytes)).is_some()
    }

    /// What is known of the balloon, with new statistics if the guest gives them within `patience`; `None` when there is none.
    #[must_use]
    pub fn balloon_report(&self, patience: Duration) -> Option<BalloonReport> {
        // Not with the machine's lock held: the guest needs some time.
        Some(self.balloon()?.report(patience))
    }

    /// Counts so far; `None` when the machine does not run.
    #[must_use]
    pub fn stats(&self) -> Option<Stats> {
        let (to, from) = channel();
        self.control.post(Event::Stats(to));
        from.recv().ok()
    }

    /// Saves the machine; it goes on afterwards.
    ///
    /// # Errors
    /// When memory cannot be read, or the machine does not run.
    pub fn save(&self) -> Result<Snapshot, SnapshotError> {
        let (to, from) = channel();
        self.control.post(Event::Save(to));
        from.recv().unwrap_or_else(|_| Err(SnapshotError::Unfit("the machine has ended".to_owned())))
    }

    /// Stops the machine, its clock too, until the result is dropped. `None` when it has ended.
    #[must_use]
    pub fn pause(&self) -> Option<Paused> {
        let paused = self.hold();
        let (to, from) = channel();
        self.control.post(Event::Pause(to));
        from.recv().ok().map(|()| paused)
    }

    /// Keeps a machine that does not run yet from doing so.
    pub fn hold(&self) -> Paused {
        Paused::new(&self.control)
    }
}
