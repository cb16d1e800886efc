//! Metrics as they are before any format: families of samples.

use crate::dns::Seen;

/// What a family counts in. It belongs to its name in Prometheus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Nothing that has a name.
    None,
    /// Seconds.
    Seconds,
    /// Bytes.
    Bytes,
    /// A share, from 0 to 1.
    Ratio,
}

/// What may become of a family's samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// They grow until the daemon ends.
    Counter,
    /// They rise and fall.
    Gauge,
    /// One sample of 1, whose labels say something.
    Info,
    /// How many fell into which bucket.
    Histogram,
}

/// All samples of one name.
#[derive(Debug)]
pub struct Family {
    /// Without prefix, unit and suffix.
    pub name: &'static str,
    /// A sentence.
    pub help: &'static str,
    /// See [`Unit`].
    pub unit: Unit,
    /// See [`Kind`].
    pub kind: Kind,
    /// Each with labels of its own.
    pub samples: Vec<Sample>,
}

/// One of them.
#[derive(Debug)]
pub struct Sample {
    /// Names and values.
    pub labels: Vec<(&'static str, String)>,
    /// What it shows.
    pub value: Value,
}

/// A number, or several.
#[derive(Debug, Clone, Copy)]
pub enum Value {
    /// A whole one.
    Whole(u64),
    /// Another.
    Real(f64),
    /// Of [`Kind::Histogram`].
    Buckets(Seen),
}

impl From<u64> for Value {
    fn from(value: u64) -> Self {
        Self::Whole(value)
    }
}

impl From<usize> for Value {
    fn from(value: usize) -> Self {
        Self::Whole(value as u64)
    }
}

impl From<f64> for Value {
    fn from(value: f64) -> Self {
        Self::Real(value)
    }
}
