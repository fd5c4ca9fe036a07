//! The kernel's command line: the default one, and the words that name the root.

use mandoline_api::monitor::Drive;

use super::{Error, value};

/// The default command line: quiet, since a character on the console costs an exit.
pub const DEFAULT_COMMAND_LINE: &str = "console=ttyS0 quiet loglevel=1 reboot=k panic=1 nomodule";

/// The words of the command line that name the root: the `index`th drive, or a partition of it.
pub(super) fn root(index: usize, drive: &Drive) -> Result<String, Error> {
    let mode = if drive.is_read_only { "ro" } else { "rw" };
    let Some(partuuid) = &drive.partuuid else {
        let letter = char::from(b'a' + index as u8);
        return Ok(format!(" root=/dev/vd{letter} {mode}"));
    };
    // Nothing that could be another word of the command line; 36 is a GPT's, an MBR's is shorter.
    let fits = |text: &str| {
        (1..=36).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-')
    };
    if !fits(partuuid) {
        let allowed = "1 to 36 hexadecimal digits and hyphens";
        return Err(value("partuuid", partuuid, allowed));
    }
    Ok(format!(" root=PARTUUID={partuuid} {mode}"))
}

/// Adds words (each with a space before it) to the kernel's part: what follows `--` is for init.
pub(super) fn add_words(command_line: &mut String, words: &str) {
    let end = command_line.find(" -- ").unwrap_or(command_line.len());
    command_line.insert_str(end, words);
}

/// Whether a word that begins with `start` is there.
pub(super) fn has_word(command_line: &str, start: &str) -> bool {
    command_line
        .split_whitespace()
        .any(|word| word.starts_with(start))
}
