//! One small class for every Unicode scalar value: all that the default split pattern asks of a character.

use std::sync::LazyLock;

/// What the split pattern can tell apart. The order is of no meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Class {
    /// None of the below: punctuation, symbols, marks, control characters, unassigned.
    Other,
    /// `\p{L}`
    Letter,
    /// `\p{N}`
    Number,
    /// `\s` except carriage return and line feed.
    Space,
    /// `\r` or `\n`, which the pattern treats apart from other white space.
    Newline,
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
    let mut flat = vec![Class::Other; 0x11_0000];
    for (pattern, class) in
        [(r"\p{L}", Class::Letter), (r"\p{N}", Class::Number), (r"\s", Class::Space), (r"[\r\n]", Class::Newline)]
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
            ('a', Class::Letter),
            ('ſ', Class::Letter),
            ('中', Class::Letter),
            ('7', Class::Number),
            ('½', Class::Number),
            ('٣', Class::Number),
            (' ', Class::Space),
            ('\u{85}', Class::Space),
            ('\u{3000}', Class::Space),
            ('\r', Class::Newline),
            ('\n', Class::Newline),
            ('\'', Class::Other),
            ('\u{301}', Class::Other),
            ('\u{200b}', Class::Other),
            ('\u{10ffff}', Class::Other),
        ] {
            assert_eq!(CLASSES.get(character as u32), class, "{character:?}");
        }
    }
}
