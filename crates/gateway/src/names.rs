//! From what a request says about its host to the label that it means. Pure.

use std::fmt;
use std::str::FromStr;

use http::uri::{Authority, Scheme};
use http::{HeaderMap, Uri};
use peer_proto::id::Label;

/// The domain below which deployments have their names: lower case, at least two labels unless it is `localhost`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Domain(String);

/// A text that is no domain.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a domain: use labels of a-z, 0-9 and '-' joined by dots, such as peers.example.org")]
pub struct DomainError(String);

impl Domain {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The host name of a deployment.
    pub fn host_of(&self, label: &Label) -> String {
        format!("{label}.{}", self.0)
    }

    /// The label in front of this domain, if `host` is exactly one label in front of it and the label is well formed.
    fn label_of(&self, host: &str) -> Option<Label> {
        let label = host.strip_suffix(&self.0)?.strip_suffix('.')?;
        label.parse().ok()
    }

    /// True for the domain itself and for everything below it.
    fn covers(&self, host: &str) -> bool {
        host.strip_suffix(&self.0).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl FromStr for Domain {
    type Err = DomainError;

    fn from_str(text: &str) -> Result<Self, DomainError> {
        let valid_label = |label: &str| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        // A deployment's label and its dot come in front; a host name has at most 253 bytes.
        if text.len() <= 253 - 25 && text.split('.').all(valid_label) {
            Ok(Self(text.to_owned()))
        } else {
            Err(DomainError(peer_proto::text::escape(text)))
        }
    }
}

/// What a request is addressed to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Destination {
    /// The deployment's label.
    pub label: Label,
    /// The host as the visitor wrote it, lower case, without port and without a dot behind it.
    pub host: String,
    /// Host and port as the visitor wrote them.
    pub authority: String,
}

/// Why a request is addressed to nobody here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unaddressed {
    /// `Host` is absent, repeated or not a host.
    #[error("Host is missing or is not a host name")]
    BadHost,
    /// The request line names another host than `Host`.
    #[error("the request line and Host name different hosts")]
    Disagreement,
    /// The secured connection was made for another name, or the host is not below our domain.
    #[error("this connection was made for another host name")]
    Misdirected,
    /// Below our domain, but no deployment can have this name.
    #[error("no deployment can have this name")]
    NoSuchName,
}

/// Finds the destination of a request on a connection whose handshake named `server_name`.
pub fn destination(
    uri: &Uri,
    headers: &HeaderMap,
    server_name: Option<&str>,
    domain: &Domain,
) -> Result<Destination, Unaddressed> {
    let mut hosts = headers.get_all(http::header::HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else { return Err(Unaddressed::BadHost) };
    let authority = host.to_str().map_err(|_| Unaddressed::BadHost)?.to_ascii_lowercase();
    let host = host_of(&authority).ok_or(Unaddressed::BadHost)?;
    if let Some(target) = uri.authority() {
        let https = uri.scheme() == Some(&Scheme::HTTPS);
        if !https || !target.as_str().eq_ignore_ascii_case(&authority) {
            return Err(Unaddressed::Disagreement);
        }
    }
    let server_name = server_name.map(|name| name.strip_suffix('.').unwrap_or(name));
    if server_name.is_some_and(|name| !name.eq_ignore_ascii_case(&host)) || !domain.covers(&host) {
        return Err(Unaddressed::Misdirected);
    }
    let label = domain.label_of(&host).ok_or(Unaddressed::NoSuchName)?;
    Ok(Destination { label, host, authority })
}

/// The host in `host[:port]`, if both are well formed.
fn host_of(authority: &str) -> Option<String> {
    let parsed: Authority = authority.parse().ok()?;
    let plain = match parsed.port() {
        Some(port) => {
            let digits = port.as_str();
            let valid = (1..=5).contains(&digits.len()) && digits.parse::<u16>().is_ok_and(|port| port > 0);
            valid && parsed.as_str().len() == parsed.host().len() + 1 + digits.len()
        }
        None => parsed.as_str() == parsed.host(),
    };
    // A name with a dot behind it is the same name, written in full.
    let host = parsed.host();
    let host = host.strip_suffix('.').unwrap_or(host);
    let valid =
        host.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'[' | b']' | b':'));
    (plain && valid && !host.is_empty()).then(|| host.to_owned())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing parse is a failing test")]
