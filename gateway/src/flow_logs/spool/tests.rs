//! The spool on a real file system, in a temporary folder.

use std::os::unix::fs::{PermissionsExt as _, symlink};

use super::*;
use crate::flow_logs::testkit::{self, attribution, ended, id, numbered, report};

const HUGE: usize = usize::MAX;

/// A spool that has the token, and what keeps its folder.
fn spool() -> (tempfile::TempDir, Spool) {
    let place = tempfile::tempdir().unwrap();
    let spool = Spool::new(place.path().join("firezone/flow_logs"));
    spool.keep_token(&attribution()).unwrap();
    (place, spool)
}

fn all(spool: &Spool) -> Batch {
    spool.batch(id(), HUGE, HUGE, &FxHashSet::default()).unwrap()
}

fn files(path: &Path) -> Vec<String> {
    let mut files = names(path).unwrap();
    files.sort();
    files
}

fn age(path: &Path, age: Duration) {
    File::open(path).unwrap().set_modified(SystemTime::now() - age).unwrap();
}

#[test]
fn files_and_folders_are_where_and_how_they_must_be() {
    let (_place, spool) = spool();
    assert_eq!([spool.keep(&report()).unwrap(), spool.keep(&ended()).unwrap()], [Kept::OnDisk; 2]);
    spool
        .keep_settings(Some(&Settings { api_url: "https://a/".into(), interval: 60, batch_size: 1000 }))
        .unwrap();
    let folder = spool.root().join("responder/0d1c7a55-9b7e-4f6c-8a3e-5f1b2c3d4e5f");
    let stem = record::stem(&report());
    assert_eq!(files(&folder), [format!("{stem}.end.json"), format!("{stem}.start.json"), "token".into()]);
    assert_eq!(fs::read_to_string(folder.join("token")).unwrap(), *attribution().token.0);
    assert_eq!(
        fs::read_to_string(folder.join(format!("{stem}.end.json"))).unwrap(),
        record::seal(&record::payload(&ended()))
    );
    assert_eq!(
        fs::read_to_string(spool.root().join("upload.json")).unwrap(),
        r#"{"api_url":"https://a/","interval":60,"batch_size":1000}"#
    );
    let mut seen = 0;
    let mut todo = vec![spool.root().to_owned()];
    while let Some(path) = todo.pop() {
        let metadata = fs::metadata(&path).unwrap();
        let expect = if metadata.is_dir() { 0o700 } else { 0o600 };
        assert_eq!(metadata.permissions().mode() & 0o7777, expect, "{}", path.display());
        todo.extend(names(&path).unwrap().iter().map(|name| path.join(name)));
        seen += 1;
    }
    assert_eq!(seen, 3 + 4);
}

#[test]
fn nothing_is_kept_without_a_token_or_where_uploads_are_not_enabled() {
    let place = tempfile::tempdir().unwrap();
    let spool = Spool::new(place.path().join("flow_logs"));
    assert_eq!(spool.keep(&report()).unwrap(), Kept::NotWanted);
    assert!(!spool.root().exists());
    spool.keep_token(&attribution()).unwrap();
    let mut other = report();
    other.attribution = testkit::attribution_of(PolicyAuthorizationId(Uuid::from_u128(9)));
    let mut disabled = report();
    let mut attribution = Attribution::clone(&disabled.attribution);
    attribution.claims.uploads_enabled = false;
    disabled.attribution = attribution.into();
    assert_eq!([spool.keep(&other).unwrap(), spool.keep(&disabled).unwrap()], [Kept::NotWanted; 2]);
    assert_eq!(spool.authorizations().unwrap(), [id()]);
    assert_eq!(all(&spool), Batch::default());
}

