//! Pinned maps, in a bpffs of the test's own: a thread with a mount namespace of its own, which ends with it.

use std::{fs, path::Path, process::Command};

use gateway_common::maps;
use nix::sched::{CloneFlags, unshare};

use super::{object, uplink as tables};
use crate::bpf::{Kernel, KernelPlane, pins::Pins};

/// Runs `work` on a thread with a bpffs on a folder that nobody else sees.
fn with_bpffs(work: impl FnOnce(&Path) + Send) {
    let folder = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            mount(&["--make-rprivate", "/"]);
            mount(&["-t", "bpf", "bpf", folder.path().to_str().unwrap()]);
            work(folder.path());
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

fn mount(arguments: &[&str]) {
    let output = Command::new("mount").args(arguments).output().unwrap();
    assert!(output.status.success(), "mount {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn dump(path: &Path) -> String {
    let output = Command::new("bpftool").args(["map", "dump", "pinned"]).arg(path).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}: {err}", path.display());
    out.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
#[ignore = "needs root and the BPF object; `cargo xtask test` runs it"]
fn bpf_maps_are_pinned_under_their_names_and_fresh_ones_replace_stale_ones() {
    with_bpffs(|bpffs| {
        let folder = bpffs.join("firezone-gateway");
        let mut first = Kernel::whole_of(object(), None, Some(&folder)).unwrap();
        tables(&mut first).set_relay("198.51.100.3:3478".parse().unwrap(), true);
        assert!(dump(&folder.join("RELAYS")).contains(r#""id": 1"#), "{}", dump(&folder.join("RELAYS")));
        // As after SIGKILL: nothing removes the names.
        std::mem::forget(first.pins.take());
        drop(first);

        let mut kernel = Kernel::whole_of(object(), None, Some(&folder)).unwrap();
        assert_eq!(kernel.pinned(), Some(&*folder));
        assert_eq!(dump(&folder.join("RELAYS")), "[]", "the stale map is there");
        let uplink = tables(&mut kernel);
        uplink.set_local("192.0.2.2:52625".parse().unwrap(), true);
        uplink.set_relay("[2001:db8:3::3]:3478".parse().unwrap(), true);
        uplink.set_channel("[2001:db8:3::3]:3478".parse().unwrap(), 0x4001, true);
        uplink.set_peer("203.0.113.9:40000".parse().unwrap(), true);
        uplink.set_ufrag(*b"ab3d", true);
        kernel.enable(true).unwrap();
        let table = [
            ("CONFIG", r#""enabled": 1"#),
            ("LOCAL", r#""port": [205,145 ], "padding": [0,0 ]"#),
            ("LOCAL", r#""present": 1"#),
            ("RELAYS", r#""address": [32,1,"#),
            ("CHANNELS", r#""key": { "relay": 1, "number": 16385 }, "value": { "full_at": 0 }"#),
            ("PEERS", r#""full_at": 0"#),
            ("UFRAGS", r#""ufrag": [97,98,51,100 ]"#),
            ("HANDSHAKES", r#""full_at": 0"#),
            ("DROPS", r#""packets": 0"#),
            ("VERDICTS", r#""bytes": 0"#),
        ];
        for (name, shown) in table {
            let dump = dump(&folder.join(name));
            assert!(dump.contains(shown), "{name} without {shown}: {dump}");
        }
        for spec in maps::ALL {
            assert!(folder.join(spec.name).exists(), "{} is not pinned", spec.name);
        }
        drop(kernel);
        assert!(!folder.exists(), "{:?} is left", fs::read_dir(&folder).map(Iterator::count));
    });
}

#[test]
#[ignore = "needs root and the BPF object; `cargo xtask test` runs it"]
fn bpf_pins_need_a_bpffs_and_spare_what_is_not_theirs() {
    let plane = KernelPlane::open(object()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("RELAYS"), "mine").unwrap();
    let refused = Pins::make(&plane, folder.path()).unwrap_err().to_string();
    assert!(refused.contains("is not in a bpffs"), "{refused}");
    assert_eq!(fs::read_to_string(folder.path().join("RELAYS")).unwrap(), "mine");
    let refused = Pins::make(&plane, &folder.path().join("none/here")).unwrap_err().to_string();
    assert!(refused.contains("cannot make the folder"), "{refused}");
}
