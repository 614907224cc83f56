//! Questions of guests and answers of resolvers: whatever they hold, only public addresses are told.
#![no_main]

use libfuzzer_sys::fuzz_target;
use peer_compute::wall::{
    ranges::is_public,
    resolver::message::{Asked, Policy, read_question},
};

fuzz_target!(|data: &[u8]| {
    // The first two bytes say where the question ends and the answer begins.
    let Some((length, rest)) = data.split_first_chunk::<2>() else { return };
    let (question, answer) = rest.split_at(usize::from(u16::from_be_bytes(*length)).min(rest.len()));
    let Asked::PassedOn(question) = read_question(question, &Policy::Public, &["office.example.net".to_owned()]) else {
        return;
    };
    assert!(question.name.contains('.') && !question.name.ends_with("office.example.net"));
    assert!(question.upstream(7).is_some_and(|bytes| bytes[..2] == [0, 7]));
    let Some(Ok(told)) = question.read_answer(7, answer) else { return };
    assert!(told.addresses.iter().all(|address| is_public(*address)));
    for datagram in [true, false] {
        let bytes = question.answer(&told, datagram);
        assert!(bytes.is_none_or(|bytes| bytes.len() <= if datagram { 1232 } else { 8192 }));
    }
});