#[test]
fn the_oldest_come_first_and_an_end_replaces_its_start() {
    let (_place, spool) = spool();
    for number in [3, 1, 2] {
        spool.keep(&numbered(number, report())).unwrap();
    }
    spool.keep(&numbered(2, ended())).unwrap();
    let expect = [report(), ended(), report()];
    let expect: Vec<_> =
        (1..).zip(expect).map(|(n, report)| record::payload(&numbered(n, report)).to_string()).collect();
    let payloads = |batch: &Batch| batch.records.iter().map(|r| r.payload.clone()).collect::<Vec<_>>();
    assert_eq!(payloads(&all(&spool)), expect);

    let some = |limit, bytes| {
        let batch = spool.batch(id(), limit, bytes, &FxHashSet::default()).unwrap();
        (batch.records.len(), batch.more)
    };
    let two = expect[0].len() + expect[1].len() + 2;
    assert_eq!(
        [(HUGE, HUGE), (3, HUGE), (2, HUGE), (HUGE, two), (HUGE, two - 1), (HUGE, 0)]
            .map(|(l, b)| some(l, b)),
        [(3, false), (3, false), (2, true), (2, true), (1, true), (1, true)]
    );
    let first = all(&spool).records[0].name().to_owned();
    let without = spool.batch(id(), HUGE, HUGE, &[(id(), first)].into_iter().collect()).unwrap();
    assert_eq!(payloads(&without), expect[1..]);

    let batch = spool.batch(id(), 2, HUGE, &FxHashSet::default()).unwrap();
    spool.remove(id(), &batch.records).unwrap();
    assert_eq!(payloads(&all(&spool)), expect[2..]);
    assert_eq!(files(&spool.folder(id())).len(), 2, "the start that was replaced is gone, too");
    spool.remove(id(), &batch.records).expect("removed already is no error");
}

#[test]
fn a_crash_between_writing_and_renaming_leaves_no_record_and_nothing_in_the_way() {
    let (_place, spool) = spool();
    let folder = spool.folder(id());
    let temporary = folder.join(format!("{}{END}{TEMPORARY}", record::stem(&ended())));
    fs::write(&temporary, "{\"checksum\":375").unwrap();
    let settings = spool.root().join(format!("{SETTINGS}{TEMPORARY}"));
    fs::write(&settings, "{").unwrap();
    assert_eq!((all(&spool), spool.settings()), (Batch::default(), None));
    // Who writes it this moment may go on.
    spool.prune(SystemTime::now()).unwrap();
    assert!(temporary.exists() && settings.exists());
    assert_eq!(spool.keep(&ended()).unwrap(), Kept::OnDisk, "the same again after a restart");
    assert_eq!((all(&spool).records.len(), temporary.exists()), (1, false));
    fs::write(&temporary, "{").unwrap();
    for path in [&temporary, &settings] {
        age(path, Duration::from_secs(61));
    }
    spool.prune(SystemTime::now()).unwrap();
    assert!(!temporary.exists() && !settings.exists());
    assert_eq!(all(&spool).records.len(), 1);
}

#[test]
fn a_disk_that_takes_no_more_leaves_no_rubbish() {
    let (_place, spool) = spool();
    // Renaming a file onto a folder fails, as would anything else after the writing.
    let in_the_way = spool.folder(id()).join(format!("{}{START}", record::stem(&report())));
    fs::create_dir_all(in_the_way.join("full")).unwrap();
    spool.keep(&report()).unwrap_err();
    assert_eq!(files(&spool.folder(id())).len(), 2);
    assert_eq!(all(&spool), Batch::default());
    assert!(!in_the_way.exists(), "what is no record is removed as corrupt");
    assert_eq!(spool.keep(&report()).unwrap(), Kept::OnDisk);
}

#[test]
fn corrupt_files_are_removed_and_what_is_not_ours_is_left_alone() {
    let (place, spool) = spool();
    let folder = spool.folder(id());
    let sealed = record::seal(&record::payload(&report()));
    let huge = format!("{}{}", " ".repeat(64 << 10), sealed);
    for (number, content) in
        ["", "{}", &sealed[1..], &sealed[..sealed.len() - 1], &sealed.replace("443", "444"), &huge]
            .iter()
            .enumerate()
    {
        fs::write(folder.join(format!("000000000{number}-0123456789abcdef.end.json")), content).unwrap();
    }
    let outside = place.path().join("outside");
    fs::write(&outside, &sealed).unwrap();
    symlink(&outside, folder.join("0000000009-0123456789abcdef.end.json")).unwrap();
    nix_fifo(&folder.join("0000000008-0123456789abcdef.start.json"));
    fs::write(folder.join("notes.txt"), "mine").unwrap();
    spool.keep(&report()).unwrap();
    assert_eq!(all(&spool).records.len(), 1);
    assert_eq!(files(&folder).len(), 3, "{:?}", files(&folder));
    assert!(outside.exists(), "a link is removed, not what it leads to");
}

/// Opening it would block for ever.
fn nix_fifo(path: &Path) {
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
}

