//! The few rtnetlink messages that bring up a sliver's interface, written out by hand: a netlink library
//! would be larger than the rest of the agent. Layouts: rtnetlink(7), `linux/rtnetlink.h`, `linux/if_addr.h`.

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;

use mandoline_api::agent::Cidr;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with};

/// A socket to the kernel's routing subsystem.
pub(crate) struct Route {
    socket: OwnedFd,
    sequence: u32,
}

/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;

/// `linux/rtnetlink.h`: the gateway is on the link, whatever the addresses there say.
const RTNH_F_ONLINK: u32 = 4;

/// A message being written. Lengths are filled in by [`Message::finish`].
struct Message {
    bytes: Vec<u8>,
}

impl Message {
    fn new(kind: u16, flags: i32, sequence: u32) -> Self {
        let mut bytes = Vec::with_capacity(128);
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&kind.to_ne_bytes());
        // The flags are small positive constants.
        let flags = u16::try_from(flags | libc::NLM_F_REQUEST | libc::NLM_F_ACK).unwrap_or(u16::MAX);
        bytes.extend_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(&sequence.to_ne_bytes());
        bytes.extend_from_slice(&[0; 4]);
        Message { bytes }
    }

    fn raw(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(value.len().saturating_add(4)).unwrap_or(u16::MAX);
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        let padded = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(padded, 0);
        self
    }

    fn address(self, kind: u16, address: IpAddr) -> Self {
        match address {
            IpAddr::V4(v4) => self.attribute(kind, &v4.octets()),
            IpAddr::V6(v6) => self.attribute(kind, &v6.octets()),
        }
    }

    fn finish(mut self) -> Vec<u8> {
        let length = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX).to_ne_bytes();
        if let Some(place) = self.bytes.get_mut(..4) {
            place.copy_from_slice(&length);
        }
        self.bytes
    }
}

fn family(address: IpAddr) -> u8 {
    // Both constants are below 256.
    let family = if address.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    u8::try_from(family).unwrap_or(0)
}

