//! Tests of the transport's state machine: the driver's way, wrong ways, and any way at all.

use proptest::prelude::*;
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::devices::virtio::persist::Saved;
use crate::devices::virtio::{COMMON_FEATURES, Device, DeviceError, DeviceType, Event};

/// A device that only counts.
#[derive(Default)]
struct Probe {
    counts: Arc<Mutex<Counts>>,
}

#[derive(Default, Debug)]
struct Counts {
    activations: u32,
    resets: u32,
    sizes: Vec<Option<usize>>,
    progress: Vec<Option<Progress>>,
    features: u64,
}

impl Device for Probe {
    fn kind(&self) -> DeviceType {
        DeviceType::Block
    }
    fn queue_sizes(&self) -> &'static [u16] {
        &[16, 8]
    }
    fn features(&self) -> u64 {
        COMMON_FEATURES | 1
    }
    fn config(&self) -> &[u8] {
        &[1, 2, 3]
    }
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let mut counts = self.counts.lock().unwrap();
        counts.activations += 1;
        counts.features = activation.features;
        counts.progress = activation
            .queues
            .iter()
            .map(|queue| queue.as_ref().map(WorkQueue::progress))
            .collect();
        counts.sizes = activation
            .queues
            .iter()
            .map(|queue| queue.as_ref().map(WorkQueue::round))
            .collect();
        Ok(())
    }
    fn reset(&mut self) {
        self.counts.lock().unwrap().resets += 1;
    }
    fn handle(&mut self, _: Event) -> Result<(), DeviceError> {
        Ok(())
    }
    fn progress(&self) -> Vec<Option<Progress>> {
        let queue = |next_available| Progress {
            next_available,
            next_used: 3,
            held: vec![1],
        };
        vec![Some(queue(5)), None]
    }
    fn save(&self) -> Saved {
        Saved::new(1, &7)
    }
    fn restore(&mut self, saved: &Saved) -> Result<(), RestoreError> {
        assert_eq!(saved.read::<u32>("probe", 1)?, 7);
        Ok(())
    }
    fn metrics(&self) -> serde_json::Value {
        serde_json::Value::Null
    }
}

fn transport() -> (Transport, Arc<Mutex<Counts>>) {
    let probe = Probe::default();
    let counts = probe.counts.clone();
    let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let slot = Slot::new("probe".into(), Box::new(probe), line).unwrap();
    (
        Transport::new(slot, crate::memory::create(16 << 20).unwrap()),
        counts,
    )
}

fn write(transport: &Transport, offset: u64, value: u32) {
    transport.write(offset, &value.to_le_bytes());
}

fn read(transport: &Transport, offset: u64) -> u32 {
    let mut bytes = [0; 4];
    transport.read(offset, &mut bytes);
    u32::from_le_bytes(bytes)
}

fn negotiate(transport: &Transport, features: u64) {
    write(transport, register::STATUS, 1);
    write(transport, register::STATUS, 3);
    for select in 0..2 {
        write(transport, register::DRIVER_FEATURES_SELECT, select);
        write(
            transport,
            register::DRIVER_FEATURES,
            (features >> (32 * select)) as u32,
        );
    }
    write(transport, register::STATUS, 11);
}

fn queue(transport: &Transport, index: u32, size: u32, base: u32) {
    write(transport, register::QUEUE_SELECT, index);
    write(transport, register::QUEUE_SIZE, size);
    write(transport, register::QUEUE_DESCRIPTORS, base);
    write(transport, register::QUEUE_DRIVER, base + 0x1000);
    write(transport, register::QUEUE_DEVICE, base + 0x2000);
    write(transport, register::QUEUE_READY, 1);
}

#[test]
fn a_driver_gets_what_it_asked_for() {
    let (transport, counts) = transport();
    assert_eq!(read(&transport, register::MAGIC), 0x7472_6976);
    assert_eq!(read(&transport, register::VERSION), 2);
    assert_eq!(read(&transport, register::DEVICE), 2);
    negotiate(&transport, FEATURE_VERSION_1 | 1);
    assert_eq!(read(&transport, register::STATUS), 11);
    queue(&transport, 0, 8, 0x10_0000);
    assert_eq!(read(&transport, register::QUEUE_READY), 1);
    write(&transport, register::STATUS, 15);
    let counts = counts.lock().unwrap();
    assert_eq!((counts.activations, counts.features), (1, FEATURE_VERSION_1 | 1));
    assert_eq!(counts.sizes, [Some(8), None]);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    for features in [FEATURE_VERSION_1 | 2, 1] {
        let (transport, _) = transport();
        negotiate(&transport, features);
        assert_eq!(read(&transport, register::STATUS), 3, "{features:#x}");
    }
}

#[test]
fn nothing_changes_after_activation() {
    let (transport, counts) = transport();
    negotiate(&transport, FEATURE_VERSION_1);
    queue(&transport, 0, 8, 0x10_0000);
    write(&transport, register::STATUS, 15);
    queue(&transport, 1, 8, 0x20_0000);
    write(&transport, register::QUEUE_SELECT, 0);
    write(&transport, register::QUEUE_READY, 0);
    assert_eq!(read(&transport, register::QUEUE_READY), 1);
    write(&transport, register::DRIVER_FEATURES, 1);
    write(&transport, register::STATUS, 15);
    let registers = transport.registers();
    assert_eq!(registers.queues[1], SavedQueue::default());
    assert_eq!(registers.driver_features, FEATURE_VERSION_1);
    assert_eq!(counts.lock().unwrap().activations, 1);
}

