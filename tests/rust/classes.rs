use super::*;

#[test]
fn classes_of_known_characters() {
    for (character, class) in [
        ('a', Class::LOWER),
        ('ſ', Class::LOWER),
        ('A', Class::UPPER),
        ('ǅ', Class::UPPER),
        ('中', Class::CASELESS),
        ('ʰ', Class::CASELESS),
        ('7', Class::NUMBER),
        ('½', Class::NUMBER),
        ('٣', Class::NUMBER),
        (' ', Class::SPACE),
        ('\u{85}', Class::SPACE),
        ('\u{3000}', Class::SPACE),
        ('\r', Class::NEWLINE),
        ('\n', Class::NEWLINE),
        ('\u{301}', Class::MARK),
        ('\'', Class::OTHER),
        ('\u{200b}', Class::OTHER),
        ('\u{10ffff}', Class::OTHER),
    ] {
        assert_eq!(CLASSES.get(character as u32), class, "{character:?}");
    }
}
