//! Tests of the entropy device.

use mandoline_api::monitor::TokenBucket;
use vmm_sys_util::epoll::EventSet;

use super::*;
use crate::devices::virtio::testing::{Ring, rings};

const DATA: u64 = 0x20_0000;

fn device(limit: &api::RateLimiter) -> (Rng, Ring) {
    let mut rng = Rng::new(limit).unwrap();
    let (mut rings, activation, _) = rings(1, 16, rng.features());
    rng.activate(activation).unwrap();
    (rng, rings.remove(0))
}

fn an_hour(size: u64) -> TokenBucket {
    TokenBucket {
        size,
        one_time_burst: None,
        refill_time: 3_600_000,
    }
}

#[test]
fn a_request_is_filled_up_to_a_page() {
    let (mut rng, mut ring) = device(&api::RateLimiter::default());
    for (wanted, given) in [(64, 64), (3 * 4096, 4096)] {
        ring.put(DATA, &[0; 3 * 4096]);
        let head = ring.offer(&[(DATA, wanted, true)]);
        rng.handle(Event::Kick(0)).unwrap();
        assert_eq!(ring.used(), Some((head, given)));
        let bytes = ring.get(DATA, wanted as usize);
        // 64 zero bytes from a random generator: once in 2^512.
        assert!(bytes[..64].iter().any(|byte| *byte != 0));
        assert!(bytes[given as usize..].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn what_the_driver_would_have_read_is_refused() {
    let (mut rng, mut ring) = device(&api::RateLimiter::default());
    ring.offer(&[(DATA, 64, false)]);
    assert!(matches!(
        rng.handle(Event::Kick(0)),
        Err(DeviceError::Chain { .. })
    ));
}

#[test]
fn the_limit_holds_until_it_is_changed() {
    let limit = api::RateLimiter {
        bandwidth: Some(an_hour(100)),
        ops: None,
    };
    let (mut rng, mut ring) = device(&limit);
    ring.offer(&[(DATA, 64, true)]);
    let waiting = ring.offer(&[(DATA, 64, true)]);
    rng.handle(Event::Kick(0)).unwrap();
    assert!(ring.used().is_some());
    assert_eq!(ring.used(), None);
    assert_eq!(rng.metrics()["throttled"], 1);
    assert!(rng.progress()[0].as_ref().unwrap().held.is_empty());
    // A kick is no way around it, nor is a saved state.
    rng.handle(Event::Kick(0)).unwrap();
    assert_eq!(ring.used(), None);
    let (mut other, mut other_ring) = device(&api::RateLimiter::default());
    other.restore(&rng.save()).unwrap();
    other_ring.offer(&[(DATA, 64, true)]);
    other.handle(Event::Kick(0)).unwrap();
    assert_eq!(other_ring.used(), None);

    rng.set_rate_limiter(&api::RateLimiter {
        bandwidth: Some(an_hour(1000)),
        ops: None,
    });
    rng.handle(Event::Host(LIMITER, EventSet::IN)).unwrap();
    assert_eq!(ring.used(), Some((waiting, 64)));
}
