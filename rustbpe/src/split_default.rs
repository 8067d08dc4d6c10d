//! The default split pattern and its kin, written out by hand.
//!
//! With a backtracking engine the pattern is most of the cost of counting a corpus (some 0.5 of 0.7 s for
//! 15 MB). Its alternatives can be told apart by the classes of the first two characters, so one forward scan
//! does: every character is looked at once, or twice within white space, whatever the input.
//!
//! Most text is ASCII, and a scan that decides character by character spends most of its time on branches that
//! the processor mispredicts, at least one a chunk. So wherever 64 bytes lie ahead, all chunk ends among them are
//! found together, as bits of a word, without a branch a chunk; the scan does the rest. Tests hold both equal to
//! the regex engine over every scalar value in many contexts and over random strings.

use crate::classes::{CLASSES, Class, ClassTable};
use crate::split::Chunks;
use crate::window::{Masks, WINDOW};

/// What the patterns of this family differ in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Style {
    /// Most numbers in a chunk, 1 to 9.
    digits: u32,
    /// White space at the end of the text is one chunk even if there are newlines in it (`\s++$`).
    whole_tail: bool,
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

/// Calls `chunks.add(start, end)` for each match of the pattern in `bytes`, which must be valid UTF-8.
#[inline(always)]
pub fn split(style: Style, bytes: &[u8], mut chunks: impl Chunks) {
    let scan = Scan { style, bytes, table: &CLASSES };
    let (mut start, mut base, mut ends) = (0, 0, 0_u64);
    while start < bytes.len() {
        if ends == 0 {
            base = start;
            ends = scan.window_ends(base);
        }
        let end = match ends {
            0 => scan.chunk_end(start),
            _ => base + ends.trailing_zeros() as usize,
        };
        ends &= ends.wrapping_sub(1);
        chunks.add(start, end);
        start = end;
    }
}

struct Scan<'a> {
    style: Style,
    bytes: &'a [u8],
    table: &'a ClassTable,
}

