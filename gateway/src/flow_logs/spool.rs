//! Where records wait for their upload, over restarts too (cli-and-service.md section 14.4).
//!
//! ```text
//! <root>/upload.json                                          where to; exists while uploads are on
//! <root>/responder/<policy_authorization_id>/token            what records of this authorization are uploaded under
//!                                            <stem>.start.json
//!                                            <stem>.end.json  all of it; makes its .start.json superfluous
//! ```
//!
//! Every file comes into its place by renaming a complete one, so that after a crash there are only whole files and
//! temporary ones. How much may wait is bounded: what finds no room is not kept, and what waits goes first. Names of folders are made from ids of their type and never from text that somebody sent. Reads and
//! writes block: for threads that may.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, ErrorKind, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use chrono::DateTime;
use gateway_proto::{
    flow::{Attribution, FlowReport},
    ids::PolicyAuthorizationId,
    portal::{ingest_token, messages::Secret},
};
use rustc_hash::FxHashSet;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use zeroize::Zeroizing;

use self::stock::{LIMITS, Limits, Stock};
use super::record;

mod stock;

const SETTINGS: &str = "upload.json";
const ROLE: &str = "responder";
const TOKEN: &str = "token";
const START: &str = ".start.json";
const END: &str = ".end.json";
const TEMPORARY: &str = ".tmp";

/// How long a folder may be without token, and a temporary file lie about: nobody is still writing it then.
const LEFT_BEHIND: Duration = Duration::from_secs(60);
/// How long after its end an authorization may still have flows to report: two minutes, said generously.
const LAST_REPORTS: Duration = Duration::from_secs(24 * 60 * 60);
/// A record has at most 16 ways of 200 bytes and a name of 253; a token some kilobytes.
const MAX_FILE: u64 = 64 << 10;

/// The spool. Two threads share it: one writes, one uploads.
#[derive(Debug)]
pub struct Spool {
    root: PathBuf,
    /// Held while a token is put into a folder and while folders are removed: a folder must not go with the token that
    /// was just put into it.
    folders: Mutex<()>,
    /// Records.
    stock: Stock,
}

/// What became of a half of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// It waits.
    OnDisk,
    /// Its authorization has no token here: it is not to be uploaded.
    NotWanted,
    /// There is no room.
    NoRoom,
}

/// What `upload.json` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// The base URL.
    pub api_url: String,
    /// Seconds between two uploads.
    pub interval: u64,
    /// The most records of one request; 0 is the default.
    pub batch_size: u64,
}

/// A record that waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// Its file.
    name: String,
    /// Does it make a `.start.json` superfluous?
    replaces_start: bool,
    /// Compact JSON.
    pub payload: String,
}

/// The oldest records of an authorization.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Oldest first.
    pub records: Vec<Waiting>,
    /// There are others.
    pub more: bool,
}

impl Spool {
    /// The spool below `root`, which needs not exist yet.
    pub fn new(root: PathBuf) -> Self {
        Self::with_limits(root, LIMITS)
    }

    fn with_limits(root: PathBuf, limits: Limits) -> Self {
        Self { root, folders: Mutex::new(()), stock: Stock::new(limits) }
    }

