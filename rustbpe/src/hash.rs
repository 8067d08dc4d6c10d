//! One fast hash for short keys. It is not made to resist chosen keys: in the encoder its tables are fixed once
//! built, so hostile text cannot make them slow; in training, the corpus is the user's own.

use std::hash::{BuildHasherDefault, Hasher};

pub const K0: u64 = 0x9e37_79b9_7f4a_7c15;
pub const K1: u64 = 0xd1b5_4a32_d192_ed03;

/// Mixes two words into one: the two halves of their 128-bit product, folded.
#[inline(always)]
pub fn mix(a: u64, b: u64) -> u64 {
    let product = u128::from(a ^ K0) * u128::from(b ^ K1);
    (product as u64) ^ (product >> 64) as u64
}

/// Hasher for `HashMap`s whose keys are byte strings or integers.
#[derive(Default)]
pub struct FastHasher(u64);

/// `HashMap<K, V, Fast>`: several times as fast as the standard SipHash on keys of a few bytes.
pub type Fast = BuildHasherDefault<FastHasher>;

impl Hasher for FastHasher {
    #[inline]
    fn write(&mut self, bytes: &[u8]) {
        for part in bytes.chunks(16) {
            let key = u128::from_le_bytes(padded(part));
            self.0 = mix(self.0 ^ key as u64, (key >> 64) as u64);
        }
    }

    #[inline]
    fn write_u64(&mut self, value: u64) {
        self.0 = mix(self.0, value);
    }

    #[inline]
    fn write_usize(&mut self, value: usize) {
        self.write_u64(value as u64);
    }

    #[inline]
    fn finish(&self) -> u64 {
        self.0
    }
}

/// The longest chunk that fits a [`ShortKey`].
pub const SHORT: usize = 15;

/// Where a key has its tag: 16 less the length of its chunk.
pub const TAG_AT: u32 = 57;
pub const TAG: u64 = 15 << TAG_AT;

/// By the length of a chunk: which bits of the 16 bytes from its start are its key. Looked up, for shifting 128 bits by a
/// variable takes a dozen instructions.
static LOW: [u64; 16] = first_bytes(0);
static HIGH: [u64; 16] = first_bytes(8);

/// By the length of a chunk: its tag.
static TAGS: [u64; 16] = {
    let mut tags = [0; 16];
    let mut length = 1;
    while length < 16 {
        tags[length] = (16 - length as u64) << TAG_AT;
        length += 1;
    }
    tags
};

/// As many of eight bytes as a chunk of the index's length reaches beyond `skipped`.
const fn first_bytes(skipped: u32) -> [u64; 16] {
    let mut masks = [0; 16];
    let mut length: u32 = 0;
    while length < 16 {
        masks[length as usize] = match 8 * length.saturating_sub(skipped) {
            bits @ 0..64 => (1 << bits) - 1,
            _ => u64::MAX,
        };
        length += 1;
    }
    masks
}

/// Asks the processor for the cache line at this place of a table ahead of its use.
#[inline(always)]
pub fn prefetch<T>(table: &[T], at: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch is a hint: it cannot fault, whatever the address, and changes nothing.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(table.as_ptr().wrapping_add(at).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (table, at);
}

/// A chunk of 1 to 15 bytes as two integers: its bytes, and in the highest byte its tag. Comparing and
/// hashing it costs a few instructions and no look at memory. 99.7 % of the chunks of English text are this short.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct ShortKey {
    pub low: u64,
    pub high: u64,
}

impl ShortKey {
    /// Equal to no key of a chunk, and to nothing in a table of them.
    pub const NONE: ShortKey = ShortKey { low: 0, high: 1 };

    /// The key of `text[start..end]`, which must be 1 to [`SHORT`] bytes long. Never equal to the default key.
    #[inline(always)]
    pub fn of(text: &[u8], start: usize, end: usize) -> Self {
        // Away from the end of the text, one load of 16 bytes and a mask beat a copy of `length` bytes.
        if start < text.len().saturating_sub(15) {
            // SAFETY: these are 16 bytes of the text.
            let bytes = unsafe { text.as_ptr().add(start).cast::<[u8; 16]>().read_unaligned() };
            Self::cut(bytes, end - start)
        } else {
            Self::at_the_end(&text[start..end])
        }
    }

    #[cold]
    fn at_the_end(chunk: &[u8]) -> Self {
        Self::cut(padded(chunk), chunk.len())
    }

    /// The key of the first `length` bytes, 1 to [`SHORT`].
    #[inline(always)]
    fn cut(bytes: [u8; 16], length: usize) -> Self {
        debug_assert!((1..=SHORT).contains(&length));
        let (all, length) = (u128::from_le_bytes(bytes), length % 16);
        ShortKey { low: all as u64 & LOW[length], high: (all >> 64) as u64 & HIGH[length] | TAGS[length] }
    }

    /// The bytes of the key.
    pub fn bytes(self) -> ([u8; 16], usize) {
        let length = 16 - self.tag();
        let all = u128::from(self.low) | u128::from(self.high & !TAG) << 64;
        (all.to_le_bytes(), length)
    }

    /// 16 less the length.
    #[inline(always)]
    pub fn tag(self) -> usize {
        (self.high >> TAG_AT) as usize % 16
    }

    /// A well mixed hash.
    #[inline(always)]
    pub fn hash(self) -> u64 {
        mix(self.low, self.high)
    }

    /// A cheaper hash, of which the highest bits are good.
    #[inline(always)]
    pub fn quick_hash(self) -> u64 {
        self.low.wrapping_mul(K0) ^ self.high.wrapping_mul(K1)
    }
}

/// At most 16 bytes, and zeros.
fn padded(part: &[u8]) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..part.len()].copy_from_slice(part);
    bytes
}

#[cfg(test)]
#[path = "../../tests/rust/hash.rs"]
mod tests;
