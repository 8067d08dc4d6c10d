//! Joins the bytes of one chunk into tokens: the pair of lowest rank first, leftmost of equals.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::hash::mix;

/// No such token.
pub const NONE: u32 = u32::MAX;

/// Up to this many bytes the lowest rank is found by a plain scan, which needs no links and no heap; beyond, the
/// scan's quadratic cost would show.
const SCAN_LIMIT: usize = 96;

/// Which pairs of tokens join, and into what. A token's id is its rank.
pub struct Rules {
    /// The token of each single byte (not always the byte's own value: GPT-2's are shuffled).
    bytes: [u32; 256],
    /// Every pair of bytes, directly indexed: the first look at each pair of a chunk needs no hashing.
    byte_pairs: Vec<u32>,
    /// Open addressing, at most half full: (left << 32 | right, joined).
    pairs: Vec<(u64, u32)>,
}

impl Rules {
    /// From the single-byte tokens and all (left, right, joined).
    pub fn new(bytes: [u32; 256], joins: &[(u32, u32, u32)]) -> Self {
        let mut rules = Rules {
            bytes,
            byte_pairs: vec![NONE; 1 << 16],
            pairs: vec![(u64::MAX, NONE); (joins.len() * 2).next_power_of_two().max(16)],
        };
        for &(left, right, joined) in joins {
            let key = u64::from(left) << 32 | u64::from(right);
            let mut at = rules.place(key);
            while rules.pairs[at].0 != u64::MAX {
                at = (at + 1) & (rules.pairs.len() - 1);
            }
            rules.pairs[at] = (key, joined);
        }
        for left in 0..256 {
            for right in 0..256 {
                rules.byte_pairs[left << 8 | right] = rules.join(bytes[left], bytes[right]);
            }
        }
        rules
    }

    #[inline(always)]
    fn place(&self, key: u64) -> usize {
        mix(key, 0) as usize & (self.pairs.len() - 1)
    }

    /// The token that two tokens join into, or [`NONE`].
    #[inline(always)]
    fn join(&self, left: u32, right: u32) -> u32 {
        let key = u64::from(left) << 32 | u64::from(right);
        let mut at = self.place(key);
        loop {
            let (found, joined) = self.pairs[at];
            if found == key || found == u64::MAX {
                return joined;
            }
            at = (at + 1) & (self.pairs.len() - 1);
        }
    }

    #[inline(always)]
    fn join_bytes(&self, pair: &[u8]) -> u32 {
        self.byte_pairs[usize::from(pair[0]) << 8 | usize::from(pair[1])]
    }
}

/// Scratch memory for merging, kept from chunk to chunk.
#[derive(Default)]
pub struct Merger {
    ids: Vec<u32>,
    /// What the part at this place joins into with the next one.
    joins: Vec<u32>,
    next: Vec<u32>,
    previous: Vec<u32>,
    heap: BinaryHeap<Reverse<u64>>,
}

impl Merger {
    /// Appends the tokens of a chunk (at least one byte).
    pub fn merge(&mut self, rules: &Rules, chunk: &[u8], out: &mut Vec<u32>) {
        self.ids.clear();
        self.ids.extend(chunk.iter().map(|&byte| rules.bytes[usize::from(byte)]));
        self.joins.clear();
        self.joins.extend(chunk.windows(2).map(|pair| rules.join_bytes(pair)));
        self.joins.push(NONE);
        if chunk.len() <= SCAN_LIMIT {
            self.merge_short(rules);
            out.extend_from_slice(&self.ids);
        } else {
            self.merge_long(rules, out);
        }
    }

    fn merge_short(&mut self, rules: &Rules) {
        let Merger { ids, joins, .. } = self;
        loop {
            let (mut lowest, mut at) = (NONE, 0);
            for (index, &join) in joins.iter().enumerate() {
                if join < lowest {
                    (lowest, at) = (join, index);
                }
            }
            if lowest == NONE {
                return;
            }
            ids[at] = lowest;
            ids.remove(at + 1);
            joins.remove(at);
            joins[at] = ids.get(at + 1).map_or(NONE, |&right| rules.join(lowest, right));
            if at > 0 {
                joins[at - 1] = rules.join(ids[at - 1], lowest);
            }
        }
    }

    /// A heap of (rank, place) over a linked list: n log n, so a megabyte of one letter takes 0.1 to 0.2 s
    /// and not hours.
    fn merge_long(&mut self, rules: &Rules, out: &mut Vec<u32>) {
        let length = self.ids.len();
        assert!(length < NONE as usize, "a chunk of 4 GiB or more");
        self.next.clear();
        self.next.extend(1..=length as u32);
        self.previous.clear();
        self.previous.extend((0..length as u32).map(|at| at.wrapping_sub(1)));
        let entry = |join: u32, at: usize| Reverse(u64::from(join) << 32 | at as u64);
        let mut entries = std::mem::take(&mut self.heap).into_vec();
        entries.clear();
        entries.extend(
            self.joins.iter().enumerate().filter(|(_, join)| **join != NONE).map(|(at, join)| entry(*join, at)),
        );
        self.heap = BinaryHeap::from(entries);

        while let Some(Reverse(top)) = self.heap.pop() {
            let (join, at) = ((top >> 32) as u32, top as u32 as usize);
            // The pair has changed since: `joins` at a place always tells the present one.
            if self.joins[at] != join {
                continue;
            }
            let right = self.next[at] as usize;
            let after = self.next[right] as usize;
            self.ids[at] = join;
            self.joins[right] = NONE;
            self.next[at] = after as u32;
            self.joins[at] = NONE;
            if after < length {
                self.previous[after] = at as u32;
                self.joins[at] = rules.join(join, self.ids[after]);
                if self.joins[at] != NONE {
                    self.heap.push(entry(self.joins[at], at));
                }
            }
            let before = self.previous[at] as usize;
            if before < length {
                self.joins[before] = rules.join(self.ids[before], join);
                if self.joins[before] != NONE {
                    self.heap.push(entry(self.joins[before], before));
                }
            }
        }
        let mut at = 0;
        while at < length {
            out.push(self.ids[at]);
            at = self.next[at] as usize;
        }
        self.shrink();
    }

    /// Gives back the memory of an uncommonly long chunk.
    fn shrink(&mut self) {
        if self.ids.capacity() > 1 << 20 {
            *self = Merger::default();
        }
    }
}
