//! The tables that chunks are counted in.

use std::collections::HashMap;

use crate::hash::{Fast, ShortKey, prefetch};
use crate::pages;

/// A short chunk and its count; free if that is 0.
#[derive(Clone, Copy, Default)]
pub struct Slot {
    pub key: ShortKey,
    pub count: u64,
}

/// Chunk -> count. Short chunks live in an open-addressing table with the key in the slot, so that the usual
/// count costs one cache miss; the few long ones go to an ordinary map.
#[derive(Default)]
pub struct WordTable {
    slots: Vec<Slot>,
    used: usize,
    long: HashMap<Box<[u8]>, u64, Fast>,
}

impl WordTable {
    /// Adds to the count of a chunk of at most 15 bytes. `count` must not be 0, which marks a free slot.
    #[inline(always)]
    pub fn add_short(&mut self, key: ShortKey, hash: u64, count: u64) {
        if self.used * 4 >= self.slots.len() * 3 {
            self.grow();
        }
        let mask = self.slots.len() - 1;
        let mut at = hash as usize & mask;
        loop {
            let slot = &mut self.slots[at];
            if slot.key == key {
                slot.count += count;
                return;
            }
            if slot.count == 0 {
                *slot = Slot { key, count };
                self.used += 1;
                return;
            }
            at = (at + 1) & mask;
        }
    }

    /// Announces that a chunk of this hash will be added soon.
    #[inline(always)]
    pub fn announce(&self, hash: u64) {
        prefetch(&self.slots, hash as usize & self.slots.len().wrapping_sub(1));
    }

    /// Adds to the count of a longer chunk.
    #[inline(never)]
    pub fn add_long(&mut self, word: &[u8], count: u64) {
        match self.long.get_mut(word) {
            Some(total) => *total += count,
            None => {
                self.long.insert(word.into(), count);
            }
        }
    }

    #[cold]
    fn grow(&mut self) {
        let size = (self.slots.len() * 2).max(1024);
        let old = std::mem::replace(&mut self.slots, pages::table(size, Slot::default()));
        for slot in old.iter().filter(|slot| slot.count > 0) {
            let mut at = slot.key.hash() as usize & (size - 1);
            while self.slots[at].count > 0 {
                at = (at + 1) & (size - 1);
            }
            self.slots[at] = *slot;
        }
    }

    /// Calls `word(bytes, count)` for every chunk.
    pub fn each(&self, word: &mut impl FnMut(&[u8], u64)) {
        for slot in self.slots.iter().filter(|slot| slot.count > 0) {
            let (bytes, length) = slot.key.bytes();
            word(&bytes[..length], slot.count);
        }
        for (bytes, &count) in &self.long {
            word(bytes, count);
        }
    }

    /// Number of distinct chunks.
    pub fn len(&self) -> usize {
        self.used + self.long.len()
    }

    /// Adds all counts of another table.
    pub fn absorb(&mut self, other: &WordTable) {
        for slot in other.slots.iter().filter(|slot| slot.count > 0) {
            self.add_short(slot.key, slot.key.hash(), slot.count);
        }
        for (word, &count) in &other.long {
            self.add_long(word, count);
        }
    }

    /// Forgets every chunk with a count of at most `count`.
    pub fn drop_up_to(&mut self, count: u64) {
        let old = std::mem::take(self);
        for slot in old.slots.iter().filter(|slot| slot.count > count) {
            self.add_short(slot.key, slot.key.hash(), slot.count);
        }
        self.long = old.long;
        self.long.retain(|_, &mut found| found > count);
    }

    /// Empties the table, and keeps its memory for the next buffer.
    pub fn clear(&mut self) {
        self.slots.fill(Slot::default());
        self.used = 0;
        self.long.clear();
    }
}
