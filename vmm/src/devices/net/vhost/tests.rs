//! Tests of the state machine on a backend that keeps vhost-net's rules, and, where there is a `/dev/vhost-net`, of
//! the whole on a tap.

use std::sync::Arc;

use vhost::{VhostUserDirtyLogRegion, VhostUserMemoryRegionBase, VhostUserMemoryRegionInfo};

use super::*;
use crate::devices::net::testing::{Wire, frame, until, wire};
use crate::devices::virtio::FEATURE_EVENT_INDEX;
use crate::devices::virtio::Slot;
use crate::devices::virtio::interrupt::USED_BUFFERS;
use crate::devices::virtio::mmio::Transport;
use crate::devices::virtio::persist::{SavedDevice, SavedQueue, SavedTransport};
use crate::devices::virtio::testing::{Ring, rings, rings_in};

const MERGE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;

/// What the backend was told, and what it answers.
#[derive(Default)]
struct Told {
    served: u64,
    features: u64,
    /// Of each queue: entries, where it starts, its call and error descriptors, and whether it is served.
    queues: [(u16, u16, i32, i32, bool); 2],
    /// The request that fails.
    fails: Option<&'static str>,
}

/// It refuses what the kernel refuses (drivers/vhost): a ring that is changed while it is served, a backend for a
/// ring that was never set up.
#[derive(Clone)]
struct Rules(Arc<std::sync::Mutex<Told>>);

impl Rules {
    fn new(served: u64) -> Self {
        let state = Told {
            served,
            ..Told::default()
        };
        Self(Arc::new(std::sync::Mutex::new(state)))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, Told> {
        self.0.lock().unwrap()
    }

    fn ring(
        &self,
        what: &'static str,
        queue: usize,
        change: impl FnOnce(&mut (u16, u16, i32, i32, bool)),
    ) -> vhost::Result<()> {
        let mut state = self.state();
        let error = |number| Err(vhost::Error::IoctlError(io::Error::from_raw_os_error(number)));
        if state.fails == Some(what) {
            return error(libc::EFAULT);
        }
        if state.queues[queue].4 {
            return error(libc::EBUSY);
        }
        change(&mut state.queues[queue]);
        Ok(())
    }

    fn served(&self) -> [bool; 2] {
        self.state().queues.map(|queue| queue.4)
    }
}

impl vhost::VhostBackend for Rules {
    fn get_features(&self) -> vhost::Result<u64> {
        Ok(self.state().served)
    }
    fn set_features(&self, features: u64) -> vhost::Result<()> {
        let mut state = self.state();
        assert_eq!(features & !state.served, 0, "a feature that it does not have");
        state.features = features;
        Ok(())
    }
    fn set_owner(&self) -> vhost::Result<()> {
        Ok(())
    }
    fn reset_owner(&self) -> vhost::Result<()> {
        Ok(())
    }
    fn set_mem_table(
        &self,
        _: &[VhostUserMemoryRegionInfo],
    ) -> vhost::Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        Ok(None)
    }
    fn set_log_base(&self, _: u64, _: Option<VhostUserDirtyLogRegion>) -> vhost::Result<()> {
        Ok(())
    }
    fn set_log_fd(&self, _: i32) -> vhost::Result<()> {
        Ok(())
    }
    fn set_vring_num(&self, queue: usize, num: u16) -> vhost::Result<()> {
        self.ring("num", queue, |ring| ring.0 = num)
    }
    fn set_vring_addr(&self, queue: usize, _: &VringConfigData) -> vhost::Result<()> {
        self.ring("addr", queue, |_| ())
    }
    fn set_vring_base(&self, queue: usize, base: u16) -> vhost::Result<()> {
        self.ring("base", queue, |ring| ring.1 = base)
    }
    fn get_vring_base(&self, queue: usize) -> vhost::Result<u32> {
        Ok(u32::from(self.state().queues[queue].1))
    }
    fn set_vring_call(&self, queue: usize, call: &EventFd) -> vhost::Result<()> {
        use std::os::fd::AsRawFd;
        let call = call.as_raw_fd();
        self.ring("call", queue, |ring| ring.2 = call)
    }
    fn set_vring_kick(&self, queue: usize, _: &EventFd) -> vhost::Result<()> {
        self.ring("kick", queue, |_| ())
    }
    fn set_vring_err(&self, queue: usize, error: &EventFd) -> vhost::Result<()> {
        use std::os::fd::AsRawFd;
        let error = error.as_raw_fd();
        self.ring("err", queue, |ring| ring.3 = error)
    }
}

