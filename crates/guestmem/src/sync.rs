//! The atomics and locks of the trace protocol: the standard library's, or, built with `--cfg loom`, those of a model checker that tries every
//! order of their operations (`tests/model.rs`).
//!
//! What runs under the checker is the x86 that these operations become: a locked instruction (every `SeqCst` store and read-modify-write) is a full
//! fence (SDM 3A 9.2.3.9), a load is a MOV. The checker itself would take `SeqCst` for no more than acquire and release, and a MOV for no more than an acquire, which
//! is weaker than the hardware: it may find too much, not too little.

#[cfg(not(loom))]
pub use std::{
    hint::spin_loop,
    sync::Mutex,
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence},
    thread::yield_now,
};

#[cfg(loom)]
pub use checked::{AtomicBool, AtomicU32, AtomicU64};
#[cfg(loom)]
pub use loom::{
    hint::spin_loop,
    sync::Mutex,
    sync::atomic::{Ordering, fence},
    thread::yield_now,
};

#[cfg(loom)]
mod checked {
    use loom::sync::atomic::{self, Ordering, fence};

    /// What a locked instruction does besides.
    fn locked<T>(order: Ordering, result: T) -> T {
        if order == Ordering::SeqCst {
            fence(Ordering::SeqCst);
        }
        result
    }

    macro_rules! atomic {
        ($name:ident, $value:ty, $($operation:ident)*) => {
            /// As in the standard library, as x86 does it.
            #[derive(Debug, Default)]
            pub struct $name(atomic::$name);

            impl $name {
                /// With a first value.
                pub fn new(value: $value) -> Self {
                    Self(atomic::$name::new(value))
                }

                /// A MOV.
                pub fn load(&self, order: Ordering) -> $value {
                    self.0.load(if order == Ordering::SeqCst { Ordering::Acquire } else { order })
                }

                /// A MOV, or an XCHG.
                pub fn store(&self, value: $value, order: Ordering) {
                    // An exchange in any case: the checker does not know which of two stores remains if nothing else orders them.
                    self.0.swap(value, if order == Ordering::SeqCst { Ordering::AcqRel } else { order });
                    locked(order, ())
                }

                $(
                    /// A locked instruction.
                    pub fn $operation(&self, value: $value, order: Ordering) -> $value {
                        locked(order, self.0.$operation(value, order))
                    }
                )*
            }
        };
    }
    atomic!(AtomicBool, bool, swap);
    atomic!(AtomicU32, u32, swap fetch_add fetch_or);
    atomic!(AtomicU64, u64, fetch_add fetch_sub fetch_or fetch_and);
}
