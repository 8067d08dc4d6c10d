//! A cache line that holds up to four chunks with their tokens.

use std::mem::MaybeUninit;

use crate::hash::{ShortKey, TAG, TAG_AT};
use crate::simd::Simd;

/// Most tokens of a short chunk that is remembered: as many as fit a slot.
pub const MOST: usize = 5;

/// Bits of an id: what fits.
const ID: u32 = (1 << 24) - 1;
/// Two ids of 24 bits, each in half a word, so that one operation takes both out.
const PAIR: u64 = (ID as u64) << 32 | ID as u64;

/// The tokens of a chunk: up to four as pairs, and the bytes of a fifth in the gaps, the one at the top excepted.
#[derive(Clone, Copy, Default)]
pub struct Tokens {
    low: u64,
    high: u64,
    count: u64,
}

impl Tokens {
    /// None if they are too many or their ids too large.
    pub fn of(ids: &[u32]) -> Option<Self> {
        if ids.len() > MOST || ids.iter().any(|&id| id > ID) {
            return None;
        }
        let id = |at: usize| u64::from(ids.get(at).copied().unwrap_or(0));
        let byte = |at: usize| id(4) >> (8 * at) & 0xff;
        let pair = |at: usize| id(at) | id(at + 1) << 32;
        let (low, high) = (pair(0) | byte(0) << 24 | byte(1) << 56, pair(2) | byte(2) << 24);
        Some(Tokens { low, high, count: ids.len() as u64 })
    }

    /// The fifth.
    #[inline(always)]
    fn last(low: u64, high: u64) -> u32 {
        (low >> 24 & 0xff | low >> 56 << 8 | (high >> 24 & 0xff) << 16) as u32
    }
}

/// Where a slot has the number of its tokens (3 bits).
const COUNT_AT: u32 = 61;
/// The chunk was seen again after it had come in.
const SEEN: u64 = 1 << 56;
/// Bits of a slot that are those of a text beyond its first eight bytes.
const TEXT: u64 = SEEN - 1;
/// Set in the tag of a chunk that is short enough to leave room for two tokens in its slot: of eight bytes at most.
const NARROW: u64 = 8 << TAG_AT;

/// A chunk: its first eight bytes, and then either its other bytes, or, as most have none, its one or two tokens; above
/// them the tag of its key. A chunk that is longer or has more tokens is wide: its tokens are in the slot after it, which
/// has tag 0. A free slot is all zero.
#[derive(Clone, Copy, Default)]
#[repr(align(16))]
struct Slot {
    low: u64,
    high: u64,
}

impl Slot {
    #[inline(always)]
    fn is_free(self) -> bool {
        self.high & TAG == 0
    }

    #[inline(always)]
    fn count(self) -> u64 {
        self.high >> COUNT_AT
    }

    #[inline(always)]
    fn is_wide(self) -> bool {
        !self.is_free() && (self.high & NARROW == 0 || self.count() > 2)
    }

    fn key(self) -> ShortKey {
        let kept = if self.high & NARROW == 0 { TAG | TEXT } else { TAG };
        ShortKey { low: self.low, high: self.high & kept }
    }
}

/// Whether a chunk takes two slots.
pub fn is_wide(key: ShortKey, tokens: Tokens) -> bool {
    Slot { low: key.low, high: key.high | tokens.count << COUNT_AT }.is_wide()
}

/// By the tag of a chunk: which bits of its slot are its key.
static MASKS: [Slot; 16] = {
    let mut masks = [Slot { low: u64::MAX, high: TAG }; 16];
    let mut tag = 1;
    while tag < 8 {
        masks[tag].high = TAG | TEXT;
        tag += 1;
    }
    masks
};

/// Two bits a slot, in the order 0, 2, 1, 3: the slot of the first two that are both set, or [`NOWHERE`].
#[cfg(target_arch = "x86_64")]
static SLOTS: [u8; 256] = {
    let mut slots = [NOWHERE as u8; 256];
    let mut bits = 0;
    while bits < 256 {
        let mut at = 0;
        while at < 4 {
            if bits >> (2 * at) & 3 == 3 && slots[bits] == NOWHERE as u8 {
                slots[bits] = [0, 2, 1, 3][at];
            }
            at += 1;
        }
        bits += 1;
    }
    slots
};

/// The slots that a chunk may be in; together one cache line. A wide chunk is in the first two or the last two.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
pub struct Place([Slot; 4]);

/// What a slot would cost that is taken for another chunk: nothing if it is free, and more if its chunk was seen again.
pub type Price = u8;
pub const FREE: Price = 0;
pub const DEAREST: Price = 2;

/// No slot.
const NOWHERE: usize = 4;