    /// Its root.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Puts the token of an authorization into its folder, and makes that: from now on its records are kept.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn keep_token(&self, attribution: &Attribution) -> io::Result<()> {
        let _kept = self.folders.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = self.folder(attribution.claims.policy_authorization_id);
        make_folder(&self.root)?;
        make_folder(&self.root.join(ROLE))?;
        make_folder(&folder)?;
        put(&folder, TOKEN, attribution.token.0.as_bytes())
    }

    /// Keeps one half of a record. Where there is no room, an end still takes the place of its start.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn keep(&self, report: &FlowReport) -> io::Result<Kept> {
        let claims = &report.attribution.claims;
        let folder = self.folder(claims.policy_authorization_id);
        if !claims.uploads_enabled || !folder.join(TOKEN).try_exists()? {
            return Ok(Kept::NotWanted);
        }
        let half = if report.end.is_some() { END } else { START };
        let content = record::seal(&record::payload(report));
        let stem = record::stem(report);
        let has_room = self.stock.take(content.len() as u64, || self.count())?;
        let start = folder.join(format!("{stem}{START}"));
        if !has_room && (half == START || !start.try_exists()?) {
            return Ok(Kept::NoRoom);
        }
        let result = put(&folder, &format!("{stem}{half}"), content.as_bytes());
        match (&result, has_room) {
            // In its place, though it may be a little longer.
            (Ok(()), false) => _ = remove(&start)?,
            (Err(_), true) => self.stock.give(content.len() as u64),
            (Ok(()), true) | (Err(_), false) => {}
        }
        match result {
            // The folder went this moment, with its token.
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(Kept::NotWanted),
            result => result.map(|()| Kept::OnDisk),
        }
    }

    /// Files of records that wait, and their bytes; `None` until they were counted. Never waits.
    pub fn level(&self) -> Option<(u64, u64)> {
        self.stock.level().map(|Limits { files, bytes }| (files, bytes))
    }

    /// Sees to it that [`Spool::level`] is known.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn look(&self) -> io::Result<()> {
        self.stock.look(|| self.count())
    }

    /// Looks at all records.
    fn count(&self) -> io::Result<Limits> {
        let mut level = Limits { files: 0, bytes: 0 };
        for id in self.authorizations()? {
            let folder = self.folder(id);
            for name in names(&folder)?.iter().filter(|name| name.ends_with(START) || name.ends_with(END)) {
                // The other thread removes some meanwhile.
                if let Ok(metadata) = fs::symlink_metadata(folder.join(name))
                    && metadata.is_file()
                {
                    level.files += 1;
                    level.bytes += metadata.len();
                }
            }
        }
        Ok(level)
    }

    /// Remembers where to upload; `None` forgets it.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn keep_settings(&self, settings: Option<&Settings>) -> io::Result<()> {
        let Some(settings) = settings else {
            return remove(&self.root.join(SETTINGS)).map(drop);
        };
        make_folder(&self.root)?;
        put(&self.root, SETTINGS, serde_json::to_string(settings)?.as_bytes())
    }

    /// Where to upload, as far as that is known without the portal.
    pub fn settings(&self) -> Option<Settings> {
        serde_json::from_slice(&read(&self.root.join(SETTINGS)).ok()??).ok()
    }

    /// Removes what is of no use any more: folders whose token has expired, empty ones whose authorization has ended long
    /// ago, those without a token and what writers left behind, as soon as that is old enough. `now` is the wall clock's.
    ///
    /// # Errors
    /// Those of the file system, after all folders were looked at.
    pub fn prune(&self, now: SystemTime) -> io::Result<()> {
        let mut result = remove_left_behind(&self.root, now);
        for id in self.authorizations()? {
            result = result.and(self.prune_folder(id, now));
        }
        result
    }

    fn prune_folder(&self, id: PolicyAuthorizationId, now: SystemTime) -> io::Result<()> {
        let folder = self.folder(id);
        let _kept = self.folders.lock().unwrap_or_else(PoisonError::into_inner);
        let useless = match self.token(id)? {
            Some(Attribution { claims, .. }) => {
                let unix_now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
                claims.exp.0 <= unix_now.as_secs()
                    || (has_ended(&claims.authorization_expires_at, unix_now) && names(&folder)?.len() <= 1)
            }
            None => is_left_behind(&folder, now)?,
        };
        if useless {
            tracing::debug!(authorization = %id, "Removing a folder of flow logs that is of no use any more");
            self.stock.forget();
            remove(&folder).map(drop)
        } else {
            remove_left_behind(&folder, now)
        }
    }

    /// The authorizations that have a folder; other names there are none of ours.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn authorizations(&self) -> io::Result<Vec<PolicyAuthorizationId>> {
        let mut ids: Vec<_> = names(&self.root.join(ROLE))?
            .iter()
            .filter_map(|name| {
                let id = Uuid::try_parse(name).ok().map(PolicyAuthorizationId)?;
                (id.to_string() == *name).then_some(id)
            })
            .collect();
        ids.sort_unstable();
        Ok(ids)
    }

    /// The token of an authorization, unless there is none that could be meant.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn token(&self, id: PolicyAuthorizationId) -> io::Result<Option<Attribution>> {
        let Some(text) = read(&self.folder(id).join(TOKEN))? else { return Ok(None) };
        let attribution = String::from_utf8(text)
            .ok()
            .and_then(|text| ingest_token::parse(Secret(Zeroizing::new(text))).ok());
        Ok(attribution.filter(|attribution| attribution.claims.policy_authorization_id == id))
    }

    /// The oldest records of an authorization, at most `limit` of them and `max_bytes` of JSON (but one in any case),
    /// without those that `skip` names. Corrupt files are removed on the way.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn batch(
        &self,
        id: PolicyAuthorizationId,
        limit: usize,
        max_bytes: usize,
        skip: &FxHashSet<(PolicyAuthorizationId, String)>,
    ) -> io::Result<Batch> {
        let folder = self.folder(id);
        let names = names(&folder)?;
        let ended: FxHashSet<&str> = names.iter().filter_map(|name| name.strip_suffix(END)).collect();
        let mut due: Vec<(&str, bool)> = names
            .iter()
            .filter_map(|name| match name.strip_suffix(START) {
                Some(stem) => (!ended.contains(stem)).then_some((name.as_str(), false)),
                None => name.strip_suffix(END).map(|_| (name.as_str(), true)),
            })
            .collect();
        due.sort_unstable();
        let mut batch = Batch::default();
        let mut bytes = 0;
        for (name, is_end) in due {
            if skip.contains(&(id, name.to_owned())) {
                continue;
            }
            if batch.records.len() >= limit {
                batch.more = true;
                break;
            }
            let Some(payload) = read(&folder.join(name))?.and_then(|content| record::unseal(&content)) else {
                tracing::debug!(authorization = %id, file = name, "Removing a corrupt flow log");
                self.remove_record(&folder.join(name))?;
                continue;
            };
            // A comma goes between two.
            bytes += payload.len() + 1;
            if bytes > max_bytes && !batch.records.is_empty() {
                batch.more = true;
                break;
            }
            let replaces_start = is_end && {
                let stem = name.strip_suffix(END).unwrap_or_default();
                names.iter().any(|other| other.strip_suffix(START) == Some(stem))
            };
            batch.records.push(Waiting { name: name.to_owned(), replaces_start, payload });
        }
        Ok(batch)
    }

    /// Removes records, with what they make superfluous.
    ///
    /// # Errors
    /// Those of the file system; the others are removed all the same.
    pub fn remove(&self, id: PolicyAuthorizationId, records: &[Waiting]) -> io::Result<()> {
        let folder = self.folder(id);
        let mut result = Ok(());
        for record in records {
            // The start first: left behind alone it would count as a flow that goes on.
            if let Some(stem) = record.name.strip_suffix(END).filter(|_| record.replaces_start) {
                result = result.and(self.remove_record(&folder.join(format!("{stem}{START}"))));
            }
            result = result.and(self.remove_record(&folder.join(&record.name)));
        }
        result
    }

    fn remove_record(&self, path: &Path) -> io::Result<()> {
        if let Some(bytes) = remove(path)? {
            self.stock.give(bytes);
        }
        Ok(())
    }

    fn folder(&self, id: PolicyAuthorizationId) -> PathBuf {
        self.root.join(ROLE).join(id.to_string())
    }
}

