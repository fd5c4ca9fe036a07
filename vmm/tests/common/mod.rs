//! What the payload tests share: an assembler of a few instructions, a VM to run its code in, and its outcome.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used)] // each test program uses a part; a test ends where it fails

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::sync::Arc;
use std::time::Duration;

use mandoline_api::monitor::{Hardware, HugePages, IoEngine, RunState, StateLine};
use mandoline_vmm::boot::elf;
use mandoline_vmm::config::{Drive, Spec};
use mandoline_vmm::devices::blk;
use mandoline_vmm::exit::Exit;
use mandoline_vmm::jail::seccomp::{self, Role};
use mandoline_vmm::machine::{self, Machine};
use mandoline_vmm::monitor::{self, Calls, Parts, Terminal};
use mandoline_vmm::state::{Phases, Since, StateFile};

pub const ENTRY: u64 = 0x10_0000;
pub const EXIT_PAGE: u32 = 0xc000_0000;
pub const WINDOW: u32 = 0xc000_1000;
pub const NEEDS_RESET: u32 = 64;

/// 32-bit code, put together by hand.
#[derive(Default)]
pub struct Code(pub Vec<u8>);

impl Code {
    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }
    /// `out port, value`
    pub fn out(self, port: u16, value: u8) -> Self {
        let [low, high] = port.to_le_bytes();
        self.raw(&[0x66, 0xba, low, high, 0xb0, value, 0xee])
    }
    /// `in al, port`
    pub fn input(self, port: u16) -> Self {
        let [low, high] = port.to_le_bytes();
        self.raw(&[0x66, 0xba, low, high, 0xec])
    }
    /// `out 0x3f8, al`
    pub fn print_al(self) -> Self {
        self.raw(&[0x66, 0xba, 0xf8, 0x03, 0xee])
    }
    pub fn print(self, text: &[u8]) -> Self {
        text.iter().fold(self, |code, byte| code.out(0x3f8, *byte))
    }
    /// `mov dword [address], value`
    pub fn store(self, address: u32, value: u32) -> Self {
        self.raw(&[0xc7, 0x05])
            .raw(&address.to_le_bytes())
            .raw(&value.to_le_bytes())
    }
    pub fn store8(self, address: u32, value: u8) -> Self {
        self.raw(&[0xc6, 0x05]).raw(&address.to_le_bytes()).raw(&[value])
    }
    pub fn store16(self, address: u32, value: u16) -> Self {
        self.raw(&[0x66, 0xc7, 0x05])
            .raw(&address.to_le_bytes())
            .raw(&value.to_le_bytes())
    }
    /// `mov eax, [address]`
    pub fn load(self, address: u32) -> Self {
        self.raw(&[0xa1]).raw(&address.to_le_bytes())
    }
    /// Loops until the 16 bits at `address` are `value`.
    pub fn wait16(self, address: u32, value: u16) -> Self {
        // l: cmp word [address], value; jne l
        self.raw(&[0x66, 0x81, 0x3d])
            .raw(&address.to_le_bytes())
            .raw(&value.to_le_bytes())
            .raw(&[0x75, 0xf5])
    }
    /// Loops until `mask` shows in the 32 bits at `address`.
    pub fn wait_bits(self, address: u32, mask: u32) -> Self {
        // l: test dword [address], mask; jz l
        self.raw(&[0xf7, 0x05])
            .raw(&address.to_le_bytes())
            .raw(&mask.to_le_bytes())
            .raw(&[0x74, 0xf4])
    }
    pub fn power_off(self) -> Self {
        self.store8(EXIT_PAGE + 8, 1).raw(&[0xeb, 0xfe])
    }
    pub fn register(self, offset: u32, value: u32) -> Self {
        self.store(WINDOW + offset, value)
    }
    /// Brings the first device up with queue 0 of 8 entries at the given rings.
    pub fn activate(self) -> Self {
        self.register(0x70, 0)
            .register(0x70, 1)
            .register(0x70, 3)
            .register(0x24, 1)
            .register(0x20, 1)
            .register(0x70, 11)
            .register(0x30, 0)
            .register(0x38, 8)
            .register(0x80, DESCRIPTORS)
            .register(0x90, AVAILABLE)
            .register(0xa0, USED)
            .register(0x44, 1)
            .register(0x70, 15)
    }
    pub fn descriptor(self, index: u32, address: u32, length: u32, flags: u16, next: u16) -> Self {
        let at = DESCRIPTORS + 16 * index;
        self.store(at, address)
            .store(at + 4, 0)
            .store(at + 8, length)
            .store16(at + 12, flags)
            .store16(at + 14, next)
    }
    /// Makes head `head` available as the `n`th and kicks.
    pub fn offer(self, n: u16, head: u16) -> Self {
        self.store16(AVAILABLE + 4 + 2 * u32::from(n - 1), head)
            .store16(AVAILABLE + 2, n)
            .register(0x50, 0)
    }
}

pub const DESCRIPTORS: u32 = 0x20_0000;
pub const AVAILABLE: u32 = 0x20_1000;
pub const USED: u32 = 0x20_2000;
pub const BUFFER: u32 = 0x20_3000;

