//! Learns BPE merges from chunk counts.
//!
//! Each step joins the neighbouring pair of tokens with the highest count (of equals, the lowest left id, then
//! the lowest right id). Only the places where that pair stands are visited, and only the counts of their
//! neighbours change, so the whole of training costs about as much as a few passes over the distinct chunks.
//!
//! One fact keeps it simple: *the list of places of a pair is complete at the moment its younger token is made.*
//! Neighbours only change by merging, and what merging makes is always a newer token. So lists are written
//! once, never grow, and need no sets: a place that has since been merged away is noticed and skipped.

use std::cmp::Reverse;

use crate::hash::prefetch;

mod queue;
mod side;
mod start;

use queue::{Candidate, Queue};
use side::Side;

/// Between chunks, and in cells that lie inside a token.
const NONE: u32 = u32::MAX;

/// How many places ahead the memory of a place is asked for: without, half of the time of merging is waiting for it
/// (0.41 s for 32,768 tokens from 100 MB of English, with it and large pages 0.30 s).
const AHEAD: usize = 16;

/// A place where a pair stands: the cell its left token starts in, and the chunk around it.
#[derive(Clone, Copy, Default)]
struct Place {
    cell: u32,
    word: u32,
}

/// A pair as seen from its younger token: the count, and where its places start. They end where the next pair's places
/// start.
struct Pair {
    places: u32,
    count: u64,
}

/// What is stored for a token: its length in bytes, and which pairs it is the younger one of.
struct Token {
    length: u32,
    /// Pairs (partner, token) with partner <= token, then pairs (token, partner) with partner < token,
    /// each sorted by partner, as ranges of `Trainer::pairs`: `first..middle` and `middle..last`.
    first: u32,
    middle: u32,
    last: u32,
}

/// The state of training: all distinct chunks, and all pairs in them.
pub struct Trainer {
    /// One cell a byte, one NONE between chunks. A token's id stands in its first and its last cell, which is
    /// enough to find both neighbours without links.
    cells: Vec<u32>,
    weights: Vec<u64>,
    tokens: Vec<Token>,
    pairs: Vec<Pair>,
    /// The older token of each pair; apart from the rest, because they are searched.
    partners: Vec<u32>,
    places: Vec<Place>,
    queue: Queue,
    left: Side,
    right: Side,
}

impl Trainer {
    fn add_pair(&mut self, pair: (u32, u32), partner: u32, count: u64, places: u32) {
        self.queue.push(Candidate { count, pair: Reverse(pair), index: self.pairs.len() as u32 });
        self.partners.push(partner);
        self.pairs.push(Pair { places, count });
    }

    fn add_token(&mut self, token: Token) {
        self.tokens.push(token);
        for side in [&mut self.left, &mut self.right] {
            side.counts.push(0);
            side.cursors.push(0);
        }
    }

    /// Learns merges until there are `vocab_size` tokens, or until no pair is left. Merge number i makes token
    /// 256 + i. `interrupt` is asked before every merge, and its error stops the training.
    pub fn learn<E>(
        mut self,
        vocab_size: u32,
        mut interrupt: impl FnMut() -> Result<(), E>,
    ) -> Result<Vec<(u32, u32)>, E> {
        let mut merges = Vec::new();
        while merges.len() + 256 < vocab_size as usize {
            interrupt()?;
            let Some((pair, index)) = self.queue.pop_best(|index| self.pairs[index].count) else { break };
            self.merge(pair, index);
            merges.push(pair);
        }
        Ok(merges)
    }

