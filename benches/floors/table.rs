//! Tables of medians and targets.

use std::fmt;
use std::time::Duration;

/// The greatest acceptable cost of an operation.
#[derive(Debug, Clone, Copy)]
pub enum Target {
    /// A multiple of the floor.
    Ratio(f64),
    /// Milliseconds above the floor.
    Above(f64),
    /// Milliseconds.
    AtMost(f64),
}

impl Target {
    fn limit(self, floor: f64) -> f64 {
        match self {
            Self::Ratio(times) => floor * times,
            Self::Above(more) => floor + more,
            Self::AtMost(most) => most,
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Self::Ratio(times) => format!("{times:.2} x floor"),
            Self::Above(more) => format!("floor + {more}"),
            Self::AtMost(most) => format!("{most}"),
        };
        f.pad(&text)
    }
}

/// One row for each operation, in the order of the first samples.
#[derive(Default)]
pub struct Table(Vec<Row>);

struct Row {
    operation: &'static str,
    target: Target,
    cpi: Vec<Duration>,
    floor: Vec<Duration>,
}

impl Table {
    /// Adds one sample of the operation and one of its floor.
    pub fn add(&mut self, operation: &'static str, target: Target, cpi: Duration, floor: Duration) {
        let at = self.0.iter().position(|row| row.operation == operation).unwrap_or_else(|| {
            self.0.push(Row { operation, target, cpi: Vec::new(), floor: Vec::new() });
            self.0.len() - 1
        });
        self.0[at].cpi.push(cpi);
        self.0[at].floor.push(floor);
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<32} {:>8} {:>8} {:>8} {:>7}   target",
            "operation", "cpi", "best", "floor", "ratio"
        )?;
        for row in &self.0 {
            let (cpi, floor) = (median(&row.cpi), median(&row.floor));
            let best = row.cpi.iter().min().map_or(0.0, |best| milliseconds(*best));
            let verdict = if cpi <= row.target.limit(floor) { "met" } else { "OVER" };
            let (operation, target, ratio) = (row.operation, row.target, cpi / floor);
            writeln!(
                f,
                "{operation:<32} {cpi:>8.1} {best:>8.1} {floor:>8.1} {ratio:>7.2}   \
                 {target:<13} {verdict}"
            )?;
        }
        Ok(())
    }
}

fn median(samples: &[Duration]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable();
    milliseconds(sorted[sorted.len() / 2])
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
