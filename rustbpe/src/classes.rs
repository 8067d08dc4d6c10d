//! A class for every Unicode scalar value: all that the split patterns ask of a character.

use std::sync::LazyLock;

/// What the split patterns can tell apart, one bit each, and sets of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Class(u8);

impl Class {
    pub const NONE: Class = Class(0);
    /// `\p{L}`
    pub const LETTER: Class = Class(1);
    /// `\p{N}`
    pub const NUMBER: Class = Class(2);
    /// `\s` except carriage return and line feed.
    pub const SPACE: Class = Class(4);
    /// `\r` or `\n`, which most patterns treat apart from other white space.
    pub const NEWLINE: Class = Class(8);
    /// `[^\s\p{L}\p{N}]`: punctuation, symbols, marks, control characters, unassigned.
    pub const REST: Class = Class(16);
    /// `\s`
    pub const WHITE: Class = Class::SPACE.or(Class::NEWLINE);

    /// Both sets together.
    pub const fn or(self, other: Class) -> Class {
        Class(self.0 | other.0)
    }

    /// Whether it is one of the classes in `any`.
    #[inline(always)]
    pub const fn is(self, any: Class) -> bool {
        self.0 & any.0 != 0
    }
}

const BLOCK: usize = 256;

/// Two-level table: code point / 256 -> block, block -> 256 classes. Equal blocks are stored once, which
/// leaves 133 of 4,352 blocks (34 KB), so the few that real text touches stay in the first cache level.
pub struct ClassTable {
    block_of: Vec<u16>,
    classes: Vec<Class>,
}

impl ClassTable {
    /// The class of a code point (a scalar value; anything beyond U+10FFFF panics).
    #[inline(always)]
    pub fn get(&self, code_point: u32) -> Class {
        let block = self.block_of[code_point as usize / BLOCK] as usize;
        self.classes[block * BLOCK + code_point as usize % BLOCK]
    }
}

/// The table, built on first use (2 ms).
///
/// It is derived from the regex engine's own tables rather than from a copy of Unicode data, so the
/// hand-written splitter and the engine cannot disagree about a character, whatever version is installed.
pub static CLASSES: LazyLock<ClassTable> = LazyLock::new(build);

fn build() -> ClassTable {
    let mut flat = vec![Class::REST; 0x11_0000];
    for (pattern, class) in
        [(r"\p{L}", Class::LETTER), (r"\p{N}", Class::NUMBER), (r"\s", Class::SPACE), (r"[\r\n]", Class::NEWLINE)]
    {
        for (first, last) in ranges(pattern) {
            flat[first as usize..=last as usize].fill(class);
        }
    }
    let mut table = ClassTable { block_of: Vec::new(), classes: Vec::new() };
    for block in flat.chunks(BLOCK) {
        let known = table.classes.chunks(BLOCK).position(|seen| seen == block);
        let index = known.unwrap_or_else(|| {
            table.classes.extend_from_slice(block);
            table.classes.len() / BLOCK - 1
        });
        table.block_of.push(index as u16);
    }
    table
}

/// The code point ranges that a one-character pattern matches.
fn ranges(pattern: &str) -> Vec<(u32, u32)> {
    let hir = regex_syntax::parse(pattern).expect("a constant pattern");
    let regex_syntax::hir::HirKind::Class(regex_syntax::hir::Class::Unicode(class)) = hir.kind() else {
        unreachable!("{pattern} is a Unicode class");
    };
    class.iter().map(|range| (range.start() as u32, range.end() as u32)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_of_known_characters() {
        for (character, class) in [
            ('a', Class::LETTER),
            ('ſ', Class::LETTER),
            ('中', Class::LETTER),
            ('7', Class::NUMBER),
            ('½', Class::NUMBER),
            ('٣', Class::NUMBER),
            (' ', Class::SPACE),
            ('\u{85}', Class::SPACE),
            ('\u{3000}', Class::SPACE),
            ('\r', Class::NEWLINE),
            ('\n', Class::NEWLINE),
            ('\'', Class::REST),
            ('\u{301}', Class::REST),
            ('\u{200b}', Class::REST),
            ('\u{10ffff}', Class::REST),
        ] {
            assert_eq!(CLASSES.get(character as u32), class, "{character:?}");
        }
    }
}
