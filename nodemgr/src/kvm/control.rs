//! The control sockets of our monitor and of QEMU: what is changed while a VM runs.

use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hyper::Method;
use mandoline_api::monitor::{
    BalloonPatch, BalloonStats, DrivePatch, FD_NAMES_HEADER, FD_PREFIX, VmPatch, VmPatchState,
};
use mandoline_api::unix::Client;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde::Serialize;
use serde_json::json;

use crate::qemu::Qmp;
use crate::vm_type::{Failure, blocking};

/// How long the guest may take to fill its balloon before it is let do so by itself.
const INFLATE: Duration = Duration::from_secs(5);
/// How often its progress is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// The longest answer that is read, in bytes.
const MAX_ANSWER: usize = 1 << 16;

/// Asks for a change.
async fn patch<T: Serialize>(api: &Path, target: &str, body: &T) -> Result<(), Failure> {
    let answer = Client::new(api)
        .request(Method::PATCH, target, Some(body), &[])
        .await
        .map_err(|e| Failure::retryable(e.to_string()))?;
    match answer.status < 300 {
        true => Ok(()),
        false => Err(refused(target, answer.status, &answer.body)),
    }
}

/// How a running VM is changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Control {
    /// Our monitor's socket.
    Monitor(PathBuf),
    /// QEMU's.
    Qemu(PathBuf),
}

impl Control {
    /// Stops the vCPUs.
    pub(super) async fn pause(&self) -> Result<(), Failure> {
        let state = VmPatchState::Paused;
        match self {
            Self::Monitor(api) => patch(api, "/vm", &VmPatch { state }).await,
            Self::Qemu(qmp) => Qmp::once(qmp, "stop", json!({})).await.map(drop),
        }
    }

    /// Lets the vCPUs run again.
    pub(super) async fn resume(&self) -> Result<(), Failure> {
        let state = VmPatchState::Resumed;
        match self {
            Self::Monitor(api) => patch(api, "/vm", &VmPatch { state }).await,
            Self::Qemu(qmp) => Qmp::once(qmp, "cont", json!({})).await.map(drop),
        }
    }

