//! Cuts text into the chunks that BPE works on. No token ever crosses a chunk border.

use std::fmt;

use crate::borders::{Borders, Chunks};
use crate::scan;
use crate::split_default::Style;
use crate::split_gpt2::{self, Gpt2};
use crate::split_o200k::{self, O200k};

/// The default split pattern: GPT-4's, but with runs of at most two digits, which spends fewer of a small
/// vocabulary's entries on numbers.
pub const SPLIT_PATTERN: &str =
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";

/// How often the regex engine may step back within one chunk. The engine's own default, one million, makes
/// an ordinary pattern fail on a run of a million spaces; this allows a hundred million (seconds).
const BACKTRACK_LIMIT: usize = 100_000_000;

/// A compiled split pattern. Clone it for each thread: clones of a regex do not contend for scratch memory.
#[derive(Clone, Debug)]
pub struct Splitter {
    pattern: String,
    engine: Engine,
}

#[derive(Clone, Debug)]
enum Engine {
    /// Hand-written splitters: that of [`SPLIT_PATTERN`] and its kin, and others.
    Default(Style),
    Gpt2,
    O200k,
    Regex(Box<fancy_regex::Regex>),
}

impl Splitter {
    /// Compiles a pattern. [`SPLIT_PATTERN`] and its kin (see [`Style::of`]), GPT-2's and GPT-4o's take a hand-written
    /// splitter, which gives the same chunks in linear time on any input (0.06 s for 100 MB of English on one thread;
    /// the engine takes seconds).
    pub fn new(pattern: &str) -> Result<Self, String> {
        let engine = match Style::of(pattern) {
            Some(style) => Engine::Default(style),
            None if split_gpt2::PATTERNS.contains(&pattern) => Engine::Gpt2,
            None if pattern == split_o200k::PATTERN => Engine::O200k,
            None => return Self::with_regex(pattern),
        };
        Ok(Splitter { pattern: pattern.to_owned(), engine })
    }

    /// Compiles a pattern for the regex engine even if a hand-written splitter exists (tests compare the two).
    pub fn with_regex(pattern: &str) -> Result<Self, String> {
        let regex = fancy_regex::RegexBuilder::new(pattern)
            .backtrack_limit(BACKTRACK_LIMIT)
            .build()
            .map_err(|error| format!("cannot compile the split pattern {pattern:?}: {}", one_line(&error)))?;
        Ok(Splitter { pattern: pattern.to_owned(), engine: Engine::Regex(Box::new(regex)) })
    }

    /// The pattern as given.
    pub fn pattern(&self) -> &str {
        &self.pattern
    }

    /// Hands every chunk of the text to `chunks`, as byte offsets, in order. Text that a custom pattern does not match
    /// is left out, as tiktoken does, and empty matches are ignored.
    #[inline(always)]
    pub fn split(&self, text: &str, mut chunks: impl Chunks) -> Result<(), String> {
        match &self.engine {
            Engine::Default(style) => scan::split(*style, text.as_bytes(), chunks),
            Engine::Gpt2 => scan::split(Gpt2, text.as_bytes(), chunks),
            Engine::O200k => scan::split(O200k, text.as_bytes(), chunks),
            Engine::Regex(regex) => self.split_with(regex, text, &mut chunks)?,
        }
        Ok(())
    }

    fn split_with(&self, regex: &fancy_regex::Regex, text: &str, chunks: &mut impl Chunks) -> Result<(), String> {
        let mut borders = Borders::from(0);
        for found in regex.find_iter(text) {
            let found = found.map_err(|error| {
                let (pattern, length, error) = (&self.pattern, text.len(), one_line(&error));
                format!(
                    "the split pattern {pattern:?} gave up on a text of {length} bytes ({error}); use a simpler pattern or shorter texts"
                )
            })?;
            if found.end() == found.start() {
                continue;
            }
            if found.start() > borders.end() || borders.are_many() {
                borders.hand_over(text.as_bytes(), chunks);
                borders.restart(found.start());
            }
            borders.push(found.end());
        }
        borders.hand_over(text.as_bytes(), chunks);
        Ok(())
    }
}

/// The words of an error on one line: that of a regex draws a picture of the pattern over several.
pub fn one_line(error: &dyn fmt::Display) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
#[path = "../../tests/rust/split.rs"]
mod tests;
