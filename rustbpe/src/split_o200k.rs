//! The split pattern of GPT-4o (tiktoken's o200k), written out by hand.
//!
//! As the default pattern's kin, but words are cut before a capital after a small letter, marks are part of words, a
//! contraction is part of the word before it, and slashes stick to the newlines after punctuation.

use crate::classes::Class;
use crate::scan::{Contractions, Rules, Text, contraction_in_any_case, settled};
use crate::split_default::{self, Style};
use crate::window::{Masks, WINDOW};

/// As tiktoken has it.
pub const PATTERN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// What both halves of a word may hold: letters without case, and marks.
const EITHER: Class = Class::CASELESS.or(Class::MARK);
const FIRST_HALF: Class = Class::UPPER.or(EITHER);
const SECOND_HALF: Class = Class::LOWER.or(EITHER);

/// Numbers and white space are those of the default's kin.
const LIKE: Style = Style { digits: 3, whole_tail: false };

#[derive(Clone, Copy)]
pub struct O200k;

impl Rules for O200k {
    #[inline(always)]
    fn window_ends(self, window: &[u8; WINDOW], masks: &Masks) -> u64 {
        let Masks { letter, upper, newline, space, apostrophe, slash, wide, .. } = *masks;
        let capital_after_small = upper & ((letter & !upper) << 1);
        let starts = split_default::starts(masks, LIKE.digits) | capital_after_small;
        let after_word = apostrophe & (letter << 1);
        // One where another ends leads the next word.
        let contractions = Contractions::at(after_word & (letter >> 1), window, contraction_in_any_case, false);
        let inside = contractions.letters | contractions.letters >> 1;
        // An apostrophe at the end may begin a contraction; one before a byte that is not ASCII, too (the long s).
        let maybe = after_word & (wide >> 1 | 0b11 << (WINDOW - 2));
        let unknown = wide | maybe | newline & (space << 1) | slash & (newline << 1);
        settled(starts & !inside | contractions.ends, space | newline, unknown)
    }

    /// The alternatives are tried in the pattern's order.
    #[inline(never)]
    fn chunk_end(self, text: &Text, start: usize) -> usize {
        let (class, after) = text.class_at(start);
        if let Some(end) = word_end(text, class, start, after) {
            let contraction = || text.contraction_end(end + 1, contraction_in_any_case);
            return if text.bytes.get(end) == Some(&b'\'') { contraction().unwrap_or(end) } else { end };
        }
        if class.is(Class::NUMBER) {
            return LIKE.number_end(text, after);
        }
        if class.is(Class::REST) {
            return punctuation_end(text, after);
        }
        let (next, after_next) = text.class_or_end(after);
        if text.bytes[start] == b' ' && next.is(Class::REST) {
            return punctuation_end(text, after_next);
        }
        LIKE.space_end(text, start)
    }
}

/// The end of the word, without a contraction, that starts with the character of `class` from `start` to `after`: as its
/// first letter, or leading it, as one character of almost any kind may.
#[inline(always)]
fn word_end(text: &Text, class: Class, start: usize, after: usize) -> Option<usize> {
    if class.is(Class::LETTER) {
        let halves = Halves::from(text, start);
        return halves.both().or(halves.first());
    }
    if class.is(Class::NUMBER.or(Class::NEWLINE)) {
        return None;
    }
    let led = Halves::from(text, after);
    // A mark leads a word if that has a second half; else it is part of one.
    let unled = || if class.is(Class::MARK) { Halves::from(text, start).both() } else { led.first() };
    led.both().or_else(unled)
}

/// Where a word may end that starts at `start`.
struct Halves<'a> {
    text: &'a Text<'a>,
    start: usize,
    /// After the longest first half.
    middle: usize,
    /// After the last character of that which may as well be the second half; 0 if there is none.
    either_end: usize,
}

impl<'a> Halves<'a> {
    #[inline(always)]
    fn from(text: &'a Text, start: usize) -> Self {
        let (mut middle, mut either_end) = (start, 0);
        loop {
            let (class, after) = text.class_or_end(middle);
            if !class.is(FIRST_HALF) {
                return Halves { text, start, middle, either_end };
            }
            if class.is(EITHER) {
                either_end = after;
            }
            middle = after;
        }
    }

    /// The first half, and at least one character of the second: what follows, or what the first half gives back.
    fn both(&self) -> Option<usize> {
        if self.text.class_or_end(self.middle).0.is(Class::LOWER) {
            return Some(self.text.skip(self.middle, SECOND_HALF));
        }
        Some(self.either_end).filter(|&end| end > 0)
    }

    /// At least one character of the first half.
    fn first(&self) -> Option<usize> {
        Some(self.middle).filter(|&end| end > self.start)
    }
}

/// The rest of ` ?[^\s\p{L}\p{N}]+[\r\n/]*`.
#[inline(always)]
fn punctuation_end(text: &Text, at: usize) -> usize {
    let mut end = split_default::punctuation_end(text, at);
    while matches!(text.bytes.get(end), Some(b'\r' | b'\n' | b'/')) {
        end += 1;
    }
    end
}
