//! What the engine has learnt of single instructions: their innocent forms often failed, so they are translated otherwise.
//!
//! Hints are advice. An instruction for which the form asked for does not exist keeps its innocent one, and every form is right for every
//! operand: a hint that no longer fits costs time only.

/// How an instruction is to be translated.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Form {
    /// The group of accesses that this instruction begins is none: each of its accesses checks for itself.
    Alone,
    /// Its access often crosses a page: it has a second form, which works on a copy of both pages' bytes ([`crate::frame::BOUNCE`]).
    Halves,
    /// Its access often meets what only the engine can reach: it is handed over without a lookup in front.
    Direct,
}

/// The hints for a page's instructions. Nearly always empty.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Hints(Vec<(u16, Form)>);

impl Hints {
    /// None.
    #[must_use]
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// One more, for the instruction at an offset of the page.
    pub fn add(&mut self, offset: u16, form: Form) {
        self.0.push((offset, form));
    }

    /// Whether the instruction at an offset is to have a form.
    #[must_use]
    pub fn has(&self, offset: u64, form: Form) -> bool {
        self.0.iter().any(|h| u64::from(h.0) == offset && h.1 == form)
    }

    /// Whether there is nothing to know.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
