//! Samples and their percentiles.

/// Measured values of one thing, and how often measuring it failed.
#[derive(Debug, Clone, Default)]
pub(crate) struct Samples {
    sorted: Vec<f64>,
    n_failures: usize,
}

impl Samples {
    pub(crate) fn add(&mut self, value: f64) {
        let at = self.sorted.partition_point(|other| *other < value);
        self.sorted.insert(at, value);
    }

    pub(crate) fn add_failure(&mut self) {
        self.n_failures += 1;
    }

    /// Attempts.
    pub(crate) fn n(&self) -> usize {
        self.sorted.len() + self.n_failures
    }

    pub(crate) fn n_failures(&self) -> usize {
        self.n_failures
    }

    /// The smallest value that `percent` of the samples do not exceed (nearest rank); 0 without samples.
    pub(crate) fn percentile(&self, percent: usize) -> f64 {
        let rank = (self.sorted.len() * percent).div_ceil(100).max(1);
        self.sorted.get(rank - 1).copied().unwrap_or(0.0)
    }

    /// Every sample as a ratio.
    pub(crate) fn divided_by(&self, divisor: f64) -> Self {
        Self {
            sorted: self.sorted.iter().map(|value| value / divisor).collect(),
            n_failures: self.n_failures,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let mut samples = Samples::default();
        assert_eq!(samples.percentile(50), 0.0);
        for value in [40.0, 10.0, 30.0, 20.0] {
            samples.add(value);
        }
        samples.add_failure();
        let found = [1, 25, 50, 51, 75, 95, 99].map(|percent| samples.percentile(percent));
        assert_eq!(found, [10.0, 10.0, 20.0, 30.0, 30.0, 40.0, 40.0]);
        assert_eq!(
            (samples.percentile(100), samples.n(), samples.n_failures()),
            (40.0, 5, 1)
        );
        assert_eq!(samples.divided_by(10.0).percentile(50), 2.0);
    }
}
