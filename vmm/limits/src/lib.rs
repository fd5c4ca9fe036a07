//! A VM's limits on the host: cgroup v2, tap, HTB over netlink.
