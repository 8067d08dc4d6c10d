//! What stands in 64 bytes of text, one bit a byte: so a splitter can look at all of them with a few operations.

use crate::simd::Simd;

/// Bytes looked at together: the bits of a word.
pub const WINDOW: usize = 64;

/// Which bytes of a window are what; bit i is byte i. Bytes from 0x80 on are `wide` and nothing else.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Masks {
    pub letter: u64,
    /// Capital letters.
    pub upper: u64,
    pub number: u64,
    /// `\r` and `\n`.
    pub newline: u64,
    /// Other white space: the plain space, tab, vertical tab and form feed.
    pub space: u64,
    /// The plain space only.
    pub blank: u64,
    pub apostrophe: u64,
    pub slash: u64,
    pub wide: u64,
}

impl Masks {
    /// Splitting 100 MB of English takes 0.06 s with the baseline instructions of x86-64, and 0.13 s with portable code.
    #[inline(always)]
    pub fn of<S: Simd>(_simd: S, window: &[u8; WINDOW]) -> Self {
        #[cfg(target_arch = "x86_64")]
        return if S::AVX2 { by::<x86::ThirtyTwo>(window) } else { by::<x86::Sixteen>(window) };
        #[cfg(not(target_arch = "x86_64"))]
        return by::<Eight>(window);
    }
}

/// Bytes that are looked at together. What comes of a comparison has the highest bit of each byte set or not.
trait Lanes: Copy {
    const COUNT: usize;
    /// From `COUNT` bytes.
    fn load(bytes: &[u8]) -> Self;
    /// This bit set in all bytes.
    fn with(self, bit: u8) -> Self;
    fn or(self, other: Self) -> Self;
    fn equal(self, byte: u8) -> Self;
    /// `count` values from `first` on, all below 0x80.
    fn among(self, first: u8, count: u8) -> Self;
    /// The highest bits.
    fn bits(self) -> u64;
}

#[inline(always)]
fn by<L: Lanes>(window: &[u8; WINDOW]) -> Masks {
    let mut masks = Masks::default();
    for (index, bytes) in window.chunks_exact(L::COUNT).enumerate() {
        let bytes = L::load(bytes);
        let bits = |lanes: L| lanes.bits() << (L::COUNT * index);
        let newline = bits(bytes.equal(b'\n').or(bytes.equal(b'\r')));
        let blank = bits(bytes.equal(b' '));
        masks.letter |= bits(bytes.with(0x20).among(b'a', 26));
        masks.upper |= bits(bytes.among(b'A', 26));
        masks.number |= bits(bytes.among(b'0', 10));
        masks.newline |= newline;
        masks.space |= bits(bytes.among(b'\t', 5)) & !newline | blank;
        masks.blank |= blank;
        masks.apostrophe |= bits(bytes.equal(b'\''));
        masks.slash |= bits(bytes.equal(b'/'));
        masks.wide |= bits(bytes);
    }
    masks
}

/// Without intrinsics: in the bytes of a word.
#[cfg(any(test, not(target_arch = "x86_64")))]
#[derive(Clone, Copy)]
struct Eight(u64);

#[cfg(any(test, not(target_arch = "x86_64")))]
impl Eight {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const HIGH: u64 = 0x80 * Self::ONES;
}

#[cfg(any(test, not(target_arch = "x86_64")))]
impl Lanes for Eight {
    const COUNT: usize = 8;

    #[inline(always)]
    fn load(bytes: &[u8]) -> Self {
        Eight(u64::from_le_bytes(bytes.try_into().expect("eight bytes")))
    }

    #[inline(always)]
    fn with(self, bit: u8) -> Self {
        Eight(self.0 | (u64::from(bit) * Self::ONES))
    }

    #[inline(always)]
    fn or(self, other: Self) -> Self {
        Eight(self.0 | other.0)
    }

    #[inline(always)]
    fn equal(self, byte: u8) -> Self {
        self.among(byte, 1)
    }

    #[inline(always)]
    fn among(self, first: u8, count: u8) -> Self {
        let low = self.0 & !Self::HIGH;
        // No byte carries into the next: both sums are below 256.
        let from_first = low + u64::from(0x80 - first) * Self::ONES;
        let beyond_last = low + u64::from(0x80 - count - first) * Self::ONES;
        Eight(from_first & !beyond_last & !self.0)
    }

    #[inline(always)]
    fn bits(self) -> u64 {
        // The product moves bit 7 of byte i to bit 56 + i.
        ((self.0 & Self::HIGH) >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::Lanes;

    /// With SSE2, which is part of every x86-64.
    #[derive(Clone, Copy)]
    pub struct Sixteen(__m128i);

    /// With AVX2.
    #[derive(Clone, Copy)]
    pub struct ThirtyTwo(__m256i);

    macro_rules! lanes {
        ($lanes:ident $count:literal $unsigned:ident: $load:ident $set:ident $or:ident $equal:ident $add:ident $greater:ident
         $bits:ident) => {
            // SAFETY, of all: the instructions are there, or nobody would ask for these lanes; and the load reads as many
            // bytes as there must be, aligned or not.
            #[allow(unused_unsafe, reason = "newer compilers need less of it")]
            impl Lanes for $lanes {
                const COUNT: usize = $count;

                #[inline(always)]
                fn load(bytes: &[u8]) -> Self {
                    debug_assert_eq!(bytes.len(), $count);
                    unsafe { $lanes($load(bytes.as_ptr().cast())) }
                }

                #[inline(always)]
                fn with(self, bit: u8) -> Self {
                    unsafe { $lanes($or(self.0, $set(bit as i8))) }
                }

                #[inline(always)]
                fn or(self, other: Self) -> Self {
                    unsafe { $lanes($or(self.0, other.0)) }
                }

                #[inline(always)]
                fn equal(self, byte: u8) -> Self {
                    unsafe { $lanes($equal(self.0, $set(byte as i8))) }
                }

                #[inline(always)]
                fn among(self, first: u8, count: u8) -> Self {
                    // Shifted so that its first becomes the lowest signed number, a range is one comparison.
                    unsafe {
                        let shifted = $add(self.0, $set(0x80_u8.wrapping_sub(first) as i8));
                        $lanes($greater($set((0x80 + count) as i8), shifted))
                    }
                }

                #[inline(always)]
                fn bits(self) -> u64 {
                    unsafe { u64::from($bits(self.0) as $unsigned) }
                }
            }
        };
    }

    lanes! { Sixteen 16 u16:
        _mm_loadu_si128 _mm_set1_epi8 _mm_or_si128 _mm_cmpeq_epi8 _mm_add_epi8 _mm_cmpgt_epi8 _mm_movemask_epi8
    }
    lanes! { ThirtyTwo 32 u32:
        _mm256_loadu_si256 _mm256_set1_epi8 _mm256_or_si256 _mm256_cmpeq_epi8 _mm256_add_epi8 _mm256_cmpgt_epi8
        _mm256_movemask_epi8
    }
}

#[cfg(test)]
#[path = "../../tests/rust/window.rs"]
mod tests;
