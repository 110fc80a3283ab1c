//! The most expensive guest code by name: samples of the profile summed by function.

use std::collections::BTreeMap;

use serde::Serialize;

use super::account::Site;
use crate::symbols::Symbols;

/// Where a position-independent program lies with `norandmaps` (Linux, ELF_ET_DYN_BASE, then rounded).
pub const PIE_BASE: u64 = 0x5555_5555_4000;
/// Shared libraries and the loader are above.
const LIBRARIES: u64 = 0x7f00_0000_0000;

/// Names of the kernel's and of the command's code.
#[derive(Clone, Debug, Default)]
pub struct Names {
    /// At any privilege level but the user's.
    pub kernel: Symbols,
    /// The command's, where it lies in memory.
    pub program: Symbols,
}

/// A function, or a place without a name.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Function {
    /// Its name, or what is known of it.
    pub name: String,
    /// Whether it is the kernel's.
    pub kernel: bool,
    /// Samples in it.
    pub samples: f64,
    /// Of all samples in guest code, in percent.
    pub percent: f64,
    /// The instruction with the most samples.
    pub hottest: u64,
}

impl Names {
    /// Who is at a place.
    fn name(&self, site: &Site) -> String {
        let symbols = if site.cpl == 3 { &self.program } else { &self.kernel };
        match symbols.at(site.rip) {
            Some((name, _)) => name.to_owned(),
            None if site.cpl != 3 => format!("kernel, {:#x}…", site.rip & !0xfff),
            None if site.rip >= LIBRARIES => format!("shared library, {:#x}…", site.rip & !0xfffff),
            None => format!("program, {:#x}…", site.rip & !0xfff),
        }
    }
}

/// The functions with the most samples, at most `limit`.
#[must_use]
pub fn functions(sites: &[(Site, f64)], names: &Names, limit: usize) -> Vec<Function> {
    let all: f64 = sites.iter().map(|(_, samples)| samples).sum();
    let mut by_name: BTreeMap<(String, bool), (f64, f64, u64)> = BTreeMap::new();
    for (site, samples) in sites {
        let sum = by_name.entry((names.name(site), site.cpl != 3)).or_default();
        sum.0 += samples;
        if *samples > sum.1 {
            (sum.1, sum.2) = (*samples, site.rip);
        }
    }
    let function = |((name, kernel), (samples, _, hottest)): ((String, bool), (f64, f64, u64))| Function {
        name,
        kernel,
        samples,
        percent: samples / all.max(1.0) * 100.0,
        hottest,
    };
    let mut functions: Vec<Function> = by_name.into_iter().map(function).collect();
    functions.sort_by(|a, b| b.samples.total_cmp(&a.samples));
    functions.truncate(limit);
    functions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_summed_by_function_and_level() {
        let names = Names {
            kernel: Symbols::new(vec![(0x1000, "copy_page".to_owned()), (0x2000, "do_fault".to_owned())]),
            program: Symbols::new(vec![(0x1000, "main".to_owned())]),
        };
        let at = |rip, cpl, samples| (Site { rip, cpl, cr3: 0 }, samples);
        let sites =
            [at(0x1004, 0, 10.0), at(0x1008, 0, 30.0), at(0x1004, 3, 20.0), at(0x7f12_3456_7890, 3, 40.0)];
        let functions = functions(&sites, &names, 3);
        assert_eq!(functions.len(), 3);
        assert!(functions.iter().any(|f| f.name == "shared library, 0x7f1234500000…" && !f.kernel));
        let copy = functions.iter().find(|f| f.name == "copy_page").unwrap();
        assert_eq!((copy.samples, copy.percent, copy.hottest, copy.kernel), (40.0, 40.0, 0x1008, true));
        assert!(functions.iter().any(|f| f.name == "main"));
    }
}
