//! What an encoder remembers of the chunks that it has seen. Both caches are of bounded size and have no chains that
//! hostile text could make long: a place holds few chunks, and the last one wins.

use std::mem::MaybeUninit;

use crate::hash::{ShortKey, prefetch};
use crate::pages;
pub use crate::place::MOST;
use crate::place::{DEAREST, FREE, Place, Tokens, is_wide};

/// Places at first, and at most: 16 KB, which is nothing to set up, and 8 MB, of which 20 MB of English with their
/// 210,000 distinct chunks use some 60 %. Twice as many were not faster: fewer misses, but more of it out of reach.
const SMALLEST: usize = 1 << 8;
const LARGEST: usize = 1 << 17;

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
    /// The first place of a chunk. The vocabulary's table of tokens uses the low bits of a hash; these are others, so
    /// that clashes differ.
    #[inline(always)]
    pub fn first(&self, hash: u64) -> usize {
        (hash >> 40) as usize & (self.places.len() - 1)
    }

    /// A second place for chunks that come to a full first one: 1.4 % of English are found there.
    pub fn second(&self, hash: u64) -> usize {
        (hash >> 20) as usize & (self.places.len() - 1)
    }

    /// Announces that a place will be looked at soon.
    #[inline(always)]
    pub fn announce(&self, place: usize) {
        prefetch(&self.places, place);
    }

    /// Writes the tokens of a chunk, and something beyond them. How many they are; 0 if the chunk is not in this place.
    #[inline(always)]
    pub fn write(&mut self, key: ShortKey, place: usize, room: &mut [MaybeUninit<u32>; MOST]) -> usize {
        self.places[place].write(key, room)
    }

    /// Remembers the tokens of a chunk, if they are few.
    pub fn put(&mut self, key: ShortKey, hash: u64, ids: &[u32]) {
        if let Some(tokens) = Tokens::of(ids) {
            self.misses += 1;
            self.put_tokens(key, hash, tokens);
        }
    }

    fn put_tokens(&mut self, key: ShortKey, hash: u64, tokens: Tokens) {
        let wide = is_wide(key, tokens);
        let (first, second) = (self.first(hash), self.second(hash));
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
        let size = self.places.len() * 4;
        let old = std::mem::replace(&mut self.places, pages::table(size.min(LARGEST), Place::default()));
        // First those that come often, which may all have their first places then.
        for often in [true, false] {
            for (key, tokens, _) in old.iter().flat_map(Place::each).filter(|&(_, _, seen)| seen == often) {
                self.put_tokens(key, key.hash(), tokens);
            }
        }
        self.misses = 0;
    }
}

/// Long chunks that are remembered, and their longest: the borders of tables are some hundred bytes, come again, and
/// take long to merge. The bytes of all chunks and their ids stay near `LONG_BYTES`: beyond, all are forgotten. With
/// the places themselves that is less than 3 MB.
const LONG_PLACES: usize = 1 << 13;
const LONGEST: usize = 512;
const LONG_BYTES: usize = 2 << 20;

/// Tokens of longer chunks, and of those that have more of them.
#[derive(Default)]
pub struct LongCache {
    /// Empty before the first use.
    places: Vec<LongPlace>,
    bytes: usize,
}

#[derive(Default)]
struct LongPlace {
    chunk: Box<[u8]>,
    ids: Box<[u32]>,
}

impl LongPlace {
    fn bytes(&self) -> usize {
        self.chunk.len() + size_of_val(&*self.ids)
    }
}

impl LongCache {
    pub fn get(&self, chunk: &[u8], hash: u64) -> Option<&[u32]> {
        let place = self.places.get(hash as usize % LONG_PLACES)?;
        (*place.chunk == *chunk).then_some(&place.ids)
    }

    pub fn put(&mut self, chunk: &[u8], hash: u64, ids: &[u32]) {
        if chunk.len() > LONGEST {
            return;
        }
        if self.places.is_empty() || self.bytes > LONG_BYTES {
            self.places.clear();
            self.places.resize_with(LONG_PLACES, Default::default);
            self.bytes = 0;
        }
        let place = &mut self.places[hash as usize % LONG_PLACES];
        self.bytes -= place.bytes();
        *place = LongPlace { chunk: chunk.into(), ids: ids.into() };
        self.bytes += place.bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::SHORT;
    use crate::testing::Random;

    fn known(cache: &mut Cache, key: ShortKey) -> Option<Vec<u32>> {
        let hash = key.hash();
        [cache.first(hash), cache.second(hash)].into_iter().find_map(|place| {
            let mut room = [MaybeUninit::new(0); MOST];
            let count = cache.write(key, place, &mut room);
            // SAFETY: all were initialised to begin with.
            (count > 0).then(|| room[..count].iter().map(|id| unsafe { id.assume_init() }).collect())
        })
    }

    #[test]
    fn what_is_found_is_what_was_put() {
        let mut random = Random::new(12);
        let mut cache = Cache::default();
        let mut found = 0;
        for round in 0..200_000 {
            // Of all lengths, and alike but for zeros at the end.
            let mut word = random.word(6, 6);
            word.resize(word.len() + random.below(SHORT - word.len() + 1), 0);
            let key = ShortKey::of(&word, 0, word.len());
            let number = key.hash();
            let ids: Vec<u32> = (0..1 + number as usize % MOST).map(|at| number as u32 >> (8 - at)).collect();
            let ids: Vec<u32> = ids.iter().map(|id| id & 0xff_ffff).collect();
            if let Some(tokens) = known(&mut cache, key) {
                assert_eq!(tokens, ids, "{word:?}");
                found += 1;
            } else {
                cache.put(key, key.hash(), &ids);
                assert_eq!(known(&mut cache, key), Some(ids), "{word:?}");
            }
            if round % 32 == 0 {
                cache.grow_if_small();
            }
        }
        assert!(found > 20_000 && cache.places.len() <= LARGEST, "{found} found in {} places", cache.places.len());
    }

    #[test]
    fn tokens_that_do_not_fit_are_not_remembered() {
        let mut cache = Cache::default();
        let key = ShortKey::of(b"abc", 0, 3);
        for ids in [&[1, 2, 3, 4, 5, 6][..], &[1 << 24]] {
            cache.put(key, key.hash(), ids);
            assert_eq!(known(&mut cache, key), None);
        }
        let most = vec![0, (1 << 24) - 1];
        cache.put(key, key.hash(), &most);
        assert_eq!(known(&mut cache, key), Some(most));
    }

    #[test]
    fn long_chunks_are_told_apart() {
        let mut cache = LongCache::default();
        assert_eq!(cache.get(b"one", 5), None);
        cache.put(b"one", 5, &[1]);
        assert_eq!((cache.get(b"one", 5), cache.get(b"two", 5)), (Some(&[1][..]), None));
        cache.put(&[b'x'; LONGEST + 1], 5, &[2]);
        assert_eq!(cache.get(&[b'x'; LONGEST + 1], 5), None);
    }

    #[test]
    fn long_chunks_take_bounded_memory() {
        let mut cache = LongCache::default();
        for number in 0..20_000_u64 {
            let chunk = [number.to_le_bytes(); LONGEST / 8].concat();
            cache.put(&chunk, number, &[1; LONGEST]);
            assert_eq!(cache.get(&chunk, number), Some(&[1; LONGEST][..]));
            let bytes: usize = cache.places.iter().map(LongPlace::bytes).sum();
            assert!(number % 500 > 0 || bytes == cache.bytes && bytes <= LONG_BYTES + 5 * LONGEST);
        }
    }
}
