//! What cleans up when guards cannot: signals and sudden death.
//!
//! ```text
//!   gateway-tests scenarios (pid 4711)            gateway-tests janitor 4711 (own process group)
//!     guards remove on drop and on panic   pipe     reads the pipe; its end means that 4711 is gone,
//!     SIGINT/SIGTERM: sweep, exit 130    ------->   however it went: kill and remove what it left
//! ```

use std::{
    io::Write as _,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use rustix::process::{Pid, Signal};
use tokio::signal::unix::{SignalKind, signal};

use super::netns;

/// Cleans up after dead runs, then watches over this one as long as this value lives.
#[derive(Debug)]
pub struct Janitor {
    watcher: Child,
}

impl Janitor {
    /// Removes leftovers of dead runs, installs the signal handler, starts the watcher process.
    ///
    /// # Errors
    /// If the watcher or the signal thread cannot be started.
    pub fn start() -> Result<Self> {
        let left = netns::sweep();
        sweep_directories();
        if left > 0 {
            println!("removed {left} namespaces that an earlier run left behind");
        }
        on_signal_clean_and_exit()?;
        let watcher = Command::new(std::env::current_exe()?)
            .arg("janitor")
            .arg(std::process::id().to_string())
            // The read end of a pipe whose write end dies with us.
            .stdin(Stdio::piped())
            // Ctrl-C at the terminal must not reach it.
            .process_group(0)
            .spawn()
            .context("cannot start the janitor process")?;
        Ok(Self { watcher })
    }

    /// When this run is over, however it ends, `text` is written to `file` (a name without blanks). For settings that would
    /// outlive it; the watcher writes, from the same session.
    ///
    /// # Errors
    /// If the watcher is gone.
    pub fn put_back(&mut self, file: &str, text: &str) -> Result<()> {
        let orders = self.watcher.stdin.as_mut().context("the janitor's pipe")?;
        writeln!(orders, "{file} {text}").context("the janitor is gone")
    }

    /// The watcher's pid: the one child that outlives a scenario.
    pub fn pid(&self) -> u32 {
        self.watcher.id()
    }
}

impl Drop for Janitor {
    fn drop(&mut self) {
        drop(self.watcher.stdin.take());
        let _exit_code = self.watcher.wait();
    }
}

/// The watcher process: waits until the run `pid` is gone, then puts back what it changed and removes what it left.
///
/// # Errors
/// If standard input cannot be read.
pub fn watch(pid: u32) -> Result<()> {
    let orders = std::io::read_to_string(std::io::stdin())?;
    for (file, text) in orders.lines().filter_map(|line| line.split_once(' ')) {
        let _cannot_be_told_to_anybody = std::fs::write(file, text);
    }
    netns::remove_run(pid);
    // An `ip netns add` of the dead run may still be under way.
    std::thread::sleep(Duration::from_millis(300));
    netns::remove_run(pid);
    remove_directory(&directory(pid));
    Ok(())
}

/// Called between steps: after a signal, the thread that builds must not go on behind the back of the one that removes.
pub fn park_if_interrupted() {
    while INTERRUPTED.load(Ordering::Relaxed) {
        std::thread::park();
    }
}

/// Starts a process of this program that has a janitor of its own. A signal to this one is passed on to it.
///
/// # Errors
/// If it cannot be started. After a signal none is started, which is `None`.
pub fn start_run(command: &mut Command) -> Result<Option<Child>> {
    let mut runs = RUNS.lock().unwrap_or_else(PoisonError::into_inner);
    if INTERRUPTED.load(Ordering::Relaxed) {
        return Ok(None);
    }
    let child = command.spawn()?;
    runs.push(child.id());
    Ok(Some(child))
}

/// The process `pid` of [`start_run`] was waited for.
pub fn run_has_ended(pid: u32) {
    RUNS.lock().unwrap_or_else(PoisonError::into_inner).retain(|run| *run != pid);
}

/// From now on Ctrl-C is what the user was told to press: exit code 0.
pub fn ctrl_c_is_the_way_out() {
    INVITED.store(true, Ordering::Relaxed);
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
static INVITED: AtomicBool = AtomicBool::new(false);
/// Processes of [`start_run`] that were not yet waited for.
static RUNS: Mutex<Vec<u32>> = Mutex::new(Vec::new());
/// How long those may take to clean up after a signal; their janitors go on after that.
const PATIENCE: Duration = Duration::from_secs(20);

/// Where a run keeps logs and generated files: `/tmp/gateway-tests-<pid>`.
pub fn directory(pid: u32) -> PathBuf {
    std::env::temp_dir().join(format!("gateway-tests-{pid}"))
}

/// A file in the run's folder that says "a person wants to read this": such folders are not swept.
pub fn keep(directory: &Path) {
    let _worst_case_it_is_swept = std::fs::write(directory.join("KEEP"), "a scenario failed\n");
}

fn sweep_directories() {
    let Ok(entries) = std::fs::read_dir(std::env::temp_dir()) else { return };
    for entry in entries.flatten() {
        let pid = entry
            .file_name()
            .to_str()
            .and_then(|name| name.strip_prefix("gateway-tests-")?.parse::<u32>().ok());
        let Some(pid) = pid else { continue };
        let alive = Path::new(&format!("/proc/{pid}")).exists();
        if !alive {
            remove_directory(&entry.path());
        }
    }
}

fn remove_directory(directory: &Path) {
    if !directory.join("KEEP").exists() {
        let _swept_by_someone_else = std::fs::remove_dir_all(directory);
    }
}

fn on_signal_clean_and_exit() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut interrupt, mut terminate) = {
        let _context = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        INTERRUPTED.store(true, Ordering::Relaxed);
        println!("\nremoving namespaces and processes");
        end_runs();
        let pid = std::process::id();
        // Twice: a process that was just being started may have entered after the first look.
        netns::remove_run(pid);
        netns::remove_run(pid);
        remove_directory(&directory(pid));
        // 128 + SIGINT, what a shell expects of an interrupted program.
        std::process::exit(if INVITED.load(Ordering::Relaxed) { 0 } else { 130 });
    })?;
    Ok(())
}

/// Tells the processes of [`start_run`] to end (a terminal has told them already) and waits for whoever waits for them.
fn end_runs() {
    let runs = || RUNS.lock().unwrap_or_else(PoisonError::into_inner).clone();
    for pid in runs() {
        if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
            let _gone_already = rustix::process::kill_process(pid, Signal::TERM);
        }
    }
    let deadline = Instant::now() + PATIENCE;
    while !runs().is_empty() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
}
