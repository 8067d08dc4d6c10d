//! Joins the bytes of one chunk into tokens: the pair of lowest rank first, leftmost of equals.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::join_table::JoinTable;
pub use crate::join_table::NONE;

/// Up to this many bytes the lowest rank is found by a plain scan, which needs no links and no heap; beyond, the
/// scan's quadratic cost would show.
const SCAN_LIMIT: usize = 96;

/// Up to this many bytes, which is most chunks by far, everything fits a few cache lines.
const TINY: usize = 16;

/// Which pairs of tokens join, and into what. A token's id is its rank.
pub struct Rules {
    /// The token of each single byte (not always the byte's own value: GPT-2's are shuffled).
    bytes: [u32; 256],
    /// Every pair of bytes, directly indexed: the first look at each pair of a chunk needs no hashing.
    byte_pairs: Vec<u32>,
    pairs: JoinTable,
}

impl Rules {
    /// From the single-byte tokens and all (left, right, joined), all with ids below `ids`.
    pub fn new(bytes: [u32; 256], joins: &[(u32, u32, u32)], ids: usize) -> Self {
        let mut rules = Rules { bytes, byte_pairs: vec![NONE; 1 << 16], pairs: JoinTable::new(joins, ids) };
        for left in 0..256 {
            for right in 0..256 {
                rules.byte_pairs[left << 8 | right] = rules.join(bytes[left], bytes[right]);
            }
        }
        rules
    }

    /// The token that two tokens join into, or [`NONE`].
    #[inline(always)]
    fn join(&self, left: u32, right: u32) -> u32 {
        self.pairs.get(left, right)
    }

    #[inline(always)]
    fn join_bytes(&self, pair: &[u8]) -> u32 {
        self.byte_pairs[usize::from(pair[0]) << 8 | usize::from(pair[1])]
    }
}

/// As a plain scan over an array of (rank, place), each one number, with the bits of `alive` for links: nothing is
/// moved, and nothing is allocated.
#[inline(never)]
fn merge_tiny(rules: &Rules, chunk: &[u8], out: &mut Vec<u32>) {
    let ranked = |join: u32, at: usize| if join == NONE { u64::MAX } else { u64::from(join) << 32 | at as u64 };
    let mut ids = [0; TINY];
    let mut joins = [u64::MAX; TINY];
    for (id, &byte) in ids.iter_mut().zip(chunk) {
        *id = rules.bytes[usize::from(byte)];
    }
    for (at, pair) in chunk.windows(2).enumerate() {
        joins[at] = ranked(rules.join_bytes(pair), at);
    }
    let mut alive = (1_u32 << chunk.len()) - 1;
    loop {
        let lowest = lowest(&joins, chunk.len());
        if lowest == u64::MAX {
            break;
        }
        let (joined, at) = ((lowest >> 32) as u32, lowest as usize % TINY);
        // There is a token to the right, or nothing would join.
        let mut later = alive & (!1 << at);
        joins[later.trailing_zeros() as usize % TINY] = u64::MAX;
        later &= later - 1;
        let earlier = alive & ((1 << at) - 1);
        alive = earlier | 1 << at | later;
        ids[at] = joined;
        joins[at] = u64::MAX;
        if later != 0 {
            joins[at] = ranked(rules.join(joined, ids[later.trailing_zeros() as usize % TINY]), at);
        }
        if earlier != 0 {
            let before = earlier.ilog2() as usize;
            joins[before] = ranked(rules.join(ids[before], joined), before);
        }
    }
    while alive != 0 {
        out.push(ids[alive.trailing_zeros() as usize % TINY]);
        alive &= alive - 1;
    }
}

/// The lowest of the first `length`. (Of 64 bits each, so that no compiler makes vector code of it, which would wait for
/// the single numbers just written.)
#[inline(always)]
fn lowest(joins: &[u64; TINY], length: usize) -> u64 {
    let (mut even, mut odd) = (u64::MAX, u64::MAX);
    for pair in joins[..length.next_multiple_of(2)].chunks_exact(2) {
        even = even.min(pair[0]);
        odd = odd.min(pair[1]);
    }
    even.min(odd)
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
        if chunk.len() <= TINY {
            merge_tiny(rules, chunk, out);
        } else {
            self.merge_to(1, rules, chunk, out);
        }
    }

    /// The last two tokens that the bytes of a token go through before they are that token, if they get there.
    pub fn last_pair(&mut self, rules: &Rules, token: &[u8]) -> Option<(u32, u32)> {
        let mut pair = Vec::new();
        self.merge_to(2, rules, token, &mut pair);
        match pair[..] {
            [left, right] => Some((left, right)),
            _ => None,
        }
    }

    /// As `merge`, but stops when so few tokens are left.
    fn merge_to(&mut self, fewest: usize, rules: &Rules, chunk: &[u8], out: &mut Vec<u32>) {
        self.ids.clear();
        self.ids.extend(chunk.iter().map(|&byte| rules.bytes[usize::from(byte)]));
        self.joins.clear();
        self.joins.extend(chunk.windows(2).map(|pair| rules.join_bytes(pair)));
        self.joins.push(NONE);
        if chunk.len() <= SCAN_LIMIT {
            self.merge_short(fewest, rules);
            out.extend_from_slice(&self.ids);
        } else {
            self.merge_long(fewest, rules, out);
        }
    }

    fn merge_short(&mut self, fewest: usize, rules: &Rules) {
        let Merger { ids, joins, .. } = self;
        while ids.len() > fewest {
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
    fn merge_long(&mut self, fewest: usize, rules: &Rules, out: &mut Vec<u32>) {
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

        let mut left = length;
        while left > fewest
            && let Some(Reverse(top)) = self.heap.pop()
        {
            let (join, at) = ((top >> 32) as u32, top as u32 as usize);
            // The pair has changed since: `joins` at a place always tells the present one.
            if self.joins[at] != join {
                continue;
            }
            left -= 1;
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
