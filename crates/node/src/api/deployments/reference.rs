//! Finds the deployment that a person means: by name, by id, or by a unique beginning of the id.

use std::sync::Arc;
use std::time::Duration;

use peer_proto::PeerId;
use peer_proto::code::{Code, Problem};
use peer_proto::id::DeploymentId;

use crate::daemon::Daemon;
use crate::node::Node;
use crate::requester::Remembered;

/// Shortest beginning of an id that is accepted.
const PREFIX_MIN: usize = 4;
/// How long all peers together may take to say what they have.
const ASK_PATIENCE: Duration = Duration::from_secs(5);

/// The provider and id of one of our deployments. Peers are asked only if memory does not know it.
pub(super) async fn resolve(
    daemon: &Daemon,
    node: &Arc<Node>,
    text: &str,
    peer: Option<&str>,
) -> Result<(PeerId, DeploymentId), Problem> {
    let trust = daemon.trust.snapshot();
    let peer = peer.map(|peer| trust.find(peer).map(|record| record.peer)).transpose()?;
    match choose(&node.requester.remembered().await?, text, peer) {
        Err(problem) if problem.code == Code::NoSuchDeployment => {}
        decided => return decided,
    }
    let asked: Vec<_> = trust.peers.keys().copied().filter(|id| peer.is_none_or(|peer| peer == *id)).collect();
    let answers = futures::future::join_all(asked.into_iter().map(|peer| node.requester.list(peer)));
    // Whoever does not answer in time has nothing to add.
    drop(tokio::time::timeout(ASK_PATIENCE, answers).await);
    choose(&node.requester.remembered().await?, text, peer)
}

fn choose(known: &[Remembered], text: &str, peer: Option<PeerId>) -> Result<(PeerId, DeploymentId), Problem> {
    let candidates = || known.iter().filter(|known| peer.is_none_or(|peer| known.peer == peer));
    let by_name: Vec<_> = candidates().filter(|known| known.status.specification.name.as_str() == text).collect();
    let by_id: Vec<_> = candidates()
        .filter(|known| text.len() >= PREFIX_MIN && known.status.id.to_string().starts_with(text))
        .collect();
    let shown = peer_proto::text::escape(text);
    // A name is what its owner chose, so it goes before the beginning of an id that happens to read the same.
    match (by_name.as_slice(), by_id.as_slice()) {
        ([one], _) | ([], [one]) => Ok((one.peer, one.status.id)),
        ([], []) => Err(Problem::new(
            Code::NoSuchDeployment,
            format!(
                "no deployment of yours is called '{shown}', or has an id that begins so (at least four characters of it); \
                 `peerctl ps -a` shows those that you have"
            ),
        )),
        _ => Err(Problem::new(
            Code::Ambiguous,
            format!("'{shown}' fits more than one deployment; name the peer with --peer, or write more of the id"),
        )),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use peer_proto::deploy::{Specification, State, Status};
    use peer_proto::identity::Identity;
    use peer_proto::unit::Timestamp;

    use super::*;

    fn remembered(peer: PeerId, id: [u8; 16], name: &str) -> Remembered {
        let specification = Specification::plain(name.parse().unwrap(), "");
        let status = Status {
            id: DeploymentId(id),
            specification,
            image: None,
            state: State::Running,
            problem: None,
            created_at: Timestamp(0),
            started_at: None,
            exit_code: None,
            restarts: 0,
            health: None,
            url: None,
            isolation: None,
        };
        Remembered { peer, status, as_of: Timestamp(0) }
    }

    #[test]
    fn names_ids_and_unique_beginnings_are_found() {
        let (bob, carol) = (Identity::generate().peer_id(), Identity::generate().peer_id());
        let known = [
            remembered(bob, [0xaa; 16], "web"),
            remembered(carol, [0xab; 16], "web"),
            remembered(bob, [0xcd; 16], "abab"),
        ];
        let code = |text, peer| choose(&known, text, peer).map_err(|problem| problem.code);
        assert_eq!(code("web", None), Err(Code::Ambiguous));
        assert_eq!(code("web", Some(bob)), Ok((bob, DeploymentId([0xaa; 16]))));
        assert_eq!(code("cdcd", None), Ok((bob, DeploymentId([0xcd; 16]))));
        assert_eq!(code("abab", None), Ok((bob, DeploymentId([0xcd; 16]))), "a name goes before an id");
        assert_eq!(code("cdc", None), Err(Code::NoSuchDeployment), "too short");
        let sentence = choose(&known, "cdc", None).unwrap_err().message;
        assert!(sentence.contains("at least four characters"), "{sentence}");
        assert_eq!(code("none", None), Err(Code::NoSuchDeployment));
    }
}
