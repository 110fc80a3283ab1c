//! Published costs of exits and page walks, in cycles of the processor named.

use serde::Serialize;

/// A number somebody published, or one that was assumed for lack of it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Cost {
    /// Cycles.
    pub cycles: f64,
    /// Where it stands; `assumed: …` says why, where nothing stands anywhere.
    pub source: &'static str,
}

/// A processor that runs guests.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Processor {
    /// Its name for tables.
    pub name: &'static str,
    /// When it came.
    pub year: u32,
    /// Guest to hypervisor and back, with what a monitor reads and writes of the guest's state on the way.
    pub exit: Cost,
    /// A trap into a monitor at a higher privilege level, emulation and return: what classical trap-and-emulate pays.
    pub trap: Cost,
    /// One memory reference of a page walk that misses the walker's own caches.
    pub reference: Cost,
    /// Whether it can walk two page tables itself.
    pub has_nested_paging: bool,
}

const SLIDES_2006: &str = "Adams and Agesen, ASPLOS 2006, slides, table 1: VM entry + page-fault exit + 10 reads + 4 writes of the VMCB";
const ATC_2012: &str = "Agesen, Mattson, Rugina, Sheldon, USENIX ATC 2012, table 1: hardware round trip; plus 500 assumed for the monitor's own work";
const TRAP_TALK: &str = "TA68, VMworld 2007: \"trap cost is high on deeply pipelined CPUs: ~1000 cycles\"";

/// A reference that the second-level cache answers: page tables that are walked often lie there.
const fn reference(cycles: f64, source: &'static str) -> Cost {
    Cost { cycles, source }
}

const fn later(
    name: &'static str,
    year: u32,
    round_trip: f64,
    l2: f64,
    has_nested_paging: bool,
) -> Processor {
    Processor {
        name,
        year,
        exit: Cost { cycles: round_trip + 500.0, source: ATC_2012 },
        trap: Cost { cycles: 1000.0, source: TRAP_TALK },
        reference: reference(
            l2,
            "Intel 64 Optimization Reference Manual: load-to-use latency of the L2 cache",
        ),
        has_nested_paging,
    }
}

/// The processors, oldest first.
pub const PROCESSORS: &[Processor] = &[
    Processor {
        name: "Pentium 4 672",
        year: 2005,
        exit: Cost { cycles: 2409.0 + 1931.0 + 10.0 * 178.0 + 4.0 * 171.0, source: SLIDES_2006 },
        trap: Cost { cycles: 2030.0, source: "slides of 2006: RDTSC by trap-and-emulate on a Pentium 4" },
        reference: reference(18.0, "assumed: latency of a Pentium 4's L2 cache, some 18 cycles"),
        has_nested_paging: false,
    },
    Processor {
        name: "Core 2 Duo",
        year: 2006,
        exit: Cost { cycles: 937.0 + 1186.0 + 10.0 * 52.0 + 4.0 * 44.0, source: SLIDES_2006 },
        trap: Cost { cycles: 1000.0, source: TRAP_TALK },
        reference: reference(
            14.0,
            "Intel 64 Optimization Reference Manual: load-to-use latency of the L2 cache",
        ),
        has_nested_paging: false,
    },
    Processor {
        name: "Opteron 'Barcelona'",
        year: 2007,
        exit: Cost { cycles: 2819.0, source: "assumed: as the Core 2 Duo of its time" },
        trap: Cost { cycles: 1000.0, source: TRAP_TALK },
        reference: reference(15.0, "assumed: latency of a Barcelona's L2 cache, some 15 cycles"),
        has_nested_paging: true,
    },
    later("Penryn", 2008, 1266.0, 15.0, false),
    later("Nehalem", 2009, 1009.0, 10.0, true),
    later("Westmere", 2010, 761.0, 10.0, true),
    later("Sandy Bridge", 2011, 784.0, 12.0, true),
    Processor {
        name: "EPYC (Zen)",
        year: 2020,
        exit: Cost {
            cycles: 2528.0,
            source: "M. Roth, linux-kernel, December 2020 (KVM: SVM, VMSAVE/VMLOAD): 2528 cycles from ioctl entry to exit",
        },
        trap: Cost { cycles: 1000.0, source: TRAP_TALK },
        reference: reference(
            12.0,
            "AMD Software Optimization Guide for Family 17h: L2 latency, 12 cycles at least",
        ),
        has_nested_paging: true,
    },
];

/// Costs of VMware's binary translator on a Pentium 4 (slides of 2006, "Adaptive Binary Translation").
pub mod translator {
    use super::Cost;

    /// An event that leaves the translation cache for the monitor.
    pub const CALLOUT: Cost = Cost { cycles: 1254.0, source: "slides of 2006: RDTSC by callout" };
    /// One that the translation does itself.
    pub const IN_CACHE: Cost = Cost { cycles: 216.0, source: "slides of 2006: RDTSC in the TC" };
    /// One that traps: user code runs directly, so a system call and a page fault do.
    pub const TRAP: Cost = Cost { cycles: 2030.0, source: "slides of 2006: RDTSC by trap-and-emulate" };
}

/// References of a page walk by hardware.
pub mod walk {
    /// Of four levels, one page table.
    pub const LEVELS: f64 = 4.0;
    /// The walker's caches hold the upper levels: one reference is left.
    pub const CACHED: f64 = 1.0;
    /// Two dimensions of four levels: (4 + 1) × (4 + 1) − 1 (Bhargava, Serebrin, Spadini, Manne, ASPLOS 2008, figure 1).
    pub const NESTED: f64 = 24.0;
    /// The same with caches for both dimensions: the nested walk of the last table's page, its entry, the nested walk of the
    /// page itself.
    pub const NESTED_CACHED: f64 = 3.0;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cost_has_a_source() {
        for processor in PROCESSORS {
            for cost in [processor.exit, processor.trap, processor.reference] {
                assert!(cost.cycles > 0.0 && cost.source.len() > 10, "{}", processor.name);
            }
        }
        assert!(PROCESSORS.windows(2).all(|pair| pair[0].year <= pair[1].year));
    }

    #[test]
    fn exits_of_the_slides_are_sums_of_table_one() {
        assert_eq!((PROCESSORS[0].exit.cycles, PROCESSORS[1].exit.cycles), (6804.0, 2819.0));
    }
}
