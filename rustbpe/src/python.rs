//! The Python module. It only converts and checks; while anything is computed, the GIL is released.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyInt, PyList, PyString};

use crate::batch::{Encoded, Model};
use crate::count::{Documents, WordCounter};
use crate::split::{SPLIT_PATTERN, SplitError, Splitter};
use crate::train::Trainer;
use crate::vocab::Vocab;

/// A buffer is counted when it holds this much text for each thread, however few documents that is: bounds
/// memory, and (the regex engine does some 20 MB/s) the time to react to Ctrl-C.
const BUFFER_BYTES_PER_THREAD: usize = 4 << 20;

/// How often training looks for Ctrl-C.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(100);

impl From<SplitError> for PyErr {
    fn from(error: SplitError) -> Self {
        PyValueError::new_err(error.to_string())
    }
}

/// Byte-level BPE. A new tokenizer knows the 256 single bytes; train it, or load one with `from_ranks`.
#[pyclass(frozen, module = "rustbpe")]
struct Tokenizer {
    /// Replaced as a whole when training ends, so that other threads may encode meanwhile.
    model: RwLock<Arc<Shared>>,
}

/// What encoding shares.
struct Shared {
    model: Model,
    /// The Python int of each token id, made when the first list is. A list of these takes 8 bytes a token, one of
    /// ints made for it 40.
    numbers: PyOnceLock<Vec<Py<PyInt>>>,
}

impl std::ops::Deref for Shared {
    type Target = Model;

    fn deref(&self) -> &Model {
        &self.model
    }
}

impl Shared {
    fn new(model: Model) -> Arc<Self> {
        Arc::new(Shared { model, numbers: PyOnceLock::new() })
    }

    fn list<'py>(&self, py: Python<'py>, ids: &[u32]) -> PyResult<Bound<'py, PyList>> {
        let make = || (0..self.vocab.len()).map(|id| PyInt::new(py, id).unbind()).collect();
        let numbers = self.numbers.get_or_init(py, make);
        PyList::new(py, ids.iter().map(|&id| numbers[id as usize].bind_borrowed(py)))
    }
}

impl Tokenizer {
    fn with_model(model: Model) -> Self {
        Tokenizer { model: RwLock::new(Shared::new(model)) }
    }

    fn model(&self) -> Arc<Shared> {
        self.model.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn batch(
        py: Python<'_>,
        model: &Model,
        texts: &Bound<'_, PyAny>,
        num_threads: Option<i64>,
    ) -> PyResult<Vec<Encoded>> {
        if texts.is_instance_of::<PyString>() {
            return Err(PyTypeError::new_err("texts is one str; pass a list of str, or use encode"));
        }
        let threads = match num_threads {
            None => None,
            Some(n) if n >= 1 => Some(n as usize),
            Some(n) => {
                return Err(PyValueError::new_err(format!(
                    "num_threads is {n}; it must be at least 1, or None for one a core"
                )));
            }
        };
        let texts = texts.try_iter()?.map(|text| text?.extract::<PyBackedStr>()).collect::<PyResult<Vec<_>>>()?;
        Ok(py.detach(|| model.encode_batch(&texts, threads))?)
    }
}

#[pymethods]
impl Tokenizer {
    #[new]
    fn new() -> PyResult<Self> {
        Ok(Self::with_model(Model::new(Vocab::from_merges(&[]), Splitter::new(SPLIT_PATTERN)?)))
    }

    /// A tokenizer with a saved vocabulary: (bytes, id) pairs in any order, as `get_mergeable_ranks` gives them.
    #[staticmethod]
    fn from_ranks(py: Python<'_>, ranks: Vec<(Bound<'_, PyBytes>, i64)>, pattern: &str) -> PyResult<Self> {
        let rank = |(bytes, id): &(Bound<'_, PyBytes>, i64)| {
            let id = u32::try_from(*id).map_err(|_| {
                PyValueError::new_err(format!("token id {id} is out of range: ids must be 0..={}", ranks.len() - 1))
            })?;
            Ok((bytes.as_bytes().to_vec(), id))
        };
        let ranks = ranks.iter().map(rank).collect::<PyResult<Vec<_>>>()?;
        let splitter = Splitter::new(pattern)?;
        let vocab = py.detach(|| Vocab::from_ranks(&ranks)).map_err(PyValueError::new_err)?;
        Ok(Self::with_model(Model::new(vocab, splitter)))
    }

