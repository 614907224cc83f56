//! The gateway's own answers: short pages that say whose fault it is. Nothing of the request is repeated in them.

use std::time::Duration;

use bytes::Bytes;
use http::header::{
    CACHE_CONTROL, CONNECTION, CONTENT_SECURITY_POLICY, CONTENT_TYPE, RETRY_AFTER, X_CONTENT_TYPE_OPTIONS,
};
use http::{HeaderValue, Response, StatusCode};
use http_body_util::Full;

use crate::names::Unaddressed;
use crate::strict::Violation;

/// Field that carries the stable code of a page, for programs.
pub const CODE_FIELD: &str = "x-peergate-error";

/// Why a visitor gets a page of the gateway instead of the deployment's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Page {
    /// The request is not acceptable HTTP.
    Violation(Violation),
    /// The request's body is not acceptable HTTP, or ended early.
    BodyBroken,
    /// The request is addressed to nobody here.
    Unaddressed(Unaddressed),
    /// No such name is live.
    NoSuchName,
    /// The deployment was stopped.
    Stopped,
    /// The deployment is paused by the owner of its machine.
    Paused,
    /// The machine that serves the name is not connected.
    ProviderOffline,
    /// The machine that serves the name is not able to take this visit now.
    ProviderBusy,
    /// The machine did not accept the visit.
    ProviderRefused,
    /// The deployment did not answer, or not in HTTP.
    DeploymentFailed,
    /// The deployment took too long.
    DeploymentTimedOut,
    /// The visitor or the name has had too many requests; time until the next.
    TooManyRequests(Duration),
    /// The gateway is about to stop.
    ShuttingDown,
}

/// Parts of a page.
struct Text {
    status: StatusCode,
    code: &'static str,
    title: &'static str,
    fault: String,
}

impl Page {
    /// The stable code, also used in metrics.
    pub fn code(self) -> &'static str {
        self.text().code
    }

    /// The answer to send.
    pub fn response(self) -> Response<Full<Bytes>> {
        let Text { status, code, title, fault } = self.text();
        let number = status.as_u16();
        let html = format!(
            "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<title>{number} {title}</title>\n\
             <h1>{title}</h1>\n<p>{fault}</p>\n<p><small>{number} {code}, said by the gateway, not by the site</small></p>\n"
        );
        let mut response = Response::new(Full::new(Bytes::from(html)));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        for (name, value) in [
            (CONTENT_TYPE, "text/html; charset=utf-8"),
            (CACHE_CONTROL, "no-store"),
            (CONTENT_SECURITY_POLICY, "default-src 'none'"),
            (X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (http::HeaderName::from_static(CODE_FIELD), code),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        if let Some(wait) = self.retry_after() {
            headers.insert(RETRY_AFTER, HeaderValue::from(wait));
        }
        if self.ends_connection() {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    /// Whole seconds after which a repetition makes sense.
    fn retry_after(self) -> Option<u64> {
        match self {
            Self::TooManyRequests(wait) => Some(wait.as_secs() + 1),
            Self::Paused => Some(60),
            Self::ProviderOffline => Some(10),
            Self::ProviderBusy | Self::ShuttingDown => Some(1),
            _ => None,
        }
    }

    /// True where the bytes that follow on the connection cannot be trusted or will not be read.
    fn ends_connection(self) -> bool {
        matches!(self, Self::Violation(_) | Self::BodyBroken | Self::Unaddressed(_) | Self::ShuttingDown)
    }

    fn text(self) -> Text {
        match self {
            Self::Violation(violation) => {
                let fault = format!("Your program's request was not accepted: {violation}.");
                page(violation.status(), "bad_request", "Request not accepted", &fault)
            }
            Self::BodyBroken => page(
                StatusCode::BAD_REQUEST,
                "bad_body",
                "Request not accepted",
                "The body of your program's request was broken off or was not as announced.",
            ),
            Self::Unaddressed(reason) => {
                let status = match reason {
                    Unaddressed::BadHost | Unaddressed::Disagreement => StatusCode::BAD_REQUEST,
                    Unaddressed::Misdirected => StatusCode::MISDIRECTED_REQUEST,
                    Unaddressed::NoSuchName => StatusCode::NOT_FOUND,
                };
                page(status, "bad_host", "Not found here", &format!("The address is wrong: {reason}."))
            }
            Self::NoSuchName => page(
                StatusCode::NOT_FOUND,
                "no_such_name",
                "Not found",
                "Nothing is published under this name. Check the address, or ask whoever gave it to you.",
            ),
            other => other.far_text(),
        }
    }

    /// Pages whose cause lies behind the gateway, or in it.
    fn far_text(self) -> Text {
        match self {
            Self::Stopped => page(
                StatusCode::GONE,
                "stopped",
                "Stopped",
                "What was published under this name has been stopped by its owner.",
            ),
            Self::Paused => page(
                StatusCode::SERVICE_UNAVAILABLE,
                "paused",
                "Paused",
                "The owner of the machine that serves this name has paused it. Nothing is lost. Try again later.",
            ),
            Self::ProviderOffline => page(
                StatusCode::SERVICE_UNAVAILABLE,
                "provider_offline",
                "Machine offline",
                "The machine that serves this name is not connected to the gateway. Try again later.",
            ),
            Self::ProviderBusy => page(
                StatusCode::SERVICE_UNAVAILABLE,
                "provider_busy",
                "Machine busy",
                "The machine that serves this name has as many visitors as it may have. Try again shortly.",
            ),
            Self::ProviderRefused => page(
                StatusCode::BAD_GATEWAY,
                "provider_refused",
                "Not served",
                "The machine that serves this name did not accept the visit. The fault is on its side.",
            ),
            Self::DeploymentFailed => page(
                StatusCode::BAD_GATEWAY,
                "deployment_failed",
                "No answer",
                "The program behind this name did not answer, or broke off. The fault is on its side.",
            ),
            Self::DeploymentTimedOut => page(
                StatusCode::GATEWAY_TIMEOUT,
                "deployment_timed_out",
                "No answer in time",
                "The program behind this name took too long to answer. The fault is on its side.",
            ),
            Self::TooManyRequests(_) => page(
                StatusCode::TOO_MANY_REQUESTS,
                "too_many_requests",
                "Too many requests",
                "Too many requests came from your address or for this name. Wait a moment.",
            ),
            _ => page(
                StatusCode::SERVICE_UNAVAILABLE,
                "shutting_down",
                "Gateway restarting",
                "The gateway is about to restart. Try again shortly.",
            ),
        }
    }
}

fn page(status: StatusCode, code: &'static str, title: &'static str, fault: &str) -> Text {
    Text { status, code, title, fault: fault.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_carry_their_status_code_and_waiting_time() {
        let page = Page::TooManyRequests(Duration::from_millis(1500)).response();
        assert_eq!(page.status(), StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(page.headers()[RETRY_AFTER], "2");
        assert_eq!(page.headers()[CODE_FIELD], "too_many_requests");
        assert!(!page.headers().contains_key(CONNECTION));
        let page = Page::Violation(Violation::HeadTooLarge).response();
        assert_eq!(page.status(), StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
        assert_eq!(page.headers()[CONNECTION], "close");
    }
}
