//! Embeds the kernel plane's object into the daemon if `cargo xtask build-ebpf` has made one; without it the daemon
//! builds as well, on any machine, and says at start what it lacks.
//!
//! `FIREZONE_BPF_OBJECT` names another object; that one must exist. Sets `cfg(bpf_object)`.

use std::path::{Path, PathBuf};

fn main() {
    println!("cargo::rustc-check-cfg=cfg(bpf_object)");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=FIREZONE_BPF_OBJECT");
    let object = match std::env::var_os("FIREZONE_BPF_OBJECT") {
        Some(named) => {
            let named = PathBuf::from(named);
            assert!(named.is_file(), "FIREZONE_BPF_OBJECT names no file: {}", named.display());
            named
        }
        None => {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bpf");
            // Watching a file that is not there would build the daemon anew every time; its folder is watched
            // instead. If the folder cannot be made, that is what happens, and nothing worse.
            let _harmless = std::fs::create_dir_all(&folder);
            let object = folder.join("firezone-gateway.o");
            if !object.is_file() {
                println!("cargo::rerun-if-changed={}", folder.display());
                return;
            }
            object
        }
    };
    // Made by the same command. An object from elsewhere may come alone; steering then needs the rights of all of it.
    let steering = Some(object.with_file_name("firezone-steering.o")).filter(|object| object.is_file());
    for (object, name) in
        [(&object, "firezone-gateway.o"), (steering.as_ref().unwrap_or(&object), "firezone-steering.o")]
    {
        println!("cargo::rerun-if-changed={}", object.display());
        let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join(name);
        std::fs::copy(object, &out)
            .unwrap_or_else(|error| panic!("cannot copy {} to {}: {error}", object.display(), out.display()));
    }
    println!("cargo::rustc-cfg=bpf_object");
}
