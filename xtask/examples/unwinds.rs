//! Started by `cargo xtask release`: does a panic end a thread and not the process, with the C library that it was
//! linked to? The daemon's watch over its workers depends on it.

fn main() {
    let caught = std::panic::catch_unwind(|| panic!("expected: this one is caught"));
    assert!(caught.is_err(), "a panic returned");
    let thread = std::thread::spawn(|| panic!("expected: this one ends its thread"));
    assert!(thread.join().is_err(), "a thread that panicked ended well");
    println!("unwinds");
}
