//! A vocabulary together with its split pattern, and the encoding of many documents on many threads.

use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::encode::Worker;
use crate::split::Splitter;
use crate::vocab::Vocab;

/// Text that a thread takes at once: one to two milliseconds of work, against some 20 µs to start a thread.
const BLOCK_BYTES: usize = 64 * 1024;

/// Token ids of several documents, one after the other.
#[derive(Debug, PartialEq, Eq)]
pub struct Encoded<I> {
    pub ids: Vec<I>,
    /// Where each document ends in `ids`.
    pub ends: Vec<usize>,
}

/// All that encoding and decoding need.
pub struct Model {
    pub vocab: Vocab,
    splitter: Splitter,
    /// Workers of earlier calls, with their caches warm.
    idle: Mutex<Vec<Worker>>,
}

impl Model {
    pub fn new(vocab: Vocab, splitter: Splitter) -> Self {
        Model { vocab, splitter, idle: Mutex::new(Vec::new()) }
    }

    /// The split pattern.
    pub fn pattern(&self) -> &str {
        self.splitter.pattern()
    }

    fn with_worker<T>(&self, work: impl FnOnce(&mut Worker) -> T) -> T {
        let idle = || self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let mut worker = idle().pop().unwrap_or_else(|| Worker::new(&self.splitter));
        let result = work(&mut worker);
        idle().push(worker);
        result
    }

    /// The tokens of one text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 1);
        self.with_worker(|worker| worker.encode(&self.vocab, text, &mut ids))?;
        Ok(ids)
    }

    /// The tokens of many texts, in their order, as `kept` makes them of ids: a list of blocks, each of consecutive texts.
    ///
    /// At most `threads` threads (None: one a core). They are started for the call and end with it: a standing
    /// pool would leave a process that forks (as data loaders do) with a pool whose threads are gone, and hang.
    pub fn encode_batch<T: AsRef<str> + Sync, I: Send>(
        &self,
        texts: &[T],
        threads: Option<usize>,
        kept: impl Fn(u32) -> I + Sync,
    ) -> Result<Vec<Encoded<I>>, String> {
        let blocks = blocks(texts);
        let cores = || std::thread::available_parallelism().map_or(1, NonZero::get);
        let threads = threads.unwrap_or_else(cores).clamp(1, blocks.len().max(1));
        let next = AtomicUsize::new(0);
        let work = || {
            self.with_worker(|worker| {
                let mut done = Vec::new();
                // What a block is encoded into stays in the core's own cache from block to block.
                let mut ids = Vec::new();
                while let Some(block) = blocks.get(next.fetch_add(1, Ordering::Relaxed)) {
                    ids.clear();
                    let mut ends = Vec::with_capacity(block.len());
                    for text in &texts[block.clone()] {
                        worker.encode(&self.vocab, text.as_ref(), &mut ids)?;
                        ends.push(ids.len());
                    }
                    done.push((block.start, Encoded { ids: ids.iter().map(|&id| kept(id)).collect(), ends }));
                }
                Ok::<_, String>(done)
            })
        };
        let parts: Vec<_> = std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let own = work();
            let join = |other: std::thread::ScopedJoinHandle<_>| {
                other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            std::iter::once(own).chain(others.into_iter().map(join)).collect()
        });
        let mut done: Vec<(usize, Encoded<I>)> = Vec::with_capacity(blocks.len());
        for part in parts {
            done.extend(part?);
        }
        done.sort_unstable_by_key(|(start, _)| *start);
        Ok(done.into_iter().map(|(_, encoded)| encoded).collect())
    }
}

/// Consecutive texts of together at least [`BLOCK_BYTES`] (the last block may be smaller).
fn blocks<T: AsRef<str>>(texts: &[T]) -> Vec<std::ops::Range<usize>> {
    let mut blocks = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (index, text) in texts.iter().enumerate() {
        bytes += text.as_ref().len();
        if bytes >= BLOCK_BYTES {
            blocks.push(start..index + 1);
            (start, bytes) = (index + 1, 0);
        }
    }
    if start < texts.len() {
        blocks.push(start..texts.len());
    }
    blocks
}

#[cfg(test)]
#[path = "../../tests/rust/batch.rs"]
mod tests;
