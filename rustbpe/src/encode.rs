//! Text to token ids.

use std::hash::BuildHasher;

use crate::borders::{BLOCK, Chunks};
use crate::cache::{Cache, LongCache, MOST, Wanted};
use crate::hash::{Fast, SHORT, ShortKey};
use crate::merge::Merger;
use crate::simd::{self, Job, Simd};
use crate::split::Splitter;
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
    pub fn encode(&mut self, vocab: &Vocab, text: &str, out: &mut Vec<u32>) -> Result<(), String> {
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
        if self.vocab.has_unreachable
            && let Some(id) = self.vocab.find(chunk)
        {
            self.out.push(id);
            return;
        }
        if self.long.write(chunk, hash, self.out) {
            return;
        }
        let before = self.out.len();
        self.merger.merge(&self.vocab.rules, chunk, self.out);
        let ids = &self.out[before..];
        if ids.len() > MOST || chunk.len() > SHORT {
            self.long.put(chunk, hash, ids);
        }
    }
}

#[cfg(test)]
#[path = "../../tests/rust/encode.rs"]
mod tests;
