//! Text to token ids.

use std::hash::BuildHasher;

use crate::cache::{Cache, LongCache, MOST};
use crate::hash::{Fast, SHORT, ShortKey};
use crate::merge::Merger;
use crate::split::{Chunks, SplitError, Splitter};
use crate::vocab::Vocab;

/// Short chunks that wait until they are encoded together.
const AHEAD: usize = 32;
/// As many ids as these may have, and as are written at once.
const ROOM: usize = (AHEAD + 1) * MOST;

/// What one thread needs to encode with one vocabulary. Always use it with the same vocabulary.
pub struct Worker {
    splitter: Splitter,
    merger: Merger,
    cache: Cache,
    long: LongCache,
}

impl Worker {
    pub fn new(splitter: &Splitter) -> Self {
        Worker {
            splitter: splitter.clone(),
            merger: Merger::default(),
            cache: Cache::default(),
            long: LongCache::default(),
        }
    }

    /// Appends the tokens of `text`.
    pub fn encode(&mut self, vocab: &Vocab, text: &str, out: &mut Vec<u32>) -> Result<(), SplitError> {
        let Worker { splitter, merger, cache, long } = self;
        let waiting = [(ShortKey::default(), 0); AHEAD];
        let mut encoding = Encoding { vocab, merger, cache, long, text: text.as_bytes(), out, waiting, length: 0 };
        splitter.split(text, &mut encoding)?;
        encoding.flush();
        Ok(())
    }
}

/// The encoding of one text.
struct Encoding<'a> {
    vocab: &'a Vocab,
    merger: &'a mut Merger,
    cache: &'a mut Cache,
    long: &'a mut LongCache,
    text: &'a [u8],
    out: &'a mut Vec<u32>,
    /// Short chunks and their first places of the cache, which come from memory while the chunks wait.
    waiting: [(ShortKey, u32); AHEAD],
    length: usize,
}

impl Chunks for &mut Encoding<'_> {
    #[inline(always)]
    fn add(&mut self, start: usize, end: usize) {
        if end - start > SHORT {
            return self.add_long(start, end);
        }
        let key = ShortKey::of(self.text, start, end);
        let place = self.cache.first(key.hash());
        self.cache.announce(place);
        self.waiting[self.length] = (key, place as u32);
        self.length += 1;
        if self.length == AHEAD {
            self.flush();
        }
    }
}