impl vhost::net::VhostNet for Rules {
    fn set_backend(&self, queue: usize, tap: Option<&File>) -> vhost::Result<()> {
        let mut state = self.state();
        let fails = state.fails == Some("backend") && queue == 1;
        if tap.is_some() && (fails || state.queues[queue].0 == 0) {
            return Err(vhost::Error::IoctlError(io::Error::from_raw_os_error(
                libc::EFAULT,
            )));
        }
        state.queues[queue].4 = tap.is_some();
        Ok(())
    }
}

fn device(rules: &Rules) -> Result<VhostNet<Rules>, Error> {
    let tap = tempfile::tempfile().unwrap();
    VhostNet::with_backend(tap, rules.clone(), &Options::default())
}

const ALL: u64 = COMMON_FEATURES | MERGE;

#[test]
fn only_what_the_kernel_serves_is_offered() {
    let offered = device(&Rules::new(ALL)).unwrap().features();
    assert_eq!(offered & RING_FEATURES, ALL);
    let fewer = device(&Rules::new(ALL & !MERGE & !FEATURE_EVENT_INDEX))
        .unwrap()
        .features();
    assert_eq!(fewer, offered & !MERGE & !FEATURE_EVENT_INDEX);
    let message = device(&Rules::new(ALL & !FEATURE_VERSION_1))
        .err()
        .unwrap()
        .to_string();
    assert!(message.contains("VIRTIO_F_VERSION_1"), "{message}");
}

#[test]
fn a_start_gives_both_queues_away_and_a_reset_takes_them_back() {
    let rules = Rules::new(ALL);
    let mut device = device(&rules).unwrap();
    let (_, activation, _) = rings(2, 64, MERGE);
    let interrupt = activation.interrupt.clone();
    let line = std::os::fd::AsRawFd::as_raw_fd(interrupt.line());
    assert_eq!(interrupt.status(), 0);
    device.activate(activation).unwrap();
    assert_eq!(rules.state().features, FEATURE_VERSION_1 | MERGE);
    for (index, error) in device.errors.iter().enumerate() {
        let error = std::os::fd::AsRawFd::as_raw_fd(error);
        assert_eq!(rules.state().queues[index], (64, 0, line, error, true));
    }
    // The driver acknowledges, and what the kernel raises next is seen all the same.
    interrupt.acknowledge(USED_BUFFERS);
    assert_eq!(interrupt.status(), USED_BUFFERS);
    device.reset();
    assert_eq!(rules.served(), [false, false]);
    interrupt.reset();
    assert_eq!(interrupt.status(), 0);
    let (_, again, _) = rings(2, 8, 0);
    device.activate(again).unwrap();
    assert_eq!(rules.state().features, FEATURE_VERSION_1);
    assert_eq!(rules.served(), [true, true]);
}

#[test]
fn a_pause_takes_the_queues_back_and_says_how_far_they_are() {
    let rules = Rules::new(ALL);
    let mut device = device(&rules).unwrap();
    let (drivers, activation, _) = rings(2, 64, 0);
    device.activate(activation).unwrap();
    // The kernel took 7 and 65,535 chains, and gave 5 and 65,535 back.
    for (queue, (taken, given)) in [(7, 5), (65_535, 65_535)].into_iter().enumerate() {
        rules.state().queues[queue].1 = taken;
        drivers[queue].set_used_index(given);
    }
    device.pause().unwrap();
    assert_eq!(rules.served(), [false, false]);
    let progress = |next_available, next_used| {
        Some(Progress {
            next_available,
            next_used,
            held: Vec::new(),
        })
    };
    assert_eq!(device.progress(), [progress(7, 5), progress(65_535, 65_535)]);
    device.pause().unwrap();
    device.resume().unwrap();
    assert_eq!(rules.served(), [true, true]);
}

#[test]
fn a_start_that_fails_half_way_leaves_nothing_served() {
    for fails in ["num", "addr", "base", "call", "err", "kick", "backend"] {
        let rules = Rules::new(ALL);
        rules.state().fails = Some(fails);
        let mut device = device(&rules).unwrap();
        let (_, activation, _) = rings(2, 8, 0);
        assert!(device.activate(activation).is_err(), "{fails}");
        device.reset();
        assert_eq!(rules.served(), [false, false], "{fails}");
        rules.state().fails = None;
        let (_, activation, _) = rings(2, 8, 0);
        device.activate(activation).unwrap();
    }
}

#[test]
fn a_fault_is_the_queues_and_a_stale_one_is_nobodys() {
    let rules = Rules::new(ALL);
    let mut device = device(&rules).unwrap();
    let (_, activation, _) = rings(2, 8, 0);
    device.activate(activation).unwrap();
    device.handle(Event::Host(1, EventSet::IN)).unwrap();
    device.errors[1].write(1).unwrap();
    let error = device.handle(Event::Host(1, EventSet::IN)).unwrap_err();
    assert!(error.to_string().starts_with("queue 1:"), "{error}");
    assert_eq!(device.metrics()["vhost_faults"], 1);
    device.errors[0].write(1).unwrap();
    device.reset();
    let (_, activation, _) = rings(2, 8, 0);
    device.activate(activation).unwrap();
    device.handle(Event::Host(0, EventSet::IN)).unwrap();
}

