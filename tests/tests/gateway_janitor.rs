//! What a run changed for longer than its life is put back by its janitor, however the run ends.

use std::{
    io::Write as _,
    process::{Command, Stdio},
};

#[test]
fn settings_are_put_back_when_the_pipe_of_the_run_ends() {
    let folder = tempfile::tempdir().unwrap();
    let setting = folder.path().join("setting");
    std::fs::write(&setting, "raised").unwrap();
    let mut janitor = Command::new(env!("CARGO_BIN_EXE_gateway-tests"))
        // A run that has made neither namespaces nor a folder.
        .args(["janitor", &std::process::id().to_string()])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut pipe = janitor.stdin.take().unwrap();
    writeln!(pipe, "{} 0", setting.display()).unwrap();
    writeln!(pipe, "/nowhere/at/all 1").unwrap();
    assert_eq!(std::fs::read_to_string(&setting).unwrap(), "raised", "the run lives");
    drop(pipe);
    assert!(janitor.wait().unwrap().success());
    assert_eq!(std::fs::read_to_string(&setting).unwrap(), "0");
}
