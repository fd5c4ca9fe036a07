//! Kernel modules, in an order in which each finds what it needs.

use std::fs::{self, File};
use std::path::Path;

use rustix::io::Errno;
use rustix::system::finit_module;

use crate::Error;

/// Loads the modules that `directory`'s file `list` names, one a line, in its order, and removes their files: the
/// initial RAM disk is memory that the sliver keeps.
pub(crate) fn load(directory: &Path) -> Result<(), Error> {
    let list = directory.join("list");
    let names = fs::read_to_string(&list).map_err(Error::system(format!("reading {}", list.display())))?;
    for name in names.lines() {
        let path = directory.join(name);
        let file = File::open(&path).map_err(Error::system(format!("opening {}", path.display())))?;
        match finit_module(&file, c"", 0) {
            // Another image of the kernel may have it built in.
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(Error::system(format!("loading the module {name}"))(e.into())),
        }
        let _ = fs::remove_file(path);
    }
    let _ = fs::remove_file(list);
    let _ = fs::remove_dir(directory);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_that_is_missing_is_named() {
        let directory = tempfile::tempdir().expect("a directory");
        fs::write(directory.path().join("list"), "none.ko\n").expect("a list");
        let error = load(directory.path()).expect_err("there is no such module");
        assert!(error.to_string().contains("none.ko"), "{error}");
    }

    #[test]
    fn a_file_that_is_no_module_is_refused_by_the_kernel_and_kept() {
        let directory = tempfile::tempdir().expect("a directory");
        fs::write(directory.path().join("list"), "text.ko\n").expect("a list");
        fs::write(directory.path().join("text.ko"), "no module").expect("a file");
        let error = load(directory.path()).expect_err("text is no module");
        assert!(
            error.to_string().contains("loading the module text.ko"),
            "{error}"
        );
        assert!(directory.path().join("text.ko").exists());
    }
}
