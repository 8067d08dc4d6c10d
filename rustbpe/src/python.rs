//! The Python module. It only converts and checks; while anything is computed, the GIL is released.

use std::mem::MaybeUninit;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyByteArray, PyBytes, PyInt, PyList, PyString};

use crate::batch::{Encoded, Model};
use crate::learning::{Learner, at_least};
use crate::pack;
use crate::split::{SPLIT_PATTERN, Splitter};
use crate::vocab::Vocab;

/// Byte-level BPE. A new tokenizer knows the 256 single bytes; train it, or load one with `from_ranks`.
#[pyclass(frozen, module = "rustbpe")]
struct Tokenizer {
    /// Replaced as a whole when training ends, so that other threads may encode meanwhile.
    shared: RwLock<Arc<Shared>>,
}

/// Tokens and offsets, as bytes.
type Buffers<'py> = (Bound<'py, PyBytes>, Bound<'py, PyBytes>);

/// What encoding shares.
struct Shared {
    model: Model,
    /// The Python int of each token id, made when the first list is. A list of these takes 8 bytes a token, one of
    /// ints made for it 40.
    numbers: PyOnceLock<Vec<Py<PyInt>>>,
}

impl Shared {
    fn new(model: Model) -> Arc<Self> {
        Arc::new(Shared { model, numbers: PyOnceLock::new() })
    }

