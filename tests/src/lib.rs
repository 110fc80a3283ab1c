//! Support for the whole-machine tests in `tests/tests`.
