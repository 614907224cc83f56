//! What a guest may ask the name system, and what of an answer it is told. Pure; the bytes of both sides are hostile.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use peer_proto::deploy::{Destination, Host};

use crate::wall::ranges::is_public;

/// Largest question that is read (bytes).
pub const QUESTION_MAX: usize = 1024;
/// Largest answer that is read or told (bytes).
pub const ANSWER_MAX: usize = 8192;
/// Largest answer in one datagram (bytes): what passes everywhere unfragmented.
const DATAGRAM_MAX: usize = 1232;
/// Most records of one answer.
const RECORDS_MAX: usize = 64;
/// How long an answer may be kept (seconds).
const TIME_MAX: u32 = 24 * 3600;
/// Longest and shortest time for which an answer's addresses are admitted (seconds).
const ADMITTED_MAX: u32 = 3600;
const ADMITTED_MIN: u32 = 60;
/// Domains that are of no use outside of one's own network, or do not exist (RFC 6761, 6762, 8375 and custom).
const LOCAL: [&str; 13] = [
    "arpa",
    "alt",
    "corp",
    "home",
    "internal",
    "intranet",
    "invalid",
    "lan",
    "local",
    "localdomain",
    "localhost",
    "onion",
    "private",
];

/// Which names a network's containers may ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Policy {
    /// Every public one.
    Public,
    /// Those of these hosts, by their addresses only.
    Listed(BTreeSet<Destination>),
}

impl Policy {
    /// The ports that are admitted at the addresses of this name.
    pub fn ports(&self, name: &str) -> Vec<u16> {
        let Self::Listed(hosts) = self else { return Vec::new() };
        let named = |host: &&Destination| matches!(&host.host, Host::Name(listed) if listed.as_str() == name);
        hosts.iter().filter(named).map(|host| host.port.get()).collect()
    }
}

/// A question that is passed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    id: u16,
    query: Query,
    /// The name in lower case, without the dot at its end.
    pub name: String,
    datagram_max: usize,
    has_edns: bool,
}

/// What becomes of the bytes that a guest sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    /// Nothing: they are no question.
    Nothing,
    /// They are answered so, without asking anybody.
    Answered(Vec<u8>),
    /// The question is passed on.
    PassedOn(Box<Question>),
}

/// What is told of an upstream answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// The answer's records and code.
    message: Message,
    /// The public addresses in it.
    pub addresses: BTreeSet<Ipv4Addr>,
    /// For how long these are good (seconds).
    pub seconds: u32,
}

/// Reads a question. `search` are the domains of the host's own network.
pub fn read_question(bytes: &[u8], policy: &Policy, search: &[String]) -> Asked {
    // A header is twelve bytes; one that says "answer" is never answered.
    if bytes.len() < 12 || bytes.len() > QUESTION_MAX || bytes[2] & 0x80 != 0 {
        return Asked::Nothing;
    }
    let id = u16::from_be_bytes([bytes[0], bytes[1]]);
    let refuse = |op_code, code| {
        let message = Message::error_msg(id, op_code, code);
        message.to_vec().map_or(Asked::Nothing, Asked::Answered)
    };
    let Ok(message) = Message::from_vec(bytes) else { return refuse(OpCode::Query, ResponseCode::FormErr) };
    if message.metadata.op_code != OpCode::Query || message.metadata.message_type != MessageType::Query {
        return refuse(message.metadata.op_code, ResponseCode::NotImp);
    }
    let [query] = &message.queries[..] else { return refuse(OpCode::Query, ResponseCode::FormErr) };
    let Some(name) = plain(&query.name) else { return refuse(OpCode::Query, ResponseCode::FormErr) };
    let datagram_max = usize::from(message.max_payload()).clamp(512, DATAGRAM_MAX);
    let has_edns = message.edns.is_some();
    let question = Question { id, query: query.clone(), name, datagram_max, has_edns };
    match verdict(&question, policy, search) {
        None => Asked::PassedOn(Box::new(question)),
        Some(code) => question.bare(code).map_or(Asked::Nothing, Asked::Answered),
    }
}