/// Half of a snapshot's way: a device put back into a VM that stands still is served from where it stood, once the VM
/// goes on.
#[test]
fn a_device_put_back_into_a_paused_vm_waits() {
    let rules = Rules::new(ALL);
    let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let slot = Slot::new("net eth0".into(), Box::new(device(&rules).unwrap()), event()).unwrap();
    let (_, activation, _) = rings(2, 8, 0);
    let transport = Transport::new(slot.clone(), activation.memory);
    let queue = |base| SavedQueue {
        size: 8,
        descriptors: base,
        driver: base + 0x4000,
        device: base + 0x6000,
        ready: true,
    };
    let progress = Progress {
        next_available: 3,
        ..Progress::default()
    };
    let saved = SavedDevice {
        name: slot.name.clone(),
        kind: DeviceType::Net as u32,
        transport: SavedTransport {
            status: 15,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: FEATURE_VERSION_1,
            queue_select: 0,
            interrupt_status: 0,
            needs_reset: false,
            config_generation: 0,
            queues: vec![queue(0x1_0000), queue(0x2_0000)],
        },
        queues: vec![Some(progress.clone()), Some(progress)],
        model: persist::save(&State {
            config: [7; 12],
            rx_rate_limiter: SavedRateLimiter::default(),
            tx_rate_limiter: SavedRateLimiter::default(),
        }),
    };
    slot.pause();
    transport.restore(&saved).unwrap();
    assert_eq!(rules.served(), [false, false]);
    assert_eq!(rules.state().queues.map(|queue| queue.1), [3, 3]);
    slot.resume();
    assert_eq!(rules.served(), [true, true]);
    assert_eq!(transport.save().model, saved.model);
}

/// The kernel's half, on a tap, if this host has `/dev/vhost-net` and lets us make a network namespace.
#[test]
fn frames_go_both_ways_through_the_kernel() {
    let vhost = File::options().read(true).write(true).open("/dev/vhost-net");
    let vhost = match vhost {
        Ok(vhost) => vhost,
        Err(error) => return eprintln!("skipped: /dev/vhost-net: {error}"),
    };
    let Some(Wire { tap, packets }) = wire() else {
        return;
    };
    const AT: u64 = 0x40_0000;
    let (mut drivers, activation, kicks) = rings(2, 64, MERGE);
    let interrupt = activation.interrupt.clone();
    let memory = activation.memory.clone();
    let mut device = VhostNet::new(tap, vhost, &memory, &Options::default()).unwrap();
    device.activate(activation).unwrap();
    let [rx, tx] = &mut drivers[..] else { return };
    let there_and_back = |rx: &mut Ring, tx: &mut Ring, length| {
        let sent = frame(length);
        tx.put(AT, &sent);
        tx.offer(&[(AT, sent.len() as u32, false)]);
        kicks[1].write(1).unwrap();
        assert_eq!(packets.receive(), sent[12..]);
        rx.offer(&[(AT + 0x1_0000, 2048, true)]);
        kicks[0].write(1).unwrap();
        packets.send(&sent[12..]);
        let (_, bytes) = until(|| {
            let _ = interrupt.line().read();
            rx.used()
        });
        assert_eq!(bytes as usize, sent.len());
        assert_eq!(rx.get(AT + 0x1_0000 + 12, length), sent[12..]);
        until(|| tx.used());
    };
    there_and_back(rx, tx, 100);
    // A pause says how far it got, and nothing moves until it ends.
    device.pause().unwrap();
    let one = Some(Progress {
        next_available: 1,
        next_used: 1,
        held: Vec::new(),
    });
    assert_eq!(device.progress(), [one.clone(), one]);
    device.resume().unwrap();
    there_and_back(rx, tx, 200);
    // A chain outside memory is the queue's fault, and a reset is the way out.
    tx.offer(&[(0xffff_0000_0000, 100, false)]);
    kicks[1].write(1).unwrap();
    until(|| device.handle(Event::Host(1, EventSet::IN)).err());
    device.reset();
    let (mut drivers, activation, again) = rings_in(memory, 2, 64, 0);
    device.activate(activation).unwrap();
    let sent = frame(300);
    drivers[1].put(AT, &sent);
    drivers[1].offer(&[(AT, sent.len() as u32, false)]);
    again[1].write(1).unwrap();
    assert_eq!(packets.receive(), sent[12..]);
}