impl Scan<'_> {
    /// Ends of chunks in the 64 bytes from `start`, where a chunk must start: bit i says that one ends before byte
    /// i. They are the first ends, without a gap; none if the first cannot be told from these bytes.
    #[inline(always)]
    fn window_ends(&self, start: usize) -> u64 {
        match self.bytes.get(start..start + WINDOW) {
            // A word in another script: a look at the window would be in vain.
            Some(window) if window[0] | window[1] < 0x80 => {
                ascii_ends(window.try_into().expect("as many bytes as asked"), self.style.digits)
            }
            _ => 0,
        }
    }

    /// Where the chunk that starts at `start` ends. The alternatives are tried in the pattern's order.
    #[inline(never)]
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
            Class::Number => self.number_end(after),
            Class::Newline => self.space_end(start),
            // One character of any other kind may lead a word.
            Class::Space | Class::Other if next == Class::Letter => self.skip(after_next, Class::Letter),
            Class::Other => self.punctuation_end(after),
            // Only the plain space may lead punctuation.
            Class::Space if self.bytes[start] == b' ' && next == Class::Other => self.punctuation_end(after_next),
            Class::Space => self.space_end(start),
        }
    }

    #[inline(never)]
    fn contraction_end(&self, at: usize) -> Option<usize> {
        Some(at + contraction(*self.bytes.get(at)?, self.bytes.get(at + 1).copied())).filter(|&end| end > at)
    }

    /// The rest of `\p{N}{1,k}`.
    #[inline(always)]
    fn number_end(&self, mut at: usize) -> usize {
        for _ in 1..self.style.digits {
            if at == self.bytes.len() {
                break;
            }
            let (class, after) = self.class_at(at);
            if class != Class::Number {
                break;
            }
            at = after;
        }
        at
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

    /// `\s*[\r\n]|\s+(?!\S)|\s+` (maybe after `\s++$`): up to the last newline of the run; else all of it if the text ends there;
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
        if self.style.whole_tail && end == self.bytes.len() {
            end
        } else if newline_end > start {
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

/// Length of `(?i:[sdmt]|ll|ve|re)`, which stands after an apostrophe, or 0. Case folding also equates U+017F
/// (long s, bytes C5 BF) with s.
fn contraction(first: u8, second: Option<u8>) -> usize {
    match (first.to_ascii_lowercase(), second.map(|second| second.to_ascii_lowercase())) {
        (b's' | b'd' | b'm' | b't', _) => 1,
        (0xc5, Some(0xbf)) | (b'l', Some(b'l')) | (b'v' | b'r', Some(b'e')) => 2,
        _ => 0,
    }
}

/// See [`Scan::window_ends`]. A chunk starts at byte 0, so nothing before it matters.
#[inline(always)]
fn ascii_ends(window: &[u8; WINDOW], digits: u32) -> u64 {
    let Masks { letter, number, newline, space, blank, apostrophe, wide } = Masks::of(window);
    let white = space | newline;
    let other = !(letter | number | white | wide);
    // Where the pattern says so whatever comes later, a chunk starts at byte i because of bytes up to i + 1:
    let word = letter & ((number | newline) << 1 | (other << 1) & ((other | blank) << 2));
    let punctuation = other & !((other | blank) << 1);
    let first_space = space & !(space << 1);
    // The last space of a run, which may lead what follows.
    let last_space = space & !(white >> 1);
    let first_newline = newline & ((letter | number) << 1);
    let mut ends = word | punctuation | first_space | last_space | first_newline;
    ends |= numbers(number, digits);
    let mut quotes = apostrophe & (ends | 1) & (letter >> 1);
    while quotes != 0 {
        let at = quotes.trailing_zeros() as usize + 1;
        let length = contraction(window[at], window.get(at + 1).copied());
        if length > 0 && at + length < WINDOW {
            ends |= 1 << (at + length);
        }
        quotes &= quotes - 1;
    }
    // Known is the text before the first byte that is not ASCII, and before a newline after a space (there the
    // chunk depends on all of the white space). White space that touches the end of that may go on.
    let unknown = wide | newline & (space << 1);
    let known = if unknown == 0 { u64::MAX } else { (unknown & unknown.wrapping_neg()) - 1 };
    let solid = !white & known;
    let sure = if solid == 0 { 0 } else { (u64::MAX >> solid.leading_zeros()) << 1 };
    ends & sure & known
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
mod tests {
    use super::Style;
    use crate::split::{SPLIT_PATTERN, Splitter};
    use crate::testing::Random;

    struct Pair {
        fast: Splitter,
        regex: Splitter,
    }

    const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    const QWEN_2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    const CL100K: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s";

    /// The default pattern, and one of each other kind.
    fn pairs() -> Vec<Pair> {
        [SPLIT_PATTERN, LLAMA_3, QWEN_2, CL100K, &CL100K.replace("{1,3}", "{1,9}")].map(Pair::new).into()
    }

    #[test]
    fn patterns_are_recognised() {
        for (pattern, digits, whole_tail) in
            [(SPLIT_PATTERN, 2, false), (LLAMA_3, 3, false), (QWEN_2, 1, false), (CL100K, 3, true)]
        {
            assert_eq!(Style::of(pattern), Some(Style { digits, whole_tail }));
            assert_eq!(Style::of(&format!("{pattern} ")), None);
        }
        assert_eq!(Style::of(&LLAMA_3.replace("{1,3}", "{1,10}")), None);
    }

    impl Pair {
        fn new(pattern: &str) -> Self {
            Pair { fast: Splitter::new(pattern).unwrap(), regex: Splitter::with_regex(pattern).unwrap() }
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
        let pairs = pairs();
        let mut text = String::new();
        for character in '\0'..=char::MAX {
            // Alone at the start and the end, doubled, after and before each class, and after an apostrophe.
            text.clear();
            for context in [" x", "1x", "\n", "  ", ".", "a", "'", "'l", "\u{a0}", "\t\n ", " !", "12"] {
                text.push(character);
                text.push_str(context);
            }
            text.extend([character, character]);
            pairs.iter().for_each(|pair| pair.check(&text));
        }
    }

    #[test]
    fn random_strings_of_telling_characters() {
        let pairs = pairs();
        let alphabet: Vec<char> =
            "aZsStTdmlLvVrReEſKéß中ह٣½1290   \t\r\n\n\u{b}\u{85}\u{a0}\u{2028}\u{3000}''’.,!$_-\u{301}\u{200d}😀\0"
                .chars()
                .collect();
        let mut random = Random::new(1);
        for _ in 0..200_000 {
            let length = random.below(24);
            let text = (0..length).map(|_| alphabet[random.below(alphabet.len())]).collect::<String>();
            pairs.iter().for_each(|pair| pair.check(&text));
        }
    }

    #[test]
    #[ignore = "ten seconds; run by runtests.sh --all"]
    fn millions_of_random_strings() {
        let pair = Pair::new(SPLIT_PATTERN);
        let telling: Vec<char> = "aZsTdlvrReEſé中٣½129   \t\r\n\u{85}\u{a0}''.,!_\u{301}😀".chars().collect();
        let mut random = Random::new(12);
        for _ in 0..5_000_000 {
            let wide = random.below(3) == 0;
            let character = |random: &mut Random| {
                if wide { random.scalar() } else { telling[random.below(telling.len())] }
            };
            let text: String = (0..random.below(24)).map(|_| character(&mut random)).collect();
            pair.check(&text);
        }
    }

    #[test]
    fn random_strings_longer_than_a_window() {
        let pairs = pairs();
        let plain: Vec<char> = "aZsStTdmlLvVrReE1290   \t\r\n\n\u{b}''.,!$_".chars().collect();
        let mut random = Random::new(11);
        for round in 0..40_000 {
            // All ASCII, or one other character in 40; single characters, or runs that reach over windows.
            let longest_run = [1, 1, 4, 70][round % 4];
            let mut text = String::new();
            while text.len() < 300 {
                let wide = round % 3 == 0 && random.below(40) == 0;
                let character = if wide { random.scalar() } else { plain[random.below(plain.len())] };
                text.extend(std::iter::repeat_n(character, 1 + random.below(longest_run)));
            }
            pairs.iter().for_each(|pair| pair.check(&text));
        }
    }

    #[test]
    fn random_strings_of_any_characters() {
        let pairs = pairs();
        let mut random = Random::new(2);
        for _ in 0..20_000 {
            let text: String = (0..random.below(40)).map(|_| random.scalar()).collect();
            pairs.iter().for_each(|pair| pair.check(&text));
        }
    }
}