/// What the question is answered with at once, if it is not passed on.
fn verdict(question: &Question, policy: &Policy, search: &[String]) -> Option<ResponseCode> {
    if question.query.query_class != DNSClass::IN {
        return Some(ResponseCode::Refused);
    }
    if is_local(&question.name, search) {
        return Some(ResponseCode::NXDomain);
    }
    let listed = matches!(policy, Policy::Listed(_));
    if listed && policy.ports(&question.name).is_empty() {
        return Some(ResponseCode::Refused);
    }
    match question.query.query_type {
        RecordType::A => None,
        // There is no way out by IPv6, and hints at services may carry addresses.
        RecordType::AAAA | RecordType::HTTPS | RecordType::SVCB => Some(ResponseCode::NoError),
        kind if !listed && is_told(kind) => None,
        _ => Some(ResponseCode::Refused),
    }
}

fn is_told(kind: RecordType) -> bool {
    use RecordType::{A, CAA, CNAME, MX, NS, SOA, SRV, TXT};
    matches!(kind, A | CAA | CNAME | MX | NS | SOA | SRV | TXT)
}

/// The name in lower case, if it is made of the characters of host and service names.
fn plain(name: &Name) -> Option<String> {
    let labels = name.iter().map(|label| {
        let allowed = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
        let text = label.iter().all(allowed).then(|| std::str::from_utf8(label).ok())??;
        Some(text.to_ascii_lowercase())
    });
    Some(labels.collect::<Option<Vec<_>>>()?.join("."))
}