impl Encoding<'_> {
    /// Encodes the chunks that wait.
    #[inline(never)]
    fn flush(&mut self) {
        let mut at = 0;
        while let Some(key) = self.flush_known(&mut at) {
            self.miss(key);
        }
        self.length = 0;
        self.cache.grow_if_small();
    }

    /// Encodes the chunks that wait from `at` on, up to the first that is not in its first place of the cache.
    #[inline(always)]
    fn flush_known(&mut self, at: &mut usize) -> Option<ShortKey> {
        self.out.reserve(ROOM);
        let room = self.out.spare_capacity_mut();
        let mut length = 0;
        let mut unknown = None;
        for &(key, place) in self.waiting[..self.length].get(*at..)? {
            *at += 1;
            let count = self.cache.write(key, place as usize, room[length..].first_chunk_mut().expect("room for all"));
            if count == 0 {
                unknown = Some(key);
                break;
            }
            length += count;
        }
        // SAFETY: the first `length` ids are written, to where there is room.
        unsafe { self.out.set_len(self.out.len() + length) };
        unknown
    }

    /// Encodes a short chunk that is not in its first place of the cache, and remembers its tokens.
    #[inline(never)]
    fn miss(&mut self, key: ShortKey) {
        let hash = key.hash();
        self.out.reserve(MOST);
        let room = self.out.spare_capacity_mut().first_chunk_mut().expect("room for them");
        let count = self.cache.write(key, self.cache.second(hash), room);
        if count > 0 {
            // SAFETY: the first `count` ids are written, to where there is room.
            unsafe { self.out.set_len(self.out.len() + count) };
            return;
        }
        let before = self.out.len();
        let (bytes, length) = key.bytes();
        self.encode_chunk(&bytes[..length], hash);
        self.cache.put(key, hash, &self.out[before..]);
    }

    #[inline(never)]
    fn add_long(&mut self, start: usize, end: usize) {
        self.flush();
        let chunk = &self.text[start..end];
        self.encode_chunk(chunk, Fast::default().hash_one(chunk));
    }

    fn encode_chunk(&mut self, chunk: &[u8], hash: u64) {
        // A chunk that is a token by itself is that token, even if no merges lead to it.
        if self.vocab.has_unreachable()
            && let Some(id) = self.vocab.find(chunk)
        {
            self.out.push(id);
            return;
        }
        if let Some(ids) = self.long.get(chunk, hash) {
            self.out.extend_from_slice(ids);
            return;
        }
        let before = self.out.len();
        self.merger.merge(self.vocab.rules(), chunk, self.out);
        let ids = &self.out[before..];
        if ids.len() > MOST || chunk.len() > SHORT {
            self.long.put(chunk, hash, ids);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::split::SPLIT_PATTERN;
    use crate::testing::{Random, naive_encode, naive_train};

    fn check(vocab: &Vocab, worker: &mut Worker, text: &str) {
        let ranks: HashMap<Vec<u8>, u32> =
            (0..vocab.len() as u32).map(|id| (vocab.token(id).unwrap().to_vec(), id)).collect();
        let mut want = Vec::new();
        Splitter::new(SPLIT_PATTERN)
            .unwrap()
            .split(text, |start, end| want.extend(naive_encode(&ranks, &text.as_bytes()[start..end])))
            .unwrap();
        let mut found = Vec::new();
        worker.encode(vocab, text, &mut found).unwrap();
        assert_eq!(found, want, "{text:?}");
        assert_eq!(vocab.decode(&found).unwrap(), text.as_bytes());
    }

    fn random_text(random: &mut Random, longest: usize, letters: usize) -> String {
        let words = (0..1 + random.below(6)).map(|_| String::from_utf8(random.word(longest, letters)).unwrap());
        words.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn equals_joining_the_lowest_rank_first_on_trained_vocabularies() {
        let mut random = Random::new(6);
        for round in 0..40 {
            let letters = 1 + round % 4;
            let words: Vec<_> = (0..8).map(|_| (random.word(20, letters), 1)).collect();
            let vocab = Vocab::from_merges(&naive_train(&words, 256 + round as u32 * 2));
            let mut worker = Worker::new(&Splitter::new(SPLIT_PATTERN).unwrap());
            for _ in 0..30 {
                check(&vocab, &mut worker, &random_text(&mut random, 24, letters));
            }
            // Long enough for the heap.
            check(&vocab, &mut worker, &random_text(&mut random, 400, letters));
        }
    }

    #[test]
    fn equals_joining_the_lowest_rank_first_on_arbitrary_vocabularies() {
        let mut random = Random::new(7);
        for _ in 0..60 {
            // Tokens that no training would make: some cannot be reached by merges at all.
            let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
            for _ in 0..60 {
                let token = random.word(6, 2);
                if !tokens.contains(&token) {
                    tokens.push(token);
                }
            }
            for at in (1..tokens.len()).rev() {
                tokens.swap(at, random.below(at + 1));
            }
            let ranks: Vec<_> = tokens.into_iter().zip(0..).collect();
            let vocab = Vocab::from_ranks(&ranks).unwrap();
            let mut worker = Worker::new(&Splitter::new(SPLIT_PATTERN).unwrap());
            for longest in [4, 12, 30, 300] {
                check(&vocab, &mut worker, &random_text(&mut random, longest, 3));
            }
        }
    }

    #[test]
    fn any_unicode_survives() {
        let mut random = Random::new(8);
        let vocab = Vocab::from_merges(&[(0xc3, 0xa9), (32, 97), (0xe4, 0xb8), (258, 0xad)]);
        let mut worker = Worker::new(&Splitter::new(SPLIT_PATTERN).unwrap());
        for _ in 0..300 {
            let text: String = (0..random.below(30)).map(|_| random.scalar()).collect();
            check(&vocab, &mut worker, &(text + " é a中"));
        }
    }
}
