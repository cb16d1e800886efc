//! From the spool to the portal's ingest endpoint (cli-and-service.md section 14.5).
//!
//! A pass goes through all authorizations and sends one batch of each. The endpoint tells records apart by themselves,
//! so that sending one twice is harmless, and a record is removed only when it was taken.
//!
//! | answer | what follows |
//! |---|---|
//! | 2xx | the records are removed |
//! | 422 | so they are: the valid ones among them were stored, the others never will be |
//! | 413 | halves; a single record stays, and is not tried again before a restart |
//! | 429 | the same again, when it says |
//! | 408, 5xx, none | the same again after a pause that grows, for five minutes; then the pass is over |
//! | 301, 302, 307, 308 | the same there, five times at most |
//! | others | the batch stays for the next pass |

use std::{
    convert::Infallible,
    fmt::Write as _,
    io,
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime},
};

use gateway_proto::{ids::PolicyAuthorizationId, portal::messages::Secret};
use hyper::body::Bytes;
use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};
use rustc_hash::FxHashSet;
use serde_json::Value;
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};

use super::{
    figures::Tally,
    http::{Answer, Dial, Http, Target},
    spool::{Settings, Spool, Waiting},
};

/// The records of a request, if the portal names no number, and the most of them.
const DEFAULT_BATCH: u64 = 1000;
const MAX_BATCH: u64 = 10_000;
/// The endpoint takes 10 MB.
const MAX_BODY: usize = 8_000_000;
/// What a body begins and ends with.
const AROUND: (&str, &str) = (r#"{"flow_logs":["#, "]}");
/// Before the next pass where a batch was not all there is.
const BACKLOG: Duration = Duration::from_secs(1);
/// Between two passes nobody needs more, and a timer can wait.
const MAX_INTERVAL: u64 = 24 * 60 * 60;
/// How often there is at most, and at least, a look for what can be removed.
const PRUNE_INTERVAL: Duration = Duration::from_secs(60);
const IDLE_PRUNE_INTERVAL: Duration = Duration::from_secs(60 * 60);
/// Pauses after failures.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const MAX_PAUSE: Duration = Duration::from_secs(60);
/// How long a batch is tried again.
const BUDGET: Duration = Duration::from_secs(5 * 60);
/// For a 429 that does not say.
const RETRY_AFTER: Duration = Duration::from_secs(1);
const MAX_REDIRECTIONS: usize = 5;

/// What uploads.
pub struct Uploader<D> {
    spool: Arc<Spool>,
    tally: Arc<Tally>,
    http: Http<D>,
    random: SmallRng,
    /// Single records that the endpoint called too large.
    too_large: FxHashSet<(PolicyAuthorizationId, String)>,
    pruned: Option<Instant>,
    /// The last pass failed, and that was said.
    failing: bool,
}

/// How a pass ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pass {
    Done,
    /// There is more to send.
    Backlog,
}

/// How a batch ended.
enum Sent {
    All,
    /// Some are kept for the next pass, for this reason.
    Kept(String),
    /// The others need not try.
    Unreachable(String),
}

/// What follows from an answer.
enum Next {
    Remove,
    Halve,
    /// Not counted as a failure.
    Wait(Duration),
    Again(String, Option<Duration>),
    Redirected(String),
    Keep(String),
}

impl<D: Dial> Uploader<D> {
    /// Uploads from `spool`; what becomes of it is counted in `tally`.
    pub fn new(spool: Arc<Spool>, tally: Arc<Tally>, http: Http<D>, seed: u64) -> Self {
        Self {
            spool,
            tally,
            http,
            random: SmallRng::seed_from_u64(seed),
            too_large: FxHashSet::default(),
            pruned: None,
            failing: false,
        }
    }

    /// Uploads to where the settings say, until nobody can change them any more. What is under way then, and when they
    /// change, is broken off.
    pub async fn run(mut self, mut settings: watch::Receiver<Option<Settings>>) {
        loop {
            let wanted = settings.borrow_and_update().clone();
            tokio::select! {
                biased;
                changed = settings.changed() => if changed.is_err() { return },
                never = self.serve(wanted) => match never {},
            }
        }
    }

