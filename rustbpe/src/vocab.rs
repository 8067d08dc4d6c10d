//! A finished vocabulary: token id <-> bytes, and the rules by which tokens join.

use std::collections::HashMap;

use crate::hash::{Fast, SHORT, ShortKey};
use crate::merge::{Merger, NONE, Rules};

/// Tokens with contiguous ids from 0; a token's id is also its merge rank.
pub struct Vocab {
    bytes: Vec<u8>,
    /// Token `id` is `bytes[starts[id]..starts[id + 1]]`.
    starts: Vec<usize>,
    /// Short tokens by their bytes; open addressing, at most half full. Id NONE marks a free slot. Loading 65,536 tokens
    /// takes a fifth to a third longer with one `HashMap` of byte strings, and up to a sixth with one of short keys.
    short: Vec<(ShortKey, u32)>,
    long: HashMap<Box<[u8]>, u32, Fast>,
    /// By which tokens join.
    pub(crate) rules: Rules,
    /// Some tokens of two or more bytes are not what their bytes merge to; training makes none such.
    pub has_unreachable: bool,
}

impl Vocab {
    /// From merges as training gives them: ids 0..=255 are the bytes, merge i makes id 256 + i.
    pub fn from_merges(merges: &[(u32, u32)]) -> Self {
        let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        for &(left, right) in merges {
            tokens.push([tokens[left as usize].as_slice(), &tokens[right as usize]].concat());
        }
        // Ids were given out in the order of merging, so encoding a token's bytes merges as training did, and the
        // last merge is the one that made the token.
        let joins: Vec<_> = merges.iter().zip(256..).map(|(&(left, right), id)| (left, right, id)).collect();
        let tables = Self::from_tokens(&tokens).and_then(|vocab| vocab.with_joins(&joins));
        tables.expect("training makes distinct tokens over all 256 bytes")
    }

    /// From (bytes, id) in any order. The ids must be 0..n, each once; the tokens distinct and not empty; and
    /// all 256 single bytes among them, for else some text would have no encoding.
    pub fn from_ranks(ranks: &[(Vec<u8>, u32)]) -> Result<Self, String> {
        let mut tokens: Vec<Vec<u8>> = vec![Vec::new(); ranks.len()];
        let (count, last) = (ranks.len(), ranks.len().wrapping_sub(1));
        for (bytes, id) in ranks {
            let Some(token) = tokens.get_mut(*id as usize) else {
                return Err(format!("token id {id} is out of range: {count} ids must be 0..={last}"));
            };
            if bytes.is_empty() {
                return Err(format!("token id {id} is empty; every token needs at least one byte"));
            }
            if !token.is_empty() {
                return Err(format!("token id {id} is given twice; ids must be 0..={last}, each once"));
            }
            token.clone_from(bytes);
        }
        let vocab = Self::from_tokens(&tokens)?;
        let all = vocab.joins();
        let vocab = vocab.with_joins(&all)?;
        let reachable = vocab.reachable();
        vocab.with_joins(&reachable)
    }

    /// The tables of these tokens, still without any joins.
    fn from_tokens(tokens: &[Vec<u8>]) -> Result<Self, String> {
        if tokens.len() >= NONE as usize {
            return Err(format!("{} tokens are too many; ids must fit 32 bits", tokens.len()));
        }
        let mut vocab = Vocab {
            bytes: tokens.concat(),
            starts: vec![0],
            short: vec![(ShortKey::default(), NONE); (tokens.len() * 2).next_power_of_two().max(16)],
            long: HashMap::default(),
            rules: Rules::new([0; 256], &[], 1),
            has_unreachable: false,
        };
        for (id, token) in tokens.iter().enumerate() {
            vocab.starts.push(vocab.starts[id] + token.len());
            if let Some(other) = vocab.find(token) {
                let bytes = token.escape_ascii().to_string();
                return Err(format!("token ids {other} and {id} have the same bytes {bytes:?}"));
            }
            vocab.insert(token, id as u32);
        }
        Ok(vocab)
    }

