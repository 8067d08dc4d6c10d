use super::Gpt2;
use crate::tests::split_families::{GPT2, R50K};

#[test]
fn patterns_are_recognised() {
    for pattern in [GPT2, R50K, &GPT2.replace(r"\p{L}+", r"[\p{L}]+").replace(r"\p{N}+", r"[\p{N}]+")] {
        assert_eq!(Gpt2::of(pattern), Some(Gpt2));
        assert_eq!(Gpt2::of(&format!("{pattern} ")), None);
    }
}
