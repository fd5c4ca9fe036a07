//! The VM generation id: 128 random bits in guest memory that change when the VM is no longer the one that it was
//! (a clone, a restored snapshot), and an interrupt that says so. The guest's kernel then reseeds its random
//! numbers. A reboot keeps the id: it is the same VM.

use std::sync::{Mutex, MutexGuard};

use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::boot::layout::GENERATION_ID;
use crate::memory::Memory;

/// An id as the guest sees it.
pub type Id = [u8; 16];

/// The VM generation id could not be made or told.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host gave no random numbers, or no event descriptor.
    #[error("VM generation id: {0}")]
    Host(#[from] std::io::Error),
    /// It could not be written to guest memory.
    #[error("VM generation id to guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// The device.
pub struct GenerationId {
    id: Mutex<Id>,
    memory: Memory,
    line: EventFd,
}

impl GenerationId {
    /// A first id.
    pub fn new(memory: Memory) -> Result<Self, Error> {
        Ok(Self {
            id: Mutex::new(random()?),
            memory,
            line: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        })
    }

    /// Its interrupt line.
    pub fn line(&self) -> &EventFd {
        &self.line
    }

    /// The id, for whoever wants to know whether it has changed.
    pub fn get(&self) -> Id {
        *self.lock()
    }

    /// Puts the id where the guest looks for it.
    pub fn write(&self) -> Result<(), Error> {
        let id = self.lock();
        Ok(self.memory.write_slice(&*id, GuestAddress(GENERATION_ID))?)
    }

    /// A new id, and the guest is told. To be called while the vCPUs stand still, so that none runs on with the
    /// old one.
    pub fn renew(&self) -> Result<(), Error> {
        *self.lock() = random()?;
        self.write()?;
        Ok(self.line.write(1)?)
    }

    fn lock(&self) -> MutexGuard<'_, Id> {
        self.id.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

fn random() -> Result<Id, Error> {
    let mut id = Id::default();
    // 16 bytes come whole (getrandom(2): up to 256 are not interrupted).
    getrandom(&mut id, GetRandomFlags::empty()).map_err(std::io::Error::from)?;
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(memory: &Memory) -> Id {
        memory.read_obj(GuestAddress(GENERATION_ID)).unwrap()
    }

    #[test]
    fn a_reboot_keeps_the_id_and_a_clone_gets_another() {
        let memory = crate::memory::create(16 << 20).unwrap();
        let generation = GenerationId::new(memory.clone()).unwrap();
        generation.write().unwrap();
        let first = seen(&memory);
        assert_ne!(first, Id::default());
        memory.write_slice(&[0; 16], GuestAddress(GENERATION_ID)).unwrap();
        generation.write().unwrap();
        assert_eq!(seen(&memory), first);
        // Nothing has been announced so far.
        assert!(generation.line().read().is_err());
        generation.renew().unwrap();
        assert_ne!(seen(&memory), first);
        assert_eq!(seen(&memory), generation.get());
        assert_eq!(generation.line().read().unwrap(), 1);
    }
}