pub fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

pub fn spec(code: Code) -> Spec {
    Spec {
        vcpus: 1,
        memory: 16 << 20,
        hardware: Hardware::MpTable,
        huge_pages: HugePages::None,
        kernel: file(&elf::tiny(&code.0, ENTRY)),
        initrd: None,
        command_line: String::new(),
        drives: Vec::new(),
        interfaces: Vec::new(),
        vsock: None,
        entropy: None,
        balloon: None,
        pmem: Vec::new(),
        park: None,
    }
}

pub fn with_drive(code: Code, bytes: &[u8], read_only: bool) -> (Spec, File) {
    let disk = file(bytes);
    let options = blk::Options {
        id: "disk".into(),
        read_only,
        flush: true,
        ..blk::Options::default()
    };
    let mut spec = spec(code);
    spec.drives.push(Drive {
        file: disk.try_clone().unwrap(),
        options,
    });
    (spec, disk)
}

pub const ENGINES: [IoEngine; 2] = [IoEngine::Sync, IoEngine::Async];

pub fn with_engine(mut spec: Spec, engine: IoEngine) -> Spec {
    spec.drives[0].options.io_engine = engine;
    spec
}

pub struct Outcome {
    pub exit: Exit,
    pub output: Vec<u8>,
    pub phases: Arc<Phases>,
    pub state: Vec<StateLine>,
}

impl Outcome {
    pub fn states(&self) -> Vec<RunState> {
        let states = self.state.iter().filter_map(|line| match line {
            StateLine::State(change) => Some(change.state),
            StateLine::Phase(_) => None,
        });
        states.collect()
    }
}

pub fn build(spec: Spec) -> Option<(Machine, Arc<Phases>)> {
    let kvm = match machine::open_kvm(None) {
        Ok(kvm) => kvm,
        Err(error) => {
            eprintln!("skipped, since there is no KVM here: {error}");
            return None;
        }
    };
    let phases = Arc::new(Phases::default());
    Some((machine::build(&kvm, spec, &phases, true).unwrap(), phases))
}

pub fn finish(machine: Machine, phases: Arc<Phases>, calls: Option<Calls>) -> Outcome {
    finish_or_restart(machine, phases, calls, None)
}

pub fn finish_or_restart(
    machine: Machine,
    phases: Arc<Phases>,
    calls: Option<Calls>,
    restart_after: Option<Duration>,
) -> Outcome {
    finish_with(machine, phases, calls, restart_after, false)
}

/// With `jailed`, under the filters of the jail, in threads of its own.
pub fn finish_with(
    machine: Machine,
    phases: Arc<Phases>,
    calls: Option<Calls>,
    restart_after: Option<Duration>,
    jailed: bool,
) -> Outcome {
    let output = tempfile::tempfile().unwrap();
    finish_all(machine, phases, calls, restart_after, jailed, output)
}

/// With a console of the test's own; nothing is read back from it.
pub fn finish_to(machine: Machine, phases: Arc<Phases>, output: File) -> Outcome {
    finish_all(machine, phases, None, None, false, output)
}

fn finish_all(
    machine: Machine,
    phases: Arc<Phases>,
    calls: Option<Calls>,
    restart_after: Option<Duration>,
    jailed: bool,
    mut output: File,
) -> Outcome {
    let confined = |role| seccomp::confine(role).map_err(|error| error.to_string());
    let mut state = tempfile::tempfile().unwrap();
    let (terminal_output, state_file) = (output.try_clone().unwrap(), state.try_clone().unwrap());
    let marks = phases.clone();
    let whole = move || {
        let parts = Parts {
            terminal: Terminal {
                input: None,
                output: Some(terminal_output),
            },
            state: StateFile::new(Some(state_file)),
            phases: marks,
            signals: monitor::signals(false).unwrap(),
            calls,
            confine: if jailed {
                Box::new(move || confined(Role::Devices))
            } else {
                Box::new(|| Ok(()))
            },
            confine_vcpu: if jailed {
                || seccomp::confine(Role::Vcpu).map_err(|error| error.to_string())
            } else {
                || Ok(())
            },
            boot_timer_from: Since::default(),
            metrics: Default::default(),
            restart_after,
        };
        monitor::run(machine, parts).unwrap()
    };
    let exit = if jailed {
        seccomp::install_handler(libc::STDERR_FILENO).unwrap();
        std::thread::spawn(whole).join().unwrap()
    } else {
        whole()
    };
    let (mut bytes, mut text) = (Vec::new(), String::new());
    // A socket cannot be read from the start, nor need it be.
    if output.rewind().is_ok() {
        output.read_to_end(&mut bytes).unwrap();
    }
    state.rewind().unwrap();
    state.read_to_string(&mut text).unwrap();
    let state = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    Outcome {
        exit,
        output: bytes,
        phases,
        state,
    }
}

pub fn run(spec: Spec) -> Option<Outcome> {
    let (machine, phases) = build(spec)?;
    Some(finish(machine, phases, None))
}
