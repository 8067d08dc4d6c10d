//! Counts the distinct chunks of a corpus, buffer by buffer, on all threads.

use std::hash::BuildHasher;
use std::ops::Range;

use rayon::prelude::*;

use crate::borders::{BLOCK, Chunks};
use crate::hash::{Fast, SHORT, ShortKey};
use crate::split::Splitter;
use crate::word_table::WordTable;

/// Documents laid end to end: one allocation for a buffer, not one for each document.
#[derive(Default)]
pub struct Documents {
    text: String,
    ends: Vec<usize>,
}

impl Documents {
    pub fn push(&mut self, document: &str) {
        self.text.push_str(document);
        self.ends.push(self.text.len());
    }

    pub fn clear(&mut self) {
        self.text.clear();
        self.ends.clear();
    }

    /// Number of documents.
    pub fn count(&self) -> usize {
        self.ends.len()
    }

    /// Bytes of text.
    pub fn bytes(&self) -> usize {
        self.text.len()
    }

    /// The documents in `parts` consecutive runs of about equally many bytes, some maybe empty.
    fn runs(&self, parts: usize) -> Vec<Range<usize>> {
        let border = |part: usize| match part {
            0 => 0,
            _ if part == parts => self.count(),
            _ => self.ends.partition_point(|&end| end <= self.text.len() * part / parts),
        };
        (0..parts).map(|part| border(part)..border(part + 1)).collect()
    }

    fn get(&self, index: usize) -> &str {
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        &self.text[start..self.ends[index]]
    }

    /// Cuts off all but the first `most` characters, and returns how many there are now.
    pub fn keep_chars(&mut self, most: usize) -> usize {
        let (kept, characters) = first_chars(&self.text, most);
        let bytes = kept.len();
        if bytes < self.text.len() {
            self.text.truncate(bytes);
            self.ends.truncate(self.ends.partition_point(|&end| end < bytes));
            if bytes > self.ends.last().copied().unwrap_or(0) {
                self.ends.push(bytes);
            }
        }
        characters
    }
}

/// At most `most` characters of a text, and how many that are.
pub fn first_chars(text: &str, most: usize) -> (&str, usize) {
    let total = text.chars().count();
    match text.char_indices().nth(most) {
        Some((end, _)) => (&text[..end], most),
        None => (text, total),
    }
}

/// Chunk counts of a whole corpus. Memory grows with the number of distinct chunks only.
///
/// Every thread counts its part of a buffer into tables of its own; then the tables are added up, each shard
/// (a fixed part of the hash space) by one thread, so that neither step has a serial part. Counts are sums, so
/// the result does not depend on the number of threads.
pub struct WordCounter {
    total: Vec<WordTable>,
    lanes: Vec<Lane>,
}

/// What one thread counts with.
struct Lane {
    splitter: Splitter,
    /// As many as there are shards; none if this is the only lane, which counts straight into the total, because
    /// adding up would cost time and gain nothing.
    tables: Vec<WordTable>,
}

impl WordCounter {
    /// A counter that uses the threads of the current rayon pool.
    pub fn new(splitter: &Splitter) -> Self {
        let threads = rayon::current_num_threads();
        let shards = threads.next_power_of_two().min(256);
        let tables = |shards| (0..shards).map(|_| WordTable::default()).collect::<Vec<_>>();
        let lane = |_| Lane { splitter: splitter.clone(), tables: tables(if threads == 1 { 0 } else { shards }) };
        WordCounter { total: tables(shards), lanes: (0..threads).map(lane).collect() }
    }

    /// Adds the chunks of these documents.
    pub fn count(&mut self, documents: &Documents) -> Result<(), String> {
        if let [Lane { splitter, .. }] = self.lanes.as_mut_slice() {
            return count_into(splitter, &mut self.total, documents, 0..documents.count());
        }
        let runs = documents.runs(self.lanes.len());
        self.lanes
            .par_iter_mut()
            .zip(runs)
            .try_for_each(|(Lane { splitter, tables }, run)| count_into(splitter, tables, documents, run))?;
        let lanes = &self.lanes;
        self.total.par_iter_mut().enumerate().for_each(|(shard, total)| {
            for lane in lanes {
                total.absorb(&lane.tables[shard]);
            }
        });
        self.lanes.par_iter_mut().for_each(|lane| lane.tables.iter_mut().for_each(WordTable::clear));
        Ok(())
    }

    /// If there are more than `most` distinct chunks, drops the rarest until at most three quarters of that are left: all
    /// with the same count go or stay together, so the result does not depend on the number of threads.
    pub fn prune(&mut self, most: usize) {
        if self.distinct() <= most {
            return;
        }
        let mut counts = Vec::with_capacity(self.distinct());
        self.each(|_, count| counts.push(count));
        let kept = most / 4 * 3;
        let place = counts.len() - kept - 1; // of the highest count that must go
        let (_, &mut highest, _) = counts.select_nth_unstable(place);
        self.total.par_iter_mut().for_each(|table| table.drop_up_to(highest));
    }

    /// Calls `word(bytes, count)` for every distinct chunk, in no particular order.
    pub fn each(&self, mut word: impl FnMut(&[u8], u64)) {
        self.total.iter().for_each(|table| table.each(&mut word));
    }

    /// Number of distinct chunks.
    pub fn distinct(&self) -> usize {
        self.total.iter().map(WordTable::len).sum()
    }
}

/// Counts chunks. The slots of a block come from memory together: counting 100 MB of English spends 0.13 s here, against
/// 0.3 s if each chunk is counted at once.
struct Counting<'a> {
    tables: &'a mut [WordTable],
    /// The short chunks of a block and their hashes.
    waiting: Box<[(ShortKey, u64); BLOCK]>,
}

impl Chunks for &mut Counting<'_> {
    #[inline(never)]
    fn add(&mut self, text: &[u8], borders: &[usize]) {
        let mut count = 0;
        for border in borders.windows(2) {
            let (start, end) = (border[0], border[1]);
            if end - start > SHORT {
                let word = &text[start..end];
                table_of(self.tables, Fast::default().hash_one(word)).add_long(word, 1);
                continue;
            }
            let key = ShortKey::of(text, start, end);
            let hash = key.hash();
            table_of(self.tables, hash).announce(hash);
            self.waiting[count] = (key, hash);
            count += 1;
        }
        for &(key, hash) in &self.waiting[..count] {
            table_of(self.tables, hash).add_short(key, hash, 1);
        }
    }
}

fn count_into(
    splitter: &Splitter,
    tables: &mut [WordTable],
    documents: &Documents,
    run: Range<usize>,
) -> Result<(), String> {
    let mut counting = Counting { tables, waiting: Box::new([(ShortKey::NONE, 0); BLOCK]) };
    for index in run {
        splitter.split(documents.get(index), &mut counting)?;
    }
    Ok(())
}

/// The highest bits of a hash choose the shard; a table's own place comes from the lowest.
#[inline(always)]
fn table_of(tables: &mut [WordTable], hash: u64) -> &mut WordTable {
    let mask = tables.len() - 1;
    &mut tables[(hash >> 56) as usize & mask]
}

#[cfg(test)]
#[path = "../../tests/rust/count.rs"]
mod tests;