#[test]
fn a_bad_queue_breaks_the_device_and_a_reset_mends_it() {
    for (size, base) in [
        (3, 0x10_0000),
        (32, 0x10_0000),
        (0, 0x10_0000),
        (0x1_0008, 0x10_0000),
        (8, 0xffff_0000),
        (8, 8),
    ] {
        let (transport, counts) = transport();
        negotiate(&transport, FEATURE_VERSION_1);
        queue(&transport, 0, size, base);
        write(&transport, register::STATUS, 15);
        assert_eq!(
            read(&transport, register::STATUS),
            15 | NEEDS_RESET,
            "size {size}, base {base:#x}"
        );
        assert_eq!(read(&transport, register::INTERRUPT_STATUS), 2);
        assert_eq!(counts.lock().unwrap().activations, 0);
        write(&transport, register::STATUS, 0);
        assert_eq!(read(&transport, register::STATUS), 0);
        assert_eq!(read(&transport, register::INTERRUPT_STATUS), 0);
        negotiate(&transport, FEATURE_VERSION_1);
        queue(&transport, 0, 8, 0x10_0000);
        write(&transport, register::STATUS, 15);
        assert_eq!(counts.lock().unwrap().activations, 1);
    }
}

#[test]
fn configuration_reads_end_at_its_end() {
    let (transport, _) = transport();
    let mut bytes = [9; 8];
    transport.read(register::CONFIG + 1, &mut bytes);
    assert_eq!(bytes, [2, 3, 0, 0, 0, 0, 0, 0]);
    transport.read(0xfff, &mut bytes);
    assert_eq!(bytes, [0; 8]);
}

#[test]
fn a_saved_device_goes_on_where_it_stood() {
    let (before, _) = transport();
    negotiate(&before, FEATURE_VERSION_1 | 1);
    queue(&before, 0, 8, 0x10_0000);
    write(&before, register::STATUS, 15);
    before.slot.interrupt.config_changed();
    let saved = before.save();
    let text = serde_json::to_string(&saved).unwrap();
    let saved: SavedDevice = serde_json::from_str(&text).unwrap();

    let (after, counts) = transport();
    after.restore(&saved).unwrap();
    assert_eq!(read(&after, register::STATUS), 15);
    assert_eq!(read(&after, register::INTERRUPT_STATUS), 2);
    assert_eq!(read(&after, register::CONFIG_GENERATION), 1);
    let counts = counts.lock().unwrap();
    assert_eq!((counts.activations, counts.features), (1, FEATURE_VERSION_1 | 1));
    assert_eq!(counts.sizes, [Some(8), None]);
    assert_eq!(
        counts.progress,
        [before.slot.device().progress()[0].clone(), None]
    );
}

#[test]
fn what_no_device_could_have_saved_is_refused() {
    let (before, _) = transport();
    negotiate(&before, FEATURE_VERSION_1);
    queue(&before, 0, 8, 0x10_0000);
    write(&before, register::STATUS, 15);
    let good = before.save();
    let spoil: [fn(&mut SavedDevice); 7] = [
        |saved| saved.name = "other".into(),
        |saved| saved.kind = 1,
        |saved| saved.transport.status = 4,
        |saved| saved.transport.driver_features |= 1 << 50,
        |saved| saved.transport.queues.clear(),
        |saved| saved.queues[0].as_mut().unwrap().held = vec![8],
        |saved| saved.model.version = 9,
    ];
    for spoil in spoil {
        let mut saved = good.clone();
        spoil(&mut saved);
        let (after, counts) = transport();
        let error = after.restore(&saved).unwrap_err().to_string();
        assert!(!error.is_empty());
        assert_eq!(counts.lock().unwrap().activations, 0, "{error}");
    }
    // Rings outside memory: the device comes back broken, and its driver can reset it.
    let mut saved = good;
    saved.transport.queues[0].driver = 1 << 40;
    let (after, counts) = transport();
    after.restore(&saved).unwrap();
    assert_eq!(read(&after, register::STATUS), 15 | NEEDS_RESET);
    assert_eq!(counts.lock().unwrap().activations, 0);
}

proptest! {
    /// Any accesses in any order: never a panic, activation only from the state before it, and an active
    /// device only with queues inside memory.
    #[test]
    fn any_order_of_accesses(
        accesses in prop::collection::vec(
            (
                prop::sample::select(vec![
                    0x10u64, 0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x70, 0x70,
                    0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4, 0xfc, 0x100, 0x1000 - 4,
                ]),
                prop_oneof![
                    prop::sample::select(vec![0u32, 1, 2, 3, 8, 11, 15, 16, 64, 128, 0x10_0000, 0xffff_fff0]),
                    any::<u32>(),
                ],
                any::<bool>(),
            ),
            0..200,
        )
    ) {
        let (transport, counts) = transport();
        let mut activations = 0;
        for (offset, value, is_read) in accesses {
            let before = read(&transport, register::STATUS);
            if is_read {
                read(&transport, offset);
            } else {
                write(&transport, offset, value);
            }
            let now = counts.lock().unwrap().activations;
            if now != activations {
                prop_assert_eq!(now, activations + 1);
                prop_assert_eq!((before & !NEEDS_RESET, offset, value), (11, register::STATUS, 15));
                activations = now;
            }
            prop_assert!(transport.registers().queues.len() == 2);
        }
    }
}
