//! The default split pattern, written out by hand.
//!
//! With a backtracking engine the pattern is most of the cost of counting a corpus (some 0.5 of 0.7 s for
//! 15 MB). Its alternatives can be told apart by the classes of the first two characters, so one forward scan does: every character is looked at
//! once, or twice within white space, whatever the input. Tests hold it equal to the regex engine over every
//! scalar value in many contexts and over random strings.

use crate::classes::{CLASSES, Class, ClassTable};

/// Calls `chunk(start, end)` for each match of the default pattern in `bytes`, which must be valid UTF-8.
pub fn split(bytes: &[u8], mut chunk: impl FnMut(usize, usize)) {
    let scan = Scan { bytes, table: &CLASSES };
    let mut start = 0;
    while start < bytes.len() {
        let end = scan.chunk_end(start);
        chunk(start, end);
        start = end;
    }
}

struct Scan<'a> {
    bytes: &'a [u8],
    table: &'a ClassTable,
}

impl Scan<'_> {
    /// Where the chunk that starts at `start` ends. The alternatives are tried in the pattern's order.
    #[inline(always)]
    fn chunk_end(&self, start: usize) -> usize {
        let (class, after) = self.class_at(start);
        if class == Class::Letter {
            return self.skip(after, Class::Letter);
        }
        if self.bytes[start] == b'\''
            && let Some(end) = self.contraction_end(after)
        {
            return end;
        }
        let (next, after_next) = if after < self.bytes.len() { self.class_at(after) } else { (Class::Newline, after) };
        match class {
            Class::Letter => unreachable!("handled above"),
            Class::Number => {
                if next == Class::Number {
                    after_next
                } else {
                    after
                }
            }
            Class::Newline => self.space_end(start),
            // One character of any other kind may lead a word.
            Class::Space | Class::Other if next == Class::Letter => self.skip(after_next, Class::Letter),
            Class::Other => self.punctuation_end(after),
            // Only the plain space may lead punctuation.
            Class::Space if self.bytes[start] == b' ' && next == Class::Other => self.punctuation_end(after_next),
            Class::Space => self.space_end(start),
        }
    }

    /// `(?i:[sdmt]|ll|ve|re)` after an apostrophe. Case folding also equates U+017F (long s, bytes C5 BF) with s.
    #[inline(never)]
    fn contraction_end(&self, at: usize) -> Option<usize> {
        let first = self.bytes.get(at)?.to_ascii_lowercase();
        let second = self.bytes.get(at + 1).map(u8::to_ascii_lowercase);
        match (first, second) {
            (b's' | b'd' | b'm' | b't', _) => Some(at + 1),
            (0xc5, Some(0xbf)) | (b'l', Some(b'l')) | (b'v' | b'r', Some(b'e')) => Some(at + 2),
            _ => None,
        }
    }

    /// The rest of ` ?[^\s\p{L}\p{N}]++[\r\n]*`.
    #[inline(always)]
    fn punctuation_end(&self, at: usize) -> usize {
        let mut end = self.skip(at, Class::Other);
        while matches!(self.bytes.get(end), Some(b'\r' | b'\n')) {
            end += 1;
        }
        end
    }

    /// `\s*[\r\n]|\s+(?!\S)|\s+`: up to the last newline of the run; else all of it if the text ends there;
    /// else all but its last character, which is left to lead the next word; else that one character.
    #[inline(never)]
    fn space_end(&self, start: usize) -> usize {
        let (mut end, mut last_start, mut newline_end) = (start, start, start);
        while end < self.bytes.len() {
            let (class, after) = self.class_at(end);
            match class {
                Class::Newline => newline_end = after,
                Class::Space => {}
                _ => break,
            }
            last_start = end;
            end = after;
        }
        if newline_end > start {
            newline_end
        } else if end == self.bytes.len() || last_start == start {
            end
        } else {
            last_start
        }
    }

    /// The first place at or after `at` that is not of `class`.
    #[inline(always)]
    fn skip(&self, mut at: usize, class: Class) -> usize {
        while at < self.bytes.len() {
            let (found, after) = self.class_at(at);
            if found != class {
                break;
            }
            at = after;
        }
        at
    }

    /// The class of the character at `at` and where the next one starts.
    #[inline(always)]
    fn class_at(&self, at: usize) -> (Class, usize) {
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
}

#[cfg(test)]
mod tests {
    use crate::split::{SPLIT_PATTERN, Splitter};
    use crate::testing::Random;

    struct Pair {
        fast: Splitter,
        regex: Splitter,
    }

    impl Pair {
        fn new() -> Self {
            Pair { fast: Splitter::new(SPLIT_PATTERN).unwrap(), regex: Splitter::with_regex(SPLIT_PATTERN).unwrap() }
        }

        fn check(&self, text: &str) {
            let ends = |splitter: &Splitter| {
                let mut ends = vec![0];
                let add = |start, end| {
                    assert_eq!(Some(&start), ends.last(), "a gap in {text:?}");
                    ends.push(end);
                };
                splitter.split(text, add).unwrap();
                ends
            };
            assert_eq!(ends(&self.fast), ends(&self.regex), "{text:?}");
        }
    }

    #[test]
    fn every_scalar_value_in_context() {
        let pair = Pair::new();
        let mut text = String::new();
        for character in '\0'..=char::MAX {
            // Alone at the start and the end, doubled, after and before each class, and after an apostrophe.
            text.clear();
            for context in [" x", "1x", "\n", "  ", ".", "a", "'", "'l", "\u{a0}", "\t\n ", " !", "12"] {
                text.push(character);
                text.push_str(context);
            }
            text.extend([character, character]);
            pair.check(&text);
        }
    }

    #[test]
    fn random_strings_of_telling_characters() {
        let pair = Pair::new();
        let alphabet: Vec<char> =
            "aZsStTdmlLvVrReEſKéß中ह٣½1290   \t\r\n\n\u{b}\u{85}\u{a0}\u{2028}\u{3000}''’.,!$_-\u{301}\u{200d}😀\0"
                .chars()
                .collect();
        let mut random = Random::new(1);
        for _ in 0..200_000 {
            let length = random.below(24);
            pair.check(&(0..length).map(|_| alphabet[random.below(alphabet.len())]).collect::<String>());
        }
    }

    #[test]
    fn random_strings_of_any_characters() {
        let pair = Pair::new();
        let mut random = Random::new(2);
        for _ in 0..20_000 {
            let text: String = (0..random.below(40)).map(|_| random.scalar()).collect();
            pair.check(&text);
        }
    }
}
