//! Writes the seeds that need keys or the canonical encoding into `seeds/TARGET/`, the same bytes each time.
//! Those of `texts`, `http` and `archive` are plain files: written by hand, or made with `xtask image`.

use std::{fs, io, path::PathBuf};

use peer_fuzz::{NOW, alice, bob, ticket};
use peer_proto::{
    card::{Card, SignedCard, Ticket},
    code::{Code, Problem},
    deploy::{
        DeployRequest, Event, ImageOffer, ImageSource, LayerHeader, LayerReply, Reply, Request, RestartPolicy,
        Specification, Variable,
    },
    envelope, frame,
    grant::{DeployGrant, Grants},
    id::{DeploymentId, Digest, Incarnation, RequestHash, RequestId},
    identity::Sealed,
    join::{self, JoinReply},
    query::{Answer, Call, Capacity, ForwardHeader, Hello, LogFrame, LogLine, LogsQuery, Output, Query, StreamReply},
    statement::Statement,
    tunnel::{LeaseReply, LeaseRequest, VisitHeader},
    unit::{ByteSize, Millicores, Port},
};

const DEPLOYMENT: DeploymentId = DeploymentId([9; 16]);

fn main() -> io::Result<()> {
    frames()?;
    signed()?;
    introductions()?;
    statements()?;
    layers()
}

fn write(target: &str, name: &str, bytes: &[u8]) -> io::Result<()> {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("seeds").join(target);
    fs::create_dir_all(&directory)?;
    fs::write(directory.join(name), bytes)
}

fn write_frame(kind: u8, name: &str, bytes: &[u8]) -> io::Result<()> {
    write("frames", name, &[&[kind], bytes].concat())
}

fn problem() -> Problem {
    Problem::new(Code::WrongState, "it runs already")
}

fn specification() -> Specification {
    Specification {
        command: vec!["/hello".into()],
        environment: vec![Variable { name: "GREETING".into(), value: "hello".into() }],
        expose: Port::new(8080).ok(),
        publish: true,
        restart: RestartPolicy::OnFailure(Some(3)),
        ..Specification::plain("web".parse().expect("a name"), "web:1")
    }
}

