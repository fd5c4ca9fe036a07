//! What all virtio devices share (virtio 1.2): the transport, interrupts, queues and the fate of a device
//! whose driver misbehaves.
//!
//! ```text
//!  vCPU threads                                event loop
//!  register access -> Transport --activate-->  Device (behind a lock) <-- kicks (ioeventfd), host descriptors
//!                        ^   \---reset------->     |
//!                        +-- Interrupt (atomics) <-+--> irqfd
//! ```
//!
//! A device's work runs in the event loop only. When it finds something that no driver may do, it returns an
//! error, and its [`Slot`] breaks it: queues dropped, `DEVICE_NEEDS_RESET` shown, one log line. The process and
//! the other devices go on; a driver that resets the device gets a fresh one.

pub mod chain;
pub mod interrupt;
pub mod mmio;
pub mod persist;
pub mod queue;
pub mod rate_limiter;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod testing;

use std::any::Any;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use crate::devices::virtio::interrupt::Interrupt;
use crate::devices::virtio::persist::{Progress, RestoreError, Saved};
use crate::devices::virtio::queue::WorkQueue;
use crate::log::RateLimit;
use crate::memory::Memory;

pub use crate::devices::virtio::chain::ChainError;

/// `VIRTIO_F_VERSION_1`.
pub const FEATURE_VERSION_1: u64 = 1 << 32;
/// `VIRTIO_F_EVENT_IDX`.
pub const FEATURE_EVENT_INDEX: u64 = 1 << 29;
/// `VIRTIO_F_INDIRECT_DESC`.
pub const FEATURE_INDIRECT: u64 = 1 << 28;
/// What every device of ours offers.
pub const COMMON_FEATURES: u64 = FEATURE_VERSION_1 | FEATURE_EVENT_INDEX | FEATURE_INDIRECT;

/// Device types (virtio 1.2, section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum DeviceType {
    /// Network.
    Net = 1,
    /// Block.
    Block = 2,
    /// Entropy.
    Rng = 4,
    /// Memory balloon.
    Balloon = 5,
    /// Stream sockets.
    Vsock = 19,
    /// Persistent memory.
    Pmem = 27,
}

/// What a driver did that none may do, or the host refused: the device stops until it is reset.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A malformed chain.
    #[error("queue {queue}: {source}")]
    Chain {
        /// Which queue.
        queue: usize,
        /// What is wrong with it.
        source: ChainError,
    },
    /// A ring is broken: its index jumps, or it lies outside memory.
    #[error("queue {queue}: {source}")]
    Ring {
        /// Which queue.
        queue: usize,
        /// What is wrong with it.
        source: virtio_queue::Error,
    },
    /// The host's kernel, which serves the queue, found its ring or a chain wrong.
    #[error("queue {queue}: vhost found its ring or a chain malformed")]
    Vhost {
        /// Which queue.
        queue: usize,
    },
    /// The host failed the device.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the host said.
        source: std::io::Error,
    },
}

/// What a device gets when its driver is ready.
pub struct Activation {
    /// Guest memory.
    pub memory: Memory,
    /// The queues, checked; one for each of [`Device::queue_sizes`], `None` where the driver set none up.
    pub queues: Vec<Option<WorkQueue>>,
    /// The features that both sides agreed on.
    pub features: u64,
    /// How to interrupt the driver.
    pub interrupt: Arc<Interrupt>,
    /// The queues' kicks, for a device whose queues somebody else serves (vhost).
    pub kicks: Vec<Arc<EventFd>>,
}

/// Something for a device to attend to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The driver made buffers of this queue available.
    Kick(usize),
    /// The host descriptor with this token is ready.
    Host(u32, EventSet),
}

/// A descriptor of the host that a device wants to hear of.
#[derive(Debug, Clone, Copy)]
pub struct Source {
    /// The descriptor; it must live as long as the device.
    pub fd: RawFd,
    /// Edge-triggered or not, readable, writable: see each device.
    pub events: EventSet,
    /// What [`Event::Host`] will carry; below [`KICK_TOKENS`].
    pub token: u32,
}

/// Tokens from here on are kicks.
pub const KICK_TOKENS: u32 = 1 << 16;

