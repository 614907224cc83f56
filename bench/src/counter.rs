//! A relay in front of a daemon's listening port that counts what really travels, handshakes and framing included.

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use crate::Failure;

/// Bytes that have passed.
#[derive(Debug, Clone, Default)]
pub(crate) struct Counter {
    towards: Arc<AtomicU64>,
    back: Arc<AtomicU64>,
}

impl Counter {
    /// Bytes towards the daemon.
    pub(crate) fn towards(&self) -> u64 {
        self.towards.load(Ordering::Relaxed)
    }

    /// Bytes from the daemon to those who dialled it.
    pub(crate) fn back(&self) -> u64 {
        self.back.load(Ordering::Relaxed)
    }
}

/// Relays from a new port of loopback to `target`, until the program ends. Gives the new port.
pub(crate) fn start(target: u16) -> Result<(u16, Counter), Failure> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = listener.local_addr()?.port();
    let counter = Counter::default();
    let counted = counter.clone();
    thread::Builder::new().name("relay".into()).spawn(move || {
        for visitor in listener.incoming().flatten() {
            // While the daemon is down its visitors are turned away, as its own port would.
            let Ok(daemon) = TcpStream::connect((Ipv4Addr::LOCALHOST, target)) else { continue };
            if let Err(error) = join(&visitor, &daemon, &counted) {
                drop((error, visitor.shutdown(Shutdown::Both), daemon.shutdown(Shutdown::Both)));
            }
        }
    })?;
    Ok((port, counter))
}

fn join(visitor: &TcpStream, daemon: &TcpStream, counter: &Counter) -> io::Result<()> {
    visitor.set_nodelay(true)?;
    daemon.set_nodelay(true)?;
    let ways = [
        (visitor.try_clone()?, daemon.try_clone()?, counter.towards.clone()),
        (daemon.try_clone()?, visitor.try_clone()?, counter.back.clone()),
    ];
    for (from, to, count) in ways {
        thread::Builder::new().name("relay".into()).spawn(move || copy(from, to, &count))?;
    }
    Ok(())
}

fn copy(mut from: TcpStream, mut to: TcpStream, count: &AtomicU64) {
    let mut block = vec![0; 64 * 1024];
    while let Ok(read @ 1..) = from.read(&mut block) {
        if to.write_all(&block[..read]).is_err() {
            break;
        }
        count.fetch_add(read as u64, Ordering::Relaxed);
    }
    // Either side's end, or its sudden death, is the other side's end too.
    drop((from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both)));
}
