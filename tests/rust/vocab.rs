use super::*;

fn ranks() -> Vec<(Vec<u8>, u32)> {
    (0..=255).map(|byte| (vec![byte], 255 - u32::from(byte))).collect()
}

#[test]
fn ranks_are_checked() {
    let error = |change: fn(&mut Vec<(Vec<u8>, u32)>)| {
        let mut ranks = ranks();
        change(&mut ranks);
        Vocab::from_ranks(&ranks).err().unwrap_or_default()
    };
    assert_eq!(error(|_| ()), "");
    assert!(error(|ranks| ranks.push((b"ab".to_vec(), 257))).contains("token id 257 is out of range"));
    assert!(error(|ranks| ranks[7].1 = 9).contains("token id 9 is given twice"));
    assert!(error(|ranks| ranks.push((vec![], 256))).contains("token id 256 is empty"));
    assert!(error(|ranks| ranks[65].0 = b"xx".to_vec()).contains("byte 0x41 is no token"));
    assert!(error(|ranks| ranks.push((b"a".to_vec(), 256))).contains("same bytes \"a\""));
    assert!(error(Vec::clear).contains("byte 0x00 is no token"));
}

#[test]
fn decode_names_the_unknown_id() {
    let vocab = Vocab::from_merges(&[(97, 98)]);
    assert_eq!(vocab.decode(&[256, 99]), Ok(b"abc".to_vec()));
    assert_eq!(vocab.decode(&[1, 257]), Err(257));
    assert_eq!(vocab.decode(&[u32::MAX]), Err(u32::MAX));
}
