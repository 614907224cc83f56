//! A container's standard input and output as one stream of bytes.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use bollard::{container::LogOutput, query_parameters::AttachContainerOptionsBuilder};
use bytes::Bytes;
use futures::{StreamExt, stream::BoxStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::io::StreamReader;

use super::{CHANGE, DockerEngine, call};
use crate::engine::{ContainerId, EngineError, quote};

/// The standard streams of a container, which must have been made without a terminal.
pub(super) struct Attached {
    output: StreamReader<BoxStream<'static, io::Result<Bytes>>, Bytes>,
    input: Pin<Box<dyn AsyncWrite + Send>>,
}

impl DockerEngine {
    /// Attaches to a container that has not been started yet, so that nothing of its output is missed.
    pub(super) async fn attach(&self, id: &ContainerId) -> Result<Attached, EngineError> {
        let options = AttachContainerOptionsBuilder::default().stream(true).stdin(true).stdout(true).build();
        let attached =
            call("attach to container", CHANGE, self.client()?.attach_container(id.as_str(), Some(options))).await?;
        let pieces = attached.output.filter_map(async |piece| match piece {
            Ok(LogOutput::StdOut { message }) => Some(Ok(message)),
            Ok(LogOutput::StdErr { message }) => {
                tracing::debug!(message = %quote(&String::from_utf8_lossy(&message)), "a forwarder says");
                None
            }
            Ok(LogOutput::Console { .. } | LogOutput::StdIn { .. }) => Some(Err(io::ErrorKind::InvalidData.into())),
            Err(error) => Some(Err(io::Error::other(error))),
        });
        Ok(Attached { output: StreamReader::new(pieces.boxed()), input: attached.input })
    }
}

impl AsyncRead for Attached {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().output).poll_read(context, buffer)
    }
}

impl AsyncWrite for Attached {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut().input.as_mut().poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().input.as_mut().poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().input.as_mut().poll_shutdown(context)
    }
}
