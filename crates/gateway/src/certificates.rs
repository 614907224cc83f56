//! TLS for visitors: the operator's files, or a certificate from a development authority of our own.
//!
//! The authority's certificate (`tls/ca.pem`) lasts, so that a browser can be told once to trust it; it is constrained to
//! the gateway's domain, so that trusting it gives away nothing else. The certificate below it is made anew at each
//! start, and its key never touches the disk.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use peer_state::data_dir::create_private;
use peer_state::durable::{self, FileError};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, GeneralSubtree, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, NameConstraints,
};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError as Invalid, InconsistentKeys, RootCertStore, ServerConfig};

use crate::names::Domain;
use crate::settings::Certificate;

/// Largest file (bytes).
const FILE_MAX: u64 = 256 * 1024;
const DAY: Duration = Duration::from_hours(24);
/// Life of the authority.
const AUTHORITY_DAYS: u32 = 3650;
/// Life of the certificate below it: the longest that browsers accept.
const CERTIFICATE_DAYS: u32 = 397;

/// Why there is no usable certificate.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file that was named does not exist.
    #[error("there is no file {}; correct the path", .0.display())]
    Missing(PathBuf),
    /// A file does not hold what it should.
    #[error("{}: {reason}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The private key belongs to another certificate.
    #[error("the key in {} is not that of the certificate in {}; name two files that belong together", key.display(), certificate.display())]
    KeyMismatch {
        /// The file with the key.
        key: PathBuf,
        /// The file with the certificate.
        certificate: PathBuf,
    },
    /// The library refused.
    #[error("the TLS certificate cannot be used: {0}")]
    Tls(#[from] rustls::Error),
    /// The development certificate could not be made.
    #[error("the development certificate cannot be made: {0}")]
    Making(#[from] rcgen::Error),
}

/// Path of the development authority's certificate.
pub fn authority_path(data_dir: &Path) -> PathBuf {
    data_dir.join("tls/ca.pem")
}

/// The TLS configuration for visitors. HTTP/1.1 is the only protocol offered.
pub fn server_config(source: &Certificate, data_dir: &Path, domain: &Domain) -> Result<ServerConfig, CertificateError> {
    let (chain, key) = match source {
        Certificate::Files { certificate, key } => read_files(certificate, key, domain)?,
        Certificate::Development => development(data_dir, domain)?,
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|error| unfit(source, error))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    config.ticketer = rustls::crypto::ring::Ticketer::new()?;
    // Early data could be replayed by whoever saw it.
    config.max_early_data_size = 0;
    Ok(config)
}

type ChainAndKey = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn unreadable(path: &Path, reason: &dyn std::fmt::Display) -> CertificateError {
    CertificateError::Unreadable { path: path.to_owned(), reason: reason.to_string() }
}

/// Why certificate and key do not go together, with the files that hold them.
fn unfit(source: &Certificate, error: rustls::Error) -> CertificateError {
    match (source, error) {
        (Certificate::Files { certificate, key }, rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch)) => {
            CertificateError::KeyMismatch { key: key.clone(), certificate: certificate.clone() }
        }
        (Certificate::Files { certificate, .. }, error @ rustls::Error::InvalidCertificate(_)) => {
            unreadable(certificate, &error)
        }
        (Certificate::Files { key, .. }, error) => unreadable(key, &error),
        (Certificate::Development, error) => error.into(),
    }
}

fn read_files(certificate: &Path, key: &Path, domain: &Domain) -> Result<ChainAndKey, CertificateError> {
    let chain = CertificateDer::pem_slice_iter(&read(certificate)?)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| unreadable(certificate, &error))?;
    let leaf = chain.first().ok_or_else(|| unreadable(certificate, &"holds no certificate in PEM form"))?;
    check_leaf(leaf, domain, UnixTime::now()).map_err(|reason| unreadable(certificate, &reason))?;
    let private = PrivateKeyDer::from_pem_slice(&read(key)?).map_err(|error| unreadable(key, &error))?;
    Ok((chain, private))
}

