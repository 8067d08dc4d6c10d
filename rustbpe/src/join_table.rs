//! Pairs of tokens -> the token that they join into: a perfect hash table, so that a look-up has no branch that the
//! processor could mispredict. Whether two neighbours join is a coin toss, and merging asks all the time.

use std::cmp::Reverse;
use std::collections::HashMap;

use crate::hash::{Fast, K0, K1};

/// No such token.
pub const NONE: u32 = u32::MAX;

/// Bits of an id in an entry. Three ids in 64 bits make the table small enough to stay in a core's own cache beside
/// all else: a look-up that has to wait for memory takes several times as long.
const ID_BITS: u32 = 21;
const KEY: u64 = (1 << (2 * ID_BITS)) - 1;
const FREE: u64 = u64::MAX;

/// Keys fall into buckets of some two; each bucket has a shift of its own that takes its keys to free places.
pub struct JoinTable {
    shifts: Vec<u8>,
    /// left | right | joined, from the lowest bits.
    entries: Vec<u64>,
    /// 64 less the bits of a bucket's index.
    bucket_bits: u32,
    /// Instead of all the above, if there are ids that do not fit.
    large: Option<HashMap<u64, u32, Fast>>,
}

impl JoinTable {
    /// From (left, right, joined), no two with the same (left, right), for ids below `ids`.
    pub fn new(joins: &[(u32, u32, u32)], ids: usize) -> Self {
        if ids >= 1 << ID_BITS {
            let entry = |&(left, right, joined): &(u32, u32, u32)| (u64::from(left) << 32 | u64::from(right), joined);
            let large = Some(joins.iter().map(entry).collect());
            return JoinTable { shifts: Vec::new(), entries: Vec::new(), bucket_bits: 0, large };
        }
        let mut size = joins.len() + joins.len() / 4 + 16;
        loop {
            if let Some(table) = Self::with_size(joins, size) {
                return table;
            }
            size += size / 4;
        }
    }

    /// None in the unlikely case that some bucket finds no free places.
    fn with_size(joins: &[(u32, u32, u32)], size: usize) -> Option<Self> {
        let buckets = (size / 2).next_power_of_two();
        let bucket_bits = 64 - buckets.ilog2();
        let mut table = JoinTable { shifts: vec![0; buckets], entries: vec![FREE; size], bucket_bits, large: None };
        let mut sizes = vec![0_usize; buckets];
        let mut keys: Vec<(usize, usize)> = Vec::with_capacity(joins.len());
        for (index, &(left, right, _)) in joins.iter().enumerate() {
            let bucket = table.bucket(hash(key(left, right)));
            sizes[bucket] += 1;
            keys.push((bucket, index));
        }
        // Large buckets first, while most places are free.
        keys.sort_unstable_by_key(|&(bucket, _)| (Reverse(sizes[bucket]), bucket));
        for bucket in keys.chunk_by(|a, b| a.0 == b.0) {
            let shift = (0..=u8::MAX).find(|&shift| table.place_all(joins, bucket, shift))?;
            table.shifts[bucket[0].0] = shift;
        }
        Some(table)
    }

    /// Places all keys of a bucket, or none.
    fn place_all(&mut self, joins: &[(u32, u32, u32)], bucket: &[(usize, usize)], shift: u8) -> bool {
        let place = |table: &Self, index: usize| table.place(hash(key(joins[index].0, joins[index].1)), shift);
        for (done, &(_, index)) in bucket.iter().enumerate() {
            let at = place(self, index);
            if self.entries[at] != FREE {
                for &(_, index) in &bucket[..done] {
                    let at = place(self, index);
                    self.entries[at] = FREE;
                }
                return false;
            }
            let (left, right, joined) = joins[index];
            self.entries[at] = key(left, right) | u64::from(joined) << (2 * ID_BITS);
        }
        true
    }

    #[inline(always)]
    fn bucket(&self, hash: u64) -> usize {
        (hash >> self.bucket_bits) as usize
    }

    #[inline(always)]
    fn place(&self, hash: u64, shift: u8) -> usize {
        let mixed = (hash ^ u64::from(shift).wrapping_mul(K0)).wrapping_mul(K1);
        ((u128::from(mixed) * self.entries.len() as u128) >> 64) as usize
    }

    /// The token that two tokens join into, or [`NONE`].
    #[inline(always)]
    pub fn get(&self, left: u32, right: u32) -> u32 {
        if let Some(large) = &self.large {
            return large.get(&(u64::from(left) << 32 | u64::from(right))).copied().unwrap_or(NONE);
        }
        let key = key(left, right);
        let hash = hash(key);
        let entry = self.entries[self.place(hash, self.shifts[self.bucket(hash)])];
        if entry & KEY == key { (entry >> (2 * ID_BITS)) as u32 } else { NONE }
    }
}

#[inline(always)]
fn key(left: u32, right: u32) -> u64 {
    u64::from(left) | u64::from(right) << ID_BITS
}

/// One to one, so no two keys of a bucket can follow each other everywhere.
#[inline(always)]
fn hash(key: u64) -> u64 {
    let hash = key.wrapping_mul(K0);
    hash ^ hash >> 32
}

#[cfg(test)]
#[path = "../../tests/rust/join_table.rs"]
mod tests;