impl Place {
    /// The slot that has this chunk, or [`NOWHERE`].
    #[inline(always)]
    fn find<S: Simd>(&self, _simd: S, key: ShortKey) -> usize {
        let mask = &MASKS[key.tag()];
        #[cfg(target_arch = "x86_64")]
        return if S::AVX2 { self.find_avx2(key, mask) } else { self.find_sse2(key, mask) };
        #[cfg(not(target_arch = "x86_64"))]
        return self.find_portable(key, mask);
    }

    #[cfg(any(test, not(target_arch = "x86_64")))]
    #[inline(always)]
    fn find_portable(&self, key: ShortKey, mask: &Slot) -> usize {
        let same = |slot: &Slot| (slot.low ^ key.low) | (slot.high & mask.high ^ key.high) == 0;
        self.0.iter().position(same).unwrap_or(NOWHERE)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn find_sse2(&self, key: ShortKey, mask: &Slot) -> usize {
        use std::arch::x86_64::*;
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
        let slots = halves & halves >> 2 & 0x1111;
        if slots == 0 { NOWHERE } else { slots.trailing_zeros() as usize / 4 }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn find_avx2(&self, key: ShortKey, mask: &Slot) -> usize {
        use std::arch::x86_64::*;
        #[allow(unused_unsafe, reason = "newer compilers need less of it")]
        // SAFETY: AVX2 is there, or nobody would ask for it; the loads read the 32 bytes of two slots, which are aligned
        // to them, and the 16 of the mask.
        let halves = unsafe {
            let key = _mm256_broadcastsi128_si256(_mm_set_epi64x(key.high as i64, key.low as i64));
            let mask = _mm256_broadcastsi128_si256(_mm_load_si128((&raw const *mask).cast()));
            let same = |at: usize| {
                let two = _mm256_load_si256((&raw const self.0[at]).cast());
                _mm256_cmpeq_epi64(_mm256_and_si256(two, mask), key)
            };
            // One bit for each eight bytes of the slots, in the order 0, 2, 1, 3.
            _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_packs_epi32(same(0), same(2)))) as u8
        };
        usize::from(SLOTS[usize::from(halves)])
    }

    /// Writes the tokens of a chunk, and something beyond them. How many they are; 0 if the chunk is not here.
    #[inline(always)]
    pub fn write(&mut self, simd: impl Simd, key: ShortKey, room: &mut [MaybeUninit<u32>; MOST]) -> usize {
        let at = self.find(simd, key);
        let Some(slot) = self.0.get_mut(at) else {
            return 0;
        };
        let high = slot.high;
        if high & SEEN == 0 {
            slot.high = high | SEEN;
        }
        let next = self.0[at | 1];
        let pair = |word: u64| [word as u32, (word >> 32) as u32].map(|id| MaybeUninit::new(id & ID));
        let count = high >> COUNT_AT;
        if count > 2 {
            [room[0], room[1]] = pair(next.low);
            [room[2], room[3]] = pair(next.high);
            room[4] = MaybeUninit::new(Tokens::last(next.low, next.high));
        } else {
            [room[0], room[1]] = pair(if key.high & NARROW == 0 { next.low } else { high });
        }
        count as usize
    }

    /// The tokens of the chunk of this slot.
    fn tokens(&self, at: usize) -> Tokens {
        let (slot, next) = (self.0[at], self.0[at | 1]);
        let (low, high) = if slot.is_wide() { (next.low, next.high) } else { (slot.high & PAIR, 0) };
        Tokens { low, high, count: slot.count() }
    }

    /// Both slots of a wide chunk cost the same.
    #[inline(always)]
    fn prices(&self) -> [Price; 4] {
        let price = |slot: Slot| Price::from(!slot.is_free()) + Price::from(slot.high & SEEN > 0);
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
        let pair = at & !1;
        if self.0[pair].is_wide() {
            self.0[pair..pair + 2].fill(Slot::default());
        }
        let head = Slot { low: key.low, high: key.high | tokens.count << COUNT_AT };
        if head.is_wide() {
            self.0[at] = head;
            self.0[at + 1] = Slot { low: tokens.low, high: tokens.high };
        } else {
            self.0[at] = Slot { high: head.high | tokens.low, ..head };
        }
    }

    pub fn forget_seen(&mut self) {
        self.0.iter_mut().filter(|slot| !slot.is_free()).for_each(|slot| slot.high &= !SEEN);
    }

    /// Chunks, their tokens, and whether they were seen again.
    pub fn each(&self) -> impl Iterator<Item = (ShortKey, Tokens, bool)> {
        let full = (0..4).filter(|&at| !self.0[at].is_free());
        full.map(|at| (self.0[at].key(), self.tokens(at), self.0[at].high & SEEN > 0))
    }
}

#[cfg(test)]
#[path = "../../tests/rust/place.rs"]
mod tests;
