//! The memory balloon (virtio 1.2 section 5.5): the guest lends pages to the host, says which free pages it does not need,
//! and tells how its memory is used.
//!
//! Way of the data: the host sets a size ([`BalloonHandle::set_size`]) → a configuration interrupt → the driver takes pages
//! from its system and names them in the inflate queue → [`GuestMemory::discard`]. A page that is taken back (the deflate
//! queue; with DEFLATE_ON_OOM also when the guest runs out) needs nothing of us: the first access finds a page of zeros.
//! Free pages are reported in the reporting queue and discarded in the same manner, whatever the balloon's size.
//! Statistics: the driver leaves a buffer with us that we give back when new ones are wanted (5.5.6.3).
//!
//! Everything happens in the notifying vCPU's thread, bounded by the queues' sizes and the segments of a chain.
//!
//! What the guest says is believed only for its own memory: a page that is in use and named here is empty afterwards.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use guestmem::{Gfn, Gpa, GuestMemory};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::active::ActiveQueue;
use super::chain::Chain;
use super::interrupt::Interrupt;
use super::{Activation, DeviceKind, DeviceState, VirtioDevice, read_config};
use crate::bus::lock;
use crate::snapshot::RestoreError;

const QUEUE_SIZES: [u16; 4] = [128, 128, 16, 128];
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;
const REPORT: usize = 3;

/// Feature bits (5.5.3).
mod bit {
    pub const STATS_VQ: u64 = 1 << 1;
    pub const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub const PAGE_POISON: u64 = 1 << 4;
    pub const REPORTING: u64 = 1 << 5;
}

/// The balloon's unit, whatever the guest's page size (5.5.6).
const PAGE_BYTES: u64 = 4096;
/// Most page numbers read from one chain; Linux names 256 at a time.
const MAX_PAGES: u64 = 4096;
/// Most pages of one report that are discarded; Linux reports 32 blocks of 2 or 4 MiB at a time.
const MAX_REPORT: u64 = 1 << 18;
/// Most statistics read from one buffer (5.5.6.4 knows about a dozen).
const MAX_STATS: usize = 64;
/// Bytes of `struct virtio_balloon_stat`, packed.
const STAT_BYTES: usize = 10;
/// Names of the statistics' tags (5.5.6.4), in order; the unit is bytes but where events are counted.
const STAT_NAMES: [&str; 10] = [
    "guest_swapped_in_bytes",
    "guest_swapped_out_bytes",
    "guest_major_faults",
    "guest_minor_faults",
    "guest_free_bytes",
    "guest_total_bytes",
    "guest_available_bytes",
    "guest_cache_bytes",
    "guest_huge_page_allocations",
    "guest_huge_page_failures",
];

/// What the device offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalloonOptions {
    /// Size at the beginning, in bytes.
    pub size_bytes: u64,
    /// Free page reporting.
    pub reporting: bool,
    /// The guest may take pages back before it runs out of memory.
    pub deflate_on_oom: bool,
}

impl Default for BalloonOptions {
    fn default() -> Self {
        Self { size_bytes: 0, reporting: true, deflate_on_oom: true }
    }
}

/// What is known of a balloon.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonReport {
    /// A driver is there.
    pub driver: bool,
    /// The size that the host wants.
    pub wanted_bytes: u64,
    /// The size that the guest says it has.
    pub actual_bytes: u64,
    /// Memory discarded because it went into the balloon.
    pub inflated_bytes: u64,
    /// Memory taken back out of it.
    pub deflated_bytes: u64,
    /// Free memory that was reported and discarded.
    pub reported_bytes: u64,
    /// What the guest last said of its memory: name and value.
    pub guest: Vec<(String, u64)>,
}

#[derive(Serialize, Deserialize)]
struct Saved {
    wanted: u32,
    actual: u32,
    poison: u32,
    features: u64,
    stats_head: Option<u16>,
}

