//! The node manager's interface: requests, answers, events.