    fn list<'py>(&self, py: Python<'py>, ids: &[u32]) -> PyResult<Bound<'py, PyList>> {
        let make = || (0..self.model.vocab.size()).map(|id| PyInt::new(py, id).unbind()).collect();
        let numbers = self.numbers.get_or_init(py, make);
        PyList::new(py, ids.iter().map(|&id| numbers[id as usize].bind_borrowed(py)))
    }

    fn batch<I: Send>(
        &self,
        texts: &Bound<'_, PyAny>,
        num_threads: Option<i64>,
        kept: impl Fn(u32) -> I + Sync + Send,
    ) -> PyResult<Vec<Encoded<I>>> {
        if texts.is_instance_of::<PyString>() {
            return Err(PyTypeError::new_err("texts is one str; pass a list of str, or use encode"));
        }
        let threads = num_threads.map(|threads| at_least("num_threads", threads, 1)).transpose()?;
        let py = texts.py();
        let texts = texts.try_iter()?.map(|text| text?.extract::<PyBackedStr>()).collect::<PyResult<Vec<_>>>()?;
        py.detach(|| self.model.encode_batch(&texts, threads, kept)).map_err(PyValueError::new_err)
    }

    /// As `batch`: (tokens of `WIDTH` bytes, where each text begins, as u64, and the last one ends).
    fn batch_bytes<'py, const WIDTH: usize>(
        &self,
        texts: &Bound<'py, PyAny>,
        num_threads: Option<i64>,
        to_bytes: impl Fn(u32) -> [u8; WIDTH] + Sync + Send,
    ) -> PyResult<Buffers<'py>> {
        let py = texts.py();
        let blocks = self.batch(texts, num_threads, to_bytes)?;
        let tokens: usize = blocks.iter().map(|block| block.ids.len()).sum();
        let count: usize = blocks.iter().map(|block| block.ends.len()).sum();
        let token_bytes = bytes_with(py, tokens * WIDTH, |mut out| {
            for block in &blocks {
                let (own, rest) = out.split_at_mut(block.ids.len() * WIDTH);
                for (place, id) in own.chunks_exact_mut(WIDTH).zip(&block.ids) {
                    place.copy_from_slice(&id.map(MaybeUninit::new));
                }
                out = rest;
            }
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
}

impl Tokenizer {
    fn with_model(model: Model) -> Self {
        Tokenizer { shared: RwLock::new(Shared::new(model)) }
    }

    fn replace(&self, model: Model) {
        *self.shared.write().unwrap_or_else(PoisonError::into_inner) = Shared::new(model);
    }

    fn shared(&self) -> Arc<Shared> {
        self.shared.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[pymethods]
impl Tokenizer {
    #[new]
    fn new() -> Self {
        let splitter = Splitter::new(SPLIT_PATTERN).expect("one that is written by hand");
        Self::with_model(Model::new(Vocab::from_merges(&[]), splitter))
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
        let splitter = Splitter::new(pattern).map_err(PyValueError::new_err)?;
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
    ///
    /// `max_distinct_words` bounds the memory: whenever a buffer leaves more distinct chunks than that, the rarest are
    /// forgotten, down to three quarters of it. What was rare in one part of the text and common in another is then
    /// counted too low, so the vocabulary can differ a little from the exact one (and with the buffer size).
    /// `progress(documents, bytes, merges)` is called about ten times a second.
    #[pyo3(signature = (iterator, vocab_size, buffer_size=8192, pattern=None, max_distinct_words=None, progress=None))]
    #[expect(clippy::too_many_arguments, reason = "they are named in Python")]
    fn train_from_iterator(
        &self,
        py: Python<'_>,
        iterator: &Bound<'_, PyAny>,
        vocab_size: i64,
        buffer_size: i64,
        pattern: Option<&str>,
        max_distinct_words: Option<i64>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<()> {
        let learner = Learner::new(vocab_size, pattern, max_distinct_words, progress)?;
        self.replace(learner.learn_iterator(py, iterator, at_least("buffer_size", buffer_size, 1)?)?);
        Ok(())
    }

    /// As `train_from_iterator`, from the texts in a column of parquet shards, which are read, split and counted on all
    /// threads without passing through Python. Documents are cut after `doc_cap` characters, and no more than
    /// `max_chars` are taken in all; the last document is cut. Returns (documents, characters) that were taken.
    #[pyo3(signature = (
        paths, vocab_size, column="text", max_chars=None, doc_cap=None, pattern=None, max_distinct_words=None, progress=None
    ))]
    #[expect(clippy::too_many_arguments, reason = "they are named in Python")]
    fn train_from_parquet(
        &self,
        py: Python<'_>,
        paths: Vec<PathBuf>,
        vocab_size: i64,
        column: &str,
        max_chars: Option<i64>,
        doc_cap: Option<i64>,
        pattern: Option<&str>,
        max_distinct_words: Option<i64>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<(usize, usize)> {
        let learner = Learner::new(vocab_size, pattern, max_distinct_words, progress)?;
        let max_chars = max_chars.map(|most| at_least("max_chars", most, 1)).transpose()?;
        let doc_cap = doc_cap.map(|most| at_least("doc_cap", most, 1)).transpose()?;
        let (model, documents, characters) = learner.learn_parquet(py, &paths, column, max_chars, doc_cap)?;
        self.replace(model);
        Ok((documents, characters))
    }

    /// The token ids of a text, which is taken as ordinary text throughout: special tokens are not known here.
    fn encode<'py>(&self, py: Python<'py>, text: &str) -> PyResult<Bound<'py, PyList>> {
        let shared = self.shared();
        let ids = py.detach(|| shared.model.encode(text)).map_err(PyValueError::new_err)?;
        shared.list(py, &ids)
    }

    /// The token ids of each text, on `num_threads` threads (None: one a core).
    #[pyo3(signature = (texts, num_threads=None))]
    fn batch_encode<'py>(
        &self,
        py: Python<'py>,
        texts: &Bound<'py, PyAny>,
        num_threads: Option<i64>,
    ) -> PyResult<Vec<Bound<'py, PyList>>> {
        let shared = self.shared();
        let mut all = Vec::new();
        for block in shared.batch(texts, num_threads, |id| id)? {
            let mut start = 0;
            for end in block.ends {
                all.push(shared.list(py, &block.ids[start..end])?);
                start = end;
            }
        }
        Ok(all)
    }

    /// As `batch_encode`, without making Python ints: (tokens, offsets), little-endian u32 and u64. The tokens of
    /// text i are `np.frombuffer(tokens, "<u4")[offsets[i]:offsets[i + 1]]`, `offsets = np.frombuffer(_, "<u8")`.
    #[pyo3(signature = (texts, num_threads=None))]
    fn batch_encode_u32<'py>(&self, texts: &Bound<'py, PyAny>, num_threads: Option<i64>) -> PyResult<Buffers<'py>> {
        self.shared().batch_bytes(texts, num_threads, u32::to_le_bytes)
    }

    /// As `batch_encode_u32`, with tokens of 16 bits ("<u2"): half the memory, for at most 65,536 tokens.
    #[pyo3(signature = (texts, num_threads=None))]
    fn batch_encode_u16<'py>(&self, texts: &Bound<'py, PyAny>, num_threads: Option<i64>) -> PyResult<Buffers<'py>> {
        let shared = self.shared();
        let size = shared.model.vocab.size();
        if size > 1 << 16 {
            let message = format!("{size} tokens do not fit 16 bits, which hold 65536; use batch_encode_u32");
            return Err(PyValueError::new_err(message));
        }
        shared.batch_bytes(texts, num_threads, |id| (id as u16).to_le_bytes())
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
        self.shared().model.vocab.size()
    }

    /// The split pattern.
    fn get_pattern(&self) -> String {
        self.shared().model.pattern().to_owned()
    }

    /// All tokens as (bytes, id), by id.
    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, u32)> {
        let shared = self.shared();
        let token = |id| shared.model.vocab.token(id).map(|bytes| (PyBytes::new(py, bytes), id));
        (0..).map_while(token).collect()
    }

    fn __repr__(&self) -> String {
        format!("rustbpe.Tokenizer(vocab_size={})", self.vocab_size())
    }
}

