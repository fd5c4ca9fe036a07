//! The marks of the first user instruction, and the exit register: the few bytes by which a guest without
//! drivers tells its monitor where it stands.

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;

use mandoline_api::agent::{BOOT_PAGE, BOOT_TIMER_VALUE, EXIT_REGISTER_OFFSET, SERIAL_MARK};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::mount::MountFlags;
use rustix::time::{ClockId, clock_gettime};

const PAGE: usize = 4096;

/// Tells the monitor that user code runs: the boot timer, where there is one, then the serial mark. Answers
/// the guest's time at the mark, nanoseconds since boot. Nothing is done before it that it doesn't need.
pub(crate) fn first_instruction() -> u64 {
    if matches!(poke(0, BOOT_TIMER_VALUE), Err(e) if e.kind() == io::ErrorKind::NotFound) {
        // The kernel mounts devtmpfs by itself where it's configured to; this one wasn't.
        let _ = rustix::mount::mount("dev", "/dev", "devtmpfs", MountFlags::NOSUID, c"mode=0755");
        let _ = poke(0, BOOT_TIMER_VALUE);
    }
    if let Ok(mut serial) = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open("/dev/ttyS0")
    {
        let _ = serial.write_all(&[SERIAL_MARK]);
    }
    boot_ns()
}

/// Tells the monitor why the reset that follows happens.
pub(crate) fn exit_register(value: u8) -> io::Result<()> {
    poke(EXIT_REGISTER_OFFSET, value)
}

/// Writes one byte into the boot page. A monitor that has no device there ignores it; a kernel with
/// `STRICT_DEVMEM` refuses when the page is memory.
fn poke(offset: usize, value: u8) -> io::Result<()> {
    if offset >= PAGE {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // O_SYNC asks for an uncached mapping: the write must leave the CPU.
    let memory = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_SYNC)
        .open("/dev/mem")?;
    // SAFETY: a fresh mapping placed by the kernel (null hint) aliases no object of this program.
    let page = unsafe {
        mmap(
            std::ptr::null_mut(),
            PAGE,
            ProtFlags::WRITE,
            MapFlags::SHARED,
            &memory,
            BOOT_PAGE,
        )?
    };
    // SAFETY: `page` is a writable mapping of PAGE bytes and `offset` is below PAGE.
    unsafe { page.cast::<u8>().add(offset).write_volatile(value) };
    // SAFETY: exactly the mapping made above, of which no reference remains.
    unsafe { munmap(page, PAGE)? };
    Ok(())
}

/// Guest time since boot, nanoseconds.
pub(crate) fn boot_ns() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let (seconds, nanos) = (
        u64::try_from(now.tv_sec).unwrap_or(0),
        u64::try_from(now.tv_nsec).unwrap_or(0),
    );
    seconds.saturating_mul(1_000_000_000).saturating_add(nanos)
}