#[test]
fn hostile_ids_and_roles_write_nothing() {
    let place = tempfile::tempdir().unwrap();
    let spool = Spool::new(place.path().join("spool"));
    let good = testkit::claims();
    let text = id().to_string();
    for (name, value) in [
        ("policy_authorization_id", "../..".to_owned()),
        ("policy_authorization_id", "../../../../../../../../etc/passwd//".to_owned()),
        ("policy_authorization_id", text.to_uppercase()),
        ("policy_authorization_id", text[..35].to_owned()),
        ("policy_authorization_id", format!("{}\0", &text[..35])),
        ("policy_authorization_id", text.replace('-', "")),
        ("role", "initiator".to_owned()),
        ("role", "../responder".to_owned()),
    ] {
        let mut hostile = good.clone();
        hostile[name] = value.clone().into();
        let parsed = ingest_token::parse(testkit::token_of(&hostile));
        parsed.iter().for_each(|attribution| spool.keep_token(attribution).unwrap());
        assert!(parsed.is_err() && files(place.path()).is_empty(), "{name} {value:?}");
    }
    spool.keep_token(&ingest_token::parse(testkit::token_of(&good)).unwrap()).unwrap();
    assert_eq!(files(place.path()), ["spool"]);
    // Neither are folders with such names walked into, should somebody have made them.
    for name in [text.to_uppercase(), text.replace('-', ""), "initiator".into()] {
        fs::create_dir(spool.root().join(ROLE).join(name)).unwrap();
    }
    assert_eq!(spool.authorizations().unwrap(), [id()]);
}

#[test]
fn a_folder_goes_with_its_token_or_a_minute_after_it_was_left_without() {
    let at = |second| SystemTime::UNIX_EPOCH + Duration::from_secs(second);
    let minute = Duration::from_secs(61);
    let other = testkit::attribution_of(PolicyAuthorizationId(Uuid::from_u128(9)));
    type Change<'a> = &'a dyn Fn(&Path);
    let nothing: Change<'_> = &|_| {};
    let without: Change<'_> = &|folder| fs::remove_file(folder.join(TOKEN)).unwrap();
    let old: Change<'_> = &|folder| {
        fs::remove_file(folder.join(TOKEN)).unwrap();
        age(folder, minute);
    };
    let spoilt: Change<'_> = &|folder| {
        fs::write(folder.join(TOKEN), b"a.b.c\xff").unwrap();
        age(folder, minute);
    };
    let anothers: Change<'_> = &|folder| {
        fs::write(folder.join(TOKEN), other.token.0.as_bytes()).unwrap();
        age(folder, minute);
    };
    for (name, change, now, stays) in [
        ("in use", nothing, at(testkit::EXPIRY - 1), true),
        ("expired", nothing, at(testkit::EXPIRY), false),
        ("the clock is before 1970", nothing, SystemTime::UNIX_EPOCH - minute, true),
        ("just made", without, SystemTime::now(), true),
        ("left behind", old, SystemTime::now(), false),
        ("left behind, and the clock was set back", old, at(1_000_000), true),
        ("spoilt token", spoilt, SystemTime::now(), false),
        ("another's token", anothers, SystemTime::now(), false),
    ] {
        let (_place, spool) = spool();
        spool.keep(&report()).unwrap();
        change(&spool.folder(id()));
        spool.prune(now).unwrap();
        assert_eq!(spool.folder(id()).exists(), stays, "{name}");
    }
    let mut over = testkit::claims();
    for (expires_at, empty, now, stays) in [
        ("2026-08-01T10:00:00Z", true, 1_785_578_400 + 86_400, true),
        ("2026-08-01T10:00:00Z", true, 1_785_578_400 + 86_401, false),
        ("2026-08-01T12:00:00+02:00", true, 1_785_578_400 + 86_401, false),
        ("2026-08-01T10:00:00Z", false, 1_785_578_400 + 86_401, true),
        ("never", true, testkit::EXPIRY - 1, true),
    ] {
        let (_place, spool) = spool();
        over["authorization_expires_at"] = expires_at.into();
        spool.keep_token(&ingest_token::parse(testkit::token_of(&over)).unwrap()).unwrap();
        assert!(empty || spool.keep(&report()).unwrap() == Kept::OnDisk);
        spool.prune(at(now)).unwrap();
        assert_eq!(spool.folder(id()).exists(), stays, "{expires_at} {empty} {now}");
    }
    let nowhere = Spool::new("/nonexistent/flow_logs".into());
    nowhere.prune(SystemTime::now()).unwrap();
    assert_eq!(nowhere.authorizations().unwrap(), []);
}

