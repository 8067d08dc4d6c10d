//! Text to token ids.

use crate::hash::{SHORT, ShortKey};
use crate::merge::Merger;
use crate::split::{SplitError, Splitter};
use crate::vocab::Vocab;

/// Chunks whose tokens a worker remembers: 2^14 of 32 bytes, half a megabyte, which stays in a core's own cache.
const CACHE_SIZE: usize = 1 << 14;

/// Most tokens of a remembered chunk. Three fill up the 32 bytes.
const CACHED_TOKENS: usize = 3;

#[derive(Clone, Copy, Default)]
struct Cached {
    key: ShortKey,
    count: u32,
    ids: [u32; CACHED_TOKENS],
}

/// What one thread needs to encode with one vocabulary. Always use it with the same vocabulary.
pub struct Worker {
    splitter: Splitter,
    merger: Merger,
    /// One place for each hash, the last chunk wins: bounded, and no chains that hostile text could make long.
    cache: Vec<Cached>,
}

impl Worker {
    pub fn new(splitter: &Splitter) -> Self {
        Worker { splitter: splitter.clone(), merger: Merger::default(), cache: vec![Cached::default(); CACHE_SIZE] }
    }

    /// Appends the tokens of `text`.
    pub fn encode(&mut self, vocab: &Vocab, text: &str, out: &mut Vec<u32>) -> Result<(), SplitError> {
        let Worker { splitter, merger, cache } = self;
        let bytes = text.as_bytes();
        splitter.split(text, |start, end| {
            if end - start > SHORT {
                encode_chunk(vocab, merger, &bytes[start..end], out);
                return;
            }
            let key = ShortKey::of(bytes, start, end);
            let hash = key.hash();
            // The table of tokens uses the low bits; these are others, so that clashes differ.
            let cached = &mut cache[(hash >> 40) as usize % CACHE_SIZE];
            if cached.key == key {
                out.extend_from_slice(&cached.ids[..cached.count as usize % (CACHED_TOKENS + 1)]);
                return;
            }
            let before = out.len();
            match vocab.find_short(key, hash) {
                Some(id) => out.push(id),
                None => merger.merge(vocab.rules(), &bytes[start..end], out),
            }
            let ids = &out[before..];
            if ids.len() <= CACHED_TOKENS {
                *cached = Cached { key, count: ids.len() as u32, ids: [0; CACHED_TOKENS] };
                cached.ids[..ids.len()].copy_from_slice(ids);
            }
        })
    }
}

/// A chunk that is a token by itself is that token, even if no merges lead to it.
fn encode_chunk(vocab: &Vocab, merger: &mut Merger, chunk: &[u8], out: &mut Vec<u32>) {
    match vocab.find(chunk) {
        Some(id) => out.push(id),
        None => merger.merge(vocab.rules(), chunk, out),
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
