//! A VM put together: KVM, memory, kernel, devices, vCPUs; ready to run.

use std::ops::Range;
use std::sync::Arc;

use kvm_bindings::{KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use mandoline_api::monitor::{Hardware, HugePages, Phase, RateLimiter};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::boot::image::Entry;
use crate::boot::layout::{GENERATION_GSI, KVM_TSS, SERIAL_GSI, device_gsi, device_window};
use crate::boot::loader::{self, Acpi, Boot, Loaded};
use crate::boot::{cpuid, regs};
use crate::bus::Bus;
use crate::config::{self, Drive, Interface, Spec};
use crate::devices::balloon::Balloon;
use crate::devices::blk::{self, Blk};
use crate::devices::control::Control;
use crate::devices::generation::{self, GenerationId};
use crate::devices::net::Net;
use crate::devices::net::vhost::{self, VhostNet};
use crate::devices::pmem::mapping::Space;
use crate::devices::pmem::{self, Pmem};
use crate::devices::rng::Rng;
use crate::devices::serial::{Console, Uart};
use crate::devices::virtio::mmio::{Transport, register};
use crate::devices::virtio::{Device, Slot};
use crate::devices::vsock::Vsock;
use crate::devices::vsock::muxer::Muxer;
use crate::exit::ExitLatch;
use crate::memory::{self, Memory};
use crate::metrics;
use crate::monitor::sleep::Sleeper;
use crate::park::ParkFile;
use crate::state::Phases;
use crate::vcpu;

/// The VM could not be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No KVM.
    #[error("/dev/kvm: {0}: is KVM loaded, may this user open it, and does the CPU have VT-x or SVM?")]
    NoKvm(std::io::Error),
    /// KVM refused a call.
    #[error("{call}: {source}")]
    Kvm {
        /// Which.
        call: &'static str,
        /// What it said.
        source: kvm_ioctls::Error,
    },
    /// KVM is too old or too small.
    #[error("this host's KVM lacks {0:?}, which every sliver needs")]
    Lacks(Cap),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// The kernel or its tables.
    #[error(transparent)]
    Load(#[from] loader::Error),
    /// A vCPU's registers.
    #[error(transparent)]
    Registers(#[from] regs::Error),
    /// A vCPU's state.
    #[error(transparent)]
    Vcpu(#[from] vcpu::state::Error),
    /// A vCPU's CPUID.
    #[error(transparent)]
    Cpuid(#[from] cpuid::TooManyEntries),
    /// The VM generation id.
    #[error(transparent)]
    Generation(#[from] generation::Error),
    /// The park file.
    #[error(transparent)]
    Park(#[from] crate::park::Error),
    /// A drive.
    #[error(transparent)]
    Drive(#[from] blk::OpenError),
    /// An interface that the kernel shall serve.
    #[error(transparent)]
    Vhost(#[from] vhost::Error),
    /// Persistent memory.
    #[error(transparent)]
    Pmem(#[from] pmem::mapping::MapError),
    /// An event descriptor.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the host said.
        source: std::io::Error,
    },
}

fn kvm(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |source| Error::Kvm { call, source }
}

fn host(what: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |source| Error::Host { what, source }
}

/// KVM's part of a machine that has not run: the interrupt controllers and the vCPUs.
pub struct PowerOn {
    irqchips: [kvm_irqchip; 3],
    vcpus: Vec<Arc<vcpu::state::PowerOn>>,
}

/// A VM that is ready to run.
pub struct Machine {
    /// KVM's VM; it lives as long as the process.
    pub vm: VmFd,
    /// What is loaded at its start.
    pub boot: Boot,
    /// What it is put back to when the guest reboots.
    pub power_on: PowerOn,
    /// vCPUs that have not started.
    pub vcpus: Vec<VcpuFd>,
    /// What they share.
    pub shared: vcpu::Shared,
    /// Virtio devices in the order of their windows.
    pub slots: Vec<Arc<Slot>>,
    /// The serial port.
    pub uart: Arc<Uart>,
    /// Its output.
    pub console: Arc<Console>,
    /// The boot/exit page.
    pub control: Arc<Control>,
    /// Guest memory.
    pub memory: Memory,
    /// The VM generation id, where ACPI tells of it.
    pub generation: Option<Arc<GenerationId>>,
    /// What parks the VM; taken by the event loop.
    pub sleeper: Option<Sleeper>,
}

/// Opens `/dev/kvm`, or takes it inherited.
pub fn open_kvm(inherited: Option<std::os::fd::OwnedFd>) -> Result<Kvm, Error> {
    use std::os::fd::{FromRawFd, IntoRawFd};
    match inherited {
        // SAFETY: the descriptor is owned and given away here.
        Some(fd) => Ok(unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) }),
        None => Kvm::new().map_err(|error| Error::NoKvm(error.into())),
    }
}

/// Builds the VM of `spec`.
pub fn build(kvm_fd: &Kvm, spec: Spec, phases: &Arc<Phases>, boot_timer: bool) -> Result<Machine, Error> {
    for capability in [
        Cap::Irqchip,
        Cap::Ioeventfd,
        Cap::Irqfd,
        Cap::UserMemory,
        Cap::ImmediateExit,
    ] {
        if !kvm_fd.check_extension(capability) {
            return Err(Error::Lacks(capability));
        }
    }
    let vm = kvm_fd.create_vm().map_err(kvm("KVM_CREATE_VM"))?;
    vm.set_tss_address(KVM_TSS).map_err(kvm("KVM_SET_TSS_ADDR"))?;
    let memory = memory::create(spec.memory)?;
    if spec.huge_pages == HugePages::Transparent {
        memory::prefer_huge_pages(&memory);
    }
    memory::register(&vm, &memory)?;
    phases.mark(Phase::MemoryReady);

    let mut models = device_models(
        &memory,
        spec.drives,
        spec.interfaces,
        spec.vsock,
        spec.entropy,
        spec.balloon,
    )?;
    let (memories, read_only) = pmem_models(kvm_fd, &vm, &memory, spec.pmem)?;
    models.extend(memories);
    let places: Vec<(u64, u32)> = (0..models.len())
        .filter_map(|n| Some((device_window(n), device_gsi(n)?)))
        .collect();
    let generation = match spec.hardware {
        Hardware::MpTable => None,
        Hardware::Acpi => Some(Arc::new(GenerationId::new(memory.clone())?)),
    };
    let acpi = generation.clone().map(|generation| Acpi {
        devices: places.clone(),
        generation,
    });
    // What the tables tell of, the command line need not: both would make every device twice.
    let told: &[_] = if acpi.is_some() { &[] } else { &places };
    let boot = Boot {
        kernel: spec.kernel,
        initrd: spec.initrd,
        command_line: loader::command_line(&spec.command_line, told)?,
        vcpus: spec.vcpus,
        acpi,
    };
    let Loaded { entry, kernel, image } = boot.load(&memory)?;
    phases.mark(Phase::KernelLoaded);

    vm.create_irq_chip().map_err(kvm("KVM_CREATE_IRQCHIP"))?;
    if let Some(generation) = &generation {
        vm.register_irqfd(generation.line(), GENERATION_GSI)
            .map_err(kvm("KVM_IRQFD"))?;
    }
    let exit = Arc::new(ExitLatch::new().map_err(host("eventfd"))?);
    let console = Console::new(phases.clone()).map_err(host("eventfd"))?;
    let line = interrupt_line(&vm, SERIAL_GSI)?;
    let uart = Arc::new(Uart::new(line, console.clone()));
    let control = Control::new(exit.clone(), phases.clone(), console.clone(), boot_timer);
    let control = Arc::new(control.map_err(host("eventfd"))?);

    let (mut slots, mut transports) = (Vec::new(), Vec::new());
    for ((name, model), (window, gsi)) in models.into_iter().zip(&places) {
        let slot = Slot::new(name, model, interrupt_line(&vm, *gsi)?).map_err(host("eventfd"))?;
        for (queue, kick) in slot.kicks.iter().enumerate() {
            let address = IoEventAddress::Mmio(window + register::QUEUE_NOTIFY);
            vm.register_ioevent(kick, &address, queue as u32)
                .map_err(kvm("KVM_IOEVENTFD"))?;
        }
        transports.push(Transport::new(slot.clone(), memory.clone()));
        slots.push(slot);
    }
    let bus = Arc::new(Bus::new(uart.clone(), control.clone(), transports, read_only));

    let vcpus = create_vcpus(kvm_fd, &vm, spec.vcpus, entry, spec.hardware)?;
    if let Some(vcpu) = vcpus.first() {
        memory::map_ahead(vcpu, image);
    }
    let power_on = PowerOn {
        irqchips: irqchips(&vm)?,
        vcpus: vcpus
            .iter()
            .map(|vcpu| Ok(Arc::new(vcpu::state::PowerOn::of(vcpu)?)))
            .collect::<Result<_, Error>>()?,
    };
    phases.mark(Phase::VcpuCreated);
    let shared = vcpu::Shared {
        bus,
        exit,
        phases: phases.clone(),
        exits: metrics::vcpu_exits(spec.vcpus),
    };
    let sleeper = match spec.park {
        Some(park) => {
            let file = ParkFile::new(park.file, &memory)?;
            Some(Sleeper::new(file, memory.clone(), kernel, park.idle, &slots).map_err(host("park"))?)
        }
        None => None,
    };
    Ok(Machine {
        vm,
        boot,
        power_on,
        vcpus,
        shared,
        slots,
        uart,
        console,
        control,
        memory,
        generation,
        sleeper,
    })
}

impl Machine {
    /// Makes it what it was before its first instruction: registers, memory, devices. Its vCPUs, whose threads these
    /// are, must be paused.
    pub fn reset(&self, vcpus: &[vcpu::Handle]) -> Result<(), Error> {
        self.shared.bus.power_on();
        memory::clear(&self.memory)?;
        self.boot.load(&self.memory)?;
        for chip in &self.power_on.irqchips {
            self.vm.set_irqchip(chip).map_err(kvm("KVM_SET_IRQCHIP"))?;
        }
        for (handle, state) in vcpus.iter().zip(&self.power_on.vcpus) {
            let state = state.clone();
            // A thread that has ended closed the latch with its reason: the machine ends after all.
            if let Some(result) = handle.at(move |vcpu| state.restore(vcpu)) {
                result?;
            }
        }
        Ok(())
    }
}

fn irqchips(vm: &VmFd) -> Result<[kvm_irqchip; 3], Error> {
    let mut chips =
        [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC].map(|chip_id| kvm_irqchip {
            chip_id,
            ..Default::default()
        });
    for chip in &mut chips {
        vm.get_irqchip(chip).map_err(kvm("KVM_GET_IRQCHIP"))?;
    }
    Ok(chips)
}

/// A device and its name for the log.
type NamedDevice = (String, Box<dyn Device>);

/// The device models with their names, in the order of their windows: drives, interfaces, vsock, rng, balloon.
fn device_models(
    memory: &Memory,
    drives: Vec<Drive>,
    interfaces: Vec<Interface>,
    vsock: Option<config::Vsock>,
    entropy: Option<RateLimiter>,
    balloon: Option<mandoline_api::monitor::Balloon>,
) -> Result<Vec<NamedDevice>, Error> {
    let mut models: Vec<NamedDevice> = Vec::new();
    for drive in drives {
        let model = Blk::new(drive.file, &drive.options)?;
        models.push((format!("blk {}", drive.options.id), Box::new(model)));
    }
    for interface in interfaces {
        let (tap, options) = (interface.tap, &interface.options);
        let model: Box<dyn Device> = match interface.vhost {
            Some(vhost) => Box::new(VhostNet::new(tap, vhost, memory, options)?),
            None => Box::new(Net::new(tap, options).map_err(host("timerfd"))?),
        };
        models.push((format!("net {}", interface.id), model));
    }
    if let Some(vsock) = vsock {
        let muxer = Muxer::new(vsock.guest_cid, vsock.listener, vsock.outward).map_err(host("vsock"))?;
        models.push(("vsock".to_owned(), Box::new(Vsock::new(vsock.guest_cid, muxer))));
    }
    if let Some(limit) = entropy {
        let rng = Rng::new(&limit).map_err(host("rng's rate limiter"))?;
        models.push(("rng".to_owned(), Box::new(rng)));
    }
    if let Some(options) = balloon {
        let bytes = memory.iter().map(GuestMemoryRegion::len).sum();
        let model = Balloon::new(&options, bytes).map_err(host("balloon"))?;
        models.push(("balloon".to_owned(), Box::new(model)));
    }
    Ok(models)
}

/// Persistent memory, mapped into the guest: the models with their names, and the windows that it may not write.
fn pmem_models(
    kvm_fd: &Kvm,
    vm: &VmFd,
    memory: &Memory,
    devices: Vec<config::Pmem>,
) -> Result<(Vec<NamedDevice>, Vec<Range<u64>>), Error> {
    let (mut models, mut read_only): (Vec<NamedDevice>, _) = (Vec::new(), Vec::new());
    if devices.is_empty() {
        return Ok((models, read_only));
    }
    let cpuid = kvm_fd
        .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
        .map_err(kvm("KVM_GET_SUPPORTED_CPUID"))?;
    let mut space = Space::above(memory, &cpuid);
    for device in devices {
        if device.read_only && !kvm_fd.check_extension(Cap::ReadonlyMem) {
            return Err(Error::Lacks(Cap::ReadonlyMem));
        }
        let window = space.map(vm, &device.id, &device.file, device.read_only)?;
        if device.read_only {
            read_only.push(window.clone());
        }
        let model = Pmem::new(device.file, window, device.read_only, device.limit.as_ref());
        let model = model.map_err(host("pmem's rate limiter"))?;
        models.push((format!("pmem {}", device.id), Box::new(model)));
    }
    Ok((models, read_only))
}

fn interrupt_line(vm: &VmFd, gsi: u32) -> Result<EventFd, Error> {
    let line = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(host("eventfd"))?;
    vm.register_irqfd(&line, gsi).map_err(kvm("KVM_IRQFD"))?;
    Ok(line)
}

fn create_vcpus(
    kvm_fd: &Kvm,
    vm: &VmFd,
    count: u8,
    entry: Entry,
    hardware: Hardware,
) -> Result<Vec<VcpuFd>, Error> {
    let supported = kvm_fd
        .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
        .map_err(kvm("KVM_GET_SUPPORTED_CPUID"))?;
    let tsc_deadline = kvm_fd.check_extension(Cap::TscDeadlineTimer);
    let mut vcpus = Vec::with_capacity(usize::from(count));
    for cpu in 0..count {
        let vcpu = vm.create_vcpu(u64::from(cpu)).map_err(kvm("KVM_CREATE_VCPU"))?;
        // Not known on every host: then the guest asks kvm-clock.
        let tsc_khz = vcpu.get_tsc_khz().unwrap_or(0);
        let shaped = cpuid::shape(&supported, cpu, count, tsc_khz, tsc_deadline)?;
        vcpu.set_cpuid2(&shaped).map_err(kvm("KVM_SET_CPUID2"))?;
        if let Some(features) = cpuid::xsave_features(&shaped) {
            regs::set_xcr0(&vcpu, cpu, features)?;
        }
        regs::set(&vcpu, cpu, entry, hardware)?;
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}
