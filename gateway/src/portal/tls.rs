//! Which certificate authorities the portal may be vouched for by: Mozilla's, bundled, and the operator's files.

use std::{path::PathBuf, sync::Arc};

use anyhow::{Context as _, Result, ensure};
use rustls::{ClientConfig, RootCertStore, crypto::ring};
use rustls_pki_types::{CertificateDer, pem::PemObject as _};

/// A PEM file with further roots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaFile {
    /// The file.
    pub path: PathBuf,
    /// The flag or variable that named it, for error texts.
    pub named_by: &'static str,
}

/// TLS 1.2 and 1.3, no client certificate, no ALPN (portal-protocol.md section 2).
///
/// # Errors
/// A file cannot be read, or holds no usable certificate.
pub fn client_config(ca_files: &[CaFile]) -> Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    for file in ca_files {
        add_file(&mut roots, file)?;
    }
    // The provider is named, not the process default: nobody has to install one first.
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .context("rustls refuses its own default protocol versions")?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

fn add_file(roots: &mut RootCertStore, CaFile { path, named_by }: &CaFile) -> Result<()> {
    let at = path.display();
    let pem = std::fs::read(path).with_context(|| format!("{named_by}: cannot read {at}"))?;
    let mut added = 0;
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.with_context(|| format!("{named_by}: {at} is not a PEM file"))?;
        // System bundles hold a few roots that webpki does not accept; they are of no use, but no mistake either.
        match roots.add(certificate) {
            Ok(()) => added += 1,
            Err(error) => tracing::debug!(%error, file = %at, "Left out a root certificate"),
        }
    }
    ensure!(
        added > 0,
        "{named_by}: {at} holds no usable certificate; expected PEM (-----BEGIN CERTIFICATE-----)"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_bad_ca_file_is_refused_naming_the_flag() {
        let mut empty = tempfile::NamedTempFile::new().unwrap();
        writeln!(empty, "hello").unwrap();
        let mut broken = tempfile::NamedTempFile::new().unwrap();
        writeln!(broken, "-----BEGIN CERTIFICATE-----\n!!!\n-----END CERTIFICATE-----").unwrap();
        for (path, named_by) in [
            (PathBuf::from("/nonexistent/ca.pem"), "--ca-file"),
            (empty.path().to_owned(), "SSL_CERT_FILE"),
            (broken.path().to_owned(), "--ca-file"),
        ] {
            let error = client_config(&[CaFile { path: path.clone(), named_by }]).unwrap_err();
            let text = format!("{error:#}");
            assert!(text.starts_with(named_by) && text.contains(path.to_str().unwrap()), "{text}");
        }
    }
}
