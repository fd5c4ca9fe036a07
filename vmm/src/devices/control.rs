//! How a guest ends or marks itself: the boot/exit page (see `mandoline_api::monitor`) and the one command of
//! the i8042 keyboard controller that matters here, the pulse on the CPU's reset line.

use std::sync::Arc;

use mandoline_api::monitor::{
    BOOT_TIMER_OFFSET, BOOT_TIMER_VALUE, EXIT_PANIC, EXIT_POWEROFF, EXIT_REASON_OFFSET, EXIT_REBOOT,
    ExitReason, Phase,
};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::serial::Console;
use crate::exit::ExitLatch;
use crate::state::Phases;

/// The i8042's status and command port.
pub const I8042_COMMAND: u16 = 0x64;
const I8042_RESET_CPU: u8 = 0xfe;
/// What a panicking Linux prints.
const PANIC_MARK: &str = "Kernel panic";

/// The registers through which a guest speaks of itself.
pub struct Control {
    exit: Arc<ExitLatch>,
    phases: Arc<Phases>,
    console: Arc<Console>,
    boot_timer: bool,
    /// Wakes the event loop after a mark.
    marked: EventFd,
}

impl Control {
    /// `boot_timer`: whether the boot timer's register is there.
    pub fn new(
        exit: Arc<ExitLatch>,
        phases: Arc<Phases>,
        console: Arc<Console>,
        boot_timer: bool,
    ) -> std::io::Result<Self> {
        let marked = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Self {
            exit,
            phases,
            console,
            boot_timer,
            marked,
        })
    }

    /// Readable after the boot timer was stopped.
    pub fn marked(&self) -> &EventFd {
        &self.marked
    }

    /// A write to the boot/exit page.
    pub fn page_write(&self, offset: u64, value: u8) {
        match (offset, value) {
            (BOOT_TIMER_OFFSET, BOOT_TIMER_VALUE)
                if self.boot_timer && self.phases.mark(Phase::BootTimer) =>
            {
                let _ = self.marked.write(1);
            }
            (EXIT_REASON_OFFSET, EXIT_POWEROFF) => self.exit.close(ExitReason::Shutdown, None),
            (EXIT_REASON_OFFSET, EXIT_REBOOT) => self.exit.close(ExitReason::Reboot, None),
            (EXIT_REASON_OFFSET, EXIT_PANIC) => self.exit.close(ExitReason::Panic, Some(self.console.tail())),
            _ => {}
        }
    }

    /// A write to the i8042's command port.
    pub fn i8042_write(&self, value: u8) {
        if value != I8042_RESET_CPU {
            return;
        }
        let tail = self.console.tail();
        match tail.rfind(PANIC_MARK) {
            Some(at) => self.exit.close(ExitReason::Panic, Some(tail[at..].to_owned())),
            None => self.exit.close(ExitReason::Reboot, None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::serial::Uart;

    fn control(boot_timer: bool) -> (Control, Uart, Arc<ExitLatch>, Arc<Phases>) {
        let phases = Arc::new(Phases::default());
        let console = Console::new(phases.clone()).unwrap();
        let exit = Arc::new(ExitLatch::new().unwrap());
        let uart = Uart::new(EventFd::new(0).unwrap(), console.clone());
        (
            Control::new(exit.clone(), phases.clone(), console, boot_timer).unwrap(),
            uart,
            exit,
            phases,
        )
    }

    #[test]
    fn the_boot_timer_takes_its_own_value_only() {
        let (control, _, _, phases) = control(true);
        control.page_write(0, 122);
        control.page_write(4, 123);
        assert_eq!(phases.reached(Phase::BootTimer), None);
        control.page_write(0, 123);
        assert!(phases.reached(Phase::BootTimer).is_some());
        assert_eq!(control.marked().read().unwrap(), 1);
        let (control, _, _, phases) = self::control(false);
        control.page_write(0, 123);
        assert_eq!(phases.reached(Phase::BootTimer), None);
    }

    #[test]
    fn reasons_are_told_apart() {
        for (value, reason) in [
            (1, ExitReason::Shutdown),
            (2, ExitReason::Reboot),
            (3, ExitReason::Panic),
        ] {
            let (control, _, exit, _) = control(false);
            control.page_write(8, value);
            assert_eq!(exit.get().unwrap().reason, reason);
        }
        let (control, uart, exit, _) = control(false);
        for byte in b"x\nKernel panic - not syncing: oops\n" {
            uart.write(0, *byte);
        }
        control.i8042_write(0xd1);
        assert!(!exit.is_closed());
        control.i8042_write(0xfe);
        let exit = exit.get().unwrap();
        assert_eq!(exit.reason, ExitReason::Panic);
        assert_eq!(exit.detail.unwrap(), "Kernel panic - not syncing: oops\n");
    }
}
