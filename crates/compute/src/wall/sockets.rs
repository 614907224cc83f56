//! The sockets of a resolver at the address of a bridge.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, bind as bind_socket, listen, socket_with, sockopt};

use crate::engine::ResolverSockets;

const PORT: u16 = 53;
/// Connections that may wait to be taken.
const BACKLOG: i32 = 32;

/// Binds both. The bridge may not be there yet, or go and come back: the address counts, not the interface.
pub(crate) fn bind(address: Ipv4Addr) -> io::Result<ResolverSockets> {
    let bound = |kind| -> io::Result<OwnedFd> {
        let socket = socket_with(AddressFamily::INET, kind, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
        sockopt::set_ip_freebind(&socket, true)?;
        if kind == SocketType::STREAM {
            // A daemon that was started again finds connections of the one before.
            sockopt::set_socket_reuseaddr(&socket, true)?;
        }
        bind_socket(&socket, &SocketAddrV4::new(address, PORT))?;
        Ok(socket)
    };
    let connections = bound(SocketType::STREAM)?;
    listen(&connections, BACKLOG)?;
    Ok(ResolverSockets { datagrams: bound(SocketType::DGRAM)?.into(), connections: connections.into() })
}
