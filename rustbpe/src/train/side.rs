//! The neighbours of a pair, gathered while it is merged.

use super::Place;

/// Neighbours met on one side while a pair is merged, by token id.
#[derive(Default)]
pub struct Side {
    pub counts: Vec<u64>,
    /// Number of places at first, then the index at which the next one is written.
    pub cursors: Vec<u32>,
    pub met: Vec<u32>,
    pub places: Vec<(u32, Place)>,
}

impl Side {
    #[inline(always)]
    pub fn add(&mut self, neighbour: u32, weight: u64, place: Place) {
        let n = neighbour as usize;
        if self.cursors[n] == 0 {
            self.met.push(neighbour);
        }
        self.counts[n] += weight;
        self.cursors[n] += 1;
        self.places.push((neighbour, place));
    }

    pub fn clear(&mut self) {
        for &neighbour in &self.met {
            self.counts[neighbour as usize] = 0;
            self.cursors[neighbour as usize] = 0;
        }
        self.met.clear();
        self.places.clear();
    }
}
