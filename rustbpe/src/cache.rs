//! What an encoder remembers of the chunks that it has seen. Both caches are of bounded size and have no chains that
//! hostile text could make long: a place holds few chunks, and the last one wins.

use crate::hash::{ShortKey, prefetch};
use crate::pages;

/// Most tokens of a short chunk that is remembered: as many as fit 16 bytes.
pub const MOST: usize = 5;

const ID_BITS: usize = 24;
const ID_MASK: u32 = (1 << ID_BITS) - 1;

/// Places at first, and at most: 16 KB, which is nothing to set up, and 8 MB, of which 20 MB of English with their
/// 190,000 distinct chunks use most.
const SMALLEST: usize = 1 << 8;
const LARGEST: usize = 1 << 17;

/// The tokens of a chunk: five ids of 24 bits, and their number in the highest byte.
#[derive(Clone, Copy, Default)]
pub struct Tokens {
    low: u64,
    high: u64,
}

impl Tokens {
    /// None if they are too many or their ids too large.
    fn of(ids: &[u32]) -> Option<Self> {
        if ids.len() > MOST || ids.iter().any(|&id| id > ID_MASK) {
            return None;
        }
        let packed = ids.iter().rev().fold(0, |packed, &id| packed << ID_BITS | u128::from(id));
        Some(Tokens { low: packed as u64, high: (packed >> 64) as u64 | (ids.len() as u64) << 56 })
    }

    #[inline(always)]
    pub fn count(self) -> usize {
        (self.high >> 56) as usize
    }

    /// The ids, and 0 beyond `count`.
    #[inline(always)]
    pub fn ids(self) -> [u32; MOST] {
        let Tokens { low, high } = self;
        let third = low >> (2 * ID_BITS) | high << (64 - 2 * ID_BITS);
        [low, low >> ID_BITS, third, high >> 8, high >> 32].map(|bits| bits as u32 & ID_MASK)
    }
}

/// Two chunks of the same place; together one cache line. A chunk comes in second, and moves up when it is seen again:
/// so those that come once do not drive out those that come often, and most look-ups find theirs first.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
struct Place {
    keys: [ShortKey; 2],
    tokens: [Tokens; 2],
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
    /// The vocabulary's table of tokens uses the low bits of a hash; these are others, so that clashes differ.
    #[inline(always)]
    fn index(&self, hash: u64) -> usize {
        (hash >> 40) as usize & (self.places.len() - 1)
    }

    /// A second place for chunks that come to a full first one. Without it, a third of the chunks of a cache that is
    /// three quarters full drive out each other.
    fn second_index(&self, hash: u64) -> usize {
        (hash >> 20) as usize & (self.places.len() - 1)
    }

    /// Announces that a chunk of this hash will be looked up soon.
    #[inline(always)]
    pub fn announce(&self, hash: u64) {
        prefetch(&self.places, self.index(hash));
    }

    /// The tokens of a chunk, if they are in its first place.
    #[inline(always)]
    pub fn get(&mut self, key: ShortKey, hash: u64) -> Option<Tokens> {
        let index = self.index(hash);
        let place = &mut self.places[index];
        if place.keys[0] != key {
            if place.keys[1] != key {
                return None;
            }
            place.keys.swap(0, 1);
            place.tokens.swap(0, 1);
        }
        Some(place.tokens[0])
    }

    /// The tokens of a chunk, if they are in its second place.
    pub fn get_second(&self, key: ShortKey, hash: u64) -> Option<Tokens> {
        let place = &self.places[self.second_index(hash)];
        place.keys.iter().position(|&other| other == key).map(|at| place.tokens[at])
    }

    /// Remembers the tokens of a chunk, if they are few.
    pub fn put(&mut self, key: ShortKey, hash: u64, ids: &[u32]) {
        if let Some(tokens) = Tokens::of(ids) {
            self.misses += 1;
            self.put_tokens(key, hash, tokens);
        }
    }

    fn put_tokens(&mut self, key: ShortKey, hash: u64, tokens: Tokens) {
        let (first, second) = (self.index(hash), self.second_index(hash));
        let index = if self.places[first].is_full() && !self.places[second].is_full() { second } else { first };
        self.places[index].push(key, tokens);
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
        for at in [0, 1] {
            for place in old.iter().filter(|place| place.keys[at] != ShortKey::default()) {
                self.put_tokens(place.keys[at], place.keys[at].hash(), place.tokens[at]);
            }
        }
        self.misses = 0;
    }
}

impl Place {
    fn is_full(&self) -> bool {
        self.keys[1] != ShortKey::default()
    }

    fn push(&mut self, key: ShortKey, tokens: Tokens) {
        let at = self.keys.iter().position(|&other| other == ShortKey::default()).unwrap_or(1);
        self.keys[at] = key;
        self.tokens[at] = tokens;
    }
}

/// Long chunks that are remembered, and their longest: at most 3 MB.
const LONG_PLACES: usize = 1 << 13;
const LONGEST: usize = 64;

/// Tokens of longer chunks, and of those that have more of them.
#[derive(Default)]
pub struct LongCache {
    /// Empty before the first use.
    places: Vec<LongPlace>,
}

#[derive(Default)]
struct LongPlace {
    chunk: Box<[u8]>,
    ids: Box<[u32]>,
}

impl LongCache {
    pub fn get(&self, chunk: &[u8], hash: u64) -> Option<&[u32]> {
        let place = self.places.get(hash as usize % LONG_PLACES)?;
        (*place.chunk == *chunk).then_some(&place.ids)
    }

    pub fn put(&mut self, chunk: &[u8], hash: u64, ids: &[u32]) {
        if chunk.len() <= LONGEST {
            if self.places.is_empty() {
                self.places.resize_with(LONG_PLACES, Default::default);
            }
            self.places[hash as usize % LONG_PLACES] = LongPlace { chunk: chunk.into(), ids: ids.into() };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn what_is_found_is_what_was_put() {
        let mut random = Random::new(12);
        let mut cache = Cache::default();
        let mut found = 0;
        for round in 0..200_000 {
            let word = random.word(6, 6);
            let key = ShortKey::of(&word, 0, word.len());
            let ids: Vec<u32> = (0..1 + word.len() % MOST).map(|at| key.hash() as u32 >> (8 + at)).collect();
            if let Some(tokens) = cache.get(key, key.hash()).or_else(|| cache.get_second(key, key.hash())) {
                assert_eq!(tokens.ids()[..tokens.count()], ids);
                found += 1;
            } else {
                cache.put(key, key.hash(), &ids);
                let tokens = cache.get(key, key.hash()).or_else(|| cache.get_second(key, key.hash()));
                assert_eq!(tokens.unwrap().count(), ids.len());
            }
            if round % 32 == 0 {
                cache.grow_if_small();
            }
        }
        assert!(found > 100_000 && cache.places.len() <= LARGEST, "{found} found in {} places", cache.places.len());
    }

    #[test]
    fn tokens_that_do_not_fit_are_not_remembered() {
        let mut cache = Cache::default();
        let key = ShortKey::of(b"abc", 0, 3);
        for ids in [&[1, 2, 3, 4, 5, 6][..], &[1 << 24]] {
            cache.put(key, key.hash(), ids);
            assert!(cache.get(key, key.hash()).is_none());
        }
        cache.put(key, key.hash(), &[0, (1 << 24) - 1]);
        assert_eq!(cache.get(key, key.hash()).unwrap().ids()[..2], [0, (1 << 24) - 1]);
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
}
