use super::*;
use crate::hash::SHORT;
use crate::tests::support::Random;

fn known(cache: &mut Cache, key: ShortKey) -> Option<Vec<u32>> {
    let place = cache.first(key) as u32;
    let mut room = [MaybeUninit::new(0); MOST];
    let (_, count) = cache.write(Baseline, &[Wanted { key, place }], &mut room);
    // SAFETY: all were initialised to begin with.
    let mut ids = room[..count].iter().map(|id| unsafe { id.assume_init() }).collect();
    (count > 0 || cache.write_second(key, &mut ids)).then_some(ids)
}

#[test]
fn what_is_found_is_what_was_put() {
    let mut random = Random::new(12);
    let mut cache = Cache::default();
    let mut found = 0;
    for round in 0..200_000 {
        // Of all lengths, and alike but for zeros at the end.
        let mut word = random.word(6, 6);
        word.resize(word.len() + random.below(SHORT - word.len() + 1), 0);
        let key = ShortKey::of(&word, 0, word.len());
        let number = key.hash();
        let ids: Vec<u32> = (0..1 + number as usize % MOST).map(|at| number as u32 >> (8 - at)).collect();
        let ids: Vec<u32> = ids.iter().map(|id| id & 0xff_ffff).collect();
        if let Some(tokens) = known(&mut cache, key) {
            assert_eq!(tokens, ids, "{word:?}");
            found += 1;
        } else {
            cache.put(key, &ids);
            assert_eq!(known(&mut cache, key), Some(ids), "{word:?}");
        }
        if round % 32 == 0 {
            cache.grow_if_small();
        }
    }
    assert!(found > 20_000 && cache.places.len() <= LARGEST, "{found} found in {} places", cache.places.len());
}

#[test]
fn tokens_that_do_not_fit_are_not_remembered() {
    let mut cache = Cache::default();
    let key = ShortKey::of(b"abc", 0, 3);
    for ids in [&[1, 2, 3, 4, 5, 6][..], &[1 << 24]] {
        cache.put(key, ids);
        assert_eq!(known(&mut cache, key), None);
    }
    let most = vec![0, (1 << 24) - 1];
    cache.put(key, &most);
    assert_eq!(known(&mut cache, key), Some(most));
}

fn known_long(cache: &LongCache, chunk: &[u8], hash: u64) -> Option<Vec<u32>> {
    let mut ids = Vec::new();
    cache.write(chunk, hash, &mut ids).then_some(ids)
}

#[test]
fn long_chunks_are_told_apart() {
    let mut cache = LongCache::default();
    assert_eq!(known_long(&cache, b"one", 5), None);
    cache.put(b"one", 5, &[1, u32::MAX]);
    assert_eq!(known_long(&cache, b"one", 5), Some(vec![1, u32::MAX]));
    for (other, hash) in [(&b"two"[..], 5), (b"on", 5), (b"ones", 5), (b"one", 6)] {
        assert_eq!(known_long(&cache, other, hash), None);
    }
    cache.put(&[b'x'; LONGEST + 1], 5, &[2]);
    assert_eq!(known_long(&cache, &[b'x'; LONGEST + 1], 5), None);
}

#[test]
fn long_chunks_take_bounded_memory() {
    let mut cache = LongCache::default();
    let mut forgotten = 0;
    for number in 0..20_000_u64 {
        let chunk = |number: u64| [number.to_le_bytes(); LONGEST / 8].concat();
        cache.put(&chunk(number), number, &[1; LONGEST]);
        assert_eq!(known_long(&cache, &chunk(number), number), Some(vec![1; LONGEST]));
        let before = number.saturating_sub(1);
        forgotten += usize::from(known_long(&cache, &chunk(before), before).is_none());
        assert!(cache.entries.len() <= LONG_BYTES + 5 * LONGEST + 4);
    }
    assert!((20..30).contains(&forgotten), "{forgotten}");
}
