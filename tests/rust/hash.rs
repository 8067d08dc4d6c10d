use super::*;

#[test]
fn short_keys_hold_their_bytes_wherever_they_lie() {
    let text: Vec<u8> = (0..40).collect();
    for start in 0..39 {
        for end in start + 1..=(start + SHORT).min(40) {
            let (bytes, length) = ShortKey::of(&text, start, end).bytes();
            assert_eq!(&bytes[..length], &text[start..end]);
            assert_eq!(ShortKey::of(&text, start, end), ShortKey::of(&text[start..end], 0, end - start));
        }
    }
}
