//! Reproducible random numbers.

/// The generator SplitMix64 (Steele, Lea, Flood 2014).
pub struct Random(u64);

impl Random {
    /// The generator for step `step` of the run with seed `seed`.
    pub fn new(seed: u64, step: u64) -> Self {
        let mut random = Self(seed);
        // Neighbouring seeds and steps must give independent sequences.
        random.0 = random.next() ^ step.wrapping_mul(0xd134_2543_de82_ef95);
        random.next();
        random
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Whether the next number is a multiple of `times`.
    pub fn one_in(&mut self, times: u64) -> bool {
        self.next().is_multiple_of(times)
    }

    /// Picks one of `items`; `None` if there is none. It consumes a number in any case.
    pub fn pick<T>(&mut self, items: impl IntoIterator<Item = T>) -> Option<T> {
        let mut items: Vec<_> = items.into_iter().collect();
        let drawn = self.next();
        (!items.is_empty()).then(|| items.swap_remove((drawn % items.len() as u64) as usize))
    }
}
