//! Segment registers between our form (attributes as VMX access rights, SDM 3C 24.4.1) and KVM's (a field a byte).

use kvm_bindings::{kvm_dtable, kvm_segment};
use x86::{Attr, Segment, TableRegister};

/// Our segment as KVM's. One that is not present is unusable, which is what a null selector leaves.
#[must_use]
pub fn to_kvm(s: &Segment) -> kvm_segment {
    let bit = |mask: u16| u8::from(s.attr.0 & mask != 0);
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: s.attr.typ(),
        present: bit(Attr::P),
        dpl: s.attr.dpl(),
        db: bit(Attr::DB),
        s: bit(Attr::S),
        l: bit(Attr::L),
        g: bit(Attr::G),
        avl: bit(Attr::AVL),
        unusable: u8::from(!s.attr.present()),
        padding: 0,
    }
}

/// KVM's segment as ours.
#[must_use]
pub fn from_kvm(s: &kvm_segment) -> Segment {
    let bit = |field: u8, mask: u16| if field & 1 != 0 { mask } else { 0 };
    let present = bit(s.present & u8::from(s.unusable == 0), Attr::P);
    let attr = u16::from(s.type_ & 15)
        | bit(s.s, Attr::S)
        | u16::from(s.dpl & 3) << 5
        | present
        | bit(s.avl, Attr::AVL)
        | bit(s.l, Attr::L)
        | bit(s.db, Attr::DB)
        | bit(s.g, Attr::G);
    Segment { selector: s.selector, attr: Attr(attr), limit: s.limit, base: s.base }
}

/// GDTR or IDTR as KVM's.
#[must_use]
pub fn table_to_kvm(t: &TableRegister) -> kvm_dtable {
    kvm_dtable { base: t.base, limit: t.limit, ..kvm_dtable::default() }
}

/// KVM's GDTR or IDTR as ours.
#[must_use]
pub fn table_from_kvm(t: &kvm_dtable) -> TableRegister {
    TableRegister { base: t.base, limit: t.limit }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_come_back_as_they_went() {
        let segments = [
            Segment::real_mode(0x1234),
            Segment { selector: 0x10, attr: Attr(0xa09b), limit: u32::MAX, base: 0 },
            Segment { selector: 0x2b, attr: Attr(0xd0f3), limit: 0xffff_ffff, base: 0x7fff_0000_1000 },
            Segment { selector: 0x40, attr: Attr(0x008b), limit: 0x67, base: 0xffff_8000_0000_0000 },
            // Null, as IRETQ to level 3 leaves SS: the level stays.
            Segment { selector: 3, attr: Attr(0x60), limit: 0, base: 0 },
        ];
        for segment in segments {
            assert_eq!(from_kvm(&to_kvm(&segment)), segment);
        }
    }

    #[test]
    fn null_segment_is_unusable_and_the_reverse() {
        assert_eq!(to_kvm(&Segment::default()).unusable, 1);
        let odd = kvm_segment { present: 1, unusable: 1, s: 1, type_: 3, ..kvm_segment::default() };
        assert!(!from_kvm(&odd).attr.present());
    }

    #[test]
    fn tables_come_back_as_they_went() {
        let table = TableRegister { base: 0xffff_fe00_0000_0000, limit: 0x7f };
        assert_eq!(table_from_kvm(&table_to_kvm(&table)), table);
    }
}
