//! What an encoder remembers of the chunks that it has seen. Both caches are of bounded size and have no chains that
//! hostile text could make long: a place holds few chunks, and the last one wins.

use std::mem::MaybeUninit;

use crate::borders::BLOCK;
use crate::hash::{SHORT, ShortKey, prefetch};
use crate::pages;
pub use crate::place::MOST;
use crate::place::{DEAREST, FREE, Place, Tokens, is_wide};
use crate::simd::{Baseline, Simd};

/// Places at first, and at most: 16 KB, which is nothing to set up, and 16 MB. 20 MB of English have 210,000 distinct chunks;
/// encoding them again, 0.7 % of 4.6 million look-ups miss their first place. With half as many places it is 1.6 % and takes
/// 1.15 times as long, for each miss waits for memory; twice as many are no faster.
const SMALLEST: usize = 1 << 8;
const LARGEST: usize = 1 << 18;

/// A chunk and its first place.
#[derive(Clone, Copy, Default)]
pub struct Wanted {
    pub key: ShortKey,
    place: u32,
}

/// The first place of a chunk, by the highest bits of its hash.
#[inline(always)]
fn first(key: ShortKey, shift: u32) -> usize {
    (key.quick_hash() >> shift) as usize
}

/// Tokens of short chunks.
pub struct Cache {
    places: Vec<Place>,
    /// Since the cache has its present size.
    misses: usize,
}

impl Default for Cache {
    fn default() -> Self {
        Cache { places: vec![Place::default(); SMALLEST], misses: 0 }
    }
}

impl Cache {
    /// 64 less the bits of a place's number.
    #[inline(always)]
    fn shift(&self) -> u32 {
        64 - self.places.len().ilog2()
    }

    /// The first place of a chunk.
    fn first(&self, key: ShortKey) -> usize {
        first(key, self.shift())
    }

    /// A second place for chunks that come to a full first one: 0.4 % of English are found there.
    fn second(&self, key: ShortKey) -> usize {
        (key.hash() >> self.shift()) as usize
    }

    /// Fills `waiting` with the chunks between the borders, and asks for their first places from memory.
    #[inline(always)]
    pub fn announce(&self, text: &[u8], borders: &[usize], waiting: &mut [Wanted; BLOCK]) {
        let (places, shift) = (self.places.as_slice(), self.shift());
        for (border, wanted) in borders.windows(2).zip(waiting) {
            let (start, end) = (border[0], border[1]);
            let key = if end - start > SHORT { ShortKey::NONE } else { ShortKey::of(text, start, end) };
            let place = first(key, shift);
            prefetch(places, place);
            *wanted = Wanted { key, place: place as u32 };
        }
    }

    /// Writes the tokens of the chunks that wait, up to one that is not in its first place. How many chunks, and how many
    /// tokens.
    #[inline(always)]
    pub fn write(&mut self, simd: impl Simd, waiting: &[Wanted], room: &mut [MaybeUninit<u32>]) -> (usize, usize) {
        assert!(room.len() >= waiting.len() * MOST, "no room for all");
        let places = self.places.as_mut_slice();
        let mut written = 0;
        for (index, wanted) in waiting.iter().enumerate() {
            // SAFETY: `first` made the place, and there are never less places than then; each chunk before has written
            // at most MOST tokens, so there is room for as many as that for this one.
            let (place, room) = unsafe {
                let room = room.get_unchecked_mut(written..).as_mut_ptr().cast::<[MaybeUninit<u32>; MOST]>();
                (places.get_unchecked_mut(wanted.place as usize), &mut *room)
            };
            let count = place.write(simd, wanted.key, room);
            if count == 0 {
                return (index, written);
            }
            written += count;
        }
        (waiting.len(), written)
    }

    /// Appends the tokens of a chunk that is in its second place, or says that it is not.
    pub fn write_second(&mut self, key: ShortKey, out: &mut Vec<u32>) -> bool {
        out.reserve(MOST);
        let room = out.spare_capacity_mut().first_chunk_mut().expect("room for them");
        let place = self.second(key);
        let count = self.places[place].write(Baseline, key, room);
        // SAFETY: the first `count` ids are written, to where there is room.
        unsafe { out.set_len(out.len() + count) };
        count > 0
    }

