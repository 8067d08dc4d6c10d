//! Sets up training: lays out the chunks, and lists every pair of bytes with its places.

use crate::count::WordCounter;
use crate::pages;

use super::{NONE, Place, Queue, Side, Token, Trainer};

/// Bounds the number of places, which is at most three per cell, to 32 bits.
const MAX_CELLS: usize = u32::MAX as usize / 3;

/// Chunks are laid out by count, up to a factor of 9/8.
const GRADES: usize = 64 * 8;

/// Grade 0 holds the highest counts (at least 1).
fn grade(count: u64) -> usize {
    let exponent = count.ilog2();
    // The three bits below the highest one.
    let fraction = (count << 3 >> exponent) as usize & 7;
    GRADES - 1 - (exponent as usize * 8 + fraction)
}

impl Trainer {
    /// Takes over the counts. Fails only if the distinct chunks hold more than about 1.4 GB.
    pub fn new(counter: &WordCounter) -> Result<Self, String> {
        Self::from_words(|word| counter.each(word))
    }

    /// `each` calls what it is given with all (chunk, count), in the same order every time; it is asked twice, which
    /// costs less than a copy of the chunks.
    pub(super) fn from_words(each: impl Fn(&mut dyn FnMut(&[u8], u64))) -> Result<Self, String> {
        // Frequent chunks first: they hold most places of most pairs, and so share cache lines. First the sizes of
        // all grades, then where each starts, in words and in cells.
        let mut grades = vec![(0, 0); GRADES];
        each(&mut |word, count| {
            if word.len() > 1 {
                let (words, cells) = &mut grades[grade(count)];
                *words += 1;
                *cells += word.len() + 1;
            }
        });
        let mut next = (0, 1);
        for grade in &mut grades {
            let start = next;
            next = (next.0 + grade.0, next.1 + grade.1);
            *grade = start;
        }
        let (words, size) = next;
        if size > MAX_CELLS {
            return Err(format!(
                "the distinct chunks of this text hold {size} bytes, the limit is {MAX_CELLS}; train on less text, or split it into shorter chunks"
            ));
        }
        let mut cells = pages::table(size, NONE);
        let mut weights = vec![0; words];
        each(&mut |word, count| {
            if word.len() > 1 {
                let (index, cell) = &mut grades[grade(count)];
                weights[*index] = count;
                *index += 1;
                cells[*cell..].iter_mut().zip(word).for_each(|(cell, &byte)| *cell = u32::from(byte));
                *cell += word.len() + 1;
            }
        });
        let mut trainer = Trainer {
            cells,
            weights,
            tokens: Vec::new(),
            pairs: Vec::new(),
            places: Vec::new(),
            partners: Vec::new(),
            queue: Queue::default(),
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
        self.places = pages::table(next_place as usize, Place::default());
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
