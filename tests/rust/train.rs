use super::*;
use crate::tests::support::{Random, naive_train};

fn train(words: &[(Vec<u8>, u64)], vocab_size: u32) -> Vec<(u32, u32)> {
    let trainer = Trainer::from_words(|word| words.iter().for_each(|(bytes, count)| word(bytes, *count))).unwrap();
    trainer.learn(vocab_size, || Ok::<(), ()>(())).unwrap()
}

#[test]
fn equals_recounting_every_time() {
    let mut random = Random::new(4);
    for round in 0..600 {
        // Few letters: many runs and overlaps, which is where incremental counting goes wrong.
        let letters = 1 + round % 4;
        let words: Vec<(Vec<u8>, u64)> =
            (0..1 + random.below(12)).map(|_| (random.word(24, letters), 1 + random.below(5) as u64)).collect();
        assert_eq!(train(&words, 300), naive_train(&words, 300), "{words:?}");
    }
}

#[test]
fn ties_go_to_the_lowest_pair() {
    let words: Vec<(Vec<u8>, u64)> = ["zy", "ac", "ab", "ba"].iter().map(|w| (w.as_bytes().to_vec(), 7)).collect();
    let want = [(97, 98), (97, 99), (98, 97), (122, 121)];
    assert_eq!(train(&words, 1000), want);
}

#[test]
fn counts_beyond_32_bits() {
    let words = [(b"ab".to_vec(), 1 << 40), (b"cd".to_vec(), (1 << 40) + 1)];
    assert_eq!(train(&words, 257), [(99, 100)]);
}

#[test]
fn no_two_tokens_have_the_same_bytes() {
    let mut random = Random::new(5);
    for _ in 0..100 {
        let words: Vec<(Vec<u8>, u64)> = (0..20).map(|_| (random.word(40, 2), 1)).collect();
        let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        for (a, b) in train(&words, 1000) {
            tokens.push([tokens[a as usize].clone(), tokens[b as usize].clone()].concat());
        }
        let distinct: std::collections::HashSet<_> = tokens.iter().collect();
        assert_eq!(distinct.len(), tokens.len());
    }
}

#[test]
fn an_interrupt_stops_it() {
    let trainer = Trainer::from_words(|word| word(b"abcdef", 1)).unwrap();
    let mut asked = 0;
    let stop = || {
        asked += 1;
        if asked == 3 { Err("stop") } else { Ok(()) }
    };
    assert_eq!(trainer.learn(1000, stop), Err("stop"));
}
