//! A class for every Unicode scalar value: all that the split patterns ask of a character.

use std::sync::LazyLock;

/// What the split patterns can tell apart, one bit each, and sets of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Class(u8);

impl Class {
    pub const NONE: Class = Class(0);
    /// `[\p{Lu}\p{Lt}]`
    pub const UPPER: Class = Class(1);
    /// `\p{Ll}`
    pub const LOWER: Class = Class(2);
    /// `[\p{Lm}\p{Lo}]`
    pub const CASELESS: Class = Class(4);
    /// `\p{M}`
    pub const MARK: Class = Class(8);
    /// `\p{N}`
    pub const NUMBER: Class = Class(16);
    /// `\s` except carriage return and line feed.
    pub const SPACE: Class = Class(32);
    /// `\r` or `\n`, which most patterns treat apart from other white space.
    pub const NEWLINE: Class = Class(64);
    /// None of these: punctuation, symbols, control characters, unassigned.
    const OTHER: Class = Class(128);
    /// `\p{L}`
    pub const LETTER: Class = Class::UPPER.or(Class::LOWER).or(Class::CASELESS);
    /// `[^\s\p{L}\p{N}]`
    pub const REST: Class = Class::MARK.or(Class::OTHER);
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
/// leaves 140 of 4,352 blocks (36 KB), so the few that real text touches stay in the first cache level.
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

/// The table, built on first use (3 ms).
///
/// It is derived from the regex engine's own tables rather than from a copy of Unicode data, so the
/// hand-written splitter and the engine cannot disagree about a character, whatever version is installed.
pub static CLASSES: LazyLock<ClassTable> = LazyLock::new(build);

fn build() -> ClassTable {
    let mut flat = vec![Class::OTHER; 0x11_0000];
    for (pattern, class) in [
        (r"[\p{Lu}\p{Lt}]", Class::UPPER),
        (r"\p{Ll}", Class::LOWER),
        (r"[\p{Lm}\p{Lo}]", Class::CASELESS),
        (r"\p{M}", Class::MARK),
        (r"\p{N}", Class::NUMBER),
        (r"\s", Class::SPACE),
        (r"[\r\n]", Class::NEWLINE),
    ] {
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
#[path = "../../tests/rust/classes.rs"]
mod tests;
