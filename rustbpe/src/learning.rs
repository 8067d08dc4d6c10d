//! Training as Python calls it: text comes in, counts and merges are made without the GIL, and meanwhile Ctrl-C is
//! heard and progress told.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyString;
use rayon::prelude::*;

use crate::batch::Model;
use crate::count::{Documents, WordCounter};
use crate::shards::Shard;
use crate::split::{SPLIT_PATTERN, Splitter};
use crate::train::Trainer;
use crate::vocab::Vocab;

/// A buffer is counted when it holds this much text for each thread, however few documents that is: bounds
/// memory, and (the regex engine does some 20 MB/s) the time to react to Ctrl-C.
const BUFFER_BYTES_PER_THREAD: usize = 4 << 20;

/// The same where rare chunks are pruned: when that happens must not depend on the number of threads.
const PRUNED_BUFFER_BYTES: usize = 32 << 20;

/// How often training looks for Ctrl-C and tells its progress.
const INTERVAL: Duration = Duration::from_millis(100);

/// `value`, or a ValueError where it is less than `least`.
pub fn at_least(name: &str, value: i64, least: usize) -> PyResult<usize> {
    usize::try_from(value)
        .ok()
        .filter(|&value| value >= least)
        .ok_or_else(|| PyValueError::new_err(format!("{name} is {value}; it must be at least {least}")))
}

/// Counts chunks, learns merges from them, and tells how far it is.
pub struct Learner {
    size: u32,
    splitter: Splitter,
    max_distinct_words: Option<usize>,
    counter: WordCounter,
    progress: Progress,
}

/// How much text was counted, and who is told.
struct Progress {
    callback: Option<Py<PyAny>>,
    documents: usize,
    characters: usize,
    bytes: usize,
    told: Instant,
}

impl Progress {
    /// Hears Ctrl-C, and calls callback(documents, bytes, merges), if it is time. Called without the GIL.
    fn tick(&mut self, merges: usize, now: bool) -> PyResult<()> {
        if !now && self.told.elapsed() < INTERVAL {
            return Ok(());
        }
        self.told = Instant::now();
        Python::attach(|py| {
            py.check_signals()?;
            match &self.callback {
                Some(callback) => callback.call1(py, (self.documents, self.bytes, merges)).map(drop),
                None => Ok(()),
            }
        })
    }
}

impl Learner {
    /// Raises ValueError for what cannot be.
    pub fn new(
        vocab_size: i64,
        pattern: Option<&str>,
        max_distinct_words: Option<i64>,
        callback: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        let size = u32::try_from(vocab_size).ok().filter(|size| (256..1 << 31).contains(size)).ok_or_else(|| {
            PyValueError::new_err(format!(
                "vocab_size is {vocab_size}; it must be at least 256 (the single bytes) and below 2**31"
            ))
        })?;
        let max_distinct_words =
            max_distinct_words.map(|most| at_least("max_distinct_words", most, 1000)).transpose()?;
        let splitter = Splitter::new(pattern.unwrap_or(SPLIT_PATTERN)).map_err(PyValueError::new_err)?;
        let counter = WordCounter::new(&splitter);
        let progress = Progress { callback, documents: 0, characters: 0, bytes: 0, told: Instant::now() };
        Ok(Learner { size, splitter, max_distinct_words, counter, progress })
    }

    /// Counts documents. Called without the GIL.
    fn count(&mut self, documents: &Documents) -> PyResult<()> {
        self.counter.count(documents).map_err(PyValueError::new_err)?;
        if let Some(most) = self.max_distinct_words {
            self.counter.prune(most);
        }
        self.progress.documents += documents.count();
        self.progress.bytes += documents.bytes();
        Ok(())
    }

    /// Learns the merges; (model, documents, characters counted). Called without the GIL.
    fn finish(self) -> PyResult<(Model, usize, usize)> {
        let Learner { size, splitter, counter, mut progress, .. } = self;
        progress.tick(0, true)?;
        let trainer = Trainer::new(&counter).map_err(PyValueError::new_err)?;
        drop(counter);
        let mut merges = 0;
        let learned = trainer.learn(size, || {
            merges += 1;
            progress.tick(merges - 1, false)
        })?;
        progress.tick(learned.len(), true)?;
        Ok((Model::new(Vocab::from_merges(&learned), splitter), progress.documents, progress.characters))
    }

    /// Learns from an iterator of str, `buffer_size` documents at a time.
    pub fn learn_iterator(
        mut self,
        py: Python<'_>,
        iterator: &Bound<'_, PyAny>,
        buffer_size: usize,
    ) -> PyResult<Model> {
        if iterator.is_instance_of::<PyString>() {
            return Err(PyTypeError::new_err("iterator is one str; pass an iterator of documents, such as [text]"));
        }
        let buffer_bytes = match self.max_distinct_words {
            Some(_) => PRUNED_BUFFER_BYTES,
            None => BUFFER_BYTES_PER_THREAD * rayon::current_num_threads(),
        };
        let mut documents = Documents::default();
        for (index, item) in iterator.try_iter()?.enumerate() {
            let item = item?;
            let text = item.cast::<PyString>().map_err(|_| {
                let kind = item.get_type().name().map_or_else(|_| "?".into(), |name| name.to_string());
                PyTypeError::new_err(format!("document {index} of the iterator is a {kind}; every one must be a str"))
            })?;
            // `to_str` is free of cost for ASCII; other text would keep the UTF-8 that it makes, as long as the str lives.
            if text.call_method0(intern!(py, "isascii"))?.is_truthy()? {
                documents.push(text.to_str()?);
            } else {
                let bytes = text.encode_utf8()?;
                documents.push(std::str::from_utf8(bytes.as_bytes()).expect("Python encodes to UTF-8"));
            }
            if documents.count() >= buffer_size || documents.bytes() >= buffer_bytes {
                py.detach(|| -> PyResult<()> {
                    self.count(&documents)?;
                    self.progress.tick(0, true)
                })?;
                documents.clear();
            }
        }
        py.detach(|| {
            self.count(&documents)?;
            drop(documents);
            self.finish().map(|(model, ..)| model)
        })
    }

    /// Learns from the documents of parquet shards, each cut after `doc_cap` characters, until `max_chars` are taken; the
    /// last one is cut. The shards are read and counted on all threads, a row group for each at a time.
    pub fn learn_parquet(
        mut self,
        py: Python<'_>,
        paths: &[PathBuf],
        column: &str,
        max_chars: Option<usize>,
        doc_cap: Option<usize>,
    ) -> PyResult<(Model, usize, usize)> {
        py.detach(|| {
            // All are opened first, so that one that cannot be used is found before any work is done.
            let shards = paths.iter().map(|path| Shard::open(path, column)).collect::<Result<Vec<_>, _>>();
            let shards = shards.map_err(PyValueError::new_err)?;
            let (mut left, doc_cap) = (max_chars.unwrap_or(usize::MAX), doc_cap.unwrap_or(usize::MAX));
            let groups: Vec<_> =
                shards.iter().flat_map(|shard| (0..shard.groups).map(move |group| (shard, group))).collect();
            for groups in groups.chunks(rayon::current_num_threads()) {
                let parts: Vec<_> = groups.par_iter().map(|(shard, group)| shard.read(*group, doc_cap)).collect();
                for part in parts {
                    let mut documents = part.map_err(PyValueError::new_err)?;
                    let characters = documents.keep_chars(left);
                    left -= characters;
                    self.progress.characters += characters;
                    self.count(&documents)?;
                    self.progress.tick(0, false)?;
                }
                if left == 0 {
                    break;
                }
            }
            self.finish()
        })
    }
}