    /// Asks a guest that was booted with `booted` MiB for `wanted` of them, and waits a moment. Gives what it has given,
    /// in MiB.
    pub(super) async fn inflate(&self, booted: u64, wanted: u64) -> Result<u64, Failure> {
        match self {
            Self::Monitor(api) => {
                let amount_mib = u32::try_from(wanted).unwrap_or(u32::MAX);
                patch(api, "/balloon", &BalloonPatch { amount_mib }).await?;
            }
            Self::Qemu(qmp) => {
                // QEMU counts what is left to the guest.
                let value = booted.saturating_sub(wanted) << 20;
                Qmp::once(qmp, "balloon", json!({ "value": value })).await?;
            }
        }
        let began = Instant::now();
        loop {
            let given = match self {
                Self::Monitor(api) => balloon(api).await?.into(),
                Self::Qemu(qmp) => {
                    let said = Qmp::once(qmp, "query-balloon", json!({})).await?;
                    booted.saturating_sub(said["actual"].as_u64().unwrap_or(0) >> 20)
                }
            };
            if given >= wanted || began.elapsed() >= INFLATE {
                return Ok(given);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Tells of a drive that its file grew to `length` bytes.
    pub(super) async fn grow(&self, drive: &'static str, file: File, length: u64) -> Result<(), Failure> {
        match self {
            Self::Monitor(api) => {
                let api = api.clone();
                blocking(move || renew_drive(&api, drive, file.as_fd())).await
            }
            Self::Qemu(qmp) => {
                let arguments = json!({ "device": drive, "size": length });
                Qmp::once(qmp, "block_resize", arguments).await.map(drop)
            }
        }
    }
}

/// What the guest's balloon holds, in MiB.
async fn balloon(api: &Path) -> Result<u32, Failure> {
    let target = "/balloon/statistics";
    let answer = Client::new(api)
        .get(target)
        .await
        .map_err(|e| Failure::retryable(e.to_string()))?;
    if answer.status >= 300 {
        return Err(refused(target, answer.status, &answer.body));
    }
    let stats: BalloonStats = serde_json::from_slice(&answer.body)
        .map_err(|e| Failure::retryable(format!("the monitor's answer to {target}: {e}")))?;
    Ok(stats.actual_mib)
}

/// Gives the monitor the file of a drive once more, after it grew. Blocks.
fn renew_drive(api: &Path, drive: &str, file: BorrowedFd<'_>) -> Result<(), Failure> {
    let target = format!("/drives/{drive}");
    let body = DrivePatch {
        drive_id: drive.to_owned(),
        path_on_host: Some(format!("{FD_PREFIX}{drive}")),
        rate_limiter: None,
    };
    let body = serde_json::to_vec(&body).map_err(|e| Failure::fatal(e.to_string()))?;
    let mut request = format!(
        "PATCH {target} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n{FD_NAMES_HEADER}: {drive}\r\n\r\n",
        body.len()
    )
    .into_bytes();
    request.extend(body);
    let (status, said) = exchange(api, &request, file)
        .map_err(|e| Failure::retryable(format!("{} {target}: {e}", api.display())))?;
    match status < 300 {
        true => Ok(()),
        false => Err(refused(&target, status, &said)),
    }
}

/// Sends a request together with a descriptor, and reads the answer: its status and its body.
fn exchange(api: &Path, request: &[u8], file: BorrowedFd<'_>) -> io::Result<(u16, Vec<u8>)> {
    let mut stream = UnixStream::connect(api)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let files = [file];
    if !control.push(SendAncillaryMessage::ScmRights(&files)) {
        return Err(io::Error::other("no room for a descriptor"));
    }
    let sent = rustix::net::sendmsg(
        &stream,
        &[IoSlice::new(request)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    stream.write_all(request.get(sent..).unwrap_or_default())?;
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    while answer.len() < MAX_ANSWER {
        if let Some(whole) = parse(&answer) {
            return Ok(whole);
        }
        match stream.read(&mut buffer)? {
            0 => break,
            length => answer.extend_from_slice(&buffer[..length]),
        }
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidData,
        "the monitor's answer is no whole HTTP answer",
    ))
}

/// Status and body, once all of an answer is there.
fn parse(answer: &[u8]) -> Option<(u16, Vec<u8>)> {
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(&answer[..end]);
    let mut lines = head.split("\r\n");
    let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
    let length = lines
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .map_or(Some(0), |(_, value)| value.trim().parse::<usize>().ok())?;
    let body = answer.get(end + 4..(end + 4).checked_add(length)?)?;
    Some((status, body.to_vec()))
}

fn refused(target: &str, status: u16, body: &[u8]) -> Failure {
    Failure::retryable(format!(
        "the monitor refuses {target} with {status}: {}",
        String::from_utf8_lossy(body)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drive_goes_with_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let monitor = std::thread::spawn(move || {
            for answer in [
                "HTTP/1.1 204 No Content\r\n\r\n".to_owned(),
                "HTTP/1.1 400 Bad\r\ncontent-length: 7\r\n\r\nno disk".to_owned(),
            ] {
                let (mut stream, _) = listener.accept().unwrap();
                let mut bytes = [0; 1024];
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
                let mut control = rustix::net::RecvAncillaryBuffer::new(&mut space);
                let got = rustix::net::recvmsg(
                    &stream,
                    &mut [io::IoSliceMut::new(&mut bytes)],
                    &mut control,
                    rustix::net::RecvFlags::empty(),
                )
                .unwrap();
                let text = String::from_utf8_lossy(&bytes[..got.bytes]).into_owned();
                assert!(text.starts_with("PATCH /drives/disk HTTP/1.1\r\n"), "{text}");
                assert!(text.contains("Mandoline-Fd-Names: disk\r\n") && text.contains("\"fd:disk\""));
                let fds = control.drain().filter_map(|message| match message {
                    rustix::net::RecvAncillaryMessage::ScmRights(fds) => Some(fds.count()),
                    _ => None,
                });
                assert_eq!(fds.sum::<usize>(), 1);
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        let file = std::fs::File::open("/dev/null").unwrap();
        renew_drive(&path, "disk", file.as_fd()).unwrap();
        let failure = renew_drive(&path, "disk", file.as_fd()).unwrap_err();
        assert!(
            failure.reason.contains("400") && failure.reason.contains("no disk"),
            "{failure}"
        );
        monitor.join().unwrap();
        assert_eq!(parse(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nabc"), None);
    }
}
