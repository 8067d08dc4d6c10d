use super::*;
use crate::split::SPLIT_PATTERN;
use crate::tests::support::{Random, naive_train};

#[test]
fn a_batch_equals_its_texts_one_by_one() {
    let mut random = Random::new(9);
    let words: Vec<_> = (0..10).map(|_| (random.word(12, 3), 1)).collect();
    let model = Model::new(Vocab::from_merges(&naive_train(&words, 300)), Splitter::new(SPLIT_PATTERN).unwrap());
    let texts: Vec<String> = (0..120)
        .map(|index| match index % 10 {
            0 => String::new(),
            _ => String::from_utf8(random.word(5000, 3)).unwrap(),
        })
        .collect();
    let single: Vec<Vec<u32>> = texts.iter().map(|text| model.encode(text).unwrap()).collect();
    for threads in [None, Some(1), Some(2), Some(50)] {
        let mut found = Vec::new();
        for block in model.encode_batch(&texts, threads, |id| id).unwrap() {
            let mut start = 0;
            for end in block.ends {
                found.push(block.ids[start..end].to_vec());
                start = end;
            }
        }
        assert_eq!(found, single, "{threads:?} threads");
        let ids = |block: Encoded<u16>| block.ids.into_iter().map(u32::from);
        let narrow = model.encode_batch(&texts, threads, |id| id as u16).unwrap().into_iter().flat_map(ids);
        assert!(narrow.eq(single.concat()), "{threads:?} threads");
    }
    assert_eq!(model.encode_batch::<&str, _>(&[], Some(4), |id| id).unwrap(), []);
}

#[test]
fn an_error_in_any_block_is_reported() {
    let splitter = Splitter::new(r"(?:a|aa)+(?!\S)b|[^a]").unwrap();
    let model = Model::new(Vocab::from_merges(&[]), splitter);
    let texts = ["x".repeat(BLOCK_BYTES), "a".repeat(200), "x".repeat(BLOCK_BYTES)];
    assert!(model.encode_batch(&texts, Some(2), |id| id).unwrap_err().contains("gave up"));
}
