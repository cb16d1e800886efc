//! Who this gateway is: its ID, its token, its rights (cli-and-service.md sections 4, 5 and 7).
//!
//! The ID's derivation is bit-exact with upstream, so that an existing gateway keeps its row in the portal.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use gateway_proto::portal::messages::Secret;
use hmac::{Hmac, Mac as _};
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

/// The files identity is read from; the tests point them elsewhere.
#[derive(Debug, Clone)]
pub struct Places {
    /// `/var/lib/firezone`.
    pub state_dir: PathBuf,
    /// `/etc/machine-id`.
    pub machine_id: PathBuf,
}

impl Default for Places {
    fn default() -> Self {
        Self { state_dir: "/var/lib/firezone".into(), machine_id: "/etc/machine-id".into() }
    }
}

/// The application ID upstream derives machine-bound IDs with.
const APP_ID: &str = "753b38f9f96947ef8083802d5909a372";

/// The gateway ID: configured, stored, derived from the machine ID, or new and then stored.
///
/// # Errors
/// When nothing is configured or stored, there is no machine ID, and a new ID cannot be written.
pub fn gateway_id(configured: Option<&str>, places: &Places) -> Result<String> {
    if let Some(id) = configured.filter(|id| !id.is_empty()) {
        return Ok(id.to_owned());
    }
    let file = places.state_dir.join("gateway_id");
    if let Some(id) = stored_id(&file) {
        // Best effort: an ID that is readable by others is not a secret.
        let _ = fs::set_permissions(&file, fs::Permissions::from_mode(0o640));
        return Ok(id);
    }
    // Upstream insists on creating the state directory first; a machine ID alone is enough to go on.
    if let Ok(machine_id) = fs::read(&places.machine_id) {
        return Ok(derived_id(&machine_id));
    }
    let id = hex::encode(Sha256::digest(uuid::Uuid::new_v4().to_string()));
    store_id(&places.state_dir, &file, &id).with_context(|| {
        format!(
            "no gateway ID: {} is unreadable and a new one cannot be stored in {}; set FIREZONE_ID",
            places.machine_id.display(),
            file.display()
        )
    })?;
    Ok(id)
}

fn stored_id(file: &Path) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    let json: serde_json::Value = serde_json::from_str(&text).ok()?;
    Some(json.get("id")?.as_str()?.to_owned())
}

/// hex(HMAC-SHA256(key = ASCII of the app ID, message = the file with its newline)).
fn derived_id(machine_id: &[u8]) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(APP_ID.as_bytes()).expect("HMAC takes keys of any length");
    mac.update(machine_id);
    hex::encode(mac.finalize().into_bytes())
}

fn store_id(dir: &Path, file: &Path, id: &str) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    fs::set_permissions(dir, fs::Permissions::from_mode(0o770))?;
    let temporary = dir.join(format!(".gateway_id.{}", std::process::id()));
    fs::write(&temporary, serde_json::json!({ "id": id }).to_string())?;
    fs::set_permissions(&temporary, fs::Permissions::from_mode(0o640))?;
    fs::rename(&temporary, file)
}

/// The token: given, or the systemd credential `FIREZONE_TOKEN`.
///
/// # Errors
/// When neither is there, naming both ways to give one.
pub fn token(given: Option<Secret>, credentials_directory: Option<&Path>) -> Result<Secret> {
    if let Some(token) = given {
        return checked(token, "FIREZONE_TOKEN");
    }
    let Some(directory) = credentials_directory else {
        bail!("no token: set FIREZONE_TOKEN, or load the systemd credential FIREZONE_TOKEN");
    };
    let file = directory.join("FIREZONE_TOKEN");
    let text = fs::read_to_string(&file).with_context(|| {
        format!("no token: cannot read the systemd credential {}; set FIREZONE_TOKEN", file.display())
    })?;
    checked(Secret(Zeroizing::new(text.trim().to_owned())), "the systemd credential FIREZONE_TOKEN")
}

fn checked(token: Secret, source: &str) -> Result<Secret> {
    if token.0.trim().is_empty() {
        bail!("{source} is empty; it must hold the gateway's token from the portal");
    }
    Ok(token)
}

/// Whether the process may do what a gateway does: real UID 0 or CAP_NET_ADMIN in the effective set.
#[must_use]
pub fn has_net_admin() -> bool {
    const CAP_NET_ADMIN: u32 = 12;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    rustix::process::getuid().is_root() || effective_capabilities(&status) & (1 << CAP_NET_ADMIN) != 0
}

fn effective_capabilities(proc_status: &str) -> u64 {
    proc_status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0)
}

/// The name shown in the portal: given, the host's, or a random one.
#[must_use]
pub fn name(given: Option<String>) -> String {
    given.unwrap_or_else(|| {
        rustix::system::uname()
            .nodename()
            .to_str()
            .map_or_else(|_| uuid::Uuid::new_v4().to_string(), ToOwned::to_owned)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(dir: &Path) -> Places {
        Places { state_dir: dir.join("state"), machine_id: dir.join("machine-id") }
    }

    #[test]
    fn machine_id_derivation_matches_the_test_vector() {
        assert_eq!(
            derived_id(b"0123456789abcdef0123456789abcdef\n"),
            "eeefe5d1cb3807dfc3ae24794878ec3147027390d839d1d718d8e42bcfde3336"
        );
    }

    #[test]
    fn id_is_configured_then_stored_then_derived_then_new() {
        let dir = tempfile::tempdir().unwrap();
        let places = places(dir.path());

        let new = gateway_id(None, &places).unwrap();
        assert_eq!(new.len(), 64);
        assert_eq!(gateway_id(None, &places).unwrap(), new, "a new ID is stored");

        fs::write(&places.machine_id, "abc\n").unwrap();
        assert_eq!(gateway_id(None, &places).unwrap(), new, "a stored ID wins over the machine's");

        fs::remove_dir_all(&places.state_dir).unwrap();
        assert_eq!(gateway_id(None, &places).unwrap(), derived_id(b"abc\n"));
        assert!(!places.state_dir.exists(), "a derived ID is not written");

        assert_eq!(gateway_id(Some("mine"), &places).unwrap(), "mine");
        assert_eq!(gateway_id(Some(""), &places).unwrap(), derived_id(b"abc\n"), "empty counts as absent");
    }

    #[test]
    fn token_comes_from_argument_or_credential() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("FIREZONE_TOKEN"), " tok \n").unwrap();
        assert_eq!(*token(None, Some(dir.path())).unwrap().0, "tok");
        let given = Secret(Zeroizing::new("arg".to_owned()));
        assert_eq!(*token(Some(given), Some(dir.path())).unwrap().0, "arg");
        assert!(token(None, None).unwrap_err().to_string().contains("FIREZONE_TOKEN"));
        assert!(token(Some(Secret(Zeroizing::new(" ".into()))), None).is_err());
    }

    #[test]
    fn effective_capabilities_are_read_from_proc() {
        assert_eq!(effective_capabilities("Name:\tx\nCapEff:\t0000000000001000\n"), 1 << 12);
        assert_eq!(effective_capabilities("nonsense"), 0);
    }
}
