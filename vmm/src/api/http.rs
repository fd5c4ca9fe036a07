//! Just enough HTTP/1.1 for a control socket: whole requests with a `Content-Length`, whole answers.

use mandoline_api::monitor::{FD_NAMES_HEADER, Fault};

/// Most bytes of head and body together (Firecracker's default payload limit).
pub const MAX_REQUEST: usize = 51_200;

/// A request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// `GET`, `PUT`, `PATCH`.
    pub method: String,
    /// Path without a query.
    pub path: String,
    /// Body; empty if there is none.
    pub body: Vec<u8>,
    /// Whether the connection stays open.
    pub keep_alive: bool,
    /// Names of the descriptors that came with it ([`FD_NAMES_HEADER`]).
    pub fd_names: Vec<String>,
}

/// What the bytes so far are.
#[derive(Debug, PartialEq, Eq)]
pub enum Parsed {
    /// Not all of a request.
    Partial,
    /// The head of a request whose sender waits to hear that the body is welcome (`Expect: 100-continue`).
    Expects,
    /// A request and how many bytes it took.
    Whole(Request, usize),
    /// No request: the answer to give before the connection is closed.
    Bad(u16, String),
}

/// Parses the beginning of `bytes`.
pub fn parse(bytes: &[u8]) -> Parsed {
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut request = httparse::Request::new(&mut headers);
    let head = match request.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if bytes.len() < MAX_REQUEST => return Parsed::Partial,
        Ok(httparse::Status::Partial) => return too_large(),
        Err(error) => return Parsed::Bad(400, format!("not an HTTP/1.1 request: {error}")),
    };
    let mut length = 0usize;
    let mut keep_alive = request.version == Some(1);
    let mut expects = false;
    let mut fd_names = Vec::new();
    for header in request.headers.iter() {
        let value = std::str::from_utf8(header.value).unwrap_or_default().trim();
        if header.name.eq_ignore_ascii_case("content-length") {
            match value.parse() {
                Ok(bytes) => length = bytes,
                Err(_) => {
                    return Parsed::Bad(400, format!("content-length is {value:?}; a number is needed"));
                }
            }
        } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
            return Parsed::Bad(
                400,
                "transfer-encoding is not supported: send a content-length".to_owned(),
            );
        } else if header.name.eq_ignore_ascii_case("connection") {
            keep_alive = !value.eq_ignore_ascii_case("close");
        } else if header.name.eq_ignore_ascii_case("expect") {
            expects = value.eq_ignore_ascii_case("100-continue");
        } else if header.name.eq_ignore_ascii_case(FD_NAMES_HEADER) {
            fd_names = value.split(',').map(|name| name.trim().to_owned()).collect();
        }
    }
    let Some(end) = head.checked_add(length).filter(|end| *end <= MAX_REQUEST) else {
        return too_large();
    };
    let Some(body) = bytes.get(head..end) else {
        return if expects && bytes.len() == head {
            Parsed::Expects
        } else {
            Parsed::Partial
        };
    };
    let path = request.path.unwrap_or("/");
    Parsed::Whole(
        Request {
            method: request.method.unwrap_or_default().to_owned(),
            path: path.split('?').next().unwrap_or("/").to_owned(),
            body: body.to_vec(),
            keep_alive,
            fd_names,
        },
        end,
    )
}

fn too_large() -> Parsed {
    Parsed::Bad(413, format!("request is over {MAX_REQUEST} bytes"))
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// JSON; empty with 204.
    pub body: String,
}

/// Tells a client that waits to go on ([`Parsed::Expects`]).
pub const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

impl Response {
    /// It is done, there is nothing to say.
    pub fn done() -> Self {
        Self {
            status: 204,
            body: String::new(),
        }
    }

    /// An object.
    pub fn json(value: &impl serde::Serialize) -> Self {
        match serde_json::to_string(value) {
            Ok(body) => Self { status: 200, body },
            Err(error) => Self::fault(500, error.to_string()),
        }
    }

    /// A refusal.
    pub fn fault(status: u16, message: impl Into<String>) -> Self {
        let fault = Fault {
            fault_message: message.into(),
        };
        let body = serde_json::to_string(&fault).unwrap_or_default();
        Self { status, body }
    }

    /// Its bytes on the wire.
    pub fn bytes(&self, keep_alive: bool) -> Vec<u8> {
        let reason = match self.status {
            200 => "OK",
            204 => "No Content",
            400 => "Bad Request",
            413 => "Payload Too Large",
            503 => "Service Unavailable",
            _ => "Internal Server Error",
        };
        let connection = if keep_alive { "keep-alive" } else { "close" };
        let mut head = format!(
            "HTTP/1.1 {} {reason}\r\nServer: Mandoline\r\nConnection: {connection}\r\n",
            self.status
        );
        if self.status != 204 {
            let length = self.body.len();
            head.push_str(&format!(
                "Content-Type: application/json\r\nContent-Length: {length}\r\n"
            ));
        }
        head.push_str("\r\n");
        head.push_str(&self.body);
        head.into_bytes()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn requests_are_taken_whole() {
        let text =
            b"PATCH /vm?x=1 HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbodyGET / HTTP/1.1\r\n\r\n";
        let Parsed::Whole(request, length) = parse(text) else {
            panic!("not whole")
        };
        assert_eq!((request.method.as_str(), request.path.as_str()), ("PATCH", "/vm"));
        assert_eq!(
            (request.body.as_slice(), request.keep_alive),
            (&b"body"[..], true)
        );
        assert!(matches!(parse(&text[length..]), Parsed::Whole(..)));
        assert!(request.fd_names.is_empty());
        for end in 0..length {
            assert_eq!(parse(&text[..end]), Parsed::Partial, "{end}");
        }
    }

    #[test]
    fn a_body_is_sent_for_and_descriptors_are_named() {
        let text = b"PUT /x HTTP/1.1\r\nExpect: 100-continue\r\nmandoline-fd-names: disk2, tap\r\nContent-Length: 2\r\n\r\n{}";
        assert_eq!(parse(&text[..text.len() - 2]), Parsed::Expects);
        assert_eq!(parse(&text[..text.len() - 1]), Parsed::Partial);
        let Parsed::Whole(request, _) = parse(text) else {
            panic!("not whole")
        };
        assert_eq!(request.fd_names, ["disk2", "tap"]);
    }

    #[test]
    fn what_is_no_request_is_refused() {
        let bad = |text: &str| match parse(text.as_bytes()) {
            Parsed::Bad(status, _) => status,
            other => panic!("{other:?}"),
        };
        assert_eq!(bad("\x01\x02\x03\r\n\r\n"), 400);
        assert_eq!(bad("PUT / HTTP/1.1\r\nContent-Length: x\r\n\r\n"), 400);
        assert_eq!(bad("PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"), 400);
        assert_eq!(bad("PUT / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n"), 413);
        assert_eq!(
            bad(&format!(
                "PUT / HTTP/1.1\r\nContent-Length: {}\r\n\r\n",
                usize::MAX
            )),
            413
        );
        assert_eq!(bad(&format!("GET /{}", "x".repeat(MAX_REQUEST))), 413);
    }

    proptest! {
        #[test]
        fn any_bytes_at_all(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&bytes);
        }
    }
}
