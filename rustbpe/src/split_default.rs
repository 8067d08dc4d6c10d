//! The default split pattern and its kin, written out by hand.
//!
//! A word may be led by one character of almost any kind, numbers come few to a chunk, contractions in any case, and
//! newlines stick to the punctuation before them or end the chunk.

use crate::classes::Class;
use crate::scan::{Contractions, Rules, Text, contraction_in_any_case, settled};
use crate::window::{Masks, WINDOW};

/// What the patterns of this family differ in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Style {
    /// Most numbers in a chunk, 1 to 9.
    pub digits: u32,
    /// White space at the end of the text is one chunk even if there are newlines in it (`\s++$`).
    pub whole_tail: bool,
}

impl Style {
    /// The style of a pattern of this family: the default one; GPT-4's as tiktoken has it; that of Llama 3 and Qwen.
    /// `{1,k}` may have any k up to 9.
    pub fn of(pattern: &str) -> Option<Self> {
        let styles = (1..=9).flat_map(|digits| [true, false].map(|whole_tail| Style { digits, whole_tail }));
        styles.into_iter().find(|style| style.patterns().iter().any(|known| known == pattern))
    }

    fn patterns(self) -> Vec<String> {
        let range = format!("{{1,{}}}", self.digits);
        if self.whole_tail {
            return vec![format!(
                r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{{L}}\p{{N}}]?+\p{{L}}++|\p{{N}}{range}+| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
            )];
        }
        let llama = |numbers: &str| {
            format!(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            )
        };
        let mut patterns = vec![
            format!(
                r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{{L}}\p{{N}}]?+\p{{L}}+|\p{{N}}{range}| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
            ),
            llama(&format!(r"\p{{N}}{range}")),
        ];
        if self.digits == 1 {
            patterns.push(llama(r"\p{N}"));
        }
        patterns
    }
}

impl Rules for Style {
    #[inline(always)]
    fn window_ends(self, window: &[u8; WINDOW], masks: &Masks) -> u64 {
        let Masks { letter, newline, space, apostrophe, wide, .. } = *masks;
        let starts = starts(masks, self.digits);
        let apostrophes = apostrophe & (starts | 1) & (letter >> 1);
        let ends = starts | Contractions::at(apostrophes, window, contraction_in_any_case, true).ends;
        // At a newline after a space the chunk depends on all of the white space.
        settled(ends, space | newline, wide | newline & (space << 1))
    }

    /// The alternatives are tried in the pattern's order.
    #[inline(never)]
    fn chunk_end(self, text: &Text, start: usize) -> usize {
        let (class, after) = text.class_at(start);
        if class.is(Class::LETTER) {
            return text.skip(after, Class::LETTER);
        }
        if text.bytes[start] == b'\''
            && let Some(end) = text.contraction_end(after, contraction_in_any_case)
        {
            return end;
        }
        let (next, after_next) = text.class_or_end(after);
        if class.is(Class::NUMBER) {
            self.number_end(text, after)
        } else if class.is(Class::NEWLINE) {
            self.space_end(text, start)
        } else if next.is(Class::LETTER) {
            // One character of any other kind may lead a word.
            text.skip(after_next, Class::LETTER)
        } else if class.is(Class::REST) {
            punctuation_end(text, after)
        } else if text.bytes[start] == b' ' && next.is(Class::REST) {
            // Only the plain space may lead punctuation.
            punctuation_end(text, after_next)
        } else {
            self.space_end(text, start)
        }
    }
}

impl Style {
    /// The rest of `\p{N}{1,k}`.
    #[inline(always)]
    pub fn number_end(self, text: &Text, mut at: usize) -> usize {
        for _ in 1..self.digits {
            let (class, after) = text.class_or_end(at);
            if !class.is(Class::NUMBER) {
                break;
            }
            at = after;
        }
        at
    }

    /// `\s*[\r\n]|\s+(?!\S)|\s+` (maybe after `\s++$`): up to the last newline of the run, if there is one.
    #[inline(never)]
    pub fn space_end(self, text: &Text, start: usize) -> usize {
        let white = text.white(start);
        if self.whole_tail && white.ends_text {
            white.end
        } else if white.newline_end > start {
            white.newline_end
        } else {
            white.before_word()
        }
    }
}

/// The rest of ` ?[^\s\p{L}\p{N}]++[\r\n]*`.
#[inline(always)]
pub fn punctuation_end(text: &Text, at: usize) -> usize {
    text.skip(text.skip(at, Class::REST), Class::NEWLINE)
}

/// Starts of chunks in a window but for contractions: where the pattern says so whatever comes later, because of the
/// bytes before and the one after.
#[inline(always)]
pub fn starts(masks: &Masks, digits: u32) -> u64 {
    let Masks { letter, number, newline, space, blank, wide, .. } = *masks;
    let white = space | newline;
    let other = !(letter | number | white | wide);
    let word = letter & ((number | newline) << 1 | (other << 1) & ((other | blank) << 2));
    let punctuation = other & !((other | blank) << 1);
    let first_space = space & !(space << 1);
    // The last space of a run, which may lead what follows.
    let last_space = space & !(white >> 1);
    let first_newline = newline & ((letter | number) << 1);
    word | punctuation | first_space | last_space | first_newline | numbers(number, digits)
}

/// Starts of the chunks in runs of numbers: every so many `digits` from the start of a run.
#[inline(always)]
fn numbers(number: u64, digits: u32) -> u64 {
    let mut starts = number & !(number << 1);
    // A number after as many others.
    let inner = (1..=digits).fold(number, |inner, back| inner & number << back);
    loop {
        let more = starts | (starts << digits) & inner;
        if more == starts {
            return starts;
        }
        starts = more;
    }
}

#[cfg(test)]
#[path = "../../tests/rust/split_default.rs"]
mod tests;
