//! Which header fields cross the gateway, and which ones it sets itself (SECURITY M15). Pure.

use std::net::IpAddr;

use http::header::{
    ALT_SVC, CONNECTION, CONTENT_LENGTH, EXPECT, FORWARDED, HOST, HeaderName, HeaderValue, SET_COOKIE, TE,
    TRANSFER_ENCODING, UPGRADE, VIA,
};
use http::{HeaderMap, Version};

use crate::names::Destination;

/// How the gateway names itself in `Via`.
const PSEUDONYM: &str = "peergate";

/// Fields that concern one connection and never cross it, besides those that `Connection` names.
/// `Trailer` is not among them: trailers pass.
static HOP_BY_HOP: [HeaderName; 9] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    http::header::PROXY_AUTHENTICATE,
    http::header::PROXY_AUTHORIZATION,
    TE,
    TRANSFER_ENCODING,
    UPGRADE,
    HeaderName::from_static("http2-settings"),
];

/// Prefix of all fields that tell a deployment about the way behind it.
const FORWARDED_PREFIX: &str = "x-forwarded-";
const X_REAL_IP: HeaderName = HeaderName::from_static("x-real-ip");
const WEBSOCKET: HeaderValue = HeaderValue::from_static("websocket");

/// True if the head asks for WebSocket; [`crate::strict`] has let only well-formed requests of this kind through.
pub fn wants_websocket(headers: &HeaderMap) -> bool {
    names_token(headers, &CONNECTION, "upgrade") && names_websocket(headers)
}

/// True if `Upgrade` is `websocket`.
pub fn names_websocket(headers: &HeaderMap) -> bool {
    headers.get(UPGRADE).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"websocket"))
}

