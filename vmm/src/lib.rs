//! One microVM, one process, on /dev/kvm.
