//! What is remembered of places of guest code, by hash: how often they were reached without a translation, and how often their code changed.

use crate::cache::Key;

/// Places that are told apart.
const ENTRIES: usize = 1 << 15;
/// So many times the code of a place was written before it checks itself.
const CHECK_AFTER: u8 = 4;
/// Entries of a fragment that checks itself between two looks at whether its code still changes, at first.
const WINDOW: u32 = 1 << 10;
/// The window doubles so often at most.
const MAX_DOUBLINGS: u8 = 12;

/// A place.
#[derive(Clone, Copy, Default)]
struct Place {
    heat: u16,
    changes: u8,
    /// How often it was taken for innocent.
    acquitted: u8,
}

/// All places.
pub struct Places(Box<[Place]>);

impl Default for Places {
    fn default() -> Self {
        Self(vec![Place::default(); ENTRIES].into_boxed_slice())
    }
}

impl Places {
    fn at(&mut self, key: &Key) -> &mut Place {
        let hash = key.gfn.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40 ^ u64::from(key.offset);
        #[expect(clippy::cast_possible_truncation, reason = "masked")]
        let slot = hash as usize & (ENTRIES - 1);
        &mut self.0[slot]
    }

    /// Counts a visit; whether there were `warm` of them.
    pub fn is_warm(&mut self, key: &Key, warm: u16) -> bool {
        let place = self.at(key);
        place.heat = place.heat.saturating_add(1);
        place.heat >= warm
    }

    /// The code of a place was written, or a write hit a line that it depends on.
    pub fn note_change(&mut self, key: &Key) {
        let place = self.at(key);
        place.changes = place.changes.saturating_add(1);
    }

    /// Whether code there is to check itself.
    pub fn changes_often(&mut self, key: &Key) -> bool {
        self.at(key).changes >= CHECK_AFTER
    }

    /// Entries until it is looked at whether the code there still changes.
    pub fn window(&mut self, key: &Key) -> u32 {
        WINDOW << self.at(key).acquitted.min(MAX_DOUBLINGS)
    }

    /// The code there did not change for a window. The next window is longer.
    pub fn acquit(&mut self, key: &Key) {
        let place = self.at(key);
        place.changes = 0;
        place.acquitted = place.acquitted.saturating_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use guestmem::Gfn;

    #[test]
    fn place_that_changes_checks_itself_until_it_is_acquitted() {
        let key = Key {
            gfn: Gfn(3),
            offset: 16,
            env: 0,
            variant: bt::Variant::User,
            page_rip: 0,
            plain: false,
            second: crate::cache::NO_FRAME,
        };
        let mut places = Places::default();
        for _ in 0..CHECK_AFTER {
            assert!(!places.changes_often(&key));
            places.note_change(&key);
        }
        assert!(places.changes_often(&key));
        assert_eq!(places.window(&key), WINDOW);
        places.acquit(&key);
        assert!(!places.changes_often(&key));
        assert_eq!(places.window(&key), 2 * WINDOW);
        for _ in 0..300 {
            places.acquit(&key);
        }
        assert_eq!(places.window(&key), WINDOW << MAX_DOUBLINGS);
    }
}
