//! A client as its own process.
mod config;
pub use config::{Command, Config, Event, Generation, Path, Stats, Token};
