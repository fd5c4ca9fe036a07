//! Bringing a VM that runs to changed resources. What a running VM cannot have is named, and waits for its next start.
//!
//! | attribute | how |
//! | --- | --- |
//! | `cpu_*`, `mem_reserve` | its cgroup |
//! | `mem_limit` | a balloon, up to what it was booted with; its cgroup's bound follows what the guest gave |
//! | `disk_quota` | the file grows, the monitor sees it, the agent lets the file system fill it; it never shrinks |
//! | `base_rate`, `burst_rate` | the network |
//! | `keys` | the agent |
//! | `vcpus`, `initscript` | the next start |

use std::sync::Arc;

use mandoline_api::agent::{GrowDiskReply, Request, SetKeysReply};
use mandoline_rspec::format_bytes;

use super::monitor::Booted;
use super::{Kvm, agent, disk, host};
use crate::cgroup::Limits;
use crate::vm_type::{Failure, Resized, SliverSpec, blocking};

impl Kvm {
    pub(super) async fn resize_live(&self, sliver: &SliverSpec) -> Result<Resized, Failure> {
        let mut resized = Resized::default();
        let handover = self.places.handover(sliver.vm_id);
        let booted = blocking(move || Ok(host::handover(&handover)))
            .await?
            .and_then(|h| h.booted);
        match booted {
            Some(booted) => self.resize_cgroup(sliver, booted, &mut resized).await?,
            None => resized
                .waits
                .push("mem_limit: what it was booted with is not known".to_owned()),
        }
        self.network
            .update_sliver(self.net(sliver)?)
            .await
            .map_err(|e| Failure::retryable(e.to_string()))?;
        self.grow_disk(sliver, &mut resized).await?;
        let request = Request::SetKeys {
            keys: sliver.rspec.keys().to_vec(),
        };
        // A guest that is not joined yet gets its keys with the join.
        if let Err(error) = agent::ask::<SetKeysReply>(&self.door(sliver.vm_id), &request).await {
            tracing::info!(vm_id = sliver.vm_id, %error, "keys not changed");
        }
        Ok(resized)
    }

    /// Memory and CPU. The guest's memory shrinks before its bound does, and grows after it.
    async fn resize_cgroup(
        &self,
        sliver: &SliverSpec,
        booted: Booted,
        resized: &mut Resized,
    ) -> Result<(), Failure> {
        let limits = self.limits(&sliver.rspec)?;
        let memory = sliver.rspec.number("mem_limit").unwrap_or(0);
        let wanted = memory >> 20;
        if wanted > booted.mem_mib {
            resized.waits.push(format!(
                "mem_limit is {}; it was booted with {} MiB",
                format_bytes(memory),
                booted.mem_mib
            ));
        }
        let vcpus = sliver.rspec.number("vcpus").unwrap_or(1);
        if vcpus != booted.vcpus {
            resized
                .waits
                .push(format!("vcpus is {vcpus}; it was booted with {}", booted.vcpus));
        }
        // A bound that grows does so before the guest may use it.
        let bound = |given: u64| Limits {
            memory_max: (booted.mem_mib.saturating_sub(given) + self.overhead_mib()) << 20,
            memory_min: limits.memory_min.min(booted.mem_mib << 20),
            ..limits
        };
        let target = booted.mem_mib.saturating_sub(wanted);
        self.set_limits(sliver, bound(0)).await?;
        let given = self.control(sliver.vm_id).inflate(booted.mem_mib, target).await?;
        if given < target {
            resized.waits.push(format!(
                "mem_limit is {}; its guest has given {given} MiB of {target} MiB back",
                format_bytes(memory)
            ));
        }
        self.set_limits(sliver, bound(given.min(target))).await
    }

    async fn set_limits(&self, sliver: &SliverSpec, limits: Limits) -> Result<(), Failure> {
        let (tree, vm_id) = (Arc::clone(&self.tree), sliver.vm_id);
        blocking(move || tree.change(vm_id, &limits)).await
    }

    async fn grow_disk(&self, sliver: &SliverSpec, resized: &mut Resized) -> Result<(), Failure> {
        let wanted = disk::size_of(sliver.rspec.number("disk_quota").unwrap_or(0));
        let path = self.places.disk(sliver.vm_id);
        let (file, grown) = blocking(move || disk::grow(&path, wanted)).await?;
        match grown {
            disk::Grown::No => return Ok(()),
            disk::Grown::Longer(length) => {
                resized.waits.push(format!(
                    "disk_quota is {}; the disk has {} and does not shrink while it lives",
                    format_bytes(wanted),
                    format_bytes(length)
                ));
                return Ok(());
            }
            disk::Grown::Yes => self.control(sliver.vm_id).grow("disk", file, wanted).await?,
        }
        match agent::ask::<GrowDiskReply>(&self.door(sliver.vm_id), &Request::GrowDisk).await {
            Ok(reply) => tracing::info!(vm_id = sliver.vm_id, ?reply, "disk grown"),
            // Whoever joins later is asked then.
            Err(error) => tracing::info!(vm_id = sliver.vm_id, %error, "file system not grown yet"),
        }
        Ok(())
    }
}
