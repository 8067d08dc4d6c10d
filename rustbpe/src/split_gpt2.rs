//! GPT-2's split pattern, written out by hand.
//!
//! Letters, numbers and all else stand in runs of any length, which only a plain space may lead; contractions are in
//! lower case only; newlines are white space like any other.

use crate::classes::Class;
use crate::scan::{Contractions, Rules, Text, contraction, settled};
use crate::window::{Masks, WINDOW};

/// Spellings of one and the same pattern: the original release's, with the contractions drawn together, and
/// tiktoken's. (`\s++$` there says nothing new: `\s+(?!\S)` takes all of the white space at the end, too. And where `\s`
/// is tried, one character of white space is left.)
pub const PATTERNS: [&str; 4] = [
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
];

#[derive(Clone, Copy)]
pub struct Gpt2;

impl Rules for Gpt2 {
    #[inline(always)]
    fn window_ends(self, window: &[u8; WINDOW], masks: &Masks) -> u64 {
        let Masks { letter, number, newline, space, blank, apostrophe, wide, .. } = *masks;
        let white = space | newline;
        let other = !(letter | number | white | wide);
        // A run starts after anything but its own kind and a space that leads it.
        let starts = |run: u64| run & !((run | blank) << 1);
        let first_white = white & !(white << 1);
        // The last of a run is left over: a plain space leads what follows, and any other is a chunk.
        let last_white = white & !(white >> 1);
        let ends = starts(letter) | starts(number) | starts(other) | first_white | last_white;
        let apostrophes = apostrophe & (ends | 1) & (letter >> 1);
        let contractions = Contractions::at(apostrophes, window, contraction, true);
        // Whether the last byte continues a contraction cannot be told.
        let cut_off = apostrophe << 1 & 1 << (WINDOW - 1);
        settled(ends & !contractions.letters | contractions.ends, white, wide | cut_off)
    }

    #[inline(never)]
    fn chunk_end(self, text: &Text, start: usize) -> usize {
        let (mut class, mut after) = text.class_at(start);
        match text.bytes[start] {
            b'\'' => {
                if let Some(end) = text.contraction_end(after, contraction) {
                    return end;
                }
            }
            b' ' => {
                let (next, after_next) = text.class_or_end(after);
                if next.is(Class::LETTER.or(Class::NUMBER).or(Class::REST)) {
                    (class, after) = (next, after_next);
                }
            }
            _ => {}
        }
        match [Class::LETTER, Class::NUMBER, Class::REST].into_iter().find(|&run| class.is(run)) {
            Some(run) => text.skip(after, run),
            None => text.white(start).before_word(),
        }
    }
}