#[derive(Default)]
struct Inner {
    queues: [Option<ActiveQueue>; 4],
    interrupt: Option<Arc<Interrupt>>,
    features: u64,
    /// In pages, as the configuration has them.
    wanted: u32,
    actual: u32,
    poison: u32,
    /// The statistics buffer that the driver left with us.
    stats_head: Option<u16>,
    /// The last statistics, by tag, and how many times there were new ones.
    stats: [Option<u64>; STAT_NAMES.len()],
    stats_round: u64,
    chain: Chain,
    inflated: u64,
    deflated: u64,
    reported: u64,
    reports: u64,
    refused: u64,
}

#[derive(Default)]
struct Shared {
    inner: Mutex<Inner>,
    /// New statistics came, or the device was reset.
    news: Condvar,
}

/// The device.
pub struct Balloon {
    name: String,
    options: BalloonOptions,
    shared: Arc<Shared>,
}

/// The host's end.
#[derive(Clone)]
pub struct BalloonHandle(Arc<Shared>);

impl BalloonHandle {
    /// From now on the balloon is to have this size; rounded down to pages.
    pub fn set_size(&self, bytes: u64) {
        let mut inner = lock(&self.0.inner);
        inner.wanted = pages(bytes);
        if let Some(interrupt) = &inner.interrupt {
            interrupt.config_changed();
        }
    }

    /// What is known, with statistics that are new if the guest gives them within `patience`.
    #[must_use]
    pub fn report(&self, patience: Duration) -> BalloonReport {
        let mut inner = lock(&self.0.inner);
        let (round, end) = (inner.stats_round, Instant::now() + patience);
        if inner.ask_for_stats() {
            while inner.stats_round == round && inner.interrupt.is_some() {
                let left = end.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                inner = self.0.news.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        inner.report()
    }
}

fn pages(bytes: u64) -> u32 {
    u32::try_from(bytes / PAGE_BYTES).unwrap_or(u32::MAX)
}

/// Discards pages that were named one by one; neighbours together.
struct Discard<'a> {
    memory: &'a GuestMemory,
    run: std::ops::Range<u64>,
    pages: u64,
    refused: u64,
}

impl<'a> Discard<'a> {
    const fn new(memory: &'a GuestMemory) -> Self {
        Self { memory, run: 0..0, pages: 0, refused: 0 }
    }

    fn add(&mut self, gfns: std::ops::Range<u64>) {
        if gfns.start != self.run.end {
            self.flush();
            self.run = gfns;
        } else {
            self.run.end = gfns.end;
        }
    }

    fn flush(&mut self) {
        let run = std::mem::replace(&mut self.run, 0..0);
        match self.memory.discard(Gfn(run.start)..Gfn(run.end)) {
            Ok(pages) => self.pages += pages,
            // The page keeps its content, which the guest must not rely on: nothing is wrong but that the host keeps it.
            Err(_) => self.refused += run.end - run.start,
        }
    }
}

/// Hands the page numbers of a chain to `each`; says how many there were.
fn page_numbers(memory: &GuestMemory, chain: &Chain, mut each: impl FnMut(u64)) -> u64 {
    let mut from = chain.reader(memory).limited(4 * MAX_PAGES);
    let (mut block, mut count) = ([0; 1024], 0);
    while let Ok(len @ 4..) = from.read(&mut block) {
        for number in block[..len].chunks_exact(4) {
            each(number.try_into().map_or(0, u32::from_le_bytes).into());
            count += 1;
        }
    }
    count
}

/// The whole pages of a segment.
fn whole_pages(gpa: Gpa, len: u32) -> std::ops::Range<u64> {
    let end = gpa.0.saturating_add(len.into()) / PAGE_BYTES;
    gpa.0.div_ceil(PAGE_BYTES).min(end)..end
}

impl Inner {
    /// The queue of the statistics, and that of the reports. Drivers that did not take the statistics give their queue's place to
    /// the next (as Linux does).
    fn role(&self, queue: usize) -> usize {
        match queue {
            STATS if self.features & bit::STATS_VQ == 0 => REPORT,
            other => other,
        }
    }

    fn inflate(&mut self) {
        let Some(queue) = &mut self.queues[INFLATE] else { return };
        let budget = usize::from(queue.size());
        let (inflated, refused) = (&mut self.inflated, &mut self.refused);
        queue.drain(&mut self.chain, budget, |memory, chain| {
            let mut discard = Discard::new(memory);
            page_numbers(memory, chain, |gfn| discard.add(gfn..gfn + 1));
            discard.flush();
            *inflated += discard.pages;
            *refused += discard.refused;
            0
        });
    }

