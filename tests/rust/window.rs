use super::*;
use crate::classes::{CLASSES, Class};
use crate::simd::Job;
use crate::tests::support::{Random, run_each};

#[derive(Clone, Copy)]
struct Check<'a> {
    window: &'a [u8; WINDOW],
    want: &'a Masks,
}

impl Job for Check<'_> {
    #[inline(always)]
    fn run(self, simd: impl Simd) {
        assert_eq!(Masks::of(simd, self.window), *self.want, "{:?}", self.window);
    }
}

#[test]
fn masks_tell_what_the_class_table_tells() {
    let mut random = Random::new(10);
    for round in 0..2000 {
        let window: [u8; WINDOW] = match round {
            0..4 => std::array::from_fn(|index| (64 * round + index) as u8),
            _ => std::array::from_fn(|_| random.next() as u8),
        };
        let mut want = Masks::default();
        for (index, &byte) in window.iter().enumerate() {
            let bit = 1 << index;
            if byte >= 0x80 {
                want.wide |= bit;
                continue;
            }
            let masks = [
                (&mut want.letter, Class::LETTER),
                (&mut want.upper, Class::UPPER),
                (&mut want.number, Class::NUMBER),
                (&mut want.newline, Class::NEWLINE),
                (&mut want.space, Class::SPACE),
            ];
            for (mask, class) in masks {
                *mask |= if CLASSES.get(u32::from(byte)).is(class) { bit } else { 0 };
            }
            want.blank |= if byte == b' ' { bit } else { 0 };
            want.apostrophe |= if byte == b'\'' { bit } else { 0 };
            want.slash |= if byte == b'/' { bit } else { 0 };
        }
        assert_eq!(by::<Eight>(&window), want);
        run_each(Check { window: &window, want: &want });
    }
}
