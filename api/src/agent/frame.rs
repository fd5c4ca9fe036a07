//! Framing: a big-endian `u32` length and that many bytes of JSON.
//!
//! A length is believed only as far as [`MAX_FRAME`], and memory is taken as bytes arrive, never as
//! promised. The core, [`split`], works on byte slices; [`Decoder`] feeds it from any source (an
//! asynchronous socket, a poll loop), [`read_frame`] and [`write_frame`] from blocking ones.

use std::io::{self, ErrorKind as IoKind, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::types::ErrorBody;

/// Most bytes of JSON in one frame (1 MiB).
pub const MAX_FRAME: usize = 1 << 20;

/// Bytes of the length before the JSON.
pub const HEADER: usize = 4;

/// Bytes of program output or input that one frame carries at most, so that its base64 form with all around
/// it is far below [`MAX_FRAME`].
pub const MAX_DATA: usize = 64 * 1024;

/// What can be wrong with a frame.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The length before the frame is above [`MAX_FRAME`].
    #[error("frame of {0} bytes; at most {MAX_FRAME} are allowed")]
    TooLong(usize),
    /// The bytes are no JSON of the expected shape.
    #[error("frame is not the JSON expected: {0}")]
    Json(#[from] serde_json::Error),
    /// The stream ended inside a frame.
    #[error("stream ended inside a frame")]
    Truncated,
    /// The stream failed.
    #[error("stream: {0}")]
    Io(#[from] io::Error),
    /// The other end answered with an error.
    #[error("{0}")]
    Remote(ErrorBody),
}

/// One frame holding `value`: what is to be written to the stream.
pub fn encode<T: Serialize + ?Sized>(value: &T) -> Result<Vec<u8>, FrameError> {
    let mut out = vec![0; HEADER];
    serde_json::to_writer(&mut out, value)?;
    let length = out.len().saturating_sub(HEADER);
    match u32::try_from(length) {
        Ok(header) if length <= MAX_FRAME => {
            if let Some(place) = out.get_mut(..HEADER) {
                place.copy_from_slice(&header.to_be_bytes());
            }
            Ok(out)
        }
        _ => Err(FrameError::TooLong(length)),
    }
}

/// The first frame of `bytes`: its JSON and how many bytes it takes with its length. `None` when more bytes
/// are needed; an error as soon as the length shows that this can be no frame.
pub fn split(bytes: &[u8]) -> Result<Option<(&[u8], usize)>, FrameError> {
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER>() else {
        return Ok(None);
    };
    let length = checked_length(*header)?;
    Ok(rest
        .get(..length)
        .map(|body| (body, HEADER.saturating_add(length))))
}

fn checked_length(header: [u8; HEADER]) -> Result<usize, FrameError> {
    match usize::try_from(u32::from_be_bytes(header)) {
        Ok(length) if length <= MAX_FRAME => Ok(length),
        Ok(length) => Err(FrameError::TooLong(length)),
        Err(_) => Err(FrameError::TooLong(usize::MAX)),
    }
}

/// Parses the JSON of a frame.
pub fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, FrameError> {
    Ok(serde_json::from_slice(body)?)
}

/// Parses the JSON of an answer: the reply of type `T`, or [`FrameError::Remote`] for `{"error": …}`.
pub fn decode_reply<T: DeserializeOwned>(body: &[u8]) -> Result<T, FrameError> {
    #[derive(serde::Deserialize)]
    struct Failure {
        error: ErrorBody,
    }
    // The error's shape is tried first: a reply type whose fields all have defaults would accept it.
    match serde_json::from_slice::<Failure>(body) {
        Ok(failure) => Err(FrameError::Remote(failure.error)),
        Err(_) => decode(body),
    }
}

/// Cuts frames out of bytes that arrive in pieces.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    start: usize,
}

impl Decoder {
    /// Takes in the bytes of one read.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.start > 0 {
            self.buffer.drain(..self.start.min(self.buffer.len()));
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The JSON of the next whole frame, if there is one.
    pub fn next_frame(&mut self) -> Result<Option<&[u8]>, FrameError> {
        let pending = self.buffer.get(self.start..).unwrap_or_default();
        match split(pending)? {
            Some((body, used)) => {
                self.start = self.start.saturating_add(used);
                Ok(Some(body))
            }
            None => Ok(None),
        }
    }

    /// Bytes taken in and not yet given out.
    pub fn pending(&self) -> usize {
        self.buffer.len().saturating_sub(self.start)
    }
}

/// Writes one frame with a single `write_all`, and flushes.
pub fn write_frame<T: Serialize + ?Sized>(stream: &mut impl Write, value: &T) -> Result<(), FrameError> {
    stream.write_all(&encode(value)?)?;
    Ok(stream.flush()?)
}

/// Reads the JSON of one frame; `None` at a clean end of the stream. Takes no byte beyond the frame.
pub fn read_frame(stream: &mut impl Read) -> Result<Option<Vec<u8>>, FrameError> {
    let mut header = [0; HEADER];
    let mut have = 0;
    while let Some(space) = header.get_mut(have..).filter(|space| !space.is_empty()) {
        match stream.read(space) {
            Ok(0) if have == 0 => return Ok(None),
            Ok(0) => return Err(FrameError::Truncated),
            Ok(n) => have = have.saturating_add(n),
            Err(e) if e.kind() == IoKind::Interrupted => {}
            Err(e) => return Err(e.into()),
        }
    }
    let length = checked_length(header)?;
    let mut body = Vec::new();
    // `take` + `read_to_end` grows the buffer by what has come, so a promised length costs nothing.
    stream.take(length as u64).read_to_end(&mut body)?;
    if body.len() == length {
        Ok(Some(body))
    } else {
        Err(FrameError::Truncated)
    }
}

#[cfg(test)]
mod tests {
    use super::super::types::{Bytes, ErrorKind, ExecEvent, Request, StatusReply};
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_hostile_length_is_refused_before_any_memory_is_taken() {
        let bytes = [0xff, 0xff, 0xff, 0xff, b'{'];
        assert!(matches!(split(&bytes), Err(FrameError::TooLong(n)) if n == 0xffff_ffff));
        assert!(matches!(read_frame(&mut &bytes[..]), Err(FrameError::TooLong(_))));
        let just_above = (MAX_FRAME as u32 + 1).to_be_bytes();
        assert!(matches!(split(&just_above), Err(FrameError::TooLong(_))));
        let largest = (MAX_FRAME as u32).to_be_bytes();
        assert!(matches!(split(&largest), Ok(None)));
    }

    #[test]
    fn a_value_too_large_for_a_frame_is_an_error_of_the_sender() {
        let value = "x".repeat(MAX_FRAME);
        assert!(matches!(encode(&value), Err(FrameError::TooLong(n)) if n == MAX_FRAME + 2));
    }

    #[test]
    fn the_end_of_a_stream_is_clean_only_between_frames() {
        let frame = encode(&Request::Hello).expect("encodes");
        assert!(read_frame(&mut &frame[..0]).expect("clean end").is_none());
        for cut in 1..frame.len() {
            assert!(
                matches!(read_frame(&mut &frame[..cut]), Err(FrameError::Truncated)),
                "cut at {cut}"
            );
        }
    }

    #[test]
    fn an_error_is_told_from_a_reply() {
        let body = br#"{"error":{"kind":"busy","message":"no"}}"#;
        match decode_reply::<StatusReply>(body) {
            Err(FrameError::Remote(error)) => assert_eq!(error.kind, ErrorKind::Busy),
            other => panic!("{other:?}"),
        }
        let newer = br#"{"error":{"kind":"of a later version","message":"no"}}"#;
        match decode_reply::<StatusReply>(newer) {
            Err(FrameError::Remote(error)) => assert_eq!(error.kind, ErrorKind::Unknown),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_largest_piece_of_output_fits_in_a_frame() {
        let event = ExecEvent::Stdout {
            data: Bytes(vec![0xff; MAX_DATA]),
        };
        assert!(encode(&event).is_ok());
    }

    proptest! {
        #[test]
        fn frames_survive_any_cutting(texts in prop::collection::vec(".{0,200}", 0..8), step in 1usize..50) {
            let mut stream = Vec::new();
            for text in &texts {
                stream.extend(encode(text).expect("encodes"));
            }
            let mut decoder = Decoder::default();
            let mut got = Vec::new();
            for piece in stream.chunks(step) {
                decoder.push(piece);
                while let Some(body) = decoder.next_frame().expect("valid") {
                    got.push(decode::<String>(body).expect("a string"));
                }
            }
            prop_assert_eq!(&got, &texts);
            prop_assert_eq!(decoder.pending(), 0);

            let mut reader = &stream[..];
            let mut read = Vec::new();
            while let Some(body) = read_frame(&mut reader).expect("valid") {
                read.push(decode::<String>(&body).expect("a string"));
            }
            prop_assert_eq!(read, texts);
        }

        #[test]
        fn garbage_is_an_answer_never_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), step in 1usize..40) {
            let mut decoder = Decoder::default();
            'pieces: for piece in bytes.chunks(step) {
                decoder.push(piece);
                loop {
                    match decoder.next_frame() {
                        Ok(Some(body)) => { let _ = decode::<Request>(body); let _ = decode_reply::<StatusReply>(body); }
                        Ok(None) => break,
                        Err(_) => break 'pieces,
                    }
                }
            }
            let _ = read_frame(&mut &bytes[..]);
            let _ = decode::<Request>(&bytes);
        }
    }
}