    async fn serve(&mut self, settings: Option<Settings>) -> Infallible {
        let Some(settings) = settings else {
            loop {
                self.prune();
                sleep(IDLE_PRUNE_INTERVAL).await;
            }
        };
        let interval = Duration::from_secs(settings.interval.clamp(1, MAX_INTERVAL));
        loop {
            self.prune();
            let pass = self.pass(&settings).await;
            let pause = if pass == Pass::Backlog { BACKLOG } else { interval };
            sleep(pause).await;
        }
    }

    fn prune(&mut self) {
        if self.pruned.is_some_and(|at| at.elapsed() < PRUNE_INTERVAL) {
            return;
        }
        self.pruned = Some(Instant::now());
        if let Err(error) = self.spool.prune(SystemTime::now()).and_then(|()| self.spool.look()) {
            tracing::debug!(%error, "Cannot look through the spool of flow logs");
        }
    }

    async fn pass(&mut self, settings: &Settings) -> Pass {
        let mut trouble = None;
        let pass = match Target::ingestion(&settings.api_url) {
            Ok(mut target) => self.send_all(&mut target, settings.batch_size, &mut trouble).await,
            Err(why) => {
                trouble = Some(why);
                Pass::Done
            }
        };
        // Between passes the server would have to keep it open.
        self.http.close();
        self.tell(trouble);
        pass
    }

    /// Once when it begins and once when it is over.
    fn tell(&mut self, trouble: Option<String>) {
        let failed_before = std::mem::replace(&mut self.failing, trouble.is_some());
        self.tally.upload_fails.store(trouble.is_some(), Ordering::Relaxed);
        match trouble {
            Some(why) if !failed_before => {
                tracing::warn!("Flow logs cannot be uploaded: {why}; they are kept")
            }
            Some(why) => tracing::debug!("Flow logs still cannot be uploaded: {why}"),
            None if failed_before => tracing::info!("Flow logs can be uploaded again"),
            None => {}
        }
    }

    async fn send_all(&mut self, target: &mut Target, batch_size: u64, trouble: &mut Option<String>) -> Pass {
        let limit = if batch_size == 0 { DEFAULT_BATCH } else { batch_size.min(MAX_BATCH) };
        let limit = usize::try_from(limit).expect("10 000 is no more than a usize holds");
        let authorizations = self.spool.authorizations().unwrap_or_else(|error| {
            *trouble = Some(format!("the spool cannot be read: {error}"));
            Vec::new()
        });
        let mut pass = Pass::Done;
        for id in authorizations {
            match self.send_batch_of(id, limit, target).await {
                Ok((Sent::All, more)) => pass = if more { Pass::Backlog } else { pass },
                Ok((Sent::Kept(why), _)) => *trouble = Some(why),
                Ok((Sent::Unreachable(why), _)) => {
                    *trouble = Some(why);
                    return Pass::Done;
                }
                Err(error) => *trouble = Some(format!("the spool fails: {error}")),
            }
        }
        pass
    }

    /// Also tells whether there are more.
    async fn send_batch_of(
        &mut self,
        id: PolicyAuthorizationId,
        limit: usize,
        target: &mut Target,
    ) -> io::Result<(Sent, bool)> {
        let room = MAX_BODY - AROUND.0.len() - AROUND.1.len();
        let batch = self.spool.batch(id, limit, room, &self.too_large)?;
        if batch.records.is_empty() {
            return Ok((Sent::All, false));
        }
        // Without a token it is a matter of time until they are removed.
        let Some(attribution) = self.spool.token(id)? else { return Ok((Sent::All, false)) };
        Ok((self.send(id, &attribution.token, &batch.records, target).await?, batch.more))
    }