fn is_local(name: &str, search: &[String]) -> bool {
    let last = name.rsplit('.').next().unwrap_or_default();
    let below =
        |domain: &String| name.strip_suffix(domain.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
    !name.contains('.') || LOCAL.contains(&last) || search.iter().any(below)
}

impl Question {
    /// The question as it is asked upstream, under another id.
    pub fn upstream(&self, id: u16) -> Option<Vec<u8>> {
        let mut message = Message::new(id, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.add_query(self.query.clone());
        let mut edns = Edns::new();
        edns.set_max_payload(u16::try_from(DATAGRAM_MAX).unwrap_or(512));
        message.set_edns(edns);
        message.to_vec().ok()
    }

    /// Reads what came back upstream. Nothing, if it does not answer this question; the error, if it was cut short.
    pub fn read_answer(&self, id: u16, bytes: &[u8]) -> Option<Result<Told, CutShort>> {
        if bytes.len() > ANSWER_MAX {
            return None;
        }
        let message = Message::from_vec(bytes).ok()?;
        let [query] = &message.queries[..] else { return None };
        let same = message.metadata.id == id
            && message.metadata.message_type == MessageType::Response
            && query.query_type == self.query.query_type
            && query.query_class == DNSClass::IN
            && plain(&query.name)? == self.name;
        if !same {
            return None;
        }
        Some(if message.metadata.truncation { Err(CutShort) } else { Ok(self.told(&message)) })
    }

    fn told(&self, answer: &Message) -> Told {
        let code = match answer.metadata.response_code {
            code @ (ResponseCode::NoError | ResponseCode::NXDomain) => code,
            _ => ResponseCode::ServFail,
        };
        let mut message = self.response(code);
        let (mut addresses, mut shortest) = (BTreeSet::new(), ADMITTED_MAX);
        for record in answer.answers.iter().take(RECORDS_MAX).filter(|record| is_public_record(record)) {
            if let RData::A(address) = &record.data {
                addresses.insert(address.0);
                shortest = shortest.min(record.ttl);
            }
            message.add_answer(bounded(record));
        }
        let seconds = shortest.clamp(ADMITTED_MIN, ADMITTED_MAX);
        // What is admitted for a while must not be kept for longer.
        for record in &mut message.answers {
            record.ttl = record.ttl.min(seconds.max(ADMITTED_MIN));
        }
        let origin = answer.authorities.iter().find(|record| record.record_type() == RecordType::SOA);
        if message.answers.is_empty()
            && let Some(origin) = origin
        {
            message.add_authority(bounded(origin));
        }
        Told { message, addresses, seconds }
    }

    fn response(&self, code: ResponseCode) -> Message {
        let mut message = Message::error_msg(self.id, OpCode::Query, code);
        message.metadata.recursion_desired = true;
        message.metadata.recursion_available = true;
        message.add_query(self.query.clone());
        if self.has_edns {
            let mut edns = Edns::new();
            edns.set_max_payload(u16::try_from(DATAGRAM_MAX).unwrap_or(512));
            message.set_edns(edns);
        }
        message
    }

    /// An answer without records.
    fn bare(&self, code: ResponseCode) -> Option<Vec<u8>> {
        self.response(code).to_vec().ok()
    }

    /// The answer when nobody upstream gives one.
    pub fn failure(&self) -> Option<Vec<u8>> {
        self.bare(ResponseCode::ServFail)
    }

    /// The bytes for the guest. In a datagram, an answer that does not fit is cut short, so that it is asked for again over
    /// a connection.
    pub fn answer(&self, told: &Told, datagram: bool) -> Option<Vec<u8>> {
        let bytes = told.message.to_vec().ok()?;
        if bytes.len() <= if datagram { self.datagram_max } else { ANSWER_MAX } {
            return Some(bytes);
        }
        let mut short = self.response(ResponseCode::NoError);
        short.metadata.truncation = true;
        short.to_vec().ok()
    }
}

/// The answer did not fit into a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CutShort;

fn bounded(record: &Record) -> Record {
    let mut bounded = record.clone();
    bounded.ttl = bounded.ttl.min(TIME_MAX);
    bounded
}

/// Whether a record may be told: an address that is not public would lead a guest's program to its host's neighbours.
fn is_public_record(record: &Record) -> bool {
    record.dns_class == DNSClass::IN
        && match &record.data {
            RData::A(address) => is_public(address.0),
            _ => is_told(record.record_type()),
        }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use hickory_proto::rr::rdata::{A, AAAA, CNAME};
    use proptest::prelude::*;

    use super::*;

    fn question(name: &str, kind: RecordType) -> Vec<u8> {
        let mut message = Message::new(7, MessageType::Query, OpCode::Query);
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        message.to_vec().unwrap()
    }

    fn ask(name: &str, kind: RecordType, policy: &Policy) -> Asked {
        read_question(&question(name, kind), policy, &["office.example.net".to_owned()])
    }

    fn passed(name: &str, policy: &Policy) -> Question {
        match ask(name, RecordType::A, policy) {
            Asked::PassedOn(question) => *question,
            other => panic!("{name}: {other:?}"),
        }
    }

    fn code(asked: &Asked) -> ResponseCode {
        let Asked::Answered(bytes) = asked else { panic!("{asked:?}") };
        Message::from_vec(bytes).unwrap().metadata.response_code
    }

    fn listed(text: &str) -> Policy {
        let peer_proto::deploy::Egress::Hosts(hosts) = text.parse().unwrap() else { panic!("hosts") };
        Policy::Listed(hosts)
    }

    fn answer(question: &Question, records: &[(&str, RData)]) -> Vec<u8> {
        let mut message = Message::response(9, OpCode::Query);
        message.add_query(question.query.clone());
        for (name, data) in records {
            message.add_answer(Record::from_rdata(Name::from_ascii(name).unwrap(), 30, data.clone()));
        }
        message.to_vec().unwrap()
    }

    #[test]
    fn v4n_names_of_the_hosts_own_network_are_never_asked_for() {
        for name in [
            "printer.",
            "printer.local.",
            "x.internal.",
            "1.0.168.192.in-addr.arpa.",
            "office.example.net.",
            "git.office.example.net.",
            "GIT.Office.Example.NET.",
            "localhost.",
            "db.localhost.",
            "nas.lan.",
        ] {
            assert_eq!(code(&ask(name, RecordType::A, &Policy::Public)), ResponseCode::NXDomain, "{name}");
        }
        for name in ["example.net.", "xoffice.example.net.", "a_b.example.org."] {
            assert!(matches!(ask(name, RecordType::A, &Policy::Public), Asked::PassedOn(_)), "{name}");
        }
    }

    #[test]
    fn v4n_only_listed_names_are_asked_for() {
        let policy = listed("api.example.org:443,api.example.org:80,192.0.2.1:53");
        assert_eq!(policy.ports("api.example.org"), [80, 443]);
        assert_eq!(passed("API.example.org.", &policy).name, "api.example.org");
        for name in ["example.org.", "x.api.example.org.", "secret.attacker.example.", "192.0.2.1."] {
            assert_eq!(code(&ask(name, RecordType::A, &policy)), ResponseCode::Refused, "{name}");
        }
        assert_eq!(code(&ask("api.example.org.", RecordType::TXT, &policy)), ResponseCode::Refused);
        assert_eq!(code(&ask("api.example.org.", RecordType::AAAA, &policy)), ResponseCode::NoError);
    }

    #[test]
    fn v4n_addresses_that_are_not_public_are_taken_out_of_answers() {
        let asked = passed("rebind.example.org.", &Policy::Public);
        let a = |text: &str| RData::A(A(text.parse().unwrap()));
        let name = "rebind.example.org.";
        let six = RData::AAAA(AAAA("::1".parse().unwrap()));
        let alias = RData::CNAME(CNAME(Name::from_ascii("cdn.example.org.").unwrap()));
        let bytes = answer(
            &asked,
            &[(name, alias), (name, a("169.254.169.254")), (name, a("8.8.8.8")), (name, a("192.168.1.1")), (name, six)],
        );
        let told = asked.read_answer(9, &bytes).unwrap().unwrap();
        assert_eq!(told.addresses, ["8.8.8.8".parse().unwrap()].into());
        assert_eq!(told.seconds, ADMITTED_MIN);
        let message = Message::from_vec(&asked.answer(&told, true).unwrap()).unwrap();
        assert_eq!((message.metadata.id, message.answers.len()), (7, 2), "the alias and the public address");
        assert!(message.answers.iter().all(|record| record.ttl <= told.seconds));
    }

    #[test]
    fn answers_to_other_questions_are_dropped() {
        let asked = passed("a.example.org.", &Policy::Public);
        let other = passed("b.example.org.", &Policy::Public);
        assert!(asked.read_answer(9, &answer(&other, &[])).is_none(), "another name");
        assert!(asked.read_answer(8, &answer(&asked, &[])).is_none(), "another id");
        assert!(asked.read_answer(9, &asked.upstream(9).unwrap()).is_none(), "a question");
        assert!(asked.read_answer(9, &answer(&asked, &[])).is_some());
    }

    #[test]
    fn large_answers_are_cut_short_in_datagrams_only() {
        let asked = passed("a.example.org.", &Policy::Public);
        let many: Vec<_> = (0..60).map(|n| ("a.example.org.", RData::A(A(Ipv4Addr::new(8, 8, 4, n))))).collect();
        let told = asked.read_answer(9, &answer(&asked, &many)).unwrap().unwrap();
        let datagram = Message::from_vec(&asked.answer(&told, true).unwrap()).unwrap();
        assert!(datagram.metadata.truncation && datagram.answers.is_empty());
        let whole = Message::from_vec(&asked.answer(&told, false).unwrap()).unwrap();
        assert_eq!(whole.answers.len(), 60);
    }

    #[test]
    fn what_is_no_question_is_not_answered_or_refused() {
        assert_eq!(read_question(&[], &Policy::Public, &[]), Asked::Nothing);
        assert_eq!(read_question(&[0; QUESTION_MAX + 1], &Policy::Public, &[]), Asked::Nothing);
        let mut response = question("a.example.org.", RecordType::A);
        response[2] |= 0x80;
        assert_eq!(
            read_question(&response, &Policy::Public, &[]),
            Asked::Nothing,
            "two resolvers must not talk forever"
        );
        assert_eq!(code(&read_question(&[0; 12], &Policy::Public, &[])), ResponseCode::FormErr);
        assert_eq!(code(&ask("a.example.org.", RecordType::ANY, &Policy::Public)), ResponseCode::Refused);
        assert_eq!(code(&ask("a.example.org.", RecordType::AXFR, &Policy::Public)), ResponseCode::Refused);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_fail(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            drop(read_question(&bytes, &Policy::Public, &[]));
            drop(passed("a.example.org.", &Policy::Public).read_answer(9, &bytes));
        }
    }
}