fn requests() -> [(&'static str, Request); 3] {
    let configuration = include_bytes!("../seeds/image_configuration/small.json").to_vec();
    let offer = ImageOffer { configuration, layer_sizes: vec![1024] };
    let image = ImageSource::Offered(offer.clone());
    let deploy = DeployRequest { specification: specification(), image };
    [("deploy", Request::Deploy(Box::new(deploy))), ("push", Request::Push(offer)), ("stop", Request::Stop(DEPLOYMENT))]
}

fn reply(event: Event) -> Reply {
    Reply { request: RequestHash([7; 32]), audience: alice().peer_id(), sequence: 0, at: NOW, event }
}

fn frames() -> io::Result<()> {
    let hello = Hello { incarnation: Incarnation([4; 16]), clock: NOW, version: "0.1.0".into() };
    write_frame(0, "hello", &frame::encode(&hello))?;
    write_frame(1, "call_list", &frame::encode(&Call::Query(Query::List)))?;
    write_frame(1, "call_signed", &frame::encode(&Call::Signed(vec![1, 2, 3])))?;
    let (cpu, memory) = (Millicores::new(1500).expect("a share"), ByteSize::mebibytes(1024));
    let grant = DeployGrant { expires_at: Some(NOW), ..DeployGrant::new(cpu, memory, 4) };
    let capacity = Capacity {
        granted: Some(grant.clone()),
        free_cpu: Millicores::new(1).ok(),
        free_memory: None,
        free_containers: 3,
        architecture: "amd64".into(),
        isolation: None,
    };
    write_frame(2, "capacity", &frame::encode(&Answer::Capacity(Box::new(capacity))))?;
    write_frame(2, "problem", &frame::encode(&Answer::Problem(problem())))?;
    let logs = LogsQuery { deployment: DEPLOYMENT, tail: Some(10), since: Some(NOW), follow: true };
    write_frame(3, "logs", &frame::encode(&logs))?;
    let line = LogLine { at: NOW, output: Output::Stderr, text: "a line\n".into() };
    write_frame(4, "lines", &frame::encode(&LogFrame::Lines(vec![line])))?;
    let forward = ForwardHeader { deployment: DEPLOYMENT, port: Port::new(80).expect("a port") };
    write_frame(5, "forward", &frame::encode(&forward))?;
    write_frame(6, "stream", &frame::encode(&StreamReply::Refused(problem())))?;
    let layer = LayerHeader { request: RequestHash([7; 32]), layer: Digest([8; 32]) };
    write_frame(7, "layer_header", &frame::encode(&layer))?;
    write_frame(8, "layer_reply", &frame::encode(&LayerReply::From(512)))?;
    for (name, request) in requests() {
        write_frame(9, &format!("request_{name}"), &frame::encode(&request))?;
    }
    write_frame(10, "reply", &frame::encode(&reply(Event::Accepted(DEPLOYMENT))))?;
    write_frame(11, "lease", &frame::encode(&LeaseRequest::Register(DEPLOYMENT)))?;
    write_frame(12, "lease_reply", &frame::encode(&LeaseReply::Live("https://a.example".into())))?;
    let visitor = std::net::IpAddr::from([192, 0, 2, 1]);
    write_frame(13, "visit", &frame::encode(&VisitHeader { deployment: DEPLOYMENT, visitor }))?;
    write_frame(14, "welcome", &frame::encode(&JoinReply::Welcome(Grants { deploy: Some(grant) })))
}

/// The statement inside a sealed message, which the targets sign themselves.
fn statement(bytes: &[u8]) -> Vec<u8> {
    let sealed: Sealed = frame::decode_strict(bytes, frame::CONTROL_FRAME_MAX).expect("our own encoding");
    sealed.bytes
}

fn signed() -> io::Result<()> {
    for (name, request) in requests() {
        let (run, id) = (Incarnation([4; 16]), RequestId([5; 16]));
        let sealed = envelope::seal(&alice(), bob().peer_id(), run, id, NOW, request).bytes;
        write("envelope", &format!("{name}_statement"), &statement(&sealed))?;
        write("envelope", &format!("{name}_sealed"), &sealed)?;
    }
    let want = reply(Event::Want(vec![Digest([8; 32])]));
    write("envelope", "reply_statement", &frame::encode(&want))?;
    write("envelope", "reply_sealed", &envelope::seal_reply(&bob(), &want))
}

fn statements() -> io::Result<()> {
    let (old, new, recovery) = (alice(), bob(), ticket());
    let card = Card::new(&new, "alice".parse().expect("a name"), &[], recovery.public_key(), NOW);
    let card = SignedCard::sign(&new, card);
    let all = [
        Statement::rotate(&old, &new, &card, 1, NOW),
        Statement::replace(&recovery, &new, &card, vec![old.peer_id()], NOW),
        Statement::revoke(&recovery, old.peer_id(), NOW),
    ];
    for statement in all {
        write("statement", statement.kind(), statement.as_bytes())?;
        write("statement", &format!("{}_text", statement.kind()), statement.to_string().as_bytes())?;
    }
    Ok(())
}

fn introductions() -> io::Result<()> {
    let addresses = ["/ip4/192.0.2.1/tcp/4100".parse().expect("an address")];
    let card = Card::new(&alice(), "alice".parse().expect("a name"), &addresses, [6; 32], NOW);
    let card = SignedCard::sign(&alice(), card);
    let joined = join::seal(&alice(), &card, ticket().peer_id(), bob().peer_id());
    let invitation = Ticket { inviter: card.clone(), seed: ticket().seed(), expires_at: NOW };
    write("introduction", "card_text", card.to_string().as_bytes())?;
    write("introduction", "card_statement", &statement(&card.to_bytes()))?;
    write("introduction", "ticket_text", invitation.to_text().as_bytes())?;
    write("introduction", "join_sealed", &joined)?;
    write("introduction", "join_statement", &statement(&joined))
}

fn layers() -> io::Result<()> {
    let header = |size: u64, kind: tar::EntryType| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(0o644);
        header
    };
    let mut small = tar::Builder::new(Vec::new());
    small.append_data(&mut header(0, tar::EntryType::Directory), "etc/", &[][..])?;
    small.append_data(&mut header(3, tar::EntryType::Regular), "etc/name", &b"abc"[..])?;
    small.append_link(&mut header(0, tar::EntryType::Symlink), "etc/link", "../name")?;
    small.append_link(&mut header(0, tar::EntryType::Link), "etc/other", "etc/name")?;
    write("layer", "small.tar", &small.into_inner()?)?;
    let mut long = tar::Builder::new(Vec::new());
    let path = "a/".repeat(120) + "b";
    long.append_data(&mut header(0, tar::EntryType::Regular), &path, &[][..])?;
    long.append_pax_extensions([("path", &b"from/pax"[..]), ("size", &b"2"[..])])?;
    long.append_data(&mut header(2, tar::EntryType::Regular), "short", &b"xy"[..])?;
    write("layer", "extended.tar", &long.into_inner()?)
}
