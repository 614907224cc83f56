//! A layer's tar file from a stranger, as it is and with its checksums made right, so that mutations get past them.
#![no_main]

use std::{fs::File, io::Write as _};

use libfuzzer_sys::fuzz_target;
use peer_compute::image::{
    layer,
    tar::{self, Kind, Member},
};

const BLOCK: usize = 512;
const MEMBERS_MAX: u64 = 1000;

fuzz_target!(|data: &[u8]| {
    let mut file = tempfile::tempfile().expect("a temporary file");
    check(&mut file, data);
    check(&mut file, &with_checksums(data));
});

fn check(file: &mut File, data: &[u8]) {
    file.set_len(0).expect("an empty file");
    std::io::Seek::rewind(file).expect("its beginning");
    file.write_all(data).expect("the file takes it");
    let mut members: Vec<Member> = Vec::new();
    let walked = tar::walk(file, MEMBERS_MAX, |member| {
        members.push(member);
        Ok(())
    });
    let mut end = 0;
    for member in &members {
        assert!(member.offset >= end + BLOCK as u64, "members overlap");
        end = member.offset + member.size;
        assert!(end <= data.len() as u64, "a member ends behind the file");
        assert!(member.kind == Kind::File || member.size == 0);
    }
    let facts = layer::check(file);
    if let Ok(count) = walked {
        assert_eq!(count, members.len() as u64);
    }
    if let Ok(facts) = facts {
        assert_eq!(facts.members, members.len() as u64);
        assert_eq!(facts.unpacked, members.iter().map(|member| member.size).sum::<u64>());
        for member in members {
            assert!(stays_inside(&member.path), "{member:?}");
            assert_ne!(member.kind, Kind::Device);
            if let Kind::HardLink(target) = &member.kind {
                assert!(stays_inside(target.strip_prefix(b"/").unwrap_or(target)), "{member:?}");
            }
        }
    }
}

/// Judged in another way than the code does: by the depth that each part leads to.
fn stays_inside(path: &[u8]) -> bool {
    let mut depth = 0_i32;
    for part in path.split(|byte| *byte == b'/') {
        depth += match part {
            b"" | b"." => 0,
            b".." => -1,
            _ => 1,
        };
        if depth < 0 {
            return false;
        }
    }
    !path.starts_with(b"/") && !path.contains(&0)
}

/// Makes the checksum of each header right, as far as headers can be found.
fn with_checksums(data: &[u8]) -> Vec<u8> {
    let mut bytes = data.to_vec();
    let mut at = 0;
    while let Some(header) = bytes.get_mut(at..at + BLOCK) {
        at += BLOCK;
        if header.iter().all(|byte| *byte == 0) {
            continue;
        }
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let digits = std::str::from_utf8(&header[124..135]).unwrap_or_default().trim_matches([' ', '\0']);
        let size = usize::from_str_radix(digits, 8).unwrap_or(0);
        at = at.saturating_add(size.div_ceil(BLOCK).saturating_mul(BLOCK));
    }
    bytes
}
