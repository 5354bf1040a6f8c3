//! Which pages of the web may use a server, and under which names it is reached.
//!
//! A page of another origin may send requests to a server on its visitor's machine, and with a name of its own that is
//! made to point there it could even read the answers. So a server that only this machine reaches answers under this
//! machine's names, and pages of other origins are refused unless the operator allows them.

use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};

use crate::api_error::ApiError;

/// What is allowed.
#[derive(Debug, Clone, Default)]
pub struct Origins {
    /// Origins of pages, such as `https://example.org`; `*`: any.
    pub allowed: Vec<String>,
    /// Names under which the server answers, besides those of this machine; none, and not `local`: any.
    pub hosts: Vec<String>,
    /// Whether only this machine reaches the server.
    pub local: bool,
}

impl Origins {
    /// Whether a request may go on.
    pub(crate) fn check(&self, headers: &HeaderMap, uri: &Uri) -> Result<(), ApiError> {
        let host = host(headers, uri);
        if !self.answers_to(host.as_deref()) {
            let message = format!(
                "this server does not answer to the name {:?}: use an address of this machine, or start it with \
                 --allowed-host",
                host.unwrap_or_default()
            );
            return Err(ApiError::bad(message).coded("host_not_allowed"));
        }
        match text(headers, header::ORIGIN) {
            Some(origin) if !self.allows(origin, headers, uri) => {
                let message =
                    format!("pages of {origin} may not use this server: start it with --cors-origin");
                Err(ApiError::new(StatusCode::FORBIDDEN, message).coded("origin_not_allowed"))
            }
            _ => Ok(()),
        }
    }

    fn answers_to(&self, host: Option<&str>) -> bool {
        if !self.local && self.hosts.is_empty() {
            return true;
        }
        let Some(name) = host.map(|host| without_port(host).to_ascii_lowercase()) else { return true };
        let address = name.trim_start_matches('[').trim_end_matches(']').parse::<std::net::IpAddr>();
        name == "localhost"
            || name.ends_with(".localhost")
            || address.is_ok_and(|address| address.is_loopback() || address.is_unspecified())
            || self.hosts.iter().any(|allowed| allowed.eq_ignore_ascii_case(&name))
    }

    fn allows(&self, origin: &str, headers: &HeaderMap, uri: &Uri) -> bool {
        let own = host(headers, uri).is_some_and(|host| {
            origin.split_once("://").is_some_and(|(_, from)| from.eq_ignore_ascii_case(&host))
        });
        own || self.is_listed(origin)
    }

    fn is_listed(&self, origin: &str) -> bool {
        self.allowed
            .iter()
            .any(|allowed| allowed == "*" || allowed.trim_end_matches('/').eq_ignore_ascii_case(origin))
    }

    /// The answer to a page's question what it may send, if this is one.
    pub(crate) fn preflight(&self, method: &Method, headers: &HeaderMap) -> Option<Response> {
        let asked = headers.get(header::ACCESS_CONTROL_REQUEST_METHOD).is_some();
        if method != Method::OPTIONS || !asked || !self.is_listed(text(headers, header::ORIGIN)?) {
            return None;
        }
        let mut response = StatusCode::NO_CONTENT.into_response();
        let out = response.headers_mut();
        out.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST, OPTIONS"));
        let names = headers.get(header::ACCESS_CONTROL_REQUEST_HEADERS).cloned();
        let usual = HeaderValue::from_static("authorization, content-type");
        out.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, names.unwrap_or(usual));
        out.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("3600"));
        if headers.contains_key("access-control-request-private-network") {
            out.insert("access-control-allow-private-network", HeaderValue::from_static("true"));
        }
        Some(response)
    }

    /// Lets a page of an allowed origin read an answer.
    pub(crate) fn mark(&self, origin: Option<&HeaderValue>, response: &mut Response) {
        if self.allowed.is_empty() {
            return;
        }
        let out = response.headers_mut();
        out.append(header::VARY, HeaderValue::from_static("origin"));
        if let Some(origin) = origin
            && origin.to_str().is_ok_and(|origin| self.is_listed(origin))
        {
            out.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
            out.insert(
                header::ACCESS_CONTROL_EXPOSE_HEADERS,
                HeaderValue::from_static("x-request-id, retry-after"),
            );
        }
    }
}

fn text(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

/// The name and port by which a client knows the server.
fn host(headers: &HeaderMap, uri: &Uri) -> Option<String> {
    let host = text(headers, header::HOST).map(str::to_owned);
    host.or_else(|| uri.authority().map(|authority| authority.to_string()))
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|digit| digit.is_ascii_digit()) && !name.ends_with(':') => {
            name
        }
        _ => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(origins: &Origins, host: &str, origin: Option<&str>) -> u16 {
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, HeaderValue::from_str(host).unwrap());
        if let Some(origin) = origin {
            headers.insert(header::ORIGIN, HeaderValue::from_str(origin).unwrap());
        }
        origins
            .check(&headers, &Uri::from_static("/health"))
            .map_or_else(|error| error.status.as_u16(), |()| 200)
    }

    #[test]
    fn a_server_of_this_machine_has_its_names_and_no_foreign_pages() {
        let local = Origins { local: true, ..Origins::default() };
        for host in
            ["localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "a.localhost:1", "LOCALHOST"]
        {
            assert_eq!(status(&local, host, None), 200, "{host}");
        }
        for host in ["evil.example", "evil.example:8000", "10.0.0.1:8000", "localhost.evil.example"] {
            assert_eq!(status(&local, host, None), 400, "{host}");
        }
        assert_eq!(status(&local, "localhost:8000", Some("http://localhost:8000")), 200, "its own page");
        for origin in ["http://localhost:3000", "https://evil.example", "null"] {
            assert_eq!(status(&local, "localhost:8000", Some(origin)), 403, "{origin}");
        }
        let named = Origins { hosts: vec!["box.lan".into()], ..local };
        assert_eq!((status(&named, "box.lan:80", None), status(&named, "other.lan", None)), (200, 400));
        assert_eq!(status(&Origins::default(), "any.example", None), 200, "others reach it under any name");
    }

    #[test]
    fn allowed_origins_may_ask_and_read() {
        let origins =
            Origins { allowed: vec!["http://localhost:3000".into()], local: true, ..Origins::default() };
        assert_eq!(status(&origins, "localhost:8000", Some("http://localhost:3000")), 200);
        assert_eq!(status(&origins, "localhost:8000", Some("http://localhost:3001")), 403);
        let mut headers = HeaderMap::new();
        headers.insert(header::ORIGIN, HeaderValue::from_static("http://localhost:3000"));
        assert!(origins.preflight(&Method::OPTIONS, &headers).is_none(), "it asks nothing");
        headers.insert(header::ACCESS_CONTROL_REQUEST_METHOD, HeaderValue::from_static("POST"));
        headers.insert(header::ACCESS_CONTROL_REQUEST_HEADERS, HeaderValue::from_static("authorization,x-a"));
        let mut response = origins.preflight(&Method::OPTIONS, &headers).unwrap();
        assert_eq!(response.headers()["access-control-allow-headers"], "authorization,x-a");
        origins.mark(headers.get(header::ORIGIN), &mut response);
        assert_eq!(response.headers()["access-control-allow-origin"], "http://localhost:3000");
        let any = Origins { allowed: vec!["*".into()], ..Origins::default() };
        assert!(any.preflight(&Method::OPTIONS, &headers).is_some());
        assert!(Origins::default().preflight(&Method::OPTIONS, &headers).is_none());
    }
}