impl Waiting {
    /// The name of its file.
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// A folder for us alone; those above it as usual.
fn make_folder(path: &Path) -> io::Result<()> {
    if let Some(above) = path.parent() {
        fs::create_dir_all(above)?;
    }
    match DirBuilder::new().mode(0o700).create(path) {
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(()),
        result => result,
    }
}

/// Writes `name` in `folder` so that there is all of it or nothing, whatever happens.
fn put(folder: &Path, name: &str, content: &[u8]) -> io::Result<()> {
    let temporary = folder.join(format!("{name}{TEMPORARY}"));
    // Another's leftovers might have other rights.
    remove(&temporary)?;
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    let written = file.write_all(content).and_then(|()| file.sync_all());
    let placed = written.and_then(|()| fs::rename(&temporary, folder.join(name)));
    placed.inspect_err(|_| {
        // On a full disk every byte counts; the first error is the one to tell.
        let _ = fs::remove_file(&temporary);
    })
}

/// `None` if there is no such file, or what is there is none of ours: not plain, or too large.
fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let kind = match fs::symlink_metadata(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        metadata => metadata?,
    };
    if !kind.is_file() || kind.len() > MAX_FILE {
        return Ok(None);
    }
    let mut content = Vec::new();
    File::open(path)?.take(MAX_FILE + 1).read_to_end(&mut content)?;
    Ok((content.len() as u64 <= MAX_FILE).then_some(content))
}

/// The names of what is in `folder`; none if there is no folder.
fn names(folder: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(Vec::new()),
        entries => entries?,
    };
    // A name that is not UTF-8 is none of ours.
    entries.filter_map(|entry| entry.map(|entry| entry.file_name().into_string().ok()).transpose()).collect()
}

/// Removes a file, or whatever has its name, if there is one; how long it was.
fn remove(path: &Path) -> io::Result<Option<u64>> {
    let result = fs::symlink_metadata(path).and_then(|metadata| {
        if metadata.is_dir() {
            fs::remove_dir_all(path)?
        } else {
            fs::remove_file(path)?
        }
        Ok(metadata.len())
    });
    match result {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        result => result.map(Some),
    }
}

fn remove_left_behind(folder: &Path, now: SystemTime) -> io::Result<()> {
    for name in names(folder)?.iter().filter(|name| name.ends_with(TEMPORARY)) {
        let path = folder.join(name);
        if is_left_behind(&path, now)? {
            remove(&path)?;
        }
    }
    Ok(())
}

/// Did an authorization end so long ago that no flow of it is still to be reported? Tokens last a month longer, and a
/// busy gateway would look through the empty folders of all of them again and again.
fn has_ended(expires_at: &str, unix_now: Duration) -> bool {
    let Ok(end) = DateTime::parse_from_rfc3339(expires_at) else { return false };
    u64::try_from(end.timestamp()).is_ok_and(|end| unix_now > Duration::from_secs(end) + LAST_REPORTS)
}

/// By a clock that may have been set since: what comes from the future is young.
fn is_left_behind(path: &Path, now: SystemTime) -> io::Result<bool> {
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
        metadata => Ok(now.duration_since(metadata?.modified()?).is_ok_and(|age| age > LEFT_BEHIND)),
    }
}

#[cfg(test)]
mod tests;