    fn deflate(&mut self) {
        let Some(queue) = &mut self.queues[DEFLATE] else { return };
        let (budget, deflated) = (usize::from(queue.size()), &mut self.deflated);
        queue.drain(&mut self.chain, budget, |memory, chain| {
            *deflated += page_numbers(memory, chain, |_| ());
            0
        });
    }

    /// Free page reporting (5.5.6.7): the segments themselves are the pages. They must keep what the driver said they hold if
    /// that is not zero (5.5.6.7.2).
    fn take_reports(&mut self, queue: usize) {
        let Some(queue) = &mut self.queues[queue] else { return };
        let keeps = self.features & bit::PAGE_POISON != 0 && self.poison != 0;
        let budget = usize::from(queue.size());
        let (reported, reports, refused) = (&mut self.reported, &mut self.reports, &mut self.refused);
        queue.drain(&mut self.chain, budget, |memory, chain| {
            *reports += 1;
            let mut discard = Discard::new(memory);
            let mut left = if keeps { 0 } else { MAX_REPORT };
            for segment in &chain.writable {
                let pages = whole_pages(segment.gpa, segment.len);
                let end = pages.end.min(pages.start + left);
                left -= end - pages.start;
                discard.add(pages.start..end);
            }
            discard.flush();
            *reported += discard.pages;
            *refused += discard.refused;
            0
        });
    }

    /// Takes buffers with statistics; the last stays with us until somebody wants new ones.
    fn take_stats(&mut self) {
        let Some(queue) = &mut self.queues[STATS] else { return };
        let memory = Arc::clone(queue.memory());
        for _ in 0..queue.size() {
            if !queue.pop(&mut self.chain) {
                if queue.listen() {
                    continue;
                }
                break;
            }
            if let Some(head) = self.stats_head.replace(self.chain.head) {
                // There should be one only; what a driver adds beyond goes back.
                queue.push(head, 0);
            }
            let mut from = self.chain.reader(&memory);
            let mut raw = [0; STAT_BYTES];
            for _ in 0..MAX_STATS {
                if from.read(&mut raw) != Ok(STAT_BYTES) {
                    break;
                }
                let [t0, t1, value @ ..] = raw;
                if let Some(slot) = self.stats.get_mut(usize::from(u16::from_le_bytes([t0, t1]))) {
                    *slot = Some(u64::from_le_bytes(value));
                }
            }
            self.stats_round += 1;
        }
        queue.signal();
    }

    /// Gives the statistics' buffer back, which asks for new ones; false when there is none.
    fn ask_for_stats(&mut self) -> bool {
        let (Some(queue), Some(head)) = (&mut self.queues[STATS], self.stats_head.take()) else {
            return false;
        };
        queue.push(head, 0);
        queue.signal();
        true
    }

    fn notify(&mut self, queue: usize) {
        match (queue, self.role(queue)) {
            (_, INFLATE) => self.inflate(),
            (_, DEFLATE) => self.deflate(),
            (_, STATS) => self.take_stats(),
            (index, REPORT) => self.take_reports(index),
            _ => {}
        }
    }

    fn report(&self) -> BalloonReport {
        let named = STAT_NAMES.iter().zip(self.stats);
        BalloonReport {
            driver: self.interrupt.is_some(),
            wanted_bytes: u64::from(self.wanted) * PAGE_BYTES,
            actual_bytes: u64::from(self.actual) * PAGE_BYTES,
            inflated_bytes: self.inflated * PAGE_BYTES,
            deflated_bytes: self.deflated * PAGE_BYTES,
            reported_bytes: self.reported * PAGE_BYTES,
            guest: named.filter_map(|(name, value)| Some(((*name).to_owned(), value?))).collect(),
        }
    }
}

impl Balloon {
    /// A balloon named `name`.
    #[must_use]
    pub fn new(name: &str, options: BalloonOptions) -> (Self, BalloonHandle) {
        let shared = Arc::<Shared>::default();
        lock(&shared.inner).wanted = pages(options.size_bytes);
        let handle = BalloonHandle(Arc::clone(&shared));
        (Self { name: name.to_owned(), options, shared }, handle)
    }
}

impl VirtioDevice for Balloon {
    /// The legacy interface's device id means the old balloon with its own endianness; a driver of that time finds none.
    fn kind(&self) -> DeviceKind {
        DeviceKind { id: 5, transitional_id: 0, class: 0x00_ff00 }
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        let only = |wanted: bool, bits: u64| if wanted { bits } else { 0 };
        bit::STATS_VQ
            | only(self.options.deflate_on_oom, bit::DEFLATE_ON_OOM)
            | only(self.options.reporting, bit::REPORTING | bit::PAGE_POISON)
    }

