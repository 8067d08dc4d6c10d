use super::*;
use crate::tests::support::Random;

#[test]
fn all_chunks_are_handed_over_once_and_in_order() {
    let mut random = Random::new(16);
    for _ in 0..2000 {
        let (mut want, mut found) = (Vec::new(), Vec::new());
        let mut add = |start, end| found.push((start, end));
        let start = random.below(9);
        let (mut borders, mut end) = (Borders::from(start), start);
        for _ in 0..random.below(30) {
            let before = end;
            match random.below(4) {
                0 => end = borders.push(before + 1 + random.below(200)),
                1 => {
                    // A gap, as custom patterns leave.
                    borders.hand_over(b"", &mut add);
                    end += 1;
                    borders.restart(end);
                    continue;
                }
                kind => {
                    // Bit 0 is never an end. Few of them or many.
                    let ends =
                        (random.next() & if kind == 2 { random.next() & random.next() } else { u64::MAX }) & !1 | 2;
                    end = borders.push_all(before, ends);
                    let places = (1..WINDOW).filter(|bit| ends >> bit & 1 == 1).map(|bit| before + bit);
                    places.fold(before, |start, end| {
                        want.push((start, end));
                        end
                    });
                }
            }
            if want.last().is_none_or(|&(_, last)| last < end) {
                want.push((before, end));
            }
            if borders.are_many() {
                borders.hand_over(b"", &mut add);
            }
        }
        borders.hand_over(b"", &mut add);
        assert_eq!(found, want);
    }
}
