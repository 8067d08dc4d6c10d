//! Sets up training: lays out the chunks, and lists every pair of bytes with its places.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::{NONE, Place, Side, Token, Trainer};

/// Bounds the number of places, which is at most three per cell, to 32 bits.
const MAX_CELLS: usize = u32::MAX as usize / 3;

impl Trainer {
    pub(super) fn from_words(mut words: Vec<(u64, Vec<u8>)>) -> Result<Self, String> {
        // Frequent chunks first: they hold most places of most pairs, and so share cache lines.
        words.sort_unstable_by_key(|(count, _)| Reverse(*count));
        let size = words.iter().map(|(_, word)| word.len() + 1).sum::<usize>() + 1;
        if size > MAX_CELLS {
            return Err(format!(
                "the distinct chunks of this text hold {size} bytes, the limit is {MAX_CELLS}; train on less text, or split it into shorter chunks"
            ));
        }
        let mut cells = Vec::with_capacity(size);
        cells.push(NONE);
        let mut weights = Vec::with_capacity(words.len());
        for (count, word) in words {
            cells.extend(word.iter().map(|&byte| u32::from(byte)));
            cells.push(NONE);
            weights.push(count);
        }
        let mut trainer = Trainer {
            cells,
            weights,
            tokens: Vec::new(),
            pairs: Vec::new(),
            places: Vec::new(),
            heap: BinaryHeap::new(),
            left: Side::default(),
            right: Side::default(),
        };
        trainer.add_byte_pairs();
        Ok(trainer)
    }

    /// Lists the pairs of bytes, by counting sort over all cells.
    fn add_byte_pairs(&mut self) {
        let mut counts = vec![0_u64; 1 << 16];
        let mut cursors = vec![0_u32; 1 << 16];
        let key = |pair: &[u32]| (pair[0] << 8 | pair[1]) as usize;
        let mut word = 0;
        for pair in self.cells[1..].windows(2) {
            if pair[1] == NONE {
                word += 1;
            } else if pair[0] != NONE {
                counts[key(pair)] += self.weights[word];
                cursors[key(pair)] += 1;
            }
        }
        let mut next_place = 0;
        for token in 0..256 {
            let first = self.pairs.len() as u32;
            let mut middle = first;
            let lefts = (0..=token).map(|partner| (partner, (partner, token)));
            let rights = (0..token).map(|partner| (partner, (token, partner)));
            for (partner, (left, right)) in lefts.chain(rights) {
                let key = key(&[left, right]);
                if counts[key] > 0 {
                    let places = next_place;
                    next_place += cursors[key];
                    cursors[key] = places;
                    self.add_pair((left, right), partner, counts[key], places);
                }
                if left == token && right == token {
                    middle = self.pairs.len() as u32;
                }
            }
            self.add_token(Token { length: 1, first, middle, last: self.pairs.len() as u32 });
        }
        self.places = vec![Place::default(); next_place as usize];
        let mut word = 0;
        for (cell, pair) in self.cells.windows(2).enumerate().skip(1) {
            if pair[1] == NONE {
                word += 1;
            } else if pair[0] != NONE {
                let cursor = &mut cursors[key(pair)];
                self.places[*cursor as usize] = Place { cell: cell as u32, word };
                *cursor += 1;
            }
        }
    }
}
