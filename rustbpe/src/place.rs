//! A cache line that holds up to four chunks with their tokens.

use std::mem::MaybeUninit;

use crate::hash::ShortKey;

/// Most tokens of a short chunk that is remembered: as many as fit a slot.
pub const MOST: usize = 5;

const ID_BITS: usize = 24;
const ID_MASK: u32 = (1 << ID_BITS) - 1;

/// The tokens of a chunk: five ids of 24 bits, and their number in the highest byte.
#[derive(Clone, Copy, Default)]
pub struct Tokens {
    low: u64,
    high: u64,
}

impl Tokens {
    /// None if they are too many or their ids too large.
    pub fn of(ids: &[u32]) -> Option<Self> {
        if ids.len() > MOST || ids.iter().any(|&id| id > ID_MASK) {
            return None;
        }
        let packed = ids.iter().rev().fold(0, |packed, &id| packed << ID_BITS | u128::from(id));
        Some(Tokens { low: packed as u64, high: (packed >> 64) as u64 | (ids.len() as u64) << 56 })
    }

    fn count(self) -> u64 {
        self.high >> 56
    }
}

/// Where a slot has the length of its chunk (4 bits), and the number of its tokens (3 bits).
const LENGTH_AT: u32 = 56;
const COUNT_AT: u32 = 60;
const LENGTH: u64 = 15 << LENGTH_AT;
/// The chunk was seen again after it had come in.
const SEEN: u64 = 1 << 63;
/// Bits of a key, which are those of the text and the length.
const KEY: u64 = (1 << COUNT_AT) - 1;
/// The longest text that leaves room for two tokens in its slot.
const NARROW: u64 = 8;

/// A chunk: its first eight bytes, and then either its other bytes, or, as most have none, its one or two tokens; above
/// them its length. A chunk that is longer or has more tokens is wide: its tokens are in the slot after it, which has
/// length 0. A free slot is all zero.
#[derive(Clone, Copy, Default)]
#[repr(align(16))]
struct Slot {
    low: u64,
    high: u64,
}

impl Slot {
    #[inline(always)]
    fn length(self) -> u64 {
        (self.high & LENGTH) >> LENGTH_AT
    }

    #[inline(always)]
    fn count(self) -> u64 {
        self.high >> COUNT_AT & 7
    }

    #[inline(always)]
    fn is_wide(self) -> bool {
        self.length() > NARROW || self.count() > 2
    }

    fn key(self) -> ShortKey {
        let kept = if self.length() > NARROW { KEY } else { LENGTH };
        ShortKey { low: self.low, high: self.high & kept }
    }
}

/// Whether a chunk takes two slots.
pub fn is_wide(key: ShortKey, tokens: Tokens) -> bool {
    Slot { low: key.low, high: key.high | tokens.count() << COUNT_AT }.is_wide()
}

/// By the length of a chunk: which bits of its slot are its key.
static MASKS: [Slot; 16] = {
    let mut masks = [Slot { low: u64::MAX, high: LENGTH }; 16];
    let mut length = NARROW as usize + 1;
    while length < 16 {
        masks[length].high = KEY;
        length += 1;
    }
    masks
};

/// The slots that a chunk may be in; together one cache line. A wide chunk is in the first two or the last two.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
pub struct Place([Slot; 4]);

/// What a slot would cost that is taken for another chunk: nothing if it is free, and more if its chunk was seen again.
pub type Price = u8;
pub const FREE: Price = 0;
pub const DEAREST: Price = 2;

impl Place {
    /// Bit 4i says whether slot i has this chunk; no other bits are set.
    #[inline(always)]
    fn find(&self, key: ShortKey) -> u32 {
        let mask = &MASKS[(key.high >> LENGTH_AT) as usize % 16];
        #[cfg(target_arch = "x86_64")]
        return self.find_sse2(key, mask);
        #[cfg(not(target_arch = "x86_64"))]
        return self.find_portable(key, mask);
    }

