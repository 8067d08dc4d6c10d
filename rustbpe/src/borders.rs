//! How a splitter hands over the chunks that it finds: many at a time, so that whoever takes them can do one thing to
//! all before the next.

use crate::window::WINDOW;

/// Chunks are handed over once there are this many; up to a window's worth may have come on top.
const MANY: usize = 64;
/// More chunks than ever come at once.
pub const BLOCK: usize = MANY + WINDOW;

/// Takes chunks as they are found.
pub trait Chunks {
    /// Fewer than [`BLOCK`] chunks of the text, in a row: each from one border to the next.
    fn add(&mut self, text: &[u8], borders: &[usize]);
}

/// Closures take them one by one.
impl<F: FnMut(usize, usize)> Chunks for F {
    #[inline(always)]
    fn add(&mut self, _text: &[u8], borders: &[usize]) {
        borders.windows(2).for_each(|pair| self(pair[0], pair[1]));
    }
}

/// Borders of chunks in a row that were found, but not handed over.
pub struct Borders {
    places: [usize; BLOCK],
    last: usize,
}

impl Borders {
    /// No chunks; the first will start at `start`.
    #[inline(always)]
    pub fn from(start: usize) -> Self {
        let mut places = [0; BLOCK];
        places[0] = start;
        Borders { places, last: 0 }
    }

    /// Where the last chunk ends.
    pub fn end(&self) -> usize {
        self.places[self.last]
    }

    /// Adds a chunk by its end, and returns that.
    #[inline(always)]
    pub fn push(&mut self, end: usize) -> usize {
        self.last += 1;
        self.places[self.last] = end;
        end
    }

    /// Adds a chunk for each of the `ends`, where bit i stands for byte `base + i`; returns the last end.
    #[inline(always)]
    pub fn push_all(&mut self, base: usize, mut ends: u64) -> usize {
        let count = ends.count_ones() as usize;
        let room: &mut [usize; WINDOW] = self.places[self.last + 1..].first_chunk_mut().expect("room for a window");
        let mut push = |places: std::ops::Range<usize>| {
            for place in &mut room[places] {
                *place = base + ends.trailing_zeros() as usize;
                ends &= ends.wrapping_sub(1);
            }
        };
        // Most windows hold nine to sixteen. To stop after each one's own number would be a branch that is mispredicted
        // every time; what is written beyond it is overwritten later.
        push(0..8);
        if count > 8 {
            push(8..16);
        }
        if count > 16 {
            push(16..count);
        }
        self.last += count;
        self.end()
    }

    #[inline(always)]
    pub fn are_many(&self) -> bool {
        self.last >= MANY
    }

    /// Hands the chunks over.
    #[inline(always)]
    pub fn hand_over(&mut self, text: &[u8], chunks: &mut impl Chunks) {
        if self.last > 0 {
            chunks.add(text, &self.places[..=self.last]);
            self.restart(self.end());
        }
    }

    /// The next chunk starts here. Those before must have been handed over.
    #[inline(always)]
    pub fn restart(&mut self, start: usize) {
        self.places[0] = start;
        self.last = 0;
    }
}

#[cfg(test)]
#[path = "../../tests/rust/borders.rs"]
mod tests;