    fn queue_sizes(&self) -> &[u16] {
        if self.options.reporting { &QUEUE_SIZES } else { &QUEUE_SIZES[..REPORT] }
    }

    /// `struct virtio_balloon_config` (5.5.4): wanted, actual, the hint's command (which is not offered), poison.
    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let inner = lock(&self.shared.inner);
        let mut config = [0; 16];
        for (at, value) in [(0, inner.wanted), (4, inner.actual), (12, inner.poison)] {
            config[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        read_config(&config, offset, data);
    }

    fn config_write(&mut self, offset: u64, data: &[u8]) {
        let Ok(value) = <[u8; 4]>::try_from(data).map(u32::from_le_bytes) else { return };
        let mut inner = lock(&self.shared.inner);
        match offset {
            4 => inner.actual = value,
            12 => inner.poison = value,
            _ => {}
        }
    }

    fn activate(&mut self, activation: Activation) {
        let mut inner = lock(&self.shared.inner);
        let mut queues = activation.queues.into_iter();
        inner.queues = std::array::from_fn(|_| queues.next().flatten());
        inner.interrupt = Some(activation.interrupt);
        inner.features = activation.features;
        (0..QUEUE_SIZES.len()).for_each(|queue| inner.notify(queue));
    }

    fn reset(&mut self) {
        let mut inner = lock(&self.shared.inner);
        // The balloon is empty again, for the guest forgets which pages it lent. The wish stays.
        *inner = Inner {
            wanted: inner.wanted,
            chain: std::mem::take(&mut inner.chain),
            inflated: inner.inflated,
            deflated: inner.deflated,
            reported: inner.reported,
            reports: inner.reports,
            refused: inner.refused,
            ..Inner::default()
        };
        self.shared.news.notify_all();
    }

    fn notify(&mut self, queue: u16) {
        lock(&self.shared.inner).notify(usize::from(queue));
        if usize::from(queue) == STATS {
            self.shared.news.notify_all();
        }
    }

    fn save(&self) -> DeviceState {
        let inner = lock(&self.shared.inner);
        let saved = Saved {
            wanted: inner.wanted,
            actual: inner.actual,
            poison: inner.poison,
            features: inner.features,
            stats_head: inner.stats_head,
        };
        let queues = inner.queues.iter().take(self.queue_sizes().len());
        let queues = queues.map(|q| q.as_ref().map(ActiveQueue::position)).collect();
        DeviceState { queues, data: serde_json::to_value(saved).expect("plain data serialises") }
    }

    fn restore(&mut self, data: &Value) -> Result<(), RestoreError> {
        let saved = Saved::deserialize(data)
            .map_err(|source| RestoreError::Damaged { name: self.name.clone(), source })?;
        self.reset();
        let mut inner = lock(&self.shared.inner);
        (inner.wanted, inner.actual, inner.poison) = (saved.wanted, saved.actual, saved.poison);
        (inner.features, inner.stats_head) = (saved.features, saved.stats_head);
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let inner = lock(&self.shared.inner);
        let report = inner.report();
        let mut all = vec![
            ("wanted_bytes", report.wanted_bytes),
            ("actual_bytes", report.actual_bytes),
            ("inflated_bytes", report.inflated_bytes),
            ("deflated_bytes", report.deflated_bytes),
            ("reported_bytes", report.reported_bytes),
            ("reports", inner.reports),
            ("refused_pages", inner.refused),
        ];
        all.extend(STAT_NAMES.iter().zip(inner.stats).filter_map(|(name, value)| Some((*name, value?))));
        all
    }
}
