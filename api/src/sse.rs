//! Server-sent events, the receiving half: bytes as they come in, events as they are whole.
//!
//! What it takes is the event stream format of the HTML standard (section 9.2.6): lines ended by LF,
//! CR LF or CR, fields `event`, `data` and `id`, comments (heartbeats) ignored. No I/O, so that the
//! clients over TCP and over Unix sockets share it.

use std::mem;

/// The longest event that is taken in, bytes. A peer that sends more is broken or hostile.
pub const MAX_EVENT: usize = 4 << 20;

/// One event.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Event {
    /// The event's type; empty means `message`.
    pub event: String,
    /// The data lines, joined by newlines.
    pub data: String,
    /// The last event id seen, for resuming; it stays from event to event.
    pub id: String,
}

/// Why a stream cannot be read on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SseError {
    /// An event, or a line, longer than [`MAX_EVENT`].
    #[error("an event of more than {MAX_EVENT} bytes")]
    TooLong,
    /// The stream is UTF-8 by definition.
    #[error("an event stream that is not UTF-8")]
    NotUtf8,
}

/// Bytes in, events out.
#[derive(Debug, Default)]
pub struct Decoder {
    line: Vec<u8>,
    after_cr: bool,
    started: bool,
    pending: Event,
    has_data: bool,
}

impl Decoder {
    /// A decoder at the start of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes in the next bytes, in whatever pieces the network made, and gives the events that they complete.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Vec<Event>, SseError> {
        let mut out = Vec::new();
        for &byte in bytes {
            // The LF of a CR LF that has already ended its line.
            if mem::take(&mut self.after_cr) && byte == b'\n' {
                continue;
            }
            match byte {
                b'\n' => self.end_line(&mut out)?,
                b'\r' => {
                    self.after_cr = true;
                    self.end_line(&mut out)?;
                }
                _ if self.line.len() + self.pending.data.len() >= MAX_EVENT => return Err(SseError::TooLong),
                _ => self.line.push(byte),
            }
        }
        Ok(out)
    }

    fn end_line(&mut self, out: &mut Vec<Event>) -> Result<(), SseError> {
        let raw = mem::take(&mut self.line);
        let mut line = std::str::from_utf8(&raw).map_err(|_| SseError::NotUtf8)?;
        if !mem::replace(&mut self.started, true) {
            line = line.strip_prefix('\u{feff}').unwrap_or(line);
        }
        if line.is_empty() {
            let event = mem::take(&mut self.pending.event);
            let data = mem::take(&mut self.pending.data);
            // An event without data is not dispatched, as the standard has it.
            if mem::take(&mut self.has_data) {
                out.push(Event {
                    event,
                    data,
                    id: self.pending.id.clone(),
                });
            }
            return Ok(());
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => self.pending.event = value.to_owned(),
            "data" => {
                if mem::replace(&mut self.has_data, true) {
                    self.pending.data.push('\n');
                }
                self.pending.data.push_str(value);
            }
            "id" if !value.contains('\0') => self.pending.id = value.to_owned(),
            // Comments (an empty field name), `retry`, and what later standards may add.
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(input: &[u8]) -> Vec<Event> {
        Decoder::new().push(input).unwrap()
    }

    fn event(event: &str, data: &str, id: &str) -> Event {
        Event {
            event: event.into(),
            data: data.into(),
            id: id.into(),
        }
    }

    #[test]
    fn fields_comments_and_several_data_lines() {
        let text = b": heartbeat\n\nevent: slivers\nid: 7\ndata: {\"a\":\ndata: 1}\n\ndata:x\n\n";
        assert_eq!(
            all(text),
            [event("slivers", "{\"a\":\n1}", "7"), event("", "x", "7")]
        );
    }

    #[test]
    fn an_event_without_data_or_end_is_not_dispatched() {
        assert_eq!(all(b"event: x\n\n"), []);
        assert_eq!(all(b"data: x\n"), []);
    }

    #[test]
    fn a_byte_order_mark_is_skipped_once() {
        assert_eq!(all("\u{feff}data: x\n\n".as_bytes()), [event("", "x", "")]);
    }

    #[test]
    fn endless_lines_and_bad_text_are_errors() {
        let mut decoder = Decoder::new();
        assert_eq!(decoder.push(&vec![b'a'; MAX_EVENT + 1]), Err(SseError::TooLong));
        assert_eq!(Decoder::new().push(b"data: \xff\n"), Err(SseError::NotUtf8));
    }

    proptest! {
        #[test]
        fn cuts_and_line_ends_do_not_matter(
            data in proptest::collection::vec("[a-z:\u{e9} ]{0,12}", 1..6),
            end in prop_oneof![Just("\n"), Just("\r\n"), Just("\r")],
            cut in 1usize..7,
        ) {
            let mut text = String::new();
            for line in &data {
                text.push_str(&format!("data: {line}{end}"));
            }
            text.push_str(&format!("{end}data: last{end}{end}"));
            let mut decoder = Decoder::new();
            let mut got = Vec::new();
            for piece in text.as_bytes().chunks(cut) {
                got.extend(decoder.push(piece).unwrap());
            }
            prop_assert_eq!(got, vec![event("", &data.join("\n"), ""), event("", "last", "")]);
        }
    }
}
