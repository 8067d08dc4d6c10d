use super::*;
use crate::simd::{Baseline, Job};
use crate::tests::support::{Random, run_each};

#[test]
fn a_full_place_keeps_what_was_seen_again() {
    let mut random = Random::new(14);
    for _ in 0..2000 {
        let mut place = Place::default();
        let tokens = |count| Tokens::of(&[7; MOST][..count]).unwrap();
        let key = |word: &[u8]| ShortKey::of(word, 0, word.len());
        let kept = random.word(12, 3);
        place.put(0, key(&kept), tokens(1 + random.below(MOST)));
        let mut room = [MaybeUninit::new(0); MOST];
        assert!(place.write(Baseline, key(&kept), &mut room) > 0);
        // Others, never looked up, only drive out each other.
        for _ in 0..20 {
            let (other, count) = ([b"x", random.word(12, 2).as_slice()].concat(), 1 + random.below(2));
            let (price, at) = place.cheapest(is_wide(key(&other), tokens(count)));
            assert!(price < DEAREST);
            place.put(at, key(&other), tokens(count));
            let found = [&other, &kept].map(|word| place.find(Baseline, key(word)));
            assert!(!found.contains(&NOWHERE), "{kept:?} {other:?}");
        }
    }
}

#[derive(Clone, Copy)]
struct Check<'a> {
    place: &'a Place,
    key: ShortKey,
    want: usize,
}

impl Job for Check<'_> {
    #[inline(always)]
    fn run(self, simd: impl Simd) {
        assert_eq!(self.place.find(simd, self.key), self.want);
    }
}

#[test]
fn slots_are_found_alike_with_and_without_intrinsics() {
    let mut random = Random::new(15);
    for _ in 0..20_000 {
        let mut place = Place::default();
        let words: Vec<_> = (0..6).map(|_| random.word(10, 1)).collect();
        let keys = words.iter().map(|word| ShortKey::of(word, 0, word.len()));
        for key in keys.clone() {
            if place.find(Baseline, key) == NOWHERE {
                let tokens = Tokens::of(&[3, 1, 4, 1, 5][..1 + random.below(MOST)]).unwrap();
                let (_, at) = place.cheapest(is_wide(key, tokens));
                place.put(at, key, tokens);
            }
            assert!(place.find(Baseline, key) < NOWHERE);
            for key in keys.clone().chain([ShortKey::NONE]) {
                let want = place.find_portable(key, &MASKS[key.tag()]);
                run_each(Check { place: &place, key, want });
            }
        }
    }
}
