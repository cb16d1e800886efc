//! The compiled object in a real kernel.
//!
//! Ignored by default, because they need root and the object; `cargo xtask test` runs them where both are there.

mod decide;
mod network;
mod pins;
mod rights;
mod steer_socket;
mod steer_tun;
mod uplink;

use std::process::Command;

use gateway_common::{maps, steer_table::CONNECTION};
use gateway_proto::{ConnectionIndex, WorkerId};

use super::{Kernel, Uplink, built_in};

fn object() -> &'static [u8] {
    built_in().expect("built without the BPF object; run `cargo xtask build-ebpf` first")
}

/// All programs, attached to nothing; and the tables of `uplink`.
fn whole() -> Kernel {
    Kernel::whole(None, None).unwrap()
}

fn uplink(kernel: &mut Kernel) -> &mut Uplink {
    kernel.uplink.as_mut().expect("the whole object has it")
}

#[test]
#[ignore = "needs root and the BPF object; `cargo xtask test` runs it"]
fn bpf_object_is_accepted_by_bpftool() {
    let folder = tempfile::tempdir().unwrap();
    let object_file = folder.path().join("firezone-gateway.o");
    std::fs::write(&object_file, object()).unwrap();
    let mount_point = folder.path().join("bpffs");
    std::fs::create_dir(&mount_point).unwrap();
    // A mount namespace of its own: the bpffs, and the programs pinned in it, are gone when the shell is.
    const SCRIPT: &str = r#"mount -t bpf bpf "$2" && bpftool prog loadall "$1" "$2" &&
        for program in uplink steer_socket steer_tun; do bpftool prog show pinned "$2/$program" || exit 1; done"#;
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", SCRIPT, "sh"])
        .args([&object_file, &mount_point])
        .output()
        .unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "bpftool refuses the object:\n{out}{err}");
    for shown in ["xdp  name uplink", "sk_reuseport  name steer_socket", "socket_filter  name steer_tun"] {
        assert!(out.contains(shown), "{shown:?} is missing:\n{out}{err}");
    }
}

#[test]
#[ignore = "needs root and the BPF object; `cargo xtask test` runs it"]
fn bpf_maps_are_shown_with_the_names_of_their_fields() {
    let mut steering = Kernel::steering().unwrap();
    steering.owners.set_session(ConnectionIndex::new(CONNECTION).unwrap(), WorkerId::new(3));
    steering.owners.set_tunnel("fd00:2021:1111::7".parse().unwrap(), WorkerId::new(4));
    let table = [
        (
            maps::SESSIONS.name,
            format!(r#""key": {{ "connection": {CONNECTION} }}, "value": {{ "worker": 3 }}"#),
        ),
        (maps::TUNNELS.name, r#""value": { "worker": 4 }"#.to_owned()),
    ];
    for ((name, shown), id) in table.into_iter().zip(steering.owners.map_ids().unwrap()) {
        let output = Command::new("bpftool").args(["map", "dump", "id", &id.to_string()]).output().unwrap();
        let dump = String::from_utf8_lossy(&output.stdout);
        let words = dump.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(words.contains(&shown), "{name}: {dump}");
    }
}

#[test]
#[ignore = "needs root and the BPF object; `cargo xtask test` runs it"]
fn bpf_object_of_another_abi_is_refused_in_one_sentence() {
    let mut other = object().to_vec();
    let at = section(&other, maps::ABI_SECTION);
    assert_eq!(other[at..at + 4], maps::ABI_VERSION.to_ne_bytes());
    other[at] += 1;
    let refused = Kernel::whole_of(&other, None, None).unwrap_err();
    let (theirs, ours) = (maps::ABI_VERSION + 1, maps::ABI_VERSION);
    let expect =
        format!("the BPF object has ABI {theirs}, this daemon {ours}; build both from the same source");
    assert_eq!(format!("{refused:#}"), expect);
    let refused = Kernel::whole_of(b"no object", None, None).unwrap_err();
    assert!(refused.to_string().contains("the kernel does not take the BPF object"), "{refused:#}");
}

#[test]
#[ignore = "needs root and the BPF object; `cargo xtask test` runs it"]
fn bpf_maps_have_room_for_as_many_clients_as_asked_for_and_say_what_they_left_out() {
    let mut kernel = Kernel::whole(Some(2), None).unwrap();
    for n in 1..=3 {
        assert!(!kernel.must_pass(), "with {} clients", n - 1);
        let connection = gateway_proto::ConnectionIndex::new(n).unwrap();
        kernel.owners.set_session(connection, gateway_proto::WorkerId::new(0));
    }
    assert!(kernel.must_pass() && !kernel.enable(true).unwrap());
    let full: Vec<_> = kernel.left_out().filter(|(_, entries)| *entries > 0).collect();
    assert_eq!(full, [("SESSIONS", 1)]);
}

/// Where a section of an object lies (ELF64, System V ABI chapter 4).
fn section(object: &[u8], name: &str) -> usize {
    let word = |at: usize, len: usize| {
        let bytes = object[at..at + len].iter().rev();
        bytes.fold(0_usize, |word, byte| word << 8 | usize::from(*byte))
    };
    let (table, size, count, names) = (word(0x28, 8), word(0x3a, 2), word(0x3c, 2), word(0x3e, 2));
    let header = |number: usize| table + number * size;
    let names = word(header(names) + 0x18, 8);
    let named = |number: &usize| {
        let at = names + word(header(*number), 4);
        object[at..].starts_with(name.as_bytes()) && object[at + name.len()] == 0
    };
    word(header((0..count).find(named).expect("a section of that name")) + 0x18, 8)
}
