//! Child processes as guards: own process group, killed and reaped on drop, output in a file.

use std::{
    fs::File,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal};

use super::NetNs;

/// The folder that collects the output of one scenario's processes.
#[derive(Debug)]
pub struct Logs {
    directory: PathBuf,
}

impl Logs {
    /// Makes `directory`.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn new(directory: PathBuf) -> Result<Self> {
        std::fs::create_dir_all(&directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
        Ok(Self { directory })
    }

    /// The folder.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// A file in the folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The last `lines` lines of every `*.log`, for a failing scenario.
    pub fn tails(&self, lines: usize) -> String {
        let mut text = String::new();
        let mut files: Vec<PathBuf> = std::fs::read_dir(&self.directory)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "log"))
            .collect();
        files.sort();
        for file in files {
            let content = std::fs::read(&file).unwrap_or_default();
            let content = String::from_utf8_lossy(&content);
            let all: Vec<&str> = content.lines().collect();
            text.push_str(&format!("    -- {}\n", file.display()));
            for line in &all[all.len().saturating_sub(lines)..] {
                text.push_str(&format!("       {line}\n"));
            }
        }
        text
    }
}

/// A running program.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
    log: PathBuf,
    status: Option<ExitStatus>,
}

/// What to run; `stdin`/`stdout` of [`Spawn::piped`] processes are given to the caller, otherwise both outputs go to the log.
#[derive(Debug, Default)]
pub struct Spawn<'a> {
    /// Name of the log file and in messages.
    pub name: &'a str,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Complete environment, in addition to `PATH` and `HOME`; nothing else is inherited.
    pub environment: Vec<(String, String)>,
    /// Pipes for standard input and output.
    pub piped: bool,
}

impl Process {
    /// Starts `what` inside `namespace`. It is killed when this value or this thread goes.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn spawn(namespace: &NetNs, logs: &Logs, what: &Spawn<'_>) -> Result<Self> {
        let log = logs.file(&format!("{}.log", what.name));
        let file = File::options().create(true).append(true).open(&log)?;
        // nsenter and setpriv both exec, so the child's pid is the program's.
        let mut command = namespace.command("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).args(&what.command);
        command.env_clear().process_group(0);
        for name in ["PATH", "HOME"] {
            command.env(name, std::env::var_os(name).unwrap_or_default());
        }
        command.envs(what.environment.iter().map(|(key, value)| (key, value)));
        command.stderr(file.try_clone()?);
        if what.piped {
            command.stdin(Stdio::piped()).stdout(Stdio::piped());
        } else {
            command.stdin(Stdio::null()).stdout(file);
        }
        let child =
            command.spawn().with_context(|| format!("cannot start {}: {:?}", what.name, what.command))?;
        Ok(Self { child, name: what.name.to_owned(), log, status: None })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The pipes of a [`Spawn::piped`] process, once.
    pub fn pipes(&mut self) -> Option<(ChildStdin, ChildStdout)> {
        Some((self.child.stdin.take()?, self.child.stdout.take()?))
    }

    /// Everything it has written so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Waits until it has written so many lines that contain `text`.
    ///
    /// # Errors
    /// If it has not after `limit`.
    pub fn wait_log(&self, text: &str, lines: usize, limit: Duration) -> Result<()> {
        wait_for(&format!("{} to say {text:?}, {lines} times", self.name), limit, || {
            Ok((self.log().lines().filter(|line| line.contains(text)).count() >= lines).then_some(()))
        })
    }

    /// Sends a signal to the program.
    ///
    /// # Errors
    /// If it has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).with_context(|| format!("cannot signal {}", self.name))
    }

