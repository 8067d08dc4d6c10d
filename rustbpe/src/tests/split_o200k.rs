use super::O200k;
use crate::tests::split_families::O200K;

#[test]
fn patterns_are_recognised() {
    assert_eq!(O200k::of(O200K), Some(O200k));
    assert_eq!(O200k::of(&format!("{O200K} ")), None);
}
