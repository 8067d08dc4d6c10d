//! What the hand-written splitters share. Each family of patterns says only its own rules: which chunk borders there
//! are among 64 ASCII bytes, and where a chunk ends that starts here.
//!
//! With a backtracking engine the pattern is most of the cost of counting a corpus (some 0.5 of 0.7 s for
//! 15 MB). The alternatives of these patterns can be told apart by the classes of the first two characters, so one
//! forward scan does: every character is looked at once, or twice within white space, whatever the input.
//!
//! Most text is ASCII, and a scan that decides character by character spends most of its time on branches that
//! the processor mispredicts, at least one a chunk. So wherever 64 bytes lie ahead, all chunk ends among them are
//! found together, as bits of a word, without a branch a chunk; the scan does the rest. Tests hold both equal to
//! the regex engine over every scalar value in many contexts and over random strings.

use crate::borders::{Borders, Chunks};
use crate::classes::{CLASSES, Class, ClassTable};
use crate::simd::{self, Job, Simd};
use crate::window::{Masks, WINDOW};

/// The rules of one family of patterns.
pub trait Rules: Copy {
    /// Ends of chunks in a window where a chunk starts at byte 0: bit i says that one ends before byte i. They are the
    /// first ends, without a gap; none if the first cannot be told from these bytes.
    fn window_ends(self, window: &[u8; WINDOW], masks: &Masks) -> u64;

    /// Where the chunk that starts at `start` ends.
    fn chunk_end(self, text: &Text, start: usize) -> usize;
}

/// Finds each match of the pattern in `bytes`, which must be valid UTF-8.
#[inline(always)]
pub fn split(rules: impl Rules, bytes: &[u8], chunks: impl Chunks) {
    simd::run(Split { rules, bytes, chunks });
}

struct Split<'a, R, C> {
    rules: R,
    bytes: &'a [u8],
    chunks: C,
}

impl<R: Rules, C: Chunks> Job for Split<'_, R, C> {
    #[inline(always)]
    fn run(self, simd: impl Simd) {
        let Split { rules, bytes, mut chunks } = self;
        let text = Text { bytes, table: &CLASSES };
        let mut borders = Borders::from(0);
        let mut start = 0;
        while start < bytes.len() {
            let ends = match bytes.get(start..start + WINDOW) {
                // A word in another script: a look at the window would be in vain.
                Some(window) if window[0] | window[1] < 0x80 => {
                    let window = window.try_into().expect("as many bytes as asked");
                    rules.window_ends(window, &Masks::of(simd, window))
                }
                _ => 0,
            };
            start = match ends {
                0 => borders.push(rules.chunk_end(&text, start)),
                _ => borders.push_all(start, ends),
            };
            if borders.are_many() {
                borders.hand_over(bytes, &mut chunks);
            }
        }
        borders.hand_over(bytes, &mut chunks);
    }
}

/// Text, and what its characters are.
pub struct Text<'a> {
    pub bytes: &'a [u8],
    pub table: &'a ClassTable,
}

/// A run of white space.
pub struct White {
    pub start: usize,
    pub end: usize,
    /// Where its last character starts.
    last: usize,
    /// After its last `\r` or `\n`; `start` if there is none.
    pub newline_end: usize,
    pub ends_text: bool,
}

impl White {
    /// `\s+(?!\S)|\s+`: all of it if the text ends there; else all but its last character, which is left to lead the
    /// next word; else that one character.
    #[inline(always)]
    pub fn before_word(&self) -> usize {
        if self.ends_text || self.last == self.start { self.end } else { self.last }
    }
}

