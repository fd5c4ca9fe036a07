//! How a guest ends or marks itself: the boot/exit page (see `mandoline_api::monitor`), the one command of the i8042
//! keyboard controller that matters here, the pulse on the CPU's reset line, and the sleep and reset registers of
//! hardware-reduced ACPI (specification 4.8.3).

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
/// ACPI's sleep control register: a type in bits 2 to 4, and bit 5 enters it.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI's sleep status register: its one bit says that the system woke, which it never does.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// ACPI's reset register.
pub const RESET_PORT: u16 = 0x602;
/// What resets when written to [`RESET_PORT`].
pub const RESET_VALUE: u8 = 1;
/// The sleep type of S5, soft off; the DSDT's `_S5` says so.
pub const SLEEP_TYPE_OFF: u8 = 5;
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
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

    /// A write to one of the ports above.
    pub fn port_write(&self, port: u16, value: u8) {
        match (port, value) {
            (I8042_COMMAND, I8042_RESET_CPU) | (RESET_PORT, RESET_VALUE) => self.reset(),
            (SLEEP_CONTROL_PORT, value) if value == SLEEP_TYPE_OFF << SLEEP_TYPE_SHIFT | SLEEP_ENABLE => {
                self.exit.close(ExitReason::Shutdown, None);
            }
            _ => {}
        }
    }

    /// A panicking kernel ends with a reset, too: what it printed last tells.
    fn reset(&self) {
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
        control.port_write(I8042_COMMAND, 0xd1);
        assert!(!exit.is_closed());
        control.port_write(I8042_COMMAND, 0xfe);
        let exit = exit.get().unwrap();
        assert_eq!(exit.reason, ExitReason::Panic);
        assert_eq!(exit.detail.unwrap(), "Kernel panic - not syncing: oops\n");
    }

    #[test]
    fn acpi_sleeps_for_good_and_resets() {
        let (control, _, exit, _) = control(false);
        // Other types, the type without "enable", "woke" cleared, and a reset value that is none.
        for (port, value) in [
            (0x600, 0x20),
            (0x600, 0x2c),
            (0x600, 0x14),
            (0x601, 0x80),
            (0x602, 0),
        ] {
            control.port_write(port, value);
            assert!(!exit.is_closed(), "{port:#x} {value:#x}");
        }
        control.port_write(0x600, 0x34);
        assert_eq!(exit.get().unwrap().reason, ExitReason::Shutdown);
        let (control, _, exit, _) = self::control(false);
        control.port_write(0x602, 1);
        assert_eq!(exit.get().unwrap().reason, ExitReason::Reboot);
    }
}
