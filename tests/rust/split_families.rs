//! The hand-written splitters beside the regex engine.

use crate::split::{SPLIT_PATTERN, Splitter};
use crate::tests::support::Random;
use crate::window::WINDOW;

pub const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
pub const QWEN_2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
pub const CL100K: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s";

pub const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
pub const O200K: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
pub const R50K: &str = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s";

struct Pair {
    fast: Splitter,
    regex: Splitter,
}

/// One pattern of each family.
fn families() -> Vec<Pair> {
    [SPLIT_PATTERN, GPT2, O200K].map(Pair::new).into()
}

/// The default pattern, and one of each other kind.
fn pairs() -> Vec<Pair> {
    [SPLIT_PATTERN, LLAMA_3, QWEN_2, CL100K, &CL100K.replace("{1,3}", "{1,9}"), GPT2, R50K, O200K].map(Pair::new).into()
}

impl Pair {
    fn new(pattern: &str) -> Self {
        Pair { fast: Splitter::new(pattern).unwrap(), regex: Splitter::with_regex(pattern).unwrap() }
    }

    fn check(&self, text: &str) {
        assert_eq!(ends(&self.fast, text), ends(&self.regex, text), "{text:?} by {}", self.fast.pattern());
    }
}

fn ends(splitter: &Splitter, text: &str) -> Vec<usize> {
    let mut ends = vec![0];
    let add = |start, end| {
        assert_eq!(Some(&start), ends.last(), "a gap in {text:?}");
        ends.push(end);
    };
    splitter.split(text, add).unwrap();
    ends
}

/// The patterns of a family have the same classes of characters, so all of them and all contexts are tried on the first
/// scripts only; what lies behind those is of few classes.
#[test]
fn every_scalar_value_in_context() {
    let (pairs, families) = (pairs(), families());
    let mut text = String::new();
    for character in '\0'..=char::MAX {
        // Alone at the start and the end, doubled, after and before each class, and after an apostrophe.
        text.clear();
        let contexts = [" x", "1x", "\n", "'l", ".", "a", "'", "  ", "\u{a0}", "\t\n ", " !", "12"];
        let (tried, contexts) =
            if character < '\u{3100}' { (&pairs, &contexts[..]) } else { (&families, &contexts[..5]) };
        for context in contexts {
            text.push(character);
            text.push_str(context);
        }
        text.extend([character, character]);
        tried.iter().for_each(|pair| pair.check(&text));
    }
}

#[test]
fn random_strings_of_telling_characters() {
    let pairs = pairs();
    let alphabet: Vec<char> =
        "aZsStTdmlLvVrReEſKéß中ह٣½1290   \t\r\n\n\u{b}\u{85}\u{a0}\u{2028}\u{3000}''’.,!/$_-\u{301}\u{200d}ǅʰA😀\0"
            .chars()
            .collect();
    let mut random = Random::new(1);
    for _ in 0..50_000 {
        let length = random.below(24);
        let text = (0..length).map(|_| alphabet[random.below(alphabet.len())]).collect::<String>();
        pairs.iter().for_each(|pair| pair.check(&text));
    }
}

#[test]
#[ignore = "a minute; run by runtests.sh --all"]
fn millions_of_random_strings() {
    let pairs = families();
    let telling: Vec<char> = "aZsTdlvrReEſé中٣½129   \t\r\n\u{85}\u{a0}''.,!/_\u{301}😀EL".chars().collect();
    let mut random = Random::new(12);
    for _ in 0..5_000_000 {
        let wide = random.below(3) == 0;
        let character = |random: &mut Random| {
            if wide { random.scalar() } else { telling[random.below(telling.len())] }
        };
        let text: String = (0..random.below(24)).map(|_| character(&mut random)).collect();
        pairs.iter().for_each(|pair| pair.check(&text));
    }
}

#[test]
fn random_strings_longer_than_a_window() {
    let pairs = pairs();
    let plain: Vec<char> = "aZsStTdmlLvVrReE1290   \t\r\n\n\u{b}''.,!/$_".chars().collect();
    let mut random = Random::new(11);
    for round in 0..10_000 {
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

/// All strings of four telling characters, wherever they lie in a window.
#[test]
fn windows_find_what_the_scan_finds_at_every_place() {
    let telling: Vec<char> = "alLS' \n\t./1é".chars().collect();
    let four = |index: usize| {
        let telling = &telling;
        (0..4).map(move |place| telling[index / telling.len().pow(place) % telling.len()])
    };
    for pair in pairs() {
        for index in 0..telling.len().pow(4) {
            for before in 0..=WINDOW {
                let mut text = "x".repeat(before);
                text.extend(four(index));
                text.push_str(&"z".repeat(WINDOW));
                let mut by_scan = vec![0];
                pair.fast.split_without_windows(&text, |_, end| by_scan.push(end));
                assert_eq!(ends(&pair.fast, &text), by_scan, "{text:?} by {}", pair.fast.pattern());
            }
        }
    }
}