/// A device model. `Any`, so that a request of the control socket reaches the model that it is for
/// ([`Slot::with`]).
pub trait Device: Any + Send {
    /// Its type.
    fn kind(&self) -> DeviceType;
    /// The largest size of each queue; powers of two.
    fn queue_sizes(&self) -> &'static [u16];
    /// The features that it offers.
    fn features(&self) -> u64;
    /// Its configuration space.
    fn config(&self) -> &[u8];
    /// The driver writes `data` at `offset` of the configuration space, in its own thread. Most devices have nothing there
    /// that a driver may write.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    /// Whether the kernel takes this device's kicks (vhost): then the event loop leaves them alone. Fixed for life.
    fn kicks_taken(&self) -> bool {
        false
    }
    /// The driver is ready.
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError>;
    /// Back to the state before [`Device::activate`]; nothing of the driver's may be used afterwards.
    fn reset(&mut self);
    /// Descriptors of the host to attend to, fixed for life.
    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }
    /// Attends to an event; called before activation too (for host descriptors).
    fn handle(&mut self, event: Event) -> Result<(), DeviceError>;
    /// Ends what is under way: when it returns, the device touches guest memory no more and holds no chain that
    /// [`Device::progress`] does not name.
    fn pause(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }
    /// A descriptor beside [`Device::sources`] that becomes readable when something comes for the guest while the device is
    /// paused (vhost's tap).
    fn paused_source(&self) -> Option<RawFd> {
        None
    }
    /// Whether an event of this source is worth waking a parked guest.
    fn rouses(&self, _token: u32) -> bool {
        true
    }
    /// Goes on after [`Device::pause`]. All kicks and sources are attended to afterwards in any case.
    fn resume(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }
    /// Where the (paused) device stands in each of its queues; empty if it is not active.
    fn progress(&self) -> Vec<Option<Progress>>;
    /// What the (paused) device keeps beside its queues, to be saved.
    fn save(&self) -> Saved;
    /// Takes back what [`Device::save`] gave, before it is activated with its queues as they were.
    fn restore(&mut self, saved: &Saved) -> Result<(), RestoreError>;
    /// What it counted, by names that stay.
    fn metrics(&self) -> serde_json::Value;
}

/// A device in its place: what transport and event loop share of it.
pub struct Slot {
    /// For the log: `blk rootfs`, `net eth0`.
    pub name: String,
    kind: DeviceType,
    queue_sizes: &'static [u16],
    features: u64,
    device: Mutex<Box<dyn Device>>,
    /// One for each queue, written by KVM (ioeventfd) when the driver notifies.
    pub kicks: Vec<Arc<EventFd>>,
    /// The device's interrupt.
    pub interrupt: Arc<Interrupt>,
    /// While the VM is paused nothing is attended to.
    paused: AtomicBool,
    /// Events attended to.
    attended: AtomicU64,
    /// Signalled when an event comes for a guest that stands still.
    roused: OnceLock<Arc<EventFd>>,
    complaints: RateLimit,
}

impl Slot {
    /// Puts a device in place; `line` is the eventfd of its interrupt line.
    pub fn new(name: String, device: Box<dyn Device>, line: EventFd) -> std::io::Result<Arc<Self>> {
        let kicks = device
            .queue_sizes()
            .iter()
            .map(|_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map(Arc::new))
            .collect::<Result<_, _>>()?;
        Ok(Arc::new(Self {
            name,
            kind: device.kind(),
            queue_sizes: device.queue_sizes(),
            features: device.features(),
            device: Mutex::new(device),
            kicks,
            interrupt: Arc::new(Interrupt::new(line)),
            paused: AtomicBool::new(false),
            attended: AtomicU64::new(0),
            roused: OnceLock::new(),
            complaints: RateLimit::new(10, std::time::Duration::from_secs(10)),
        }))
    }

    /// Lets `work` at the model, if it is a `T`. In the event loop only, as everything that a device does.
    pub fn with<T: Device, R>(&self, work: impl FnOnce(&mut T) -> R) -> Option<R> {
        let mut device = self.device();
        let model: &mut dyn Any = &mut **device;
        model.downcast_mut::<T>().map(work)
    }

    /// From now on, `roused` is signalled when the host has something for a guest that stands still.
    pub fn rouse_by(&self, roused: Arc<EventFd>) {
        // Once a machine: the first stays.
        let _ = self.roused.set(roused);
    }