    /// Joins every (a, b) into a new token, and lists the new pairs this makes.
    fn merge(&mut self, (a, b): (u32, u32), index: usize) {
        let made = self.tokens.len() as u32;
        let (length_a, length_b) = (self.tokens[a as usize].length, self.tokens[b as usize].length);
        let length = length_a + length_b;
        // (made, made), and the (made, a) that were counted just before it was seen that they become it.
        let (mut double, mut double_places, mut undone) = (0, Vec::new(), 0);

        let start = self.pairs[index].places as usize;
        let end = self.pairs.get(index + 1).map_or(self.places.len(), |next| next.places as usize);
        for at in start..end {
            if let Some(ahead) = self.places.get(at + AHEAD) {
                prefetch(&self.cells, ahead.cell as usize);
                prefetch(&self.weights, ahead.word as usize);
            }
            let Place { cell, word } = self.places[at];
            let middle = cell + length_a;
            // Merged away since it was listed? A cell never goes back to an older token, so ids suffice.
            if self.cells[cell as usize] != a || self.cells[middle as usize] != b {
                continue;
            }
            let weight = self.weights[word as usize];
            self.cells[middle as usize - 1] = NONE;
            self.cells[middle as usize] = NONE;
            self.cells[cell as usize] = made;
            self.cells[(cell + length) as usize - 1] = made;
            let left = self.cells[cell as usize - 1];
            if left == made {
                double += weight;
                double_places.push(Place { cell: cell - length, word });
                undone += weight;
            } else if left != NONE {
                let cell = cell - self.tokens[left as usize].length;
                self.left.add(left, weight, Place { cell, word });
            }
            let right = self.cells[(cell + length) as usize];
            if right != NONE {
                self.right.add(right, weight, Place { cell, word });
            }
        }

        self.pairs[index].count = 0;
        let (mut left, mut right) = (std::mem::take(&mut self.left), std::mem::take(&mut self.right));
        left.met.sort_unstable();
        right.met.sort_unstable();
        for &neighbour in &left.met {
            self.lower(neighbour, a, left.counts[neighbour as usize], index);
        }
        for &neighbour in &right.met {
            self.lower(b, neighbour, right.counts[neighbour as usize], index);
        }
        if undone > 0 {
            right.counts[a as usize] -= undone;
        }
        let first = self.pairs.len() as u32;
        self.list(&mut left, |neighbour| (neighbour, made));
        if double > 0 {
            self.add_pair((made, made), made, double, self.places.len() as u32);
            self.places.append(&mut double_places);
        }
        let middle = self.pairs.len() as u32;
        self.list(&mut right, |neighbour| (made, neighbour));
        (self.left, self.right) = (left, right);
        self.add_token(Token { length, first, middle, last: self.pairs.len() as u32 });
    }

    /// Lists the new pairs with the neighbours met on one side, each with its places in order.
    fn list(&mut self, side: &mut Side, pair: impl Fn(u32) -> (u32, u32)) {
        let mut next = self.places.len();
        self.places.resize(next + side.places.len(), Place::default());
        for &neighbour in &side.met {
            let count = side.counts[neighbour as usize];
            let places = next as u32;
            next += side.cursors[neighbour as usize] as usize;
            side.cursors[neighbour as usize] = places;
            if count > 0 {
                self.add_pair(pair(neighbour), neighbour, count, places);
            }
        }
        for &(neighbour, place) in &side.places {
            let cursor = &mut side.cursors[neighbour as usize];
            self.places[*cursor as usize] = place;
            *cursor += 1;
        }
        // `met` decides what is cleared; cursors may be 0 again here, which is as good.
        side.clear();
    }

    /// Takes `by` from the count of a pair, unless it is the very pair that is being merged away (as in "aaa").
    #[inline(always)]
    fn lower(&mut self, left: u32, right: u32, by: u64, merged: usize) {
        let (partner, range) = if left <= right {
            let token = &self.tokens[right as usize];
            (left, token.first..token.middle)
        } else {
            let token = &self.tokens[left as usize];
            (right, token.middle..token.last)
        };
        let partners = &self.partners[range.start as usize..range.end as usize];
        let found = range.start as usize + partners.binary_search(&partner).expect("a pair that stands in the text");
        if found != merged {
            self.pairs[found].count -= by;
        }
    }
}

#[cfg(test)]
#[path = "../../tests/rust/train.rs"]
mod tests;
