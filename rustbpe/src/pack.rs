//! Best-fit packing of documents into rows of equal length.

use std::collections::VecDeque;

/// A stretch of a document that becomes one piece of a row, behind a token that starts documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    /// Of its first token, among the tokens of all documents.
    start: usize,
    /// Tokens in a row, the one that starts it included.
    length: usize,
}

/// Pieces by length: the longest that fits, and the shortest of all, in a few instructions.
struct Shelf {
    /// `by_length[n]`: pieces of length n, in the order they came.
    by_length: Vec<VecDeque<Piece>>,
    /// One bit for each length that there is a piece of.
    there: Vec<u64>,
}

impl Shelf {
    fn new(row_len: usize) -> Self {
        Shelf { by_length: vec![VecDeque::new(); row_len + 1], there: vec![0; row_len / 64 + 1] }
    }

    fn put(&mut self, piece: Piece) {
        self.by_length[piece.length].push_back(piece);
        self.there[piece.length / 64] |= 1 << (piece.length % 64);
    }

    /// The longest piece of at most `space` tokens, the last of equals; if there is none, the shortest, the first of
    /// equals.
    fn take(&mut self, space: usize) -> Option<Piece> {
        let (length, fits) = match self.longest_up_to(space) {
            Some(length) => (length, true),
            None => (self.shortest()?, false),
        };
        let pieces = &mut self.by_length[length];
        let piece = if fits { pieces.pop_back() } else { pieces.pop_front() };
        if pieces.is_empty() {
            self.there[length / 64] &= !(1 << (length % 64));
        }
        piece
    }

    fn longest_up_to(&self, space: usize) -> Option<usize> {
        let (mut word, bit) = (space / 64, space % 64);
        let mut bits = self.there[word] & (u64::MAX >> (63 - bit));
        while bits == 0 {
            word = word.checked_sub(1)?;
            bits = self.there[word];
        }
        Some(word * 64 + 63 - bits.leading_zeros() as usize)
    }

    fn shortest(&self) -> Option<usize> {
        let word = self.there.iter().position(|&bits| bits != 0)?;
        Some(word * 64 + self.there[word].trailing_zeros() as usize)
    }
}

/// Where everything goes.
pub struct Packing {
    /// In the order of the rows, each row full.
    pieces: Vec<Piece>,
    pub rows: usize,
    /// Tokens that are in no row, those that would have started pieces included.
    pub cropped: usize,
}

/// Packs documents into rows of `row_len` tokens (at least 2). `ends`: where each of them ends, in tokens.
///
/// A document becomes pieces of at most `row_len` tokens, with one before each that starts documents. A row takes the
/// longest piece that fits, again and again; where none fits, it is filled with the head of the shortest piece, whose
/// tail is dropped (so the least is lost). What is left at the end and does not fill a row is dropped too.
pub fn pack(ends: &[usize], row_len: usize) -> Packing {
    let mut shelf = Shelf::new(row_len);
    let mut begin = 0;
    for &end in ends {
        let mut start = begin;
        loop {
            shelf.put(Piece { start, length: (end - start).min(row_len - 1) + 1 });
            start += row_len - 1;
            if start >= end {
                break;
            }
        }
        begin = end;
    }
    let mut packing = Packing { pieces: Vec::with_capacity(ends.len()), rows: 0, cropped: 0 };
    let (mut space, mut full) = (row_len, 0);
    while let Some(Piece { start, length }) = shelf.take(space) {
        let taken = length.min(space);
        packing.pieces.push(Piece { start, length: taken });
        packing.cropped += length - taken;
        space -= taken;
        if space == 0 {
            (space, full) = (row_len, packing.pieces.len());
            packing.rows += 1;
        }
    }
    packing.cropped += row_len - space; // of a last row that did not get full
    packing.pieces.truncate(full);
    packing
}

impl Packing {
    /// Writes the rows, end to end, into `out`, which has just the room. Tokens, `bos` before each piece among them, are
    /// `bos.len()` bytes each.
    pub fn write(&self, tokens: &[u8], bos: &[u8], mut out: &mut [u8]) {
        let width = bos.len();
        for &Piece { start, length } in &self.pieces {
            let (piece, rest) = out.split_at_mut(length * width);
            piece[..width].copy_from_slice(bos);
            piece[width..].copy_from_slice(&tokens[start * width..(start + length - 1) * width]);
            out = rest;
        }
        assert!(out.is_empty(), "room for other rows than these");
    }
}

#[cfg(test)]
#[path = "../../tests/rust/pack.rs"]
mod tests;
