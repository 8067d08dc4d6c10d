use super::*;
use crate::classes::CLASSES;
use crate::scan::{Rules, Text};
use crate::tests::split_families::{GPT2, O200K, R50K};

impl Splitter {
    /// [`Splitter::split`] of a hand-written splitter, by its scan alone.
    pub fn split_without_windows(&self, text: &str, chunks: impl Chunks) {
        match &self.engine {
            Engine::Default(style) => scan_all(*style, text.as_bytes(), chunks),
            Engine::Gpt2 => scan_all(Gpt2, text.as_bytes(), chunks),
            Engine::O200k => scan_all(O200k, text.as_bytes(), chunks),
            Engine::Regex(_) => unreachable!("{:?} has no hand-written splitter", self.pattern),
        }
    }
}

/// [`scan::split`] without a look at windows.
fn scan_all(rules: impl Rules, bytes: &[u8], mut chunks: impl Chunks) {
    let text = Text { bytes, table: &CLASSES };
    let mut start = 0;
    while start < bytes.len() {
        let end = rules.chunk_end(&text, start);
        chunks.add(bytes, &[start, end]);
        start = end;
    }
}

fn chunks<'a>(splitter: &Splitter, text: &'a str) -> Vec<&'a str> {
    let mut found = Vec::new();
    splitter.split(text, |start, end| found.push(&text[start..end])).unwrap();
    found
}

#[test]
fn splits_as_the_pattern_says() {
    let text = "I'll pay 12345 $$\n\n  for\tit,  OK?\r\n 'S x ";
    let want = vec![
        "I", "'ll", " pay", " ", "12", "34", "5", " $$\n\n", " ", " for", "\tit", ",", " ", " OK", "?\r\n", " '", "S",
        " x", " ",
    ];
    assert_eq!(chunks(&Splitter::new(SPLIT_PATTERN).unwrap(), text), want);
    assert_eq!(chunks(&Splitter::with_regex(SPLIT_PATTERN).unwrap(), text), want);
}

#[test]
fn custom_patterns_drop_what_they_do_not_match() {
    let splitter = Splitter::new(r"[a-z]+|x*").unwrap();
    assert_eq!(chunks(&splitter, "ab 12 cd"), vec!["ab", "cd"]);
    let many = "ab1cd".repeat(300);
    assert_eq!(chunks(&splitter, &many), [["ab"].as_slice(), &["cdab"; 299], &["cd"]].concat());
}

#[test]
fn a_broken_pattern_is_a_one_line_error() {
    let error = Splitter::new("(unclosed").unwrap_err();
    assert!(error.contains("\"(unclosed\"") && !error.contains('\n'), "{error}");
}

#[test]
fn a_pattern_that_gives_up_is_an_error() {
    let splitter = Splitter::with_regex(r"(?:a|aa)+(?!\S)b").unwrap();
    let error = splitter.split(&"a".repeat(200), |_, _| {}).unwrap_err();
    assert!(error.contains("gave up on a text of 200 bytes") && !error.contains('\n'), "{error}");
}

#[test]
fn patterns_are_recognised() {
    let engine = |pattern: &str| Splitter::new(pattern).unwrap().engine;
    let near_miss = |pattern: &str| matches!(engine(&format!("{pattern} ")), Engine::Regex(_));
    assert!(matches!(engine(SPLIT_PATTERN), Engine::Default(_)) && near_miss(SPLIT_PATTERN));
    for pattern in [GPT2, R50K, &GPT2.replace(r"\p{L}+", r"[\p{L}]+").replace(r"\p{N}+", r"[\p{N}]+")] {
        assert!(matches!(engine(pattern), Engine::Gpt2) && near_miss(pattern), "{pattern}");
    }
    assert!(matches!(engine(O200K), Engine::O200k) && near_miss(O200K));
}
