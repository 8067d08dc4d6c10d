use super::*;
use crate::tests::support::Random;

/// The same by scanning lengths: (lengths in each row, cropped).
fn slow(lengths: &[usize], row_len: usize) -> (Vec<Vec<usize>>, usize) {
    let mut left: Vec<usize> = Vec::new();
    for &length in lengths {
        let pieces = length.div_ceil(row_len - 1).max(1);
        left.extend((0..pieces).map(|piece| (length - piece * (row_len - 1)).min(row_len - 1) + 1));
    }
    let (mut rows, mut cropped) = (Vec::new(), 0);
    while !left.is_empty() {
        let (mut row, mut space) = (Vec::new(), row_len);
        while space > 0 && !left.is_empty() {
            let fitting = left.iter().filter(|&&length| length <= space).max();
            let choice = *fitting.unwrap_or_else(|| left.iter().min().unwrap());
            left.remove(left.iter().position(|&length| length == choice).unwrap());
            row.push(choice.min(space));
            cropped += choice - choice.min(space);
            space -= choice.min(space);
        }
        if space > 0 {
            cropped += row.iter().sum::<usize>();
        } else {
            rows.push(row);
        }
    }
    (rows, cropped)
}

#[test]
fn equals_scanning() {
    let mut random = Random::new(11);
    for _ in 0..400 {
        let row_len = 2 + random.below(140);
        let lengths: Vec<usize> = (0..random.below(40)).map(|_| random.below(200)).collect();
        let ends: Vec<usize> = lengths
            .iter()
            .scan(0, |end, length| {
                *end += length;
                Some(*end)
            })
            .collect();
        let count = ends.last().copied().unwrap_or(0);
        let tokens: Vec<u8> = (1..=count as u16).flat_map(u16::to_le_bytes).collect();
        let packing = pack(&ends, row_len);
        let (want, want_cropped) = slow(&lengths, row_len);
        assert_eq!((packing.cropped, packing.rows), (want_cropped, want.len()));
        let mut bytes = vec![1; packing.rows * row_len * 2];
        packing.write(&tokens, &[0, 0], &mut bytes);
        let found: Vec<u16> = bytes.chunks(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect();
        let mut seen = vec![false; count + 1];
        assert_eq!(found.len(), want.len() * row_len);
        for (row, want) in found.chunks(row_len).zip(&want) {
            let mut at = 0;
            for &length in want {
                assert_eq!(row[at], 0);
                let piece = &row[at + 1..at + length];
                assert!(piece.windows(2).all(|pair| pair[1] == pair[0] + 1), "{piece:?}");
                for &token in piece {
                    assert!(!std::mem::replace(&mut seen[usize::from(token)], true));
                }
                at += length;
            }
        }
    }
}
