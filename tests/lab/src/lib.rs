//! The lab: virtual nodes under QEMU, with a real /dev/kvm inside.
