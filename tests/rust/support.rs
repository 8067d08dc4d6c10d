//! What the tests share: a seeded random generator, and slow reference versions that are plainly right.

use std::collections::HashMap;

use crate::simd::{self, Baseline, Job};

/// Does a job once in every way that this processor knows.
pub fn run_each(job: impl Job + Copy) {
    job.run(Baseline);
    simd::run(job);
}

/// A small generator with a fixed seed (splitmix64), so a failing test fails again.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    /// Any Unicode scalar value; half of them from the first two planes' busy start.
    pub fn scalar(&mut self) -> char {
        loop {
            let limit = if self.below(2) == 0 { 0x3100 } else { 0x11_0000 };
            if let Some(character) = char::from_u32(self.below(limit) as u32) {
                return character;
            }
        }
    }

    /// A word of up to `longest` bytes drawn from the first `letters` letters.
    pub fn word(&mut self, longest: usize, letters: usize) -> Vec<u8> {
        (0..1 + self.below(longest)).map(|_| b'a' + self.below(letters) as u8).collect()
    }
}

/// Recounts every pair before every merge.
pub fn naive_train(words: &[(Vec<u8>, u64)], vocab_size: u32) -> Vec<(u32, u32)> {
    let mut words: Vec<(Vec<u32>, u64)> =
        words.iter().map(|(word, count)| (word.iter().map(|&byte| u32::from(byte)).collect(), *count)).collect();
    let mut merges = Vec::new();
    for id in 256..vocab_size {
        let mut counts: HashMap<(u32, u32), u64> = HashMap::new();
        for (word, count) in &words {
            for pair in word.windows(2) {
                *counts.entry((pair[0], pair[1])).or_default() += count;
            }
        }
        let best = counts.iter().max_by_key(|&(&pair, &count)| (count, std::cmp::Reverse(pair)));
        let Some((&pair, _)) = best else { break };
        merges.push(pair);
        for (word, _) in &mut words {
            let mut at = 0;
            while at + 1 < word.len() {
                if (word[at], word[at + 1]) == pair {
                    word.splice(at..at + 2, [id]);
                }
                at += 1;
            }
        }
    }
    merges
}

/// Joins the pair of lowest rank, leftmost first, until no two neighbours join.
pub fn naive_encode(ranks: &HashMap<Vec<u8>, u32>, chunk: &[u8]) -> Vec<u32> {
    if let Some(&rank) = ranks.get(chunk) {
        return vec![rank];
    }
    let mut parts: Vec<Vec<u8>> = chunk.iter().map(|&byte| vec![byte]).collect();
    loop {
        let joined = parts.windows(2).enumerate().filter_map(|(at, pair)| Some((*ranks.get(&pair.concat())?, at)));
        let Some((_, at)) = joined.min() else { break };
        let right = parts.remove(at + 1);
        parts[at].extend(right);
    }
    parts.iter().map(|part| ranks[part]).collect()
}
