//! Logs and consoles, as they grow.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use crossterm::event::{Event, KeyCode, KeyEvent, KeyModifiers};
use mandoline_api::nodemgr::{ClientError, NodeManager, TAIL_MAX, Tail, VmId};

use super::top::Raw;
use crate::error::{About, Result};
use crate::output::Output;

/// How often a file is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// The log of a sliver's monitor.
pub(super) async fn log(nm: &NodeManager, output: Output, vm_id: VmId, follow: bool) -> Result<()> {
    let mut from = None;
    loop {
        let tail = nm.log(vm_id, from).await?;
        let full = tail.text.len() as u64 >= TAIL_MAX;
        from = Some(tail.next);
        show(output, &tail, false)?;
        if !follow && (!full || output.json) {
            return Ok(());
        }
        if !full {
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// What a sliver's serial port says. Nobody reads its input: a sliver has no login there, ssh is the way in.
pub(super) async fn console(nm: &NodeManager, output: Output, vm_id: VmId, once: bool) -> Result<()> {
    let live = !once && !output.json && std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    if !live {
        let tail = nm.console(vm_id, None).await?;
        return show(output, &tail, false);
    }
    eprintln!("console of sliver {vm_id}; Ctrl-] leaves");
    let _raw = Raw::enter()?;
    let mut from = None;
    loop {
        match nm.console(vm_id, from).await {
            Ok(tail) => {
                from = Some(tail.next);
                show(output, &tail, true)?;
            }
            // It has written nothing yet, or goes away while we look.
            Err(ClientError::Refused(_)) if from.is_none() => {}
            Err(error) => return Err(error.into()),
        }
        if crossterm::event::poll(LOOK).about("terminal")?
            && leaves(&crossterm::event::read().about("terminal")?)
        {
            return Ok(());
        }
    }
}

/// Ctrl-] as terminals send it, or Ctrl-C.
fn leaves(event: &Event) -> bool {
    let Event::Key(KeyEvent { code, modifiers, .. }) = event else {
        return false;
    };
    let control = modifiers.contains(KeyModifiers::CONTROL);
    control && matches!(code, KeyCode::Char(']' | '5' | 'c'))
}

fn show(output: Output, tail: &Tail, raw: bool) -> Result<()> {
    if output.json {
        return output.show(tail, |tail| tail.text.clone());
    }
    let mut text = visible(&tail.text);
    if raw {
        text = text.replace("\r\n", "\n").replace('\n', "\r\n");
    }
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error).about("standard output"),
        _ => Ok(()),
    }
}

/// Without what could steer the operator's terminal: a guest writes what it likes.
fn visible(text: &str) -> String {
    let harmless = |c: &char| !c.is_control() || matches!(c, '\n' | '\r' | '\t');
    text.chars().filter(harmless).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_does_not_steer_the_terminal() {
        assert_eq!(
            visible("a\x1b]0;title\x07b\tc\r\n\u{9b}31m"),
            "a]0;titleb\tc\r\n31m"
        );
    }

    #[test]
    fn the_escape_is_known_in_the_forms_that_terminals_send() {
        let key = |c, modifiers| Event::Key(KeyEvent::new(KeyCode::Char(c), modifiers));
        assert!(leaves(&key(']', KeyModifiers::CONTROL)) && leaves(&key('5', KeyModifiers::CONTROL)));
        assert!(!leaves(&key(']', KeyModifiers::NONE)));
    }
}
