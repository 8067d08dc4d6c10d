//! Byte-level BPE: learn a vocabulary from text, and turn text into token ids with it.
//!
//! The way through the crate, in the order that text takes:
//! [`split`] cuts text into chunks that no token may cross, [`count`] counts the distinct chunks of a
//! corpus, [`train`] learns merges from those counts, [`vocab`] holds the finished vocabulary, and
//! [`encode`] applies it to chunks. [`batch`] spreads documents over threads. The Python classes are in
//! `python`, behind the `python` feature, so that everything else is tested by a plain `cargo test`.

pub mod batch;
pub mod borders;
mod cache;
pub mod classes;
pub mod count;
pub mod encode;
mod hash;
mod join_table;
mod merge;
pub mod pack;
mod pages;
mod place;
mod scan;
mod simd;
pub mod split;
mod split_default;
mod split_gpt2;
mod split_o200k;
#[cfg(test)]
#[path = "../../tests/rust/mod.rs"]
mod tests;
pub mod train;
pub mod vocab;
mod window;
mod word_table;

#[cfg(feature = "python")]
mod learning;
#[cfg(feature = "python")]
mod python;
#[cfg(feature = "python")]
mod shards;