#[test]
fn settings_come_back_after_a_restart_unless_they_are_forgotten_or_spoilt() {
    let (_place, spool) = spool();
    let settings = Settings { api_url: "https://flows.example.net/".into(), interval: 60, batch_size: 0 };
    assert_eq!(spool.settings(), None);
    spool.keep_settings(Some(&settings)).unwrap();
    assert_eq!(Spool::new(spool.root().to_owned()).settings(), Some(settings));
    fs::write(spool.root().join(SETTINGS), "{\"api_url\":").unwrap();
    assert_eq!(spool.settings(), None);
    spool.keep_settings(None).unwrap();
    spool.keep_settings(None).unwrap();
    assert_eq!(files(spool.root()), ["responder"]);
}

/// A spool for few.
fn small(files: u64, bytes: u64) -> (tempfile::TempDir, Spool) {
    let place = tempfile::tempdir().unwrap();
    let spool = Spool::with_limits(place.path().to_owned(), Limits { files, bytes });
    spool.keep_token(&attribution()).unwrap();
    (place, spool)
}

#[test]
fn what_finds_no_room_is_not_kept_and_what_waits_makes_room_when_it_goes() {
    let (place, spool) = small(3, 1 << 20);
    let keep = |number, report| spool.keep(&numbered(number, report)).unwrap();
    assert_eq!([1, 2, 3].map(|number| keep(number, report())), [Kept::OnDisk; 3]);
    assert_eq!(keep(4, report()), Kept::NoRoom);
    assert_eq!(keep(4, ended()), Kept::NoRoom);
    // An end says all that its start does: it takes its place.
    assert_eq!(keep(2, ended()), Kept::OnDisk);
    let folder = spool.folder(id());
    assert_eq!(files(&folder).len(), 3 + 1, "and the token: {:?}", files(&folder));
    assert_eq!(keep(5, report()), Kept::NoRoom);

    // The oldest are uploaded.
    let batch = spool.batch(id(), 1, HUGE, &FxHashSet::default()).unwrap();
    spool.remove(id(), &batch.records).unwrap();
    assert_eq!([keep(6, report()), keep(7, report())], [Kept::OnDisk, Kept::NoRoom]);

    // Another run counts what it finds; a corrupt one goes, and makes room.
    let again = Spool::with_limits(place.path().to_owned(), Limits { files: 3, bytes: 1 << 20 });
    assert_eq!(again.keep(&numbered(8, report())).unwrap(), Kept::NoRoom);
    let corrupt = folder.join(files(&folder).iter().find(|name| name.ends_with(END)).unwrap());
    fs::write(&corrupt, "{").unwrap();
    assert_eq!(all(&again).records.len(), 2);
    assert_eq!(again.keep(&numbered(8, report())).unwrap(), Kept::OnDisk);
    assert_eq!(again.keep(&numbered(9, report())).unwrap(), Kept::NoRoom);

    // Its time is over: all of it goes.
    again.prune(SystemTime::UNIX_EPOCH + Duration::from_secs(testkit::EXPIRY + 1)).unwrap();
    again.keep_token(&attribution()).unwrap();
    assert_eq!([1, 2, 3].map(|n| again.keep(&numbered(n, report())).unwrap()), [Kept::OnDisk; 3]);
}

#[test]
fn bytes_are_bounded_too_and_a_failure_takes_no_room() {
    let one = record::seal(&record::payload(&numbered(1, report()))).len() as u64;
    let (_place, spool) = small(100, 2 * one);
    let folder = spool.folder(id());
    // Something in the way of the first record, and of its removal.
    let name = format!("{}{START}", record::stem(&numbered(1, report())));
    fs::create_dir_all(folder.join(&name).join("x")).unwrap();
    for _ in 0..5 {
        spool.keep(&numbered(1, report())).unwrap_err();
    }
    fs::remove_dir_all(folder.join(&name)).unwrap();
    spool.stock.forget();
    let kept = [1, 2, 3].map(|number| spool.keep(&numbered(number, report())).unwrap());
    assert_eq!(kept, [Kept::OnDisk, Kept::OnDisk, Kept::NoRoom]);
}