    fn rouse(&self, event: Event) {
        if let (Event::Host(token, events), Some(roused)) = (event, self.roused.get())
            // Room in a tap or socket is no news for a guest that sends nothing.
            && !events.difference(EventSet::OUT | EventSet::EDGE_TRIGGERED).is_empty()
            && self.device().rouses(token)
        {
            let _ = roused.write(1);
        }
    }

    /// How many events the device has attended to.
    pub fn attended(&self) -> u64 {
        self.attended.load(Ordering::Relaxed)
    }

    /// See [`Device::paused_source`].
    pub fn paused_source(&self) -> Option<RawFd> {
        self.device().paused_source()
    }

    /// What the device counted.
    pub fn metrics(&self) -> serde_json::Value {
        self.device().metrics()
    }

    /// Its type.
    pub fn kind(&self) -> DeviceType {
        self.kind
    }

    fn device(&self) -> MutexGuard<'_, Box<dyn Device>> {
        // A poisoned lock means that a device panicked; its state is reset with its driver like any other.
        self.device
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn activate(&self, activation: Activation) {
        let mut device = self.device();
        let mut result = device.activate(activation);
        // A device that comes back into a VM that stands still (a restore) stands still too.
        if result.is_ok() && self.paused.load(Ordering::Acquire) {
            result = device.pause();
        }
        if let Err(error) = result {
            self.break_device(&mut **device, &error);
        }
    }

    fn reset(&self) {
        self.device().reset();
        self.interrupt.reset();
    }

    /// Stops a device whose driver or host failed it; it stays so until the driver resets it.
    fn break_device(&self, device: &mut dyn Device, error: &DeviceError) {
        device.reset();
        self.interrupt.needs_reset();
        self.complain(&error.to_string());
    }

    fn complain(&self, error: &str) {
        if let Some(suppressed) = self.complaints.pass() {
            tracing::warn!(device = self.name, suppressed, "device needs a reset: {error}");
        }
    }

    fn attend(&self, event: Event) {
        if self.paused.load(Ordering::Acquire) {
            self.rouse(event);
            return;
        }
        self.attended.fetch_add(1, Ordering::Relaxed);
        let mut device = self.device();
        if let Err(error) = device.handle(event) {
            self.break_device(&mut **device, &error);
        }
    }

    /// Quiets the device; when this returns it touches guest memory no more.
    pub fn pause(&self) {
        self.paused.store(true, Ordering::Release);
        let mut device = self.device();
        if let Err(error) = device.pause() {
            self.break_device(&mut **device, &error);
        }
    }

    /// Goes on, and attends to all that came meanwhile.
    pub fn resume(&self) {
        let sources = {
            let mut device = self.device();
            if let Err(error) = device.resume() {
                self.break_device(&mut **device, &error);
            }
            device.sources()
        };
        self.paused.store(false, Ordering::Release);
        for source in sources {
            self.attend(Event::Host(source.token, source.events));
        }
        if !self.device().kicks_taken() {
            for queue in 0..self.kicks.len() {
                self.attend(Event::Kick(queue));
            }
        }
    }
}

/// A slot's subscription in the event loop.
pub struct Subscription(pub Arc<Slot>);

impl MutEventSubscriber for Subscription {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let taken = self.0.device().kicks_taken();
        for (queue, kick) in self.0.kicks.iter().enumerate().filter(|_| !taken) {
            let events = Events::with_data(kick.as_ref(), KICK_TOKENS + queue as u32, EventSet::IN);
            if let Err(error) = ops.add(events) {
                tracing::error!(device = self.0.name, %error, "kick cannot be watched");
            }
        }
        for source in self.0.device().sources() {
            let events = Events::with_data_raw(source.fd, source.token, source.events);
            if let Err(error) = ops.add(events) {
                tracing::error!(device = self.0.name, %error, "host descriptor cannot be watched");
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        match events.data().checked_sub(KICK_TOKENS) {
            Some(queue) => {
                // The count does not matter, only that it goes back to zero.
                if let Some(kick) = self.0.kicks.get(queue as usize) {
                    let _ = kick.read();
                }
                self.0.attend(Event::Kick(queue as usize));
            }
            None => self.0.attend(Event::Host(events.data(), events.event_set())),
        }
    }
}
