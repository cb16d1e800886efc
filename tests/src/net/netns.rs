//! A network namespace as a guard: made, entered, removed.
//!
//! Names are `fz-<pid>-<name>`, so that the leftovers of a run that died can be told from those of one that lives.
//! Namespaces are entered with `setns(CLONE_NEWNET)` only: `ip netns exec` would also replace `/sys` and hide bpffs.

use std::{
    fs::File,
    io::Write as _,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use rustix::thread::LinkNameSpaceType;

/// Where `ip` binds named namespaces.
const DIRECTORY: &str = "/run/netns";

/// A network namespace that exists as long as this value.
#[derive(Debug)]
pub struct NetNs {
    name: String,
}

impl NetNs {
    /// Makes `/run/netns/fz-<pid>-<name>` with its loopback up.
    ///
    /// # Errors
    /// Without root, or if the name exists.
    pub fn new(name: &str) -> Result<Self> {
        super::janitor::park_if_interrupted();
        let name = format!("{}{name}", prefix(std::process::id()));
        ip(&["netns", "add", &name])?;
        let namespace = Self { name };
        namespace.ip_batch(&["link set lo up"])?;
        // Nobody else is here: no second of waiting for duplicate addresses on each new interface.
        namespace.sysctl(&["net.ipv6.conf.all.accept_dad=0", "net.ipv6.conf.default.accept_dad=0"])?;
        Ok(namespace)
    }

    /// The name in `/run/netns`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file to give to `nsenter --net=`.
    pub fn path(&self) -> PathBuf {
        Path::new(DIRECTORY).join(&self.name)
    }

    /// A command that will run inside: `nsenter --net=... -- program`.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).arg("--").arg(program);
        command
    }

    /// Runs `work` on a thread of its own that has entered the namespace.
    ///
    /// # Errors
    /// If the namespace cannot be entered, or `work` fails.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let path = self.path();
        std::thread::scope(|scope| {
            scope
                .spawn(move || {
                    enter(&path)?;
                    work()
                })
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Several `ip` commands at once, one a line, without the leading `ip`.
    ///
    /// # Errors
    /// With what `ip` said.
    pub fn ip_batch<S: AsRef<str>>(&self, lines: &[S]) -> Result<()> {
        let mut script = String::new();
        for line in lines {
            script.push_str(line.as_ref());
            script.push('\n');
        }
        feed(self.command("ip").args(["-batch", "-"]), &script)
    }

    /// An nftables script.
    ///
    /// # Errors
    /// With what `nft` said.
    pub fn nft(&self, script: &str) -> Result<()> {
        feed(self.command("nft").args(["-f", "-"]), script)
    }

    /// Sets `net.*` sysctls of this namespace, given as `key=value`.
    ///
    /// # Errors
    /// If one does not exist or refuses the value.
    pub fn sysctl(&self, settings: &[&str]) -> Result<()> {
        self.run(|| {
            for setting in settings {
                let (key, value) = setting.split_once('=').context("a sysctl is `key=value`")?;
                let path = Path::new("/proc/sys").join(key.replace('.', "/"));
                std::fs::write(&path, value).with_context(|| format!("cannot set {setting}"))?;
            }
            Ok(())
        })
    }
}

impl Drop for NetNs {
    fn drop(&mut self) {
        remove(&self.name);
    }
}

/// Makes a veth pair between two namespaces; both ends are up. `(namespace, interface name)` each.
///
/// # Errors
/// With what `ip` said.
pub fn veth(one: (&NetNs, &str), two: (&NetNs, &str)) -> Result<()> {
    ip(&[
        "link",
        "add",
        "name",
        one.1,
        "netns",
        one.0.name(),
        "type",
        "veth",
        "peer",
        "name",
        two.1,
        "netns",
        two.0.name(),
    ])?;
    one.0.ip_batch(&[format!("link set {} up", one.1)])?;
    two.0.ip_batch(&[format!("link set {} up", two.1)])
}

/// Moves the calling thread into the namespace bound at `path`; there is no way back but the thread's end.
///
/// # Errors
/// Without CAP_SYS_ADMIN or if `path` is no network namespace.
pub fn enter(path: &Path) -> Result<()> {
    let file = File::open(path).with_context(|| format!("cannot open namespace {}", path.display()))?;
    rustix::thread::move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
        .with_context(|| format!("cannot enter namespace {}", path.display()))
}

/// The namespaces that run `pid` has made and not yet removed.
pub fn of_run(pid: u32) -> Vec<String> {
    let prefix = prefix(pid);
    names().filter(|name| name.starts_with(&prefix)).collect()
}

/// Processes whose network namespace is one of `names`, except this one.
pub fn inhabitants(names: &[String]) -> Vec<i32> {
    let inodes: Vec<u64> = names
        .iter()
        .filter_map(|name| Path::new(DIRECTORY).join(name).metadata().ok())
        .map(|m| m.ino())
        .collect();
    let Ok(processes) = std::fs::read_dir("/proc") else { return Vec::new() };
    processes
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| u32::try_from(*pid).is_ok_and(|pid| pid != std::process::id()))
        .filter(|pid| {
            // stat follows the magic link to the namespace itself, whose inode is that of the bind mount.
            std::fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|m| inodes.contains(&m.ino()))
        })
        .collect()
}

/// Kills what lives in the namespaces of run `pid` and removes them. Returns how many there were.
pub fn remove_run(pid: u32) -> usize {
    let names = of_run(pid);
    for process in inhabitants(&names) {
        if let Some(process) = rustix::process::Pid::from_raw(process) {
            let _gone_already = rustix::process::kill_process(process, rustix::process::Signal::KILL);
        }
    }
    for name in &names {
        remove(name);
    }
    names.len()
}

/// Removes what runs that are dead have left. Returns how many namespaces there were.
pub fn sweep() -> usize {
    let mut pids: Vec<u32> = names()
        .filter_map(|name| name.strip_prefix("fz-")?.split('-').next()?.parse().ok())
        .filter(|pid| !is_alive_run(*pid))
        .collect();
    pids.sort_unstable();
    pids.dedup();
    pids.into_iter().map(remove_run).sum()
}

fn prefix(pid: u32) -> String {
    format!("fz-{pid}-")
}

fn names() -> impl Iterator<Item = String> {
    std::fs::read_dir(DIRECTORY)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
}

/// A pid is reused sooner or later, so it must also be one of ours by name.
fn is_alive_run(pid: u32) -> bool {
    pid == std::process::id()
        || std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.starts_with("gateway"))
}

fn remove(name: &str) {
    // May race with the janitor or a signal; whoever comes second finds nothing to do.
    let _whoever_was_first =
        Command::new("ip").args(["netns", "del", name]).stdout(Stdio::null()).stderr(Stdio::null()).status();
}

fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(arguments).output().context("cannot run `ip` (package iproute2)")?;
    if !output.status.success() {
        bail!("`ip {}` failed: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

fn feed(command: &mut Command, script: &str) -> Result<()> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {:?}", command.get_program()))?;
    child.stdin.take().context("a piped stdin")?.write_all(script.as_bytes())?;
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("{command:?} failed: {}\n{script}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