    fn with_joins(mut self, joins: &[(u32, u32, u32)]) -> Result<Self, String> {
        let mut bytes = [NONE; 256];
        for byte in 0..=255_u8 {
            bytes[usize::from(byte)] = self
                .find(&[byte])
                .ok_or_else(|| format!("byte 0x{byte:02x} is no token; all 256 single bytes must be"))?;
        }
        self.rules = Rules::new(bytes, joins, self.size());
        self.has_unreachable = joins.len() + 256 < self.size();
        Ok(self)
    }

    /// The joins that can ever happen: at most one a token, of all that give its bytes.
    ///
    /// Suppose that within some text two tokens stand that join into a third. All merges that made the two were
    /// inside their bytes, and each was the first in order of the whole text, so also of these bytes alone. So the
    /// bytes alone come to the same two tokens; and as every merge takes away one token, they come to two only once.
    fn reachable(&self) -> Vec<(u32, u32, u32)> {
        let mut merger = Merger::default();
        let mut joins = Vec::new();
        for id in 0..self.size() as u32 {
            if let Some((left, right)) = merger.last_pair(&self.rules, self.token(id).expect("in range")) {
                joins.push((left, right, id));
            }
        }
        joins
    }

    /// Every way to make a token of two others. Encoding looks up pairs of ids, not joined bytes, so all the
    /// hashing of byte strings is done here, once.
    fn joins(&self) -> Vec<(u32, u32, u32)> {
        // Only cuts into two lengths that exist: a vocabulary trained on a run of one letter has tokens of many
        // kilobytes, where trying every cut would be quadratic.
        let tokens = (0..self.size() as u32).map(|id| self.token(id).expect("in range"));
        let mut exists = vec![false; tokens.clone().map(<[u8]>::len).max().unwrap_or(0) + 1];
        tokens.clone().for_each(|token| exists[token.len()] = true);
        let lengths: Vec<usize> = (1..exists.len()).filter(|&length| exists[length]).collect();
        let mut joins = Vec::new();
        for (id, token) in tokens.enumerate() {
            for &cut in lengths.iter().take_while(|&&cut| cut < token.len()) {
                if exists[token.len() - cut]
                    && let (Some(left), Some(right)) = (self.find(&token[..cut]), self.find(&token[cut..]))
                {
                    joins.push((left, right, id as u32));
                }
            }
        }
        joins
    }

    fn insert(&mut self, token: &[u8], id: u32) {
        if token.len() > SHORT {
            self.long.insert(token.into(), id);
            return;
        }
        let key = ShortKey::of(token, 0, token.len());
        let mask = self.short.len() - 1;
        let mut at = key.hash() as usize & mask;
        while self.short[at].1 != NONE {
            at = (at + 1) & mask;
        }
        self.short[at] = (key, id);
    }

    /// The token with exactly these bytes.
    pub fn find(&self, bytes: &[u8]) -> Option<u32> {
        match bytes.len() {
            0 => None,
            1..=SHORT => self.find_short(ShortKey::of(bytes, 0, bytes.len())),
            _ => self.long.get(bytes).copied(),
        }
    }

    fn find_short(&self, key: ShortKey) -> Option<u32> {
        let mask = self.short.len() - 1;
        let mut at = key.hash() as usize & mask;
        loop {
            let (found, id) = self.short[at];
            if found == key {
                return Some(id);
            }
            if id == NONE {
                return None;
            }
            at = (at + 1) & mask;
        }
    }

    /// Number of tokens.
    pub fn size(&self) -> usize {
        self.starts.len() - 1
    }

    /// The bytes of a token.
    pub fn token(&self, id: u32) -> Option<&[u8]> {
        let end = *self.starts.get(id as usize + 1)?;
        Some(&self.bytes[self.starts[id as usize]..end])
    }

    /// The bytes of these tokens, or the first id that is not in the vocabulary.
    pub fn decode(&self, ids: &[u32]) -> Result<Vec<u8>, u32> {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            bytes.extend_from_slice(self.token(id).ok_or(id)?);
        }
        Ok(bytes)
    }
}

#[cfg(test)]
#[path = "../../tests/rust/vocab.rs"]
mod tests;