mod tests {
    use super::*;
    use peer_proto::id::DeploymentId;
    use peer_proto::identity::Identity;

    fn ask(uri: &str, hosts: &[&str], server_name: Option<&str>) -> Result<Destination, Unaddressed> {
        let mut request = http::Request::builder().uri(uri);
        for host in hosts {
            request = request.header("host", *host);
        }
        let (parts, ()) = request.body(()).unwrap().into_parts();
        destination(&parts.uri, &parts.headers, server_name, &"peer.localhost".parse().unwrap())
    }

    fn label() -> Label {
        Label::derive(&Identity::generate().peer_id(), &DeploymentId::random())
    }

    #[test]
    fn label_comes_from_a_host_that_everything_agrees_on() {
        let label = label();
        let host = format!("{label}.peer.localhost");
        let found = ask("/", &[&host], Some(&host)).unwrap();
        assert_eq!((found.label, found.host.as_str()), (label, host.as_str()));
        let with_port = format!("{}:8443", host.to_uppercase());
        assert_eq!(ask("/", &[&with_port], Some(&host)).unwrap().authority, with_port.to_lowercase());
        assert_eq!(ask("/", &[&host], None).unwrap().label, label);
        for dotted in [format!("{host}."), format!("{host}.:8443")] {
            let found = ask("/", &[&dotted], Some(&host)).unwrap();
            assert_eq!(
                (found.label, found.host.as_str(), found.authority.as_str()),
                (label, host.as_str(), dotted.as_str())
            );
        }
        assert_eq!(ask("/", &[&format!("{host}..")], Some(&host)), Err(Unaddressed::Misdirected));
        assert_eq!(ask(&format!("https://{host}/x"), &[&host], None).unwrap().label, label);
    }

    #[test]
    fn v7_disagreeing_or_odd_hosts_are_refused() {
        let (one, other) = (format!("{}.peer.localhost", label()), format!("{}.peer.localhost", label()));
        assert_eq!(ask("/", &[], None), Err(Unaddressed::BadHost));
        assert_eq!(ask("/", &[&one, &one], None), Err(Unaddressed::BadHost));
        assert_eq!(ask("/", &[&other], Some(&one)), Err(Unaddressed::Misdirected));
        assert_eq!(ask("/", &["example.org"], None), Err(Unaddressed::Misdirected));
        assert_eq!(ask("/", &["10.0.0.1"], None), Err(Unaddressed::Misdirected));
        assert_eq!(ask("/", &["evilpeer.localhost"], None), Err(Unaddressed::Misdirected));
        assert_eq!(ask("/", &["peer.localhost"], None), Err(Unaddressed::NoSuchName));
        assert_eq!(ask("/", &["abc.peer.localhost"], None), Err(Unaddressed::NoSuchName));
        assert_eq!(ask("/", &[&format!("a.{one}")], None), Err(Unaddressed::NoSuchName));
        assert_eq!(ask(&format!("https://{other}/"), &[&one], None), Err(Unaddressed::Disagreement));
        assert_eq!(ask(&format!("http://{one}/"), &[&one], None), Err(Unaddressed::Disagreement));
        for odd in ["", ".", "a b", "user@10.0.0.1", "a:0", "a:70000", "a:b", "a:", "a/b", "a,b", "ä"] {
            assert_eq!(ask("/", &[odd], None), Err(Unaddressed::BadHost), "{odd:?}");
        }
    }

    #[test]
    fn domains_are_strict() {
        for text in ["peer.localhost", "a-b.example.org", "localhost"] {
            assert!(text.parse::<Domain>().is_ok(), "{text}");
        }
        for text in ["", ".", "a..b", "-a.b", "a-.b", "A.b", "a_b.c", "*.a.b", "a.b.", "a b", &"a.".repeat(200)] {
            assert!(text.parse::<Domain>().is_err(), "{text}");
        }
    }
}
