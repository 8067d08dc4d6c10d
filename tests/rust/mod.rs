//! What the tests of several modules share. The tests of each module are in the file of its name.

pub mod split_families;
pub mod support;