    /// Remembers the tokens of a chunk, if they are few.
    pub fn put(&mut self, key: ShortKey, ids: &[u32]) {
        if let Some(tokens) = Tokens::of(ids) {
            self.misses += 1;
            self.put_tokens(key, tokens);
        }
    }

    fn put_tokens(&mut self, key: ShortKey, tokens: Tokens) {
        let wide = is_wide(key, tokens);
        let (first, second) = (self.first(key), self.second(key));
        let (price, at) = self.places[first].cheapest(wide);
        if price == FREE {
            return self.places[first].put(at, key, tokens);
        }
        let (other_price, other_at) = self.places[second].cheapest(wide);
        if other_price < price {
            return self.places[second].put(other_at, key, tokens);
        }
        if price == DEAREST {
            self.places[first].forget_seen();
        }
        self.places[first].put(at, key, tokens);
    }

    /// Grows as long as that helps: once there were as many misses as the cache holds chunks.
    #[inline(always)]
    pub fn grow_if_small(&mut self) {
        if self.misses > 2 * self.places.len() && self.places.len() < LARGEST {
            self.grow();
        }
    }

    #[cold]
    fn grow(&mut self) {
        let size = (self.places.len() * 4).min(LARGEST);
        let old = std::mem::replace(&mut self.places, pages::table(size, Place::default()));
        // First those that come often, which may all have their first places then.
        for often in [true, false] {
            for (key, tokens, _) in old.iter().flat_map(Place::each).filter(|&(_, _, seen)| seen == often) {
                self.put_tokens(key, tokens);
            }
        }
        self.misses = 0;
    }
}

/// Long chunks that are remembered, and their longest: the borders of tables are some hundred bytes, come again, and
/// take long to merge. All chunks and their tokens together take some `LONG_BYTES`: beyond, all are forgotten.
const LONG_PLACES: usize = 1 << 15;
const LONGEST: usize = 512;
const LONG_BYTES: usize = 2 << 20;

/// Tokens of longer chunks, and of those that have more of them.
#[derive(Default)]
pub struct LongCache {
    /// By the lowest bits of the hash, where an entry starts. Empty before the first use.
    places: Vec<u32>,
    /// An entry is two numbers of 16 bits, how long the chunk is and how many its tokens, then these and the chunk. All
    /// of it lies together, for each look at another place may wait for memory.
    entries: Vec<u8>,
}

impl LongCache {
    /// Appends the tokens of a chunk that is known, or says that it is not.
    pub fn write(&self, chunk: &[u8], hash: u64, out: &mut Vec<u32>) -> bool {
        let Some(&start) = self.places.get(hash as usize % LONG_PLACES) else {
            return false;
        };
        let entry = &self.entries[start as usize..];
        let (length, count) = (u16::from_le_bytes([entry[0], entry[1]]), u16::from_le_bytes([entry[2], entry[3]]));
        let (ids, rest) = entry[4..].split_at(4 * usize::from(count));
        if rest[..usize::from(length)] != *chunk {
            return false;
        }
        out.extend(ids.chunks_exact(4).map(|id| u32::from_le_bytes(id.try_into().expect("four bytes"))));
        true
    }

    pub fn put(&mut self, chunk: &[u8], hash: u64, ids: &[u32]) {
        if chunk.len() > LONGEST {
            return;
        }
        if self.places.is_empty() || self.entries.len() > LONG_BYTES {
            // The first entry is of no chunk.
            self.entries.clear();
            self.entries.extend([0; 4]);
            self.places.clear();
            self.places.resize(LONG_PLACES, 0);
        }
        self.places[hash as usize % LONG_PLACES] = self.entries.len() as u32;
        self.entries.extend([chunk.len() as u16, ids.len() as u16].map(u16::to_le_bytes).as_flattened());
        ids.iter().for_each(|id| self.entries.extend(id.to_le_bytes()));
        self.entries.extend(chunk);
    }
}

#[cfg(test)]
#[path = "../../tests/rust/cache.rs"]
mod tests;
