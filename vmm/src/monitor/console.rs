//! The console in the event loop: its host's end, in both directions.

use std::fs::File;
use std::io;
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;

use super::watch;
use crate::devices::serial::{Console, Uart};

const CONSOLE_OUTPUT: u32 = 0;
const CONSOLE_ROOM: u32 = 1;
const CONSOLE_SINK: u32 = 2;
const CONSOLE_SOURCE: u32 = 3;

/// The console's host side.
pub(super) struct ConsoleEvents {
    pub(super) console: Arc<Console>,
    pub(super) uart: Arc<Uart>,
    pub(super) input: Option<File>,
    pub(super) output: Option<File>,
}

impl ConsoleEvents {
    /// Hands on what the guest has printed.
    pub(super) fn hand_on(&mut self) {
        let result = match &mut self.output {
            Some(output) => self.console.drain(output),
            None => Err(io::ErrorKind::NotFound.into()),
        };
        match result {
            Ok(()) => {}
            // Edge-triggered writability goes on.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => self.console.discard(),
        }
    }

    fn feed(&mut self) {
        if let Some(input) = &mut self.input
            && let Err(error) = self.uart.feed(input)
        {
            tracing::info!(%error, "console: no more input");
        }
    }
}

impl MutEventSubscriber for ConsoleEvents {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(
            ops,
            Events::with_data(&self.console.output, CONSOLE_OUTPUT, EventSet::IN),
        );
        watch(
            ops,
            Events::with_data(&self.console.room, CONSOLE_ROOM, EventSet::IN),
        );
        // A regular file cannot be watched, and need not be: it never blocks.
        if let Some(output) = &self.output {
            let _ = ops.add(Events::with_data(
                output,
                CONSOLE_SINK,
                EventSet::OUT | EventSet::EDGE_TRIGGERED,
            ));
        }
        if let Some(input) = &self.input {
            let _ = ops.add(Events::with_data(
                input,
                CONSOLE_SOURCE,
                EventSet::IN | EventSet::EDGE_TRIGGERED,
            ));
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        match events.data() {
            CONSOLE_OUTPUT => {
                let _ = self.console.output.read();
                self.hand_on();
            }
            CONSOLE_ROOM => {
                let _ = self.console.room.read();
                self.feed();
            }
            CONSOLE_SINK => self.hand_on(),
            _ => self.feed(),
        }
    }
}
