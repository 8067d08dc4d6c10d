//! Pairs of tokens -> the token that they join into: a perfect hash table, so that a look-up has no branch that the
//! processor could mispredict. Whether two neighbours join is a coin toss, and merging asks all the time.

/// No such token.
pub const NONE: u32 = u32::MAX;

const K0: u64 = 0x9e37_79b9_7f4a_7c15;
const K1: u64 = 0xd1b5_4a32_d192_ed03;

#[derive(Clone, Copy)]
struct Entry {
    left: u32,
    right: u32,
    joined: u32,
}

const FREE: Entry = Entry { left: NONE, right: NONE, joined: NONE };

/// Keys fall into buckets of some two; each bucket has a shift of its own that takes its keys to free places.
pub struct JoinTable {
    shifts: Vec<u8>,
    /// A power of two, at most half of them taken.
    entries: Vec<Entry>,
    /// 64 less the bits of an index into either.
    shift_bits: u32,
    entry_bits: u32,
}

impl JoinTable {
    /// From (left, right, joined), no two with the same (left, right).
    pub fn new(joins: &[(u32, u32, u32)]) -> Self {
        let mut size = (joins.len() * 2).next_power_of_two().max(16);
        loop {
            if let Some(table) = Self::with_size(joins, size) {
                return table;
            }
            size *= 2;
        }
    }

    /// None in the unlikely case that some bucket finds no free places.
    fn with_size(joins: &[(u32, u32, u32)], size: usize) -> Option<Self> {
        let buckets = size / 4;
        let mut table = JoinTable {
            shifts: vec![0; buckets],
            entries: vec![FREE; size],
            shift_bits: 64 - buckets.ilog2(),
            entry_bits: 64 - size.ilog2(),
        };
        let mut keys: Vec<(usize, usize)> = Vec::with_capacity(joins.len());
        let mut sizes = vec![0_usize; buckets];
        for (index, &(left, right, _)) in joins.iter().enumerate() {
            let bucket = table.bucket(hash(left, right));
            sizes[bucket] += 1;
            keys.push((bucket, index));
        }
        // Large buckets first, while most places are free.
        keys.sort_unstable_by_key(|&(bucket, _)| (std::cmp::Reverse(sizes[bucket]), bucket));
        for bucket in keys.chunk_by(|a, b| a.0 == b.0) {
            let shift = (0..=u8::MAX).find(|&shift| table.place_all(joins, bucket, shift))?;
            table.shifts[bucket[0].0] = shift;
        }
        Some(table)
    }

    /// Places all keys of a bucket, or none.
    fn place_all(&mut self, joins: &[(u32, u32, u32)], bucket: &[(usize, usize)], shift: u8) -> bool {
        let place = |&(_, index): &(usize, usize)| {
            let (left, right, _) = joins[index];
            (hash(left, right) ^ u64::from(shift).wrapping_mul(K0)).wrapping_mul(K1) >> self.entry_bits
        };
        let places: Vec<usize> = bucket.iter().map(|key| place(key) as usize).collect();
        for (at, &place) in places.iter().enumerate() {
            if self.entries[place].joined != NONE {
                places[..at].iter().for_each(|&place| self.entries[place] = FREE);
                return false;
            }
            let (left, right, joined) = joins[bucket[at].1];
            self.entries[place] = Entry { left, right, joined };
        }
        true
    }

    #[inline(always)]
    fn bucket(&self, hash: u64) -> usize {
        (hash >> self.shift_bits) as usize
    }

    /// The token that two tokens join into, or [`NONE`].
    #[inline(always)]
    pub fn get(&self, left: u32, right: u32) -> u32 {
        let hash = hash(left, right);
        let shift = u64::from(self.shifts[self.bucket(hash)]);
        let place = (hash ^ shift.wrapping_mul(K0)).wrapping_mul(K1) >> self.entry_bits;
        let entry = self.entries[place as usize];
        // `|` rather than `||`, for the same reason as everything here.
        let other = (entry.left ^ left) | (entry.right ^ right);
        if other == 0 { entry.joined } else { NONE }
    }
}

/// One to one, so no two keys of a bucket can follow each other everywhere.
#[inline(always)]
fn hash(left: u32, right: u32) -> u64 {
    let hash = (u64::from(left) << 32 | u64::from(right)).wrapping_mul(K0);
    hash ^ hash >> 32
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::testing::Random;

    #[test]
    fn finds_what_is_there_and_nothing_else() {
        let mut random = Random::new(13);
        for size in [0, 1, 2, 7, 100, 5000, 70_000] {
            for range in [40, 300, 1 << 20, NONE as usize] {
                let mut pair = || (random.below(range) as u32, random.below(range) as u32);
                let joins: HashMap<(u32, u32), u32> = (0..size).map(|id| (pair(), id)).collect();
                let list: Vec<_> = joins.iter().map(|(&(left, right), &id)| (left, right, id)).collect();
                let table = JoinTable::new(&list);
                for (&(left, right), &id) in &joins {
                    assert_eq!(table.get(left, right), id);
                }
                for _ in 0..10_000 {
                    let (left, right) = pair();
                    assert_eq!(table.get(left, right), joins.get(&(left, right)).copied().unwrap_or(NONE));
                }
            }
        }
    }
}