/// Refuses a certificate that no visitor of a deployment could accept, whoever has signed it.
fn check_leaf(leaf: &CertificateDer<'_>, domain: &Domain, now: UnixTime) -> Result<(), String> {
    let parsed = ParsedCertificate::try_from(leaf).map_err(|error| error.to_string())?;
    let name = ServerName::try_from(format!("x.{domain}")).map_err(|error| error.to_string())?;
    if verify_server_name(&parsed, &name).is_err() {
        return Err(format!(
            "the certificate is not for '*.{domain}'; get one that is, or set domain to what it is for"
        ));
    }
    let algorithms = rustls::crypto::ring::default_provider().signature_verification_algorithms.all;
    // Nobody is trusted here, so this always fails; a time that does not fit is found before that.
    match verify_server_cert_signed_by_trust_anchor(&parsed, &RootCertStore::empty(), &[], now, algorithms) {
        Err(rustls::Error::InvalidCertificate(
            error @ (Invalid::Expired
            | Invalid::ExpiredContext { .. }
            | Invalid::NotValidYet
            | Invalid::NotValidYetContext { .. }),
        )) => Err(format!("the certificate cannot be used now ({error}); renew it, or set the clock")),
        _ => Ok(()),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, CertificateError> {
    durable::read(path, FILE_MAX)?.ok_or_else(|| CertificateError::Missing(path.to_owned()))
}

fn development(data_dir: &Path, domain: &Domain) -> Result<ChainAndKey, CertificateError> {
    let authority_key = authority(data_dir, domain)?;
    let authority = authority_params(domain);
    let issuer = Issuer::from_params(&authority, authority_key);
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(vec![domain.to_string(), format!("*.{domain}")])?;
    params.distinguished_name.push(DnType::CommonName, domain.as_str());
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    set_validity(&mut params, CERTIFICATE_DAYS);
    let certificate = params.signed_by(&key, &issuer)?;
    let private = PrivateKeyDer::try_from(key.serialize_der()).expect("a key of our own making has a known form");
    Ok((vec![certificate.der().clone()], private))
}

/// The authority's key; makes key and certificate if they are absent or of another domain.
fn authority(data_dir: &Path, domain: &Domain) -> Result<KeyPair, CertificateError> {
    let directory = data_dir.join("tls");
    create_private(&directory)?;
    let (key_path, domain_path) = (directory.join("ca.key"), directory.join("ca.domain"));
    let certificate_path = authority_path(data_dir);
    let same_domain =
        durable::read(&domain_path, FILE_MAX)?.is_some_and(|text| text.trim_ascii() == domain.as_str().as_bytes());
    if same_domain
        && durable::read(&certificate_path, FILE_MAX)?.is_some()
        && let Some(pem) = durable::read(&key_path, FILE_MAX)?
    {
        return KeyPair::from_pem(&String::from_utf8_lossy(&pem)).map_err(|error| CertificateError::Unreadable {
            path: key_path,
            reason: format!("{error}; remove the directory tls to make a new authority"),
        });
    }
    let key = KeyPair::generate()?;
    let certificate = authority_params(domain).self_signed(&key)?;
    // The domain comes last: without it the others do not count.
    durable::write(&key_path, key.serialize_pem().as_bytes(), 0o600)?;
    durable::write(&certificate_path, certificate.pem().as_bytes(), 0o644)?;
    durable::write(&domain_path, format!("{domain}\n").as_bytes(), 0o600)?;
    Ok(key)
}

fn authority_params(domain: &Domain) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, format!("peergate development authority for {domain}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.name_constraints = Some(NameConstraints {
        permitted_subtrees: vec![GeneralSubtree::DnsName(domain.to_string())],
        excluded_subtrees: Vec::new(),
    });
    set_validity(&mut params, AUTHORITY_DAYS);
    params
}

/// Valid from yesterday, for clocks that are a little behind, for so many days.
fn set_validity(params: &mut CertificateParams, days: u32) {
    let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    params.not_before = rcgen::date_time_ymd(1970, 1, 1) + since_epoch.saturating_sub(DAY);
    params.not_after = params.not_before + DAY * days;
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn development_authority_lasts_is_private_and_follows_the_domain() {
        let directory = tempfile::tempdir().unwrap();
        let domain: Domain = "peer.localhost".parse().unwrap();
        let make = |domain| server_config(&Certificate::Development, directory.path(), domain).unwrap();
        make(&domain);
        let path = authority_path(directory.path());
        let first = std::fs::read(&path).unwrap();
        make(&domain);
        assert_eq!(std::fs::read(&path).unwrap(), first);
        make(&"example.org".parse().unwrap());
        assert_ne!(std::fs::read(&path).unwrap(), first);
        let key = std::fs::metadata(directory.path().join("tls/ca.key")).unwrap();
        assert_eq!(key.permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn operators_certificate_must_fit_its_key_its_names_and_the_time() {
        let directory = tempfile::tempdir().unwrap();
        let [certificate, key] = ["c.pem", "k.pem"].map(|name| directory.path().join(name));
        let files = Certificate::Files { certificate: certificate.clone(), key: key.clone() };
        let check = |names: &[&str], days: u32, own_key: bool| {
            let pair = KeyPair::generate().unwrap();
            let mut params = CertificateParams::new(names.iter().map(ToString::to_string).collect::<Vec<_>>()).unwrap();
            set_validity(&mut params, days);
            std::fs::write(&certificate, params.self_signed(&pair).unwrap().pem()).unwrap();
            let pair = if own_key { pair } else { KeyPair::generate().unwrap() };
            std::fs::write(&key, pair.serialize_pem()).unwrap();
            let outcome = server_config(&files, directory.path(), &"a.example.org".parse().unwrap());
            outcome.map(drop).map_err(|error| error.to_string())
        };
        assert_eq!(check(&["*.a.example.org", "a.example.org"], 30, true), Ok(()));
        for names in [&["a.example.org"][..], &["*.example.org"], &["*.b.example.org"]] {
            let error = check(names, 30, true).unwrap_err();
            assert!(error.contains("c.pem") && error.contains("'*.a.example.org'"), "{error}");
        }
        // Valid from yesterday for no day at all.
        let error = check(&["*.a.example.org"], 0, true).unwrap_err();
        assert!(error.contains("c.pem") && error.contains("renew"), "{error}");
        let error = check(&["*.a.example.org"], 30, false).unwrap_err();
        assert!(error.contains("k.pem is not that of the certificate in") && error.contains("c.pem"), "{error}");
    }

    #[test]
    fn files_that_are_absent_or_no_certificate_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("c.pem");
        let files = Certificate::Files { certificate: path.clone(), key: path.clone() };
        let domain: Domain = "peer.localhost".parse().unwrap();
        let error = server_config(&files, directory.path(), &domain).unwrap_err();
        assert!(matches!(error, CertificateError::Missing(_)));
        std::fs::write(&path, "no certificate").unwrap();
        let error = server_config(&files, directory.path(), &domain).unwrap_err();
        assert!(error.to_string().contains("c.pem"), "{error}");
    }
}
