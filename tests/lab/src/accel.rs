//! How a node can be run here: with the CPU's help where a guest may have guests, else by emulation with SVM.
//! Detected, never asked; what was used, and why, stands beside every number.

use crate::{LabError, Result, tiny_vm};
use serde::Serialize;

/// How QEMU runs the nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Accel {
    /// `-accel kvm`: the host's KVM, with nested virtualisation.
    Kvm,
    /// `-accel tcg` with SVM and nested paging emulated.
    TcgSvm,
}

/// What was found out about `/dev/kvm` and the CPU.
#[derive(Debug, Clone, Serialize)]
pub struct KvmProbe {
    /// `/dev/kvm` exists.
    pub present: bool,
    /// We may open it, and it answered `KVM_GET_API_VERSION` so.
    pub api_version: Option<i32>,
    /// The CPU's flag for hardware virtualisation: `svm` or `vmx`.
    pub cpu_flag: Option<&'static str>,
    /// The KVM module lets guests have guests.
    pub nested: bool,
    /// A virtual machine could be made.
    pub makes_vm: bool,
    /// What was chosen.
    pub accel: Accel,
    /// The same in words, with the reason.
    pub words: String,
}

impl Accel {
    /// What to use here. `MANDOLINE_LAB_ACCEL` (`kvm` or `tcg`) overrides what was found.
    pub fn detect() -> Result<Accel> {
        Ok(probe()?.accel)
    }

    /// The value for benchmarks' `machine.kvm`.
    pub fn kvm_kind(self) -> &'static str {
        match self {
            Accel::Kvm => "hardware",
            Accel::TcgSvm => "nested-tcg",
        }
    }
}

/// Looks at the CPU and `/dev/kvm`.
pub fn probe() -> Result<KvmProbe> {
    let cpu_info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu_flag = cpu_flag(&cpu_info);
    let nested = ["kvm_amd", "kvm_intel"].iter().any(|module| {
        std::fs::read_to_string(format!("/sys/module/{module}/parameters/nested"))
            .is_ok_and(|v| matches!(v.trim(), "1" | "Y" | "y"))
    });
    let present = std::path::Path::new("/dev/kvm").exists();
    let (api_version, makes_vm) = tiny_vm::answers();
    let (mut accel, mut words) = choose(present, api_version, cpu_flag, nested, makes_vm);
    match std::env::var("MANDOLINE_LAB_ACCEL").as_deref() {
        Ok("kvm") => (accel, words) = (Accel::Kvm, "KVM, because MANDOLINE_LAB_ACCEL says so".into()),
        Ok("tcg") => {
            (accel, words) = (
                Accel::TcgSvm,
                "emulation with SVM, because MANDOLINE_LAB_ACCEL says so".into(),
            );
        }
        Ok("") | Err(_) => {}
        Ok(other) => {
            return Err(LabError::Value {
                name: "MANDOLINE_LAB_ACCEL",
                value: other.into(),
                allowed: "kvm, tcg".into(),
            });
        }
    }
    Ok(KvmProbe {
        present,
        api_version,
        cpu_flag,
        nested,
        makes_vm,
        accel,
        words,
    })
}

fn choose(
    present: bool,
    api_version: Option<i32>,
    cpu_flag: Option<&str>,
    nested: bool,
    makes_vm: bool,
) -> (Accel, String) {
    let why_not = match (present, api_version, cpu_flag, nested, makes_vm) {
        (false, ..) => "there is no /dev/kvm",
        (_, None, ..) => "/dev/kvm cannot be opened by this user (group kvm?)",
        (_, Some(v), ..) if v != 12 => "/dev/kvm does not speak API version 12",
        (_, _, None, ..) => "the CPU shows neither svm nor vmx",
        (_, _, _, false, _) => "KVM's module parameter `nested` is off",
        (.., false) => "KVM refused to make a virtual machine",
        (.., true) => return (Accel::Kvm, "KVM with nested virtualisation".into()),
    };
    (
        Accel::TcgSvm,
        format!("emulation (TCG) with SVM and nested paging, because {why_not}"),
    )
}

fn cpu_flag(cpu_info: &str) -> Option<&'static str> {
    let flags = cpu_info.lines().find(|l| l.starts_with("flags"))?;
    ["svm", "vmx"]
        .into_iter()
        .find(|f| flags.split_whitespace().any(|w| w == *f))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_is_used_only_when_all_of_it_is_there() {
        assert_eq!(choose(true, Some(12), Some("svm"), true, true).0, Accel::Kvm);
        for (present, api, flag, nested, vm, word) in [
            (false, None, Some("svm"), true, false, "no /dev/kvm"),
            (true, None, Some("svm"), true, false, "cannot be opened"),
            (true, Some(11), Some("svm"), true, true, "version 12"),
            (true, Some(12), None, true, true, "neither svm nor vmx"),
            (true, Some(12), Some("vmx"), false, true, "`nested`"),
            (true, Some(12), Some("vmx"), true, false, "refused"),
        ] {
            let (accel, words) = choose(present, api, flag, nested, vm);
            assert_eq!(accel, Accel::TcgSvm);
            assert!(words.contains(word), "{words}");
        }
    }

    #[test]
    fn cpu_flags_are_whole_words() {
        assert_eq!(cpu_flag("flags\t\t: fpu svm_lock vmxy\n"), None);
        assert_eq!(cpu_flag("model\t: x\nflags\t\t: fpu vmx sse\n"), Some("vmx"));
        assert_eq!(cpu_flag(""), None);
    }
}
