use std::collections::HashMap;

use super::*;
use crate::split::SPLIT_PATTERN;
use crate::tests::support::{Random, naive_encode, naive_train};

fn check(vocab: &Vocab, worker: &mut Worker, text: &str) {
    let ranks: HashMap<Vec<u8>, u32> =
        (0..vocab.size() as u32).map(|id| (vocab.token(id).unwrap().to_vec(), id)).collect();
    let mut want = Vec::new();
    Splitter::new(SPLIT_PATTERN)
        .unwrap()
        .split(text, |start, end| want.extend(naive_encode(&ranks, &text.as_bytes()[start..end])))
        .unwrap();
    let mut found = Vec::new();
    worker.encode(vocab, text, &mut found).unwrap();
    assert_eq!(found, want, "{text:?}");
    assert_eq!(vocab.decode(&found).unwrap(), text.as_bytes());
}

fn random_text(random: &mut Random, longest: usize, letters: usize) -> String {
    let words = (0..1 + random.below(6)).map(|_| String::from_utf8(random.word(longest, letters)).unwrap());
    words.collect::<Vec<_>>().join(" ")
}

#[test]
fn equals_joining_the_lowest_rank_first_on_trained_vocabularies() {
    let mut random = Random::new(6);
    for round in 0..40 {
        let letters = 1 + round % 4;
        let words: Vec<_> = (0..8).map(|_| (random.word(20, letters), 1)).collect();
        let vocab = Vocab::from_merges(&naive_train(&words, 256 + round as u32 * 2));
        let mut worker = Worker::new(&Splitter::new(SPLIT_PATTERN).unwrap());
        for _ in 0..30 {
            check(&vocab, &mut worker, &random_text(&mut random, 24, letters));
        }
        // Long enough for the heap.
        check(&vocab, &mut worker, &random_text(&mut random, 400, letters));
    }
}

#[test]
fn equals_joining_the_lowest_rank_first_on_arbitrary_vocabularies() {
    let mut random = Random::new(7);
    for _ in 0..60 {
        // Tokens that no training would make: some cannot be reached by merges at all.
        let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        for _ in 0..60 {
            let token = random.word(6, 2);
            if !tokens.contains(&token) {
                tokens.push(token);
            }
        }
        for at in (1..tokens.len()).rev() {
            tokens.swap(at, random.below(at + 1));
        }
        let ranks: Vec<_> = tokens.into_iter().zip(0..).collect();
        let vocab = Vocab::from_ranks(&ranks).unwrap();
        let mut worker = Worker::new(&Splitter::new(SPLIT_PATTERN).unwrap());
        for longest in [4, 12, 30, 300] {
            check(&vocab, &mut worker, &random_text(&mut random, longest, 3));
        }
    }
}

#[test]
fn any_unicode_survives() {
    let mut random = Random::new(8);
    let vocab = Vocab::from_merges(&[(0xc3, 0xa9), (32, 97), (0xe4, 0xb8), (258, 0xad)]);
    let mut worker = Worker::new(&Splitter::new(SPLIT_PATTERN).unwrap());
    for _ in 0..300 {
        let text: String = (0..random.below(30)).map(|_| random.scalar()).collect();
        check(&vocab, &mut worker, &(text + " é a中"));
    }
}
