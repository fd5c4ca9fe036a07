//! The requests that threads may make by `ioctl` once they are confined, by their names in the kernel's headers.

use super::table::Value;

macro_rules! requests {
    ($($name:ident = $number:literal;)*) => {
        $(#[doc = concat!("`", stringify!($name), "`.")]
        pub const $name: Value = Value { name: stringify!($name), number: $number };)*
    };
}

// asm-generic/ioctls.h
requests! {
    FIONBIO = 0x5421;
}

// linux/kvm.h
requests! {
    KVM_RUN = 0xae80;
    KVM_GET_REGS = 0x8090_ae81;
    KVM_SET_REGS = 0x4090_ae82;
    KVM_GET_SREGS = 0x8138_ae83;
    KVM_SET_SREGS = 0x4138_ae84;
    KVM_GET_MSRS = 0xc008_ae88;
    KVM_SET_MSRS = 0x4008_ae89;
    KVM_SET_FPU = 0x41a0_ae8d;
    KVM_GET_LAPIC = 0x8400_ae8e;
    KVM_SET_LAPIC = 0x4400_ae8f;
    KVM_GET_MP_STATE = 0x8004_ae98;
    KVM_SET_MP_STATE = 0x4004_ae99;
    KVM_GET_VCPU_EVENTS = 0x8040_ae9f;
    KVM_SET_VCPU_EVENTS = 0x4040_aea0;
    KVM_SET_DEBUGREGS = 0x4080_aea2;
    KVM_GET_TSC_KHZ = 0xaea3;
    KVM_SET_XCRS = 0x4188_aea7;
    KVM_KVMCLOCK_CTRL = 0xaead;
    KVM_SET_IRQCHIP = 0x8208_ae63;
}

// linux/if_tun.h
requests! {
    TUNSETOFFLOAD = 0x4004_54d0;
}

// linux/vhost.h
requests! {
    VHOST_SET_FEATURES = 0x4008_af00;
    VHOST_SET_VRING_NUM = 0x4008_af10;
    VHOST_SET_VRING_ADDR = 0x4028_af11;
    VHOST_SET_VRING_BASE = 0x4008_af12;
    VHOST_GET_VRING_BASE = 0xc008_af12;
    VHOST_SET_VRING_KICK = 0x4008_af20;
    VHOST_SET_VRING_CALL = 0x4008_af21;
    VHOST_SET_VRING_ERR = 0x4008_af22;
    VHOST_NET_SET_BACKEND = 0x4008_af30;
}
