//! Events for people and scripts: the last few are kept, and whoever listens gets the new ones.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use peer_proto::control::Notice;
use peer_proto::id::DeploymentId;
use peer_proto::text::escape;
use tokio::sync::broadcast;

use crate::clock;

/// Events that are kept for those who come later, and that a slow listener may lag behind by.
pub const NOTICES_KEPT: usize = 256;

#[derive(Debug)]
struct Inner {
    kept: Mutex<VecDeque<Notice>>,
    sender: broadcast::Sender<Notice>,
}

/// The events; clones share them.
#[derive(Debug, Clone)]
pub struct Notices {
    inner: Arc<Inner>,
}

impl Default for Notices {
    fn default() -> Self {
        let inner = Inner { kept: Mutex::default(), sender: broadcast::Sender::new(NOTICES_KEPT) };
        Self { inner: Arc::new(inner) }
    }
}

impl Notices {
    /// Tells what has just happened; [`Notice::kind`] lists the kinds.
    #[expect(clippy::needless_pass_by_value, reason = "every caller has just made the sentence")]
    pub fn push(&self, kind: &str, peer: Option<String>, deployment: Option<DeploymentId>, message: String) {
        let notice = Notice { at: clock::now(), kind: kind.to_owned(), peer, deployment, message: escape(&message) };
        let mut kept = self.inner.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == NOTICES_KEPT {
            kept.pop_front();
        }
        kept.push_back(notice.clone());
        // Sent under the lock, so that everybody sees the same order. Nobody may be listening.
        drop(self.inner.sender.send(notice));
    }

    /// The last ones, oldest first.
    pub fn recent(&self) -> Vec<Notice> {
        self.inner.kept.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    /// Those from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<Notice> {
        self.inner.sender.subscribe()
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_are_kept_in_their_order() {
        let notices = Notices::default();
        for number in 0..NOTICES_KEPT + 10 {
            notices.push("peer_added", None, None, number.to_string());
        }
        let kept = notices.recent();
        assert_eq!(kept.len(), NOTICES_KEPT);
        assert_eq!((kept[0].message.as_str(), kept.last().unwrap().message.as_str()), ("10", "265"));
    }

    #[tokio::test]
    async fn listeners_get_new_ones_with_control_characters_escaped() {
        let notices = Notices::default();
        notices.push("peer_added", None, None, "before".into());
        let mut receiver = notices.subscribe();
        notices.push("peer_refused", Some("peer".into()), None, "a\u{1b}[2Jb".into());
        let notice = receiver.recv().await.unwrap();
        assert_eq!((notice.kind.as_str(), notice.message.as_str()), ("peer_refused", "a\\u{1b}[2Jb"));
        assert!(receiver.try_recv().is_err());
    }
}
