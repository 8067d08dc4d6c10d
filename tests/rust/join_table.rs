use super::*;
use crate::tests::support::Random;

#[test]
fn finds_what_is_there_and_nothing_else() {
    let mut random = Random::new(13);
    for size in [0, 1, 2, 7, 100, 5000, 70_000] {
        for range in [40, 300, 1 << 20, (1 << 21) - 1, NONE as usize] {
            let mut pair = || (random.below(range) as u32, random.below(range) as u32);
            let joins: HashMap<(u32, u32), u32> = (0..size).map(|id| (pair(), id % range as u32)).collect();
            let list: Vec<_> = joins.iter().map(|(&(left, right), &id)| (left, right, id)).collect();
            let table = JoinTable::new(&list, range);
            for (&(left, right), &id) in &joins {
                assert_eq!(table.get(left, right), id);
            }
            for _ in 0..10_000 {
                let (left, right) = pair();
                assert_eq!(table.get(left, right), joins.get(&(left, right)).copied().unwrap_or(NONE));
            }
        }
    }
}
