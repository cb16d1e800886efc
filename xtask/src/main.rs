//! The only build knowledge.
fn main() {}