    #[cfg(any(test, not(target_arch = "x86_64")))]
    #[inline(always)]
    fn find_portable(&self, key: ShortKey, mask: &Slot) -> u32 {
        let same = self.0.map(|slot| u32::from((slot.low ^ key.low) | (slot.high & mask.high ^ key.high) == 0));
        same[0] | same[1] << 4 | same[2] << 8 | same[3] << 12
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn find_sse2(&self, key: ShortKey, mask: &Slot) -> u32 {
        use std::arch::x86_64::{
            __m128i, _mm_and_si128, _mm_cmpeq_epi32, _mm_load_si128, _mm_movemask_epi8, _mm_packs_epi16,
            _mm_packs_epi32, _mm_set_epi64x,
        };
        // SAFETY: SSE2 is part of every x86_64; the loads read the 16 bytes of a slot, which is aligned to them.
        let quarters = unsafe {
            let load = |slot: &Slot| _mm_load_si128((&raw const *slot).cast::<__m128i>());
            let (key, mask) = (_mm_set_epi64x(key.high as i64, key.low as i64), load(mask));
            let same = |at: usize| _mm_cmpeq_epi32(_mm_and_si128(load(&self.0[at]), mask), key);
            let (left, right) = (_mm_packs_epi32(same(0), same(1)), _mm_packs_epi32(same(2), same(3)));
            // One bit for each four bytes of the slots.
            _mm_movemask_epi8(_mm_packs_epi16(left, right)) as u32
        };
        let halves = quarters & quarters >> 1;
        halves & halves >> 2 & 0x1111
    }

    /// Writes the tokens of a chunk, and something beyond them. How many they are; 0 if the chunk is not here.
    #[inline(always)]
    pub fn write(&mut self, key: ShortKey, room: &mut [MaybeUninit<u32>; MOST]) -> usize {
        let found = self.find(key);
        if found == 0 {
            return 0;
        }
        let at = found.trailing_zeros() as usize / 4 % 4;
        let Slot { high, .. } = self.0[at];
        if high & SEEN == 0 {
            self.0[at].high = high | SEEN;
        }
        let next = self.0[at | 1];
        let id = |bits: u64| MaybeUninit::new(bits as u32 & ID_MASK);
        let count = high >> COUNT_AT & 7;
        if count > 2 {
            let third = next.low >> (2 * ID_BITS) | next.high << (64 - 2 * ID_BITS);
            *room = [next.low, next.low >> ID_BITS, third, next.high >> 8, next.high >> 32].map(id);
        } else {
            let ids = if key.high >> LENGTH_AT > NARROW { next.low } else { high };
            (room[0], room[1]) = (id(ids), id(ids >> ID_BITS));
        }
        count as usize
    }

    /// The tokens of the chunk of this slot.
    fn tokens(&self, at: usize) -> Tokens {
        let (slot, next) = (self.0[at], self.0[at | 1]);
        let low = if slot.is_wide() { next.low } else { slot.high };
        Tokens { low, high: next.high & ((1 << 56) - 1) | slot.count() << 56 }
    }

    /// Both slots of a wide chunk cost the same.
    #[inline(always)]
    fn prices(&self) -> [Price; 4] {
        let price = |slot: Slot| Price::from(slot.length() > 0) + Price::from(slot.high & SEEN > 0);
        let pair = |left: Slot, right: Slot| (price(left), price(if left.is_wide() { left } else { right }));
        let (a, b) = pair(self.0[0], self.0[1]);
        let (c, d) = pair(self.0[2], self.0[3]);
        [a, b, c, d]
    }

    /// The cheapest place for a chunk. Narrow ones fill from the left, wide ones from the right.
    #[inline(always)]
    pub fn cheapest(&self, wide: bool) -> (Price, usize) {
        let [a, b, c, d] = self.prices();
        if wide {
            let (left, right) = ((a.max(b), 0), (c.max(d), 2));
            if left.0 < right.0 { left } else { right }
        } else {
            (a, 0).min((b, 1)).min((c, 2).min((d, 3)))
        }
    }

    /// Puts a chunk at a slot. What is there goes.
    pub fn put(&mut self, at: usize, key: ShortKey, tokens: Tokens) {
        let (pair, count) = (at & !1, tokens.count());
        if self.0[pair].is_wide() {
            self.0[pair..pair + 2].fill(Slot::default());
        }
        let head = Slot { low: key.low, high: key.high | count << COUNT_AT };
        if head.is_wide() {
            self.0[at] = head;
            self.0[at + 1] = Slot { low: tokens.low, high: tokens.high & ((1 << 56) - 1) };
        } else {
            self.0[at] = Slot { high: head.high | tokens.low, ..head };
        }
    }

    pub fn forget_seen(&mut self) {
        self.0.iter_mut().filter(|slot| slot.length() > 0).for_each(|slot| slot.high &= !SEEN);
    }

    /// Chunks, their tokens, and whether they were seen again.
    pub fn each(&self) -> impl Iterator<Item = (ShortKey, Tokens, bool)> {
        let full = (0..4).filter(|&at| self.0[at].length() > 0);
        full.map(|at| (self.0[at].key(), self.tokens(at), self.0[at].high & SEEN > 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn a_full_place_keeps_what_was_seen_again() {
        let mut random = Random::new(14);
        for _ in 0..2000 {
            let mut place = Place::default();
            let tokens = |count| Tokens::of(&[7; MOST][..count]).unwrap();
            let key = |word: &[u8]| ShortKey::of(word, 0, word.len());
            let kept = random.word(12, 3);
            place.put(0, key(&kept), tokens(1 + random.below(MOST)));
            let mut room = [MaybeUninit::new(0); MOST];
            assert!(place.write(key(&kept), &mut room) > 0);
            // Others, never looked up, only drive out each other.
            for _ in 0..20 {
                let (other, count) = ([b"x", random.word(12, 2).as_slice()].concat(), 1 + random.below(2));
                let (price, at) = place.cheapest(is_wide(key(&other), tokens(count)));
                assert!(price < DEAREST);
                place.put(at, key(&other), tokens(count));
                assert!(place.find(key(&other)) > 0 && place.find(key(&kept)) > 0, "{kept:?} {other:?}");
            }
        }
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn slots_are_found_alike_with_and_without_intrinsics() {
        let mut random = Random::new(15);
        for _ in 0..20_000 {
            let mut place = Place::default();
            let words: Vec<_> = (0..6).map(|_| random.word(10, 1)).collect();
            for word in &words {
                let key = ShortKey::of(word, 0, word.len());
                let tokens = Tokens::of(&[3, 1, 4, 1, 5][..1 + random.below(MOST)]).unwrap();
                let (_, at) = place.cheapest(is_wide(key, tokens));
                place.put(at, key, tokens);
                assert!(place.find(key) >> (4 * at) & 1 == 1);
                for other in &words {
                    let (key, mask) = (ShortKey::of(other, 0, other.len()), &MASKS[other.len()]);
                    assert_eq!(place.find_sse2(key, mask), place.find_portable(key, mask));
                }
            }
        }
    }
}