    /// Learns `vocab_size` tokens (256 bytes and the rest merges) from an iterator of str, and replaces this
    /// tokenizer's vocabulary and pattern.
    ///
    /// The text is streamed: `buffer_size` documents at a time are split and counted on all threads (environment
    /// variable RAYON_NUM_THREADS; default one a core), and memory grows with the distinct chunks only. The result
    /// does not depend on the number of threads. If the text runs out of pairs to merge, the vocabulary ends up
    /// smaller than asked, without an error. Ctrl-C stops it and leaves the tokenizer as it was.
    #[pyo3(signature = (iterator, vocab_size, buffer_size=8192, pattern=None))]
    fn train_from_iterator(
        &self,
        py: Python<'_>,
        iterator: &Bound<'_, PyAny>,
        vocab_size: i64,
        buffer_size: i64,
        pattern: Option<&str>,
    ) -> PyResult<()> {
        let size = u32::try_from(vocab_size).ok().filter(|size| (256..1 << 31).contains(size)).ok_or_else(|| {
            PyValueError::new_err(format!(
                "vocab_size is {vocab_size}; it must be at least 256 (the single bytes) and below 2**31"
            ))
        })?;
        if buffer_size < 1 {
            return Err(PyValueError::new_err(format!("buffer_size is {buffer_size}; it must be at least 1")));
        }
        if iterator.is_instance_of::<PyString>() {
            return Err(PyTypeError::new_err("iterator is one str; pass an iterator of documents, such as [text]"));
        }
        let splitter = Splitter::new(pattern.unwrap_or(SPLIT_PATTERN))?;
        let mut counter = WordCounter::new(&splitter);
        let mut documents = Documents::default();
        let buffer_bytes = BUFFER_BYTES_PER_THREAD * rayon::current_num_threads();
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
            if documents.len() >= buffer_size as usize || documents.bytes() >= buffer_bytes {
                py.detach(|| counter.count(&documents))?;
                documents.clear();
                py.check_signals()?;
            }
        }
        let model = py.detach(|| -> PyResult<Model> {
            counter.count(&documents)?;
            drop(documents);
            let trainer = Trainer::new(&counter).map_err(PyValueError::new_err)?;
            drop(counter);
            let mut asked = Instant::now();
            let merges = trainer.learn(size, || {
                if asked.elapsed() < SIGNAL_INTERVAL {
                    return Ok(());
                }
                asked = Instant::now();
                Python::attach(|py| py.check_signals())
            })?;
            Ok(Model::new(Vocab::from_merges(&merges), splitter))
        })?;
        *self.model.write().unwrap_or_else(PoisonError::into_inner) = Shared::new(model);
        Ok(())
    }

    /// The token ids of a text, which is taken as ordinary text throughout: special tokens are not known here.
    fn encode<'py>(&self, py: Python<'py>, text: &str) -> PyResult<Bound<'py, PyList>> {
        let model = self.model();
        let ids = py.detach(|| model.encode(text))?;
        model.list(py, &ids)
    }

    /// The token ids of each text, on `num_threads` threads (None: one a core).
    #[pyo3(signature = (texts, num_threads=None))]
    fn batch_encode<'py>(
        &self,
        py: Python<'py>,
        texts: &Bound<'py, PyAny>,
        num_threads: Option<i64>,
    ) -> PyResult<Vec<Bound<'py, PyList>>> {
        let model = self.model();
        let mut all = Vec::new();
        for block in Self::batch(py, &model, texts, num_threads)? {
            let mut start = 0;
            for end in block.ends {
                all.push(model.list(py, &block.ids[start..end])?);
                start = end;
            }
        }
        Ok(all)
    }

    /// As `batch_encode`, without making Python ints: (tokens, offsets), little-endian u32 and u64. The tokens of
    /// text i are `np.frombuffer(tokens, "<u4")[offsets[i]:offsets[i + 1]]`, `offsets = np.frombuffer(_, "<u8")`.
    #[pyo3(signature = (texts, num_threads=None))]
    fn batch_encode_u32<'py>(
        &self,
        py: Python<'py>,
        texts: &Bound<'py, PyAny>,
        num_threads: Option<i64>,
    ) -> PyResult<(Bound<'py, PyBytes>, Bound<'py, PyBytes>)> {
        let blocks = Self::batch(py, &self.model(), texts, num_threads)?;
        let tokens: usize = blocks.iter().map(|block| block.ids.len()).sum();
        let count: usize = blocks.iter().map(|block| block.ends.len()).sum();
        let ids = blocks.iter().flat_map(|block| &block.ids);
        let token_bytes = PyBytes::new_with(py, tokens * 4, |out| {
            out.chunks_exact_mut(4).zip(ids).for_each(|(out, id)| out.copy_from_slice(&id.to_le_bytes()));
            Ok(())
        })?;
        let offset_bytes = PyBytes::new_with(py, (count + 1) * 8, |out| {
            let mut places = out.chunks_exact_mut(8).skip(1);
            let mut base = 0;
            for block in &blocks {
                for (end, out) in block.ends.iter().zip(places.by_ref()) {
                    out.copy_from_slice(&((base + end) as u64).to_le_bytes());
                }
                base += block.ids.len();
            }
            Ok(())
        })?;
        Ok((token_bytes, offset_bytes))
    }

    /// The text of these ids. Bytes that are not UTF-8 become U+FFFD, as with `bytes.decode(errors="replace")`.
    fn decode(&self, py: Python<'_>, ids: &Bound<'_, PyAny>) -> PyResult<String> {
        let bytes = self.bytes_of(py, ids)?;
        Ok(py.detach(|| String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// The bytes of these ids.
    fn decode_bytes<'py>(&self, py: Python<'py>, ids: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.bytes_of(py, ids)?))
    }

    /// Number of tokens.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.model().vocab.len()
    }

    /// The split pattern.
    fn get_pattern(&self) -> String {
        self.model().pattern().to_owned()
    }

    /// All tokens as (bytes, id), by id.
    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, u32)> {
        let model = self.model();
        let token = |id| model.vocab.token(id).map(|bytes| (PyBytes::new(py, bytes), id));
        (0..).map_while(token).collect()
    }

    fn __repr__(&self) -> String {
        format!("rustbpe.Tokenizer(vocab_size={})", self.vocab_size())
    }
}

impl Tokenizer {
    fn bytes_of(&self, py: Python<'_>, ids: &Bound<'_, PyAny>) -> PyResult<Vec<u8>> {
        let model = self.model();
        let unknown = |id: &dyn std::fmt::Display| {
            PyValueError::new_err(format!("token id {id} is unknown; ids must be 0..={}", model.vocab.len() - 1))
        };
        let mut numbers = Vec::with_capacity(ids.len().unwrap_or(0));
        for id in ids.try_iter()? {
            let id = id?;
            // A number that is negative or too large fails to convert with an OverflowError.
            match id.extract::<u32>() {
                Ok(number) => numbers.push(number),
                Err(error) if error.is_instance_of::<pyo3::exceptions::PyOverflowError>(py) => {
                    return Err(unknown(&id));
                }
                Err(error) => return Err(error),
            }
        }
        py.detach(|| model.vocab.decode(&numbers)).map_err(|id| unknown(&id))
    }
}

/// Byte-level BPE: training and encoding.
#[pymodule]
mod rustbpe {
    #[pymodule_export]
    use super::Tokenizer;

    /// The default split pattern.
    #[pymodule_export]
    const SPLIT_PATTERN: &str = crate::split::SPLIT_PATTERN;
}
