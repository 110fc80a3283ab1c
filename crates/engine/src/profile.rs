//! A profile by sampling: what the vCPU's thread was at, at so many moments a second.

use std::collections::{BTreeMap, HashMap};

/// A guest instruction.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Site {
    /// Its linear address.
    pub rip: u64,
    /// Level 3's.
    pub user: bool,
    /// Level 3's address space: CR3 without the lower 12 bits; 0 for kernels, which have one.
    pub cr3: u64,
}

/// Sites that are counted one by one.
const MAX_SITES: usize = 1 << 16;

/// What samples found.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Profile {
    /// Samples a second, while the vCPU does not sleep.
    pub hz: u32,
    /// Samples taken.
    pub samples: u64,
    /// Of them, those that came when there was no room.
    pub lost: u64,
    /// Where: translated code, assembly around it, the engine.
    pub places: BTreeMap<&'static str, u64>,
    /// Of those in translated code: what the host instruction is for.
    pub categories: BTreeMap<&'static str, u64>,
    /// Of those in assembly: which.
    pub assembly: BTreeMap<&'static str, u64>,
    /// Of those in the engine: at what.
    pub engine: BTreeMap<&'static str, u64>,
    /// Of those in translated code: the guest's instruction.
    pub sites: HashMap<Site, u64>,
    /// Of those, the ones at sites beyond those.
    pub other_sites: u64,
    /// Executions of guest instructions in translated code, in units of samples for each host instruction, if every host instruction takes the
    /// same time: each sample is one over the host instructions that were made of the guest's.
    pub guest_instructions: f64,
    /// Those of host instructions.
    pub host_instructions: f64,
}

impl Profile {
    /// Counts a sample at a guest instruction.
    pub fn at(&mut self, site: Site) {
        self.count(site, 1);
    }

    fn count(&mut self, site: Site, samples: u64) {
        let full = self.sites.len() >= MAX_SITES;
        match self.sites.get_mut(&site) {
            Some(n) => *n += samples,
            None if full => self.other_sites += samples,
            None => drop(self.sites.insert(site, samples)),
        }
    }

    /// Host instructions for a guest instruction, weighted by what was executed; None: nothing was.
    #[must_use]
    pub fn lengthening(&self) -> Option<f64> {
        (self.guest_instructions > 0.0).then(|| self.host_instructions / self.guest_instructions)
    }

    /// Adds another vCPU's, or another life's.
    pub fn add(&mut self, other: &Self) {
        self.hz = self.hz.max(other.hz);
        self.samples += other.samples;
        self.lost += other.lost;
        self.other_sites += other.other_sites;
        self.guest_instructions += other.guest_instructions;
        self.host_instructions += other.host_instructions;
        let groups = [
            (&mut self.places, &other.places),
            (&mut self.categories, &other.categories),
            (&mut self.assembly, &other.assembly),
            (&mut self.engine, &other.engine),
        ];
        for (mine, theirs) in groups {
            theirs.iter().for_each(|(name, n)| *mine.entry(name).or_default() += n);
        }
        other.sites.iter().for_each(|(site, n)| self.count(*site, *n));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_add_and_sites_beyond_the_limit_are_others() {
        let mut p = Profile::default();
        let site = |rip| Site { rip, user: false, cr3: 0 };
        (0..MAX_SITES as u64 + 5).for_each(|rip| p.at(site(rip)));
        p.at(site(3));
        assert_eq!((p.sites.len(), p.sites[&site(3)], p.other_sites), (MAX_SITES, 2, 5));
        let mut q = Profile { guest_instructions: 2.0, host_instructions: 10.0, ..Profile::default() };
        q.places.insert("translated", 3);
        q.at(site(u64::MAX));
        p.add(&q);
        p.add(&q);
        assert_eq!((p.places["translated"], p.other_sites, p.lengthening()), (6, 7, Some(5.0)));
        assert_eq!(Profile::default().lengthening(), None);
    }
}
