//! The control socket itself: who may connect, how many, how long they may take. What they say is [`protocol`]'s, what is
//! answered [`status`]'s.

use std::{
    fs,
    io::{self, ErrorKind, Write as _},
    os::unix::{
        fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
        net::{UnixListener as StdListener, UnixStream as StdStream},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
    sync::Semaphore,
    time::timeout,
};

use super::{
    ask::Asker,
    fast_path,
    protocol::{self, MAX_REQUEST, Refusal, Request},
    status, why,
};
use crate::metrics::{Exporter, Format};

/// Connections at a time.
const MAX_CONNECTIONS: usize = 8;
/// For how long a connection may be silent, a request incomplete or an answer unread.
const PATIENCE: Duration = Duration::from_secs(10);

/// What answers.
#[derive(Clone)]
pub struct Server {
    asker: Asker,
    exporter: Arc<Exporter>,
    /// Whoever else than root may ask: the user of this process.
    uid: u32,
}

/// The socket's file; removed at the end if it is still ours.
#[derive(Debug)]
struct File {
    path: PathBuf,
    inode: (u64, u64),
}

impl Drop for File {
    fn drop(&mut self) {
        let inode = fs::symlink_metadata(&self.path).map(|file| (file.dev(), file.ino()));
        if inode.is_ok_and(|inode| inode == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Server {
    /// Answers from what the event loop and the exporter say.
    pub fn new(asker: Asker, exporter: Arc<Exporter>) -> Self {
        Self { asker, exporter, uid: rustix::process::geteuid().as_raw() }
    }

    /// Serves until the runtime ends. A gateway without its control socket still carries traffic, so one that cannot be
    /// had is a WARN with the cure, not an exit.
    pub async fn serve(self, path: PathBuf) {
        let (listener, _file) = match listen(&path) {
            Ok(listening) => listening,
            Err(why) => {
                tracing::warn!("No control socket, so `status`, `why` and `top` do not work: {why}");
                return;
            }
        };
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                // Out of file descriptors, usually: leave the processor to those who can free some.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            if let Err(refusal) = self.admit(&stream) {
                refuse(stream, refusal);
                continue;
            }
            let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
                let message = format!("{MAX_CONNECTIONS} connections are open already; close one of them");
                refuse(stream, Refusal::new("busy", message));
                continue;
            };
            let server = self.clone();
            tokio::spawn(async move {
                // Whoever goes away in the middle is its own business.
                let _ = server.converse(stream).await;
                drop(place);
            });
        }
    }

    /// Root and our own user.
    fn admit(&self, stream: &UnixStream) -> Result<(), Refusal> {
        let denied = |who: String| {
            Refusal::new(
                "denied",
                format!("{who} may not ask; run the command as root or as the gateway's user"),
            )
        };
        match stream.peer_cred().map(|peer| peer.uid()) {
            Ok(uid) if uid == 0 || uid == self.uid => Ok(()),
            Ok(uid) => Err(denied(format!("User {uid}"))),
            Err(e) => Err(denied(format!("Somebody whom the kernel does not name ({e})"))),
        }
    }

    async fn converse(&self, stream: UnixStream) -> io::Result<()> {
        let (reader, mut writer) = stream.into_split();
        let mut reader = BufReader::new(reader);
        let mut request = Vec::new();
        loop {
            request.clear();
            // One more than there may be shows that there are more.
            let mut bounded = (&mut reader).take(MAX_REQUEST as u64 + 1);
            let read = timeout(PATIENCE, bounded.read_until(b'\n', &mut request)).await;
            let (answer, last) = match read.map(|read| read.map(|_| request.len())) {
                Ok(Err(e)) => return Err(e),
                Ok(Ok(0)) => return Ok(()),
                Ok(_) if request.len() > MAX_REQUEST => {
                    let message = format!("A request may have {MAX_REQUEST} bytes; this one has more");
                    (protocol::line(Err(Refusal::new("too_long", message))), true)
                }
                Ok(_) if !request.ends_with(b"\n") => {
                    let message = "The request does not end; end it with a line feed";
                    (protocol::line(Err(Refusal::new("not_json", message))), true)
                }
                Ok(_) => (self.answer(request.trim_ascii_end()).await, false),
                Err(_) => {
                    let message = format!("No whole request for {} s; connect again", PATIENCE.as_secs());
                    (protocol::line(Err(Refusal::new("timeout", message))), true)
                }
            };
            timeout(PATIENCE, writer.write_all(answer.as_bytes())).await??;
            if last {
                return linger(&mut reader, &mut writer).await;
            }
        }
    }

    async fn answer(&self, line: &[u8]) -> String {
        let answer = match protocol::parse(line) {
            Ok(request) => self.look(request).await,
            Err(refusal) => Err(refusal),
        };
        // Thousands of clients make megabytes, and this thread is the event loop's.
        let line = tokio::task::spawn_blocking(|| protocol::line(answer)).await;
        line.unwrap_or_else(|_| protocol::line(Err(silent())))
    }

    async fn look(&self, request: Request) -> Result<Value, Refusal> {
        match request {
            Request::Status => status::look(&self.asker).await.ok_or_else(silent),
            Request::Why(packet) => why::look(&self.asker, packet).await.ok_or_else(silent),
            Request::Flows { client, most } => {
                status::flows(&self.asker, client, most).await.ok_or_else(silent)
            }
            Request::Metrics => {
                let page = self.exporter.page(Format::Classic).await.ok_or_else(silent)?;
                Ok(json!({ "page": String::from_utf8_lossy(&page) }))
            }
            Request::FastPath(mode) => fast_path::switch(&self.asker, mode).await,
        }
    }
}

/// The event loop or a worker does not answer.
pub(super) fn silent() -> Refusal {
    Refusal::new(
        "busy",
        "The gateway does not answer in time; it may be overloaded: look at its log and its processors",
    )
}

/// What was sent beyond is read for a moment: closing with bytes unread would take the answer back.
async fn linger(
    reader: &mut (impl tokio::io::AsyncRead + Unpin),
    writer: &mut (impl tokio::io::AsyncWrite + Unpin),
) -> io::Result<()> {
    writer.shutdown().await?;
    let mut rest = [0; 4096];
    let empty = async {
        while reader.read(&mut rest).await? > 0 {}
        Ok(())
    };
    timeout(Duration::from_secs(1), empty).await.unwrap_or(Ok(()))
}

/// Best effort, at once: whoever may not ask does not make us wait.
fn refuse(stream: UnixStream, refusal: Refusal) {
    // Past tokio, which does not know yet that a new socket has room.
    let _ =
        stream.into_std().and_then(|mut stream| stream.write_all(protocol::line(Err(refusal)).as_bytes()));
}

/// Listens at `path`, in place of the socket of a daemon that was killed.
fn listen(path: &Path) -> Result<(UnixListener, File), String> {
    let cure = "name another path by --control-socket (FIREZONE_CONTROL_SOCKET)";
    let shown = path.display();
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    if let Some(folder) = folder {
        fs::create_dir_all(folder).map_err(|e| {
            format!(
                "cannot make the folder {}: {e}; make it for this user (in a unit: RuntimeDirectory=), or {cure}",
                folder.display()
            )
        })?;
    }
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        Err(e) => return Err(format!("cannot look at {shown}: {e}; {cure}")),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(format!("{shown} is there and no socket; remove it, or {cure}"));
        }
        Ok(_) => match StdStream::connect(path) {
            Err(e) if e.kind() == ErrorKind::ConnectionRefused => {
                fs::remove_file(path).map_err(|e| {
                    format!("cannot replace the socket {shown} of an earlier gateway: {e}; remove it")
                })?;
            }
            Ok(_) => return Err(format!("another gateway serves {shown}; {cure}")),
            Err(e) => {
                return Err(format!("{shown} is there, and it cannot be told whose it is: {e}; {cure}"));
            }
        },
    }
    let bound = || -> io::Result<(UnixListener, File)> {
        // Between bind and chmod nobody gets in: whoever connects is asked who they are.
        let listener = StdListener::bind(path)?;
        let found = fs::symlink_metadata(path)?;
        let file = File { path: path.to_owned(), inode: (found.dev(), found.ino()) };
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        Ok((UnixListener::from_std(listener)?, file))
    };
    bound().map_err(|e| format!("cannot listen on {shown}: {e}; {cure}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_dead_socket_is_replaced_and_a_live_one_and_other_files_are_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run").join("control.sock");
        let (listener, file) = listen(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let why = listen(&path).expect_err("it is alive");
        assert!(why.contains("another gateway serves") && why.contains("--control-socket"), "{why}");
        // As after SIGKILL: the file stays, nobody listens.
        std::mem::forget(file);
        drop(listener);
        let (listener, file) = listen(&path).unwrap();
        drop((listener, file));
        assert!(!path.exists());

        fs::write(&path, "mine").unwrap();
        let why = listen(&path).expect_err("it is a file");
        assert!(why.contains("no socket") && fs::read_to_string(&path).unwrap() == "mine", "{why}");
        let why = listen(&path.join("below")).expect_err("a file is no folder");
        assert!(why.contains("cannot make the folder") && why.contains("RuntimeDirectory="), "{why}");
    }

    #[tokio::test]
    async fn the_socket_of_who_came_later_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.sock");
        let (listener, file) = listen(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _second = listen(&path).unwrap();
        drop((listener, file));
        assert!(path.exists());
    }
}