impl Text<'_> {
    /// The class of the character at `at` and where the next one starts.
    #[inline(always)]
    pub fn class_at(&self, at: usize) -> (Class, usize) {
        let first = self.bytes[at];
        if first < 0x80 {
            return (self.table.get(u32::from(first)), at + 1);
        }
        self.wide_class_at(at, first)
    }

    #[inline(never)]
    fn wide_class_at(&self, at: usize, first: u8) -> (Class, usize) {
        let tail = |n: usize| u32::from(self.bytes[at + n] & 0x3f);
        let (code_point, width) = match first {
            ..0xe0 => (u32::from(first & 0x1f) << 6 | tail(1), 2),
            0xe0..0xf0 => (u32::from(first & 0x0f) << 12 | tail(1) << 6 | tail(2), 3),
            _ => (u32::from(first & 0x07) << 18 | tail(1) << 12 | tail(2) << 6 | tail(3), 4),
        };
        (self.table.get(code_point), at + width)
    }

    /// [`Text::class_at`], but at the end of the text no class.
    #[inline(always)]
    pub fn class_or_end(&self, at: usize) -> (Class, usize) {
        if at < self.bytes.len() { self.class_at(at) } else { (Class::NONE, at) }
    }

    /// The first place at or after `at` that is of none of the classes in `any`.
    #[inline(always)]
    pub fn skip(&self, mut at: usize, any: Class) -> usize {
        while at < self.bytes.len() {
            let (found, after) = self.class_at(at);
            if !found.is(any) {
                break;
            }
            at = after;
        }
        at
    }

    /// The run of white space from `start`.
    #[inline(always)]
    pub fn white(&self, start: usize) -> White {
        let (mut end, mut last, mut newline_end) = (start, start, start);
        while end < self.bytes.len() {
            let (class, after) = self.class_at(end);
            if !class.is(Class::WHITE) {
                break;
            }
            if class.is(Class::NEWLINE) {
                newline_end = after;
            }
            last = end;
            end = after;
        }
        White { start, end, last, newline_end, ends_text: end == self.bytes.len() }
    }

    /// Where the contraction ends whose apostrophe stands before `at`; `length` tells its length from its next two bytes.
    #[inline(never)]
    pub fn contraction_end(&self, at: usize, length: impl Fn(u8, Option<u8>) -> usize) -> Option<usize> {
        Some(at + length(*self.bytes.get(at)?, self.bytes.get(at + 1).copied())).filter(|&end| end > at)
    }
}

/// Length of `[sdmt]|ll|ve|re`, which stands after an apostrophe, or 0.
#[inline(always)]
pub fn contraction(first: u8, second: Option<u8>) -> usize {
    match (first, second) {
        (b's' | b'd' | b'm' | b't', _) => 1,
        (b'l', Some(b'l')) | (b'v' | b'r', Some(b'e')) => 2,
        _ => 0,
    }
}

/// Length of `(?i:[sdmt]|ll|ve|re)`. Case folding also equates U+017F (long s, bytes C5 BF) with s.
pub fn contraction_in_any_case(first: u8, second: Option<u8>) -> usize {
    match (first, second) {
        (0xc5, Some(0xbf)) => 2,
        _ => contraction(first.to_ascii_lowercase(), second.map(|second| second.to_ascii_lowercase())),
    }
}

/// Contractions in a window.
#[derive(Clone, Copy, Default)]
pub struct Contractions {
    /// Their letters.
    pub letters: u64,
    /// The bytes after them, as far as they are in the window.
    pub ends: u64,
}

impl Contractions {
    /// Those at these apostrophes, each before a letter; see [`Text::contraction_end`]. Unless they `may_touch`, one whose
    /// apostrophe is where another ends is none.
    #[inline(always)]
    pub fn at(
        mut apostrophes: u64,
        window: &[u8; WINDOW],
        length: impl Fn(u8, Option<u8>) -> usize,
        may_touch: bool,
    ) -> Contractions {
        let mut found = Contractions::default();
        while apostrophes != 0 {
            let at = apostrophes.trailing_zeros() as usize + 1;
            let length = length(window[at], window.get(at + 1).copied());
            if length > 0 && (may_touch || found.ends >> (at - 1) & 1 == 0) {
                found.letters |= ((1 << length) - 1) << at;
                found.ends |= (1 << at) << length;
            }
            apostrophes &= apostrophes - 1;
        }
        found
    }
}

/// Those ends that hold whatever comes later: before the first `unknown` byte, and before white space that touches it or
/// the end of the window, for it may go on.
#[inline(always)]
pub fn settled(ends: u64, white: u64, unknown: u64) -> u64 {
    let known = if unknown == 0 { u64::MAX } else { (unknown & unknown.wrapping_neg()) - 1 };
    let solid = !white & known;
    let sure = if solid == 0 { 0 } else { (u64::MAX >> solid.leading_zeros()) << 1 };
    ends & sure & known
}
