use std::collections::HashMap;

use super::*;
use crate::split::SPLIT_PATTERN;
use crate::tests::support::Random;

#[test]
fn counts_equal_a_plain_map_with_any_number_of_threads() {
    let splitter = Splitter::new(SPLIT_PATTERN).unwrap();
    let mut random = Random::new(3);
    let texts: Vec<String> = (0..300)
        .map(|_| {
            let words = (0..random.below(60)).map(|_| String::from_utf8(random.word(20, 3)).unwrap());
            words.collect::<Vec<_>>().join(" ")
        })
        .collect();
    let mut want: HashMap<Vec<u8>, u64> = HashMap::new();
    for text in &texts {
        splitter.split(text, |start, end| *want.entry(text[start..end].into()).or_default() += 1).unwrap();
    }
    for threads in [1, 2, 3, 8] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let counter = pool.install(|| {
            let mut counter = WordCounter::new(&splitter);
            for part in texts.chunks(70) {
                let mut documents = Documents::default();
                part.iter().for_each(|text| documents.push(text));
                counter.count(&documents).unwrap();
            }
            counter
        });
        let mut found = HashMap::new();
        counter.each(|word, count| assert!(found.insert(word.to_vec(), count).is_none()));
        assert_eq!(found, want, "{threads} threads");
        assert_eq!(counter.distinct(), want.len());
    }
}

#[test]
fn pruning_drops_the_rarest_together() {
    let text = (1..=40).flat_map(|n| std::iter::repeat_n(format!(" {}", "abcdefgh".repeat(n)), n)).collect::<String>();
    let mut counter = WordCounter::new(&Splitter::new(SPLIT_PATTERN).unwrap());
    let mut documents = Documents::default();
    documents.push(&text);
    counter.count(&documents).unwrap();
    counter.prune(40);
    assert_eq!(counter.distinct(), 40);
    counter.prune(20);
    let mut counts = Vec::new();
    counter.each(|_, count| counts.push(count));
    counts.sort_unstable();
    assert_eq!(counts, (26..=40).collect::<Vec<_>>());
}

#[test]
fn documents_are_cut_between_characters() {
    for (most, want) in [(0, vec![]), (1, vec!["é"]), (2, vec!["éa"]), (3, vec!["éa", "b"]), (9, vec!["éa", "bcd"])]
    {
        let mut documents = Documents::default();
        documents.push("éa");
        documents.push("bcd");
        assert_eq!(documents.keep_chars(most), most.min(5));
        let found: Vec<_> = (0..documents.count()).map(|index| documents.get(index)).collect();
        assert_eq!(found, want, "{most}");
    }
}

#[test]
fn runs_cover_every_document_once() {
    let mut documents = Documents::default();
    for text in ["", "abc", "", "d", "efghijkl", ""] {
        documents.push(text);
    }
    for parts in 1..9 {
        let all: Vec<usize> = documents.runs(parts).into_iter().flatten().collect();
        assert_eq!(all, (0..6).collect::<Vec<_>>(), "{parts} parts");
    }
}