fn host_prefix(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

impl Route {
    /// Opens the socket.
    pub(crate) fn open() -> io::Result<Self> {
        // Protocol 0 of this family is NETLINK_ROUTE.
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok(Route { socket, sequence: 0 })
    }

    fn message(&mut self, kind: u16, flags: i32) -> Message {
        self.sequence = self.sequence.wrapping_add(1);
        Message::new(kind, flags, self.sequence)
    }

    /// Sends a message and waits for the kernel's word on it.
    fn request(&mut self, message: Message) -> io::Result<()> {
        send(&self.socket, &message.finish(), SendFlags::empty())?;
        let mut buffer = [0u8; 4096];
        loop {
            let (bytes, _) = recv(&self.socket, &mut buffer[..], RecvFlags::empty())?;
            if let Some(answer) = find_ack(buffer.get(..bytes).unwrap_or_default(), self.sequence) {
                return answer;
            }
        }
    }

    /// Sets an interface up, with the MTU given.
    pub(crate) fn link_up(&mut self, index: u32, mtu: Option<u32>) -> io::Result<()> {
        let up = (libc::IFF_UP as u32).to_ne_bytes();
        let mut message = self
            .message(libc::RTM_NEWLINK, 0)
            // ifinfomsg: family, padding, type, index, flags, mask of the flags to change
            .raw(&[0, 0, 0, 0])
            .raw(&index.to_ne_bytes())
            .raw(&up)
            .raw(&up);
        if let Some(mtu) = mtu {
            message = message.attribute(libc::IFLA_MTU, &mtu.to_ne_bytes());
        }
        self.request(message)
    }

    /// Gives an interface an address; one that is there already is no error.
    pub(crate) fn add_address(&mut self, index: u32, cidr: Cidr) -> io::Result<()> {
        // Nobody shares a sliver's link: duplicate address detection could only delay it.
        let flags = u8::try_from(libc::IFA_F_NODAD).unwrap_or(0);
        let flags = if cidr.address.is_ipv6() { flags } else { 0 };
        let message = self
            .message(libc::RTM_NEWADDR, libc::NLM_F_CREATE | libc::NLM_F_REPLACE)
            // ifaddrmsg: family, prefix, flags, scope, index
            .raw(&[family(cidr.address), cidr.prefix, flags, libc::RT_SCOPE_UNIVERSE])
            .raw(&index.to_ne_bytes())
            .address(libc::IFA_LOCAL, cidr.address)
            .address(libc::IFA_ADDRESS, cidr.address);
        self.request(message)
    }

    /// Routes `destination` (everything, if `None`) to an interface: by `gateway`, taken to be on its link,
    /// or directly.
    pub(crate) fn add_route(
        &mut self,
        index: u32,
        of_family: IpAddr,
        destination: Option<IpAddr>,
        gateway: Option<IpAddr>,
    ) -> io::Result<()> {
        let on_link = RTNH_F_ONLINK.to_ne_bytes();
        let (flags, scope) = match gateway {
            Some(_) => (on_link, libc::RT_SCOPE_UNIVERSE),
            None => ([0; 4], libc::RT_SCOPE_LINK),
        };
        let mut message = self
            .message(libc::RTM_NEWROUTE, libc::NLM_F_CREATE | libc::NLM_F_REPLACE)
            // rtmsg: family, prefix of destination and source, type of service, table, protocol, scope, type
            .raw(&[
                family(of_family),
                destination.map_or(0, host_prefix),
                0,
                0,
                libc::RT_TABLE_MAIN,
                libc::RTPROT_BOOT,
                scope,
                libc::RTN_UNICAST,
            ])
            .raw(&flags);
        if let Some(destination) = destination {
            message = message.address(libc::RTA_DST, destination);
        }
        if let Some(gateway) = gateway {
            message = message.address(libc::RTA_GATEWAY, gateway);
        }
        let message = message.attribute(libc::RTA_OIF, &index.to_ne_bytes());
        self.request(message)
    }
}

/// The kernel's acknowledgement of message `sequence` in what it sent, if it's there.
fn find_ack(mut bytes: &[u8], sequence: u32) -> Option<io::Result<()>> {
    let word = |bytes: &[u8], at: usize| -> Option<[u8; 4]> { bytes.get(at..)?.first_chunk::<4>().copied() };
    loop {
        let length = usize::try_from(u32::from_ne_bytes(word(bytes, 0)?)).ok()?;
        let kind = bytes
            .get(4..6)?
            .first_chunk::<2>()
            .map(|kind| u16::from_ne_bytes(*kind))?;
        let of = u32::from_ne_bytes(word(bytes, 8)?);
        if i32::from(kind) == libc::NLMSG_ERROR && of == sequence {
            let code = i32::from_ne_bytes(word(bytes, HEADER)?);
            return Some(match code {
                0 => Ok(()),
                code => Err(io::Error::from_raw_os_error(code.saturating_neg())),
            });
        }
        // A length that does not lead onwards ends the walk.
        bytes = bytes.get(length.max(HEADER).next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_the_layout_of_rtnetlink() {
        let bytes = Message::new(libc::RTM_NEWLINK, 0, 7)
            .raw(&[0; 16])
            .attribute(4, &[1, 2])
            .finish();
        assert_eq!(bytes.len(), 16 + 16 + 8);
        assert_eq!(bytes[..4], 40u32.to_ne_bytes());
        assert_eq!(bytes[8..12], 7u32.to_ne_bytes());
        assert_eq!(bytes[32..34], 6u16.to_ne_bytes(), "length without padding");
        assert_eq!(bytes[38..], [0, 0], "padding");
    }

    #[test]
    fn acknowledgements_are_found_and_garbage_is_survived() {
        let ack = |sequence: u32, code: i32| {
            let mut bytes = Message::new(libc::NLMSG_ERROR as u16, 0, sequence).raw(&code.to_ne_bytes());
            bytes = bytes.raw(&[0; 16]);
            bytes.finish()
        };
        let mut both = ack(1, 0);
        both.extend(ack(2, -libc::ENODEV));
        assert!(matches!(find_ack(&both, 1), Some(Ok(()))));
        assert!(matches!(find_ack(&both, 2), Some(Err(e)) if e.raw_os_error() == Some(libc::ENODEV)));
        assert!(find_ack(&both, 3).is_none());
        for cut in 0..both.len() {
            let _ = find_ack(&both[..cut], 2);
        }
        assert!(find_ack(&[0xff; 64], 9).is_none());
        assert!(find_ack(&[0; 64], 9).is_none());
    }
}
