use super::Style;
use crate::split::SPLIT_PATTERN;
use crate::tests::split_families::{CL100K, LLAMA_3, QWEN_2};

#[test]
fn patterns_are_recognised() {
    for (pattern, digits, whole_tail) in
        [(SPLIT_PATTERN, 2, false), (LLAMA_3, 3, false), (QWEN_2, 1, false), (CL100K, 3, true)]
    {
        assert_eq!(Style::of(pattern), Some(Style { digits, whole_tail }));
        assert_eq!(Style::of(&format!("{pattern} ")), None);
    }
    assert_eq!(Style::of(&LLAMA_3.replace("{1,3}", "{1,10}")), None);
}