/// Makes a visitor's fields those that the deployment gets. `chunked` keeps the body's framing for methods that
/// usually have none.
pub fn to_origin(headers: &mut HeaderMap, visitor: IpAddr, destination: &Destination, version: Version) {
    let (websocket, chunked) = (wants_websocket(headers), headers.contains_key(TRANSFER_ENCODING));
    let trailers = names_token(headers, &TE, "trailers");
    remove_hop_by_hop(headers);
    headers.remove(EXPECT);
    let forwarded: Vec<HeaderName> =
        headers.keys().filter(|name| name.as_str().starts_with(FORWARDED_PREFIX)).cloned().collect();
    for name in forwarded.iter().chain([&FORWARDED, &X_REAL_IP]) {
        headers.remove(name);
    }
    if websocket {
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(UPGRADE, WEBSOCKET);
    } else if trailers {
        headers.insert(CONNECTION, HeaderValue::from_static("TE"));
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    if chunked {
        headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
    let address = visitor.to_canonical().to_string();
    let node = if address.contains(':') { format!("\"[{address}]\"") } else { address.clone() };
    let forwarded = format!("for={node};host=\"{}\";proto=https", destination.authority);
    for (name, value) in [
        (HOST, destination.authority.as_str()),
        (X_REAL_IP, &address),
        (HeaderName::from_static("x-forwarded-for"), &address),
        (HeaderName::from_static("x-forwarded-host"), &destination.authority),
        (HeaderName::from_static("x-forwarded-proto"), "https"),
        (FORWARDED, &forwarded),
    ] {
        headers.insert(name, HeaderValue::from_str(value).expect("hosts and addresses are plain text"));
    }
    add_via(headers, version);
}

/// Makes a deployment's fields those that the visitor gets. `switched` keeps the agreement on WebSocket.
pub fn to_visitor(headers: &mut HeaderMap, host: &str, version: Version, switched: bool) {
    remove_hop_by_hop(headers);
    // The host's other ports and protocols are the gateway's to announce.
    headers.remove(ALT_SVC);
    if switched {
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(UPGRADE, WEBSOCKET);
        headers.remove(CONTENT_LENGTH);
    }
    confine_cookies(headers, host);
    add_via(headers, version);
}

/// True if one of the comma-separated values of `name` is `token`.
fn names_token(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    tokens(headers, name).any(|found| found.eq_ignore_ascii_case(token.as_bytes()))
}

fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a [u8]> {
    let values = headers.get_all(name).iter();
    values.flat_map(|value| value.as_bytes().split(|byte| *byte == b',').map(<[u8]>::trim_ascii))
}

fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = tokens(headers, &CONNECTION)
        .filter_map(|token| HeaderName::from_bytes(token).ok())
        // A deployment that names these would change its message's meaning, not this connection's.
        .filter(|name| *name != CONTENT_LENGTH && *name != HOST)
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}

fn add_via(headers: &mut HeaderMap, version: Version) {
    let version = if version == Version::HTTP_10 { "1.0" } else { "1.1" };
    let value = HeaderValue::from_str(&format!("{version} {PSEUDONYM}")).expect("plain text");
    headers.append(VIA, value);
}

/// Removes `Domain` from cookies where it names anything above the deployment's own host, so that one deployment
/// cannot set cookies for another. The cookie then belongs to this host alone.
fn confine_cookies(headers: &mut HeaderMap, host: &str) {
    if !headers.contains_key(SET_COOKIE) {
        return;
    }
    let cookies: Vec<HeaderValue> = headers.get_all(SET_COOKIE).iter().map(|cookie| confined(cookie, host)).collect();
    headers.remove(SET_COOKIE);
    for cookie in cookies {
        headers.append(SET_COOKIE, cookie);
    }
}

fn confined(cookie: &HeaderValue, host: &str) -> HeaderValue {
    let attributes: Vec<&[u8]> = cookie.as_bytes().split(|byte| *byte == b';').collect();
    let kept: Vec<&[u8]> = attributes
        .iter()
        .enumerate()
        .filter(|(index, attribute)| *index == 0 || !is_wide_domain(attribute, host))
        .map(|(_, attribute)| *attribute)
        .collect();
    if kept.len() == attributes.len() {
        return cookie.clone();
    }
    HeaderValue::from_bytes(&kept.join(&b';')).expect("parts of a valid value are a valid value")
}

fn is_wide_domain(attribute: &[u8], host: &str) -> bool {
    let mut parts = attribute.splitn(2, |byte| *byte == b'=');
    let (Some(name), Some(value)) = (parts.next(), parts.next()) else { return false };
    if !name.trim_ascii().eq_ignore_ascii_case(b"domain") {
        return false;
    }
    let Ok(domain) = std::str::from_utf8(value.trim_ascii()) else { return true };
    let domain = domain.trim_start_matches('.').to_ascii_lowercase();
    domain != host && !domain.ends_with(&format!(".{host}"))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing parse is a failing test")]
mod tests {
    use super::*;
    use peer_proto::id::{DeploymentId, Label};
    use peer_proto::identity::Identity;

    fn map(fields: &[(&str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(HeaderName::from_bytes(name.as_bytes()).unwrap(), HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    fn values<'a>(headers: &'a HeaderMap, name: &str) -> Vec<&'a str> {
        headers.get_all(name).iter().map(|value| value.to_str().unwrap()).collect()
    }

    fn destination() -> Destination {
        let label = Label::derive(&Identity::generate().peer_id(), &DeploymentId::random());
        Destination { label, host: "a.b".into(), authority: "a.b:8443".into() }
    }

    #[test]
    fn v7_forwarding_fields_hold_the_true_visitor_only() {
        let mut headers = map(&[
            ("host", "A.b:8443"),
            ("x-forwarded-for", "10.0.0.1"),
            ("X-Forwarded-For", "10.0.0.2"),
            ("x-forwarded-user", "root"),
            ("forwarded", "for=10.0.0.1"),
            ("x-real-ip", "10.0.0.1"),
            ("via", "1.1 other"),
        ]);
        to_origin(&mut headers, "2001:db8::1".parse().unwrap(), &destination(), Version::HTTP_11);
        assert_eq!(values(&headers, "x-forwarded-for"), ["2001:db8::1"]);
        assert_eq!(values(&headers, "x-real-ip"), ["2001:db8::1"]);
        assert_eq!(values(&headers, "forwarded"), ["for=\"[2001:db8::1]\";host=\"a.b:8443\";proto=https"]);
        assert_eq!(values(&headers, "x-forwarded-proto"), ["https"]);
        assert_eq!(values(&headers, "x-forwarded-host"), ["a.b:8443"]);
        assert_eq!(values(&headers, "via"), ["1.1 other", "1.1 peergate"]);
        assert!(!headers.contains_key("x-forwarded-user"));
    }

    #[test]
    fn hop_by_hop_fields_stay_and_repeated_ones_pass_in_order() {
        let mut headers = map(&[
            ("connection", "close, X-Secret"),
            ("x-secret", "1"),
            ("keep-alive", "timeout=5"),
            ("upgrade", "h2c"),
            ("http2-settings", "AAMAAABk"),
            ("te", "gzip, trailers"),
            ("x-many", "1"),
            ("x-other", "0"),
            ("x-many", "2"),
            ("x-many", "1"),
        ]);
        to_origin(&mut headers, "192.0.2.1".parse().unwrap(), &destination(), Version::HTTP_11);
        assert_eq!(values(&headers, "x-many"), ["1", "2", "1"]);
        assert_eq!((values(&headers, "connection"), values(&headers, "te")), (vec!["TE"], vec!["trailers"]));
        for name in ["x-secret", "keep-alive", "upgrade", "http2-settings"] {
            assert!(!headers.contains_key(name), "{name}");
        }
    }

    #[test]
    fn only_websocket_is_asked_for() {
        let mut headers = map(&[("connection", "keep-alive, Upgrade"), ("upgrade", "WebSocket")]);
        to_origin(&mut headers, "192.0.2.1".parse().unwrap(), &destination(), Version::HTTP_11);
        assert_eq!((values(&headers, "connection"), values(&headers, "upgrade")), (vec!["Upgrade"], vec!["websocket"]));
        let mut headers = map(&[("connection", "Upgrade"), ("upgrade", "h2c")]);
        to_origin(&mut headers, "192.0.2.1".parse().unwrap(), &destination(), Version::HTTP_11);
        assert!(!headers.contains_key("connection") && !headers.contains_key("upgrade"));
    }

    #[test]
    fn cookies_cannot_reach_above_their_host() {
        let mut headers = map(&[
            ("set-cookie", "a=1; Domain=b; Path=/"),
            ("set-cookie", "b=2; domain=.A.b; Secure"),
            ("set-cookie", "domain=x"),
            ("set-cookie", "c=3; Domain = localhost"),
            ("set-cookie", "d=4; Domain=x.a.b"),
        ]);
        to_visitor(&mut headers, "a.b", Version::HTTP_11, false);
        let expected = ["a=1; Path=/", "b=2; domain=.A.b; Secure", "domain=x", "c=3", "d=4; Domain=x.a.b"];
        assert_eq!(values(&headers, "set-cookie"), expected);
    }
}