impl Tokenizer {
    fn bytes_of(&self, py: Python<'_>, ids: &Bound<'_, PyAny>) -> PyResult<Vec<u8>> {
        let shared = self.shared();
        let vocab = &shared.model.vocab;
        let unknown = |id: &dyn std::fmt::Display| {
            PyValueError::new_err(format!("token id {id} is unknown; ids must be 0..={}", vocab.size() - 1))
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
        py.detach(|| vocab.decode(&numbers)).map_err(|id| unknown(&id))
    }
}

/// Bytes that `fill` writes, all of them. `PyBytes::new_with` would fill them with zeros before.
fn bytes_with(py: Python<'_>, size: usize, fill: impl FnOnce(&mut [MaybeUninit<u8>])) -> PyResult<Bound<'_, PyBytes>> {
    let length = size.try_into().map_err(|_| PyValueError::new_err("too many tokens"))?;
    // SAFETY: a new bytes object of this size, or an error; nobody else has seen it yet, so it may be written to.
    unsafe {
        let object = Bound::from_owned_ptr_or_err(py, ffi::PyBytes_FromStringAndSize(std::ptr::null(), length))?;
        let start = ffi::PyBytes_AsString(object.as_ptr()).cast();
        fill(std::slice::from_raw_parts_mut(start, size));
        Ok(object.cast_into_unchecked())
    }
}

/// Documents packed into rows of `row_len` tokens: (rows, how many tokens were cropped).
///
/// `tokens` are those of all documents, little-endian, `width` (2 or 4) bytes each, and `ends` says where each document
/// ends, in tokens. Each document, or piece of one that is too long for a row, begins with the token `bos`. A row takes
/// the longest piece that fits, again and again; where none fits, the head of the shortest, whose tail is dropped. The
/// rows are like `tokens`, end to end, in memory that may be written to; what does not fill a row at the end is cropped too.
#[pyfunction]
fn pack_rows<'py>(
    py: Python<'py>,
    tokens: &[u8],
    ends: Vec<usize>,
    width: usize,
    bos: u32,
    row_len: usize,
) -> PyResult<(Bound<'py, PyByteArray>, usize)> {
    if !matches!(width, 2 | 4) || tokens.len() % width > 0 {
        let length = tokens.len();
        let message = format!("width is {width}, for {length} bytes of tokens; it must be 2 or 4, and divide them");
        return Err(PyValueError::new_err(message));
    }
    if row_len < 2 {
        return Err(PyValueError::new_err(format!("row_len is {row_len}; a row of less than 2 tokens holds no text")));
    }
    let count = tokens.len() / width;
    if !ends.is_sorted() || ends.last().copied().unwrap_or(0) != count {
        return Err(PyValueError::new_err(format!("ends must rise up to {count}, the number of tokens")));
    }
    let bos = bos.to_le_bytes();
    if bos[width..].iter().any(|&byte| byte > 0) {
        return Err(PyValueError::new_err(format!("bos is no token of {width} bytes")));
    }
    let packing = py.detach(|| pack::pack(&ends, row_len));
    let rows = PyByteArray::new_with(py, packing.rows * row_len * width, |out| {
        packing.write(tokens, &bos[..width], out);
        Ok(())
    })?;
    Ok((rows, packing.cropped))
}

/// Byte-level BPE: training and encoding; packing of what was encoded.
#[pymodule]
mod rustbpe {
    #[pymodule_export]
    use super::{Tokenizer, pack_rows};

    /// The default split pattern.
    #[pymodule_export]
    const SPLIT_PATTERN: &str = crate::split::SPLIT_PATTERN;
}