    /// Its exit status if it has ended.
    pub fn poll(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = self.child.try_wait().ok().flatten();
        }
        self.status
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// If it still runs after `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let name = self.name.clone();
        wait_for(&format!("the end of {name}"), limit, || Ok(self.poll()))
    }

    /// CPU time used so far, user and system (`/proc/pid/stat`, clock ticks of 10 ms).
    ///
    /// # Errors
    /// If it has ended.
    pub fn cpu_time(&self) -> Result<Duration> {
        let fields = self.stat()?;
        // Fields 14 and 15 of proc(5), counted from 1; `stat` starts at field 3.
        let ticks: u64 = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
        Ok(Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second()))
    }

    /// How often its threads of now have gone to sleep and woken again (proc(5),
    /// `voluntary_ctxt_switches`).
    ///
    /// # Errors
    /// If it has ended.
    pub fn wakes(&self) -> Result<u64> {
        let mut wakes = 0;
        for task in std::fs::read_dir(format!("/proc/{}/task", self.child.id()))
            .with_context(|| format!("{} has ended", self.name))?
        {
            // A thread may end between the listing and the look.
            let Ok(status) = std::fs::read_to_string(task?.path().join("status")) else { continue };
            let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            wakes += count.context("voluntary_ctxt_switches of a thread")?.trim().parse::<u64>()?;
        }
        Ok(wakes)
    }

    /// The scheduler's state letter, `S` for sleeping.
    ///
    /// # Errors
    /// If it has ended.
    pub fn state(&self) -> Result<char> {
        self.stat()?[0].chars().next().context("a state letter")
    }

    /// Fields of `/proc/pid/stat` after the command's name.
    fn stat(&self) -> Result<Vec<String>> {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))
            .with_context(|| format!("{} has ended", self.name))?;
        let (_, after_name) = text.rsplit_once(')').context("the form of /proc/pid/stat")?;
        Ok(after_name.split_whitespace().map(str::to_owned).collect())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The whole group: a server's own children must go too, also when the server itself has ended already.
        let _empty_already = rustix::process::kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        let _reaped_already = self.child.wait();
    }
}

/// What a finished program said.
#[derive(Debug)]
pub struct Outcome {
    /// Exit status.
    pub status: ExitStatus,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// How long it took.
    pub took: Duration,
}

impl Outcome {
    /// Standard output of a program that ended well.
    ///
    /// # Errors
    /// With everything it said, if it did not.
    pub fn success(self) -> Result<String> {
        if !self.status.success() {
            bail!("{}: {} {}", self.status, self.stdout.trim(), self.stderr.trim());
        }
        Ok(self.stdout)
    }
}

/// Runs a program inside `namespace` to its end, at most for `limit`.
///
/// # Errors
/// If it cannot be started or does not end in time; not if it fails.
pub fn run(namespace: &NetNs, limit: Duration, command: &[&str]) -> Result<Outcome> {
    let started = Instant::now();
    let mut child = namespace
        .command("setpriv")
        .args(["--pdeathsig", "KILL", "--"])
        .args(command)
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {command:?}"))?;
    let (mut out, mut err) = (child.stdout.take().context("piped")?, child.stderr.take().context("piped")?);
    // Read on the side: a program that fills a pipe would otherwise wait for us while we wait for it.
    std::thread::scope(|scope| {
        let stdout = scope.spawn(move || read_all(&mut out));
        let stderr = scope.spawn(move || read_all(&mut err));
        let ended = wait_for(&format!("the end of {command:?}"), limit, || Ok(child.try_wait()?));
        if ended.is_err() {
            let _empty_already = rustix::process::kill_process_group(Pid::from_child(&child), Signal::KILL);
            let _ = child.wait();
        }
        let (stdout, stderr) = (stdout.join().unwrap_or_default(), stderr.join().unwrap_or_default());
        let status = ended.with_context(|| format!("it said: {stdout} {stderr}"))?;
        Ok(Outcome { status, stdout, stderr, took: started.elapsed() })
    })
}

fn read_all(stream: &mut dyn std::io::Read) -> String {
    let mut bytes = Vec::new();
    let _what_was_read_counts = stream.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Asks `question` every 5 ms until it answers.
///
/// # Errors
/// If there is no answer after `limit`, naming `what`, or if the question itself fails.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut question: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(answer) = question()? {
            return Ok(answer);
        }
        if Instant::now() >= deadline {
            bail!("waited {limit:?} for {what}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Lets this process and its children have at least `wanted` open files.
///
/// # Errors
/// If the hard limit is lower and cannot be raised, naming both.
pub fn raise_file_limit(wanted: u64) -> Result<()> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let now = getrlimit(Resource::Nofile);
    if now.current.is_none_or(|current| current >= wanted) {
        return Ok(());
    }
    let maximum = now.maximum.map(|maximum| maximum.max(wanted));
    setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum })
        .with_context(|| format!("{wanted} open files are needed, the limit is {:?}", now.maximum))
}

/// Processes whose parent is this one, as `(pid, name)`.
pub fn children() -> Vec<(u32, String)> {
    let parent = std::process::id().to_string();
    let Ok(processes) = std::fs::read_dir("/proc") else { return Vec::new() };
    processes
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter_map(|pid| {
            let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let (before, after) = text.rsplit_once(')')?;
            let name = before.split_once('(')?.1.to_owned();
            (after.split_whitespace().nth(1)? == parent).then_some((pid, name))
        })
        .collect()
}
