//! The other end of the control socket: asks a running gateway, for `status` and its like.

use std::{
    io::{BufRead as _, BufReader, ErrorKind, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::protocol::VERSION;

/// A gateway answers within 5 s, or says that it cannot.
const PATIENCE: Duration = Duration::from_secs(10);

/// A connection to a gateway.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// One sentence with the cure: nobody is there, or we may not.
    pub fn connect(path: &Path) -> Result<Self> {
        let shown = path.display();
        let stream = match UnixStream::connect(path) {
            Ok(stream) => stream,
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => bail!(
                "No gateway listens on {shown}; is it running, and with the same --control-socket \
                 (FIREZONE_CONTROL_SOCKET)? Its log says why it has no control socket"
            ),
            Err(e) if e.kind() == ErrorKind::PermissionDenied => {
                bail!(
                    "{shown} may not be used by this user; run the command as root or as the gateway's user"
                )
            }
            Err(e) => return Err(e).with_context(|| format!("Cannot connect to {shown}")),
        };
        stream.set_read_timeout(Some(PATIENCE)).context("Cannot bound how long to wait")?;
        stream.set_write_timeout(Some(PATIENCE)).context("Cannot bound how long to wait")?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    /// Sends a request: its name and its fields.
    ///
    /// # Errors
    /// What the gateway says is wrong, or that it does not answer.
    pub fn ask(&mut self, name: &str, fields: Value) -> Result<Value> {
        let mut request = json!({ "version": VERSION, "request": name });
        if let (Some(request), Value::Object(fields)) = (request.as_object_mut(), fields) {
            request.extend(fields);
        }
        let silent = "The gateway does not answer; it may be overloaded or just ending: look at its log";
        // One that refuses us closes at once, and what it said is still to be read.
        let sent = writeln!(self.stream.get_mut(), "{request}");
        let mut line = String::new();
        match self.stream.read_line(&mut line) {
            Ok(0) => {
                sent.context(silent)?;
                bail!("The gateway closed the connection without an answer; look at its log")
            }
            Ok(_) => {}
            Err(e) => return Err(e).context(silent),
        }
        let mut answer: Value = serde_json::from_str(&line)
            .context("The gateway's answer is no JSON; is this its control socket?")?;
        if let Some(message) = answer["error"]["message"].as_str() {
            bail!("{message}");
        }
        if answer["version"] != VERSION || answer["ok"].is_null() {
            bail!("The gateway speaks another version of the protocol; use its own firezone-gateway");
        }
        Ok(answer["ok"].take())
    }

    /// The same, read as what it must be.
    ///
    /// # Errors
    /// As [`Client::ask`], or the answer lacks something.
    pub fn ask_for<T: DeserializeOwned>(&mut self, name: &str, fields: Value) -> Result<T> {
        read(self.ask(name, fields)?)
    }
}

/// An answer as what it must be.
fn read<T: DeserializeOwned>(answer: Value) -> Result<T> {
    serde_json::from_value(answer)
        .context("The gateway's answer lacks something; use its own firezone-gateway")
}

/// What `status`, `flows`, `why`, `top` and so on do.
pub mod commands {
    use std::{io::stdout, net::IpAddr};

    use super::{super::show, super::status, super::why, *};

    /// `firezone-gateway status`.
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub fn status(path: &Path, as_json: bool) -> Result<()> {
        let answer = Client::connect(path)?.ask("status", Value::Null)?;
        print(as_json, answer, |status: status::Status| show::status(&status))
    }

    /// `firezone-gateway flows`.
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub fn flows(path: &Path, client: Option<&str>, limit: usize, as_json: bool) -> Result<()> {
        let fields = json!({ "client": client, "limit": limit });
        let answer = Client::connect(path)?.ask("flows", fields)?;
        print(as_json, answer, |flows: status::Flows| show::flows(&flows))
    }

    /// `firezone-gateway why`.
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub fn why(
        path: &Path,
        (src, dst): (IpAddr, IpAddr),
        protocol: &str,
        port: Option<u16>,
        as_json: bool,
    ) -> Result<()> {
        let fields = json!({ "src": src, "dst": dst, "protocol": number_or_word(protocol), "port": port });
        let answer = Client::connect(path)?.ask("why", fields)?;
        print(as_json, answer, |why: why::Why| show::why(&why))
    }

    /// `firezone-gateway fast-path`.
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub fn fast_path(path: &Path, mode: &str) -> Result<()> {
        let answer = Client::connect(path)?.ask("fast-path", json!({ "mode": mode }))?;
        print(false, answer, |now: status::FastPath| format!("fast path: {}\n", now.words))
    }

    fn number_or_word(protocol: &str) -> Value {
        protocol.parse::<u64>().map_or_else(|_| json!(protocol), |number| json!(number))
    }

    /// Whoever reads may stop (`| head`).
    fn print<T: DeserializeOwned>(as_json: bool, answer: Value, show: impl Fn(T) -> String) -> Result<()> {
        let text = match as_json {
            true => serde_json::to_string_pretty(&answer)? + "\n",
            false => show(read(answer)?),
        };
        match stdout().write_all(text.as_bytes()) {
            Err(e) if e.kind() != ErrorKind::BrokenPipe => Err(e).context("Cannot write to standard output"),
            _ => Ok(()),
        }
    }
}
