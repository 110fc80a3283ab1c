//! `trellis host`: what this host offers to a virtual machine monitor, in plain words or as JSON, and what `automatic` makes of it.

mod facts;
mod text;

pub use facts::Facts;

/// What to print.
#[must_use]
pub fn run(json: bool) -> String {
    let facts = Facts::of_this_host();
    if json { format!("{:#}\n", facts.to_json()) } else { text::of(&facts) }
}
