//! Text to token ids.

use std::hash::BuildHasher;

use crate::borders::{BLOCK, Chunks};
use crate::cache::{Cache, LongCache, MOST, Wanted};
use crate::hash::{Fast, SHORT, ShortKey};
use crate::merge::Merger;
use crate::simd::{self, Job, Simd};
use crate::split::{SplitError, Splitter};
use crate::vocab::Vocab;

/// As many ids as the short chunks of a block may have, and as are written at once.
const ROOM: usize = BLOCK * MOST;

/// What one thread needs to encode with one vocabulary. Always use it with the same vocabulary.
pub struct Worker {
    splitter: Splitter,
    merger: Merger,
    cache: Cache,
    long: LongCache,
    /// The chunks of a block and their first places of the cache.
    waiting: Box<[Wanted; BLOCK]>,
}

impl Worker {
    pub fn new(splitter: &Splitter) -> Self {
        Worker {
            splitter: splitter.clone(),
            merger: Merger::default(),
            cache: Cache::default(),
            long: LongCache::default(),
            waiting: Box::new([Wanted::default(); BLOCK]),
        }
    }

    /// Appends the tokens of `text`.
    pub fn encode(&mut self, vocab: &Vocab, text: &str, out: &mut Vec<u32>) -> Result<(), SplitError> {
        let Worker { splitter, merger, cache, long, waiting } = self;
        splitter.split(text, Encoding { vocab, merger, cache, long, waiting, out })
    }
}

/// The encoding of one text.
struct Encoding<'a> {
    vocab: &'a Vocab,
    merger: &'a mut Merger,
    cache: &'a mut Cache,
    long: &'a mut LongCache,
    waiting: &'a mut [Wanted; BLOCK],
    out: &'a mut Vec<u32>,
}

impl Chunks for Encoding<'_> {
    #[inline(always)]
    fn add(&mut self, text: &[u8], borders: &[usize]) {
        simd::run(Block { encoding: self, text, borders });
    }
}

/// Chunks in a row: those of `text` between the `borders`.
struct Block<'a, 'b> {
    encoding: &'a mut Encoding<'b>,
    text: &'a [u8],
    borders: &'a [usize],
}

impl Job for Block<'_, '_> {
    /// Announces all chunks to the cache, so that their places come from memory together, then writes their tokens.
    #[inline(always)]
    fn run(self, simd: impl Simd) {
        let Block { encoding, text, borders } = self;
        let count = borders.len() - 1;
        encoding.cache.announce(text, borders, encoding.waiting);
        let mut at = 0;
        loop {
            encoding.out.reserve(ROOM);
            let waiting = &encoding.waiting[at..count];
            let (known, ids) = encoding.cache.write(simd, waiting, encoding.out.spare_capacity_mut());
            // SAFETY: as many ids are written, to where there is room.
            unsafe { encoding.out.set_len(encoding.out.len() + ids) };
            at += known;
            if at == count {
                break;
            }
            encoding.add_unknown(encoding.waiting[at].key, &text[borders[at]..borders[at + 1]]);
            at += 1;
        }
        encoding.cache.grow_if_small();
    }
}

impl Encoding<'_> {
    /// Encodes a chunk that is not in its first place of the cache.
    #[inline(never)]
    fn add_unknown(&mut self, key: ShortKey, chunk: &[u8]) {
        if key == ShortKey::NONE {
            return self.encode_chunk(chunk, Fast::default().hash_one(chunk));
        }
        if self.cache.write_second(key, self.out) {
            return;
        }
        let before = self.out.len();
        self.encode_chunk(chunk, key.hash());
        self.cache.put(key, &self.out[before..]);
    }

    fn encode_chunk(&mut self, chunk: &[u8], hash: u64) {
        // A chunk that is a token by itself is that token, even if no merges lead to it.
        if self.vocab.has_unreachable()
            && let Some(id) = self.vocab.find(chunk)
        {
            self.out.push(id);
            return;
        }
        if self.long.write(chunk, hash, self.out) {
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