    async fn send(
        &mut self,
        id: PolicyAuthorizationId,
        token: &Secret,
        records: &[Waiting],
        target: &mut Target,
    ) -> io::Result<Sent> {
        let mut parts = vec![records];
        let mut deadline = Instant::now() + BUDGET;
        let (mut pause, mut redirections) = (FIRST_PAUSE, 0);
        while let Some(part) = parts.pop() {
            let answer = self.http.post(target, token, body(part)).await;
            match follows(answer, part.len()) {
                Next::Remove => {
                    self.tally.uploaded.fetch_add(part.len() as u64, Ordering::Relaxed);
                    self.spool.remove(id, part)?;
                    tracing::debug!(authorization = %id, records = part.len(), "Uploaded flow logs");
                    pause = FIRST_PAUSE;
                }
                Next::Halve if part.len() > 1 => {
                    let (older, newer) = part.split_at(part.len() / 2);
                    parts.extend([newer, older]);
                }
                Next::Halve => {
                    tracing::warn!(authorization = %id, file = part[0].name(), "A flow log is too large to be uploaded");
                    self.too_large.insert((id, part[0].name().to_owned()));
                }
                Next::Wait(time) => {
                    deadline += time;
                    sleep(time).await;
                    parts.push(part);
                }
                Next::Again(why, retry_after) => {
                    let jitter = self.random.random_range(0.5..1.5);
                    let time = retry_after.unwrap_or_default().max(pause.mul_f64(jitter).min(MAX_PAUSE));
                    if Instant::now() + time > deadline {
                        return Ok(Sent::Unreachable(why));
                    }
                    tracing::debug!(?time, "Flow logs are sent again: {why}");
                    sleep(time).await;
                    pause = (pause * 2).min(MAX_PAUSE);
                    parts.push(part);
                }
                Next::Redirected(location) => {
                    redirections += 1;
                    if redirections > MAX_REDIRECTIONS {
                        return Ok(Sent::Unreachable(format!("more than {MAX_REDIRECTIONS} redirections")));
                    }
                    match target.redirected(&location) {
                        Ok(there) => *target = there,
                        Err(why) => return Ok(Sent::Unreachable(why)),
                    }
                    parts.push(part);
                }
                Next::Keep(why) => return Ok(Sent::Kept(why)),
            }
        }
        Ok(Sent::All)
    }
}

/// The table at the top.
fn follows(answer: Result<Answer, String>, records: usize) -> Next {
    let answer = match answer {
        Ok(answer) => answer,
        Err(why) => return Next::Again(why, None),
    };
    let status = answer.status;
    let said = format!("the server answers with HTTP {status}");
    match (status, answer.location) {
        (200..=299, _) => Next::Remove,
        (422, _) => {
            let invalid = count_invalid(&answer.body);
            tracing::warn!(
                records,
                ?invalid,
                "The server calls flow logs invalid, and keeps only the others"
            );
            Next::Remove
        }
        (413, _) => Next::Halve,
        (429, _) => Next::Wait(answer.retry_after.unwrap_or(RETRY_AFTER)),
        (408 | 500..=599, _) => Next::Again(said, answer.retry_after),
        (301 | 302 | 307 | 308, Some(location)) => Next::Redirected(location),
        _ => Next::Keep(said),
    }
}

/// How many records a 422 complains about.
fn count_invalid(body: &[u8]) -> Option<usize> {
    let body: Value = serde_json::from_slice(body).ok()?;
    let errors = body.get("validation_errors").or_else(|| body.get("error")?.get("validation_errors"))?;
    errors.as_array().map(Vec::len).or_else(|| errors.as_object().map(serde_json::Map::len))
}

fn body(records: &[Waiting]) -> Bytes {
    let mut body = String::with_capacity(records.iter().map(|r| r.payload.len() + 1).sum::<usize>() + 32);
    body.push_str(AROUND.0);
    for (nth, record) in records.iter().enumerate() {
        let comma = if nth == 0 { "" } else { "," };
        write!(body, "{comma}{}", record.payload).expect("writing to a String cannot fail");
    }
    body.push_str(AROUND.1);
    body.into()
}

#[cfg(test)]
mod tests;
