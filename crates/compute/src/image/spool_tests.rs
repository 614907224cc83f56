#![expect(clippy::unwrap_used, reason = "tests")]

use peer_proto::identity::Identity;

use super::*;

fn layer_bytes() -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(3);
    archive.append_data(&mut header, "a", b"abc".as_slice()).unwrap();
    archive.into_inner().unwrap()
}

struct Fixture {
    spool: Spool,
    peer: PeerId,
    bytes: Vec<u8>,
    digest: Digest,
    directory: tempfile::TempDir,
}

fn fixture(quota: u64) -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let bytes = layer_bytes();
    let spool = Spool::open(directory.path(), quota).unwrap();
    Fixture { spool, peer: Identity::generate().peer_id(), digest: Digest::of(&bytes), bytes, directory }
}

impl Fixture {
    fn part(&self, from: usize, to: usize) -> Bytes {
        Bytes::copy_from_slice(&self.bytes[from..to])
    }

    async fn begin(&self) -> Result<Transfer, SpoolError> {
        match self.spool.receive(self.peer, self.digest, self.bytes.len() as u64, Room::PLENTY).await? {
            Receipt::Partial(transfer) => Ok(transfer),
            Receipt::Complete(path) => panic!("complete at {}", path.display()),
        }
    }
}

#[tokio::test]
async fn a_layer_is_continued_after_a_break_and_stored() {
    let mut fixture = fixture(1 << 20);
    let mut transfer = fixture.begin().await.unwrap();
    transfer.append(fixture.part(0, 700)).await.unwrap();
    let error = transfer.finish().await.unwrap_err();
    assert!(matches!(error, SpoolError::Incomplete { offset: 700, .. }), "{error}");
    // A new process knows nothing but the file.
    fixture.spool = Spool::open(fixture.directory.path(), 1 << 20).unwrap();
    let mut transfer = fixture.begin().await.unwrap();
    assert_eq!(transfer.offset(), 700);
    transfer.append(fixture.part(700, fixture.bytes.len())).await.unwrap();
    let path = transfer.finish().await.unwrap();
    assert_eq!(fs::read(&path).unwrap(), fixture.bytes);
    assert_eq!(fixture.spool.path(&fixture.peer, &fixture.digest), Some(path));
    let receipt = fixture.spool.receive(fixture.peer, fixture.digest, 1, Room::PLENTY).await.unwrap();
    assert!(matches!(receipt, Receipt::Complete(_)));
    let other = Identity::generate().peer_id();
    assert_eq!(fixture.spool.path(&other, &fixture.digest), None, "another peer sees nothing");
    fixture.spool.remove(&fixture.peer, &fixture.digest).unwrap();
    assert_eq!(fixture.spool.path(&fixture.peer, &fixture.digest), None);
}

#[tokio::test]
async fn g2_layer_with_wrong_digest_is_deleted() {
    let fixture = fixture(1 << 20);
    let mut transfer = fixture.begin().await.unwrap();
    let mut wrong = fixture.bytes.clone();
    wrong[512] ^= 1;
    transfer.append(wrong.into()).await.unwrap();
    let error = transfer.finish().await.unwrap_err();
    assert_eq!(error.code(), Code::DigestMismatch);
    assert_eq!(fixture.begin().await.unwrap().offset(), 0);
}

#[tokio::test]
async fn v4_hostile_layer_is_deleted() {
    let mut fixture = fixture(1 << 20);
    fixture.bytes = b"not a tar file".to_vec();
    fixture.digest = Digest::of(&fixture.bytes);
    let mut transfer = fixture.begin().await.unwrap();
    transfer.append(fixture.part(0, fixture.bytes.len())).await.unwrap();
    assert!(matches!(transfer.finish().await, Err(SpoolError::Hostile { .. })));
    assert_eq!(fixture.begin().await.unwrap().offset(), 0);
}

#[tokio::test]
async fn v5_neither_size_nor_quota_can_be_passed() {
    let fixture = fixture(2048);
    let mut transfer = fixture.begin().await.unwrap();
    let size = fixture.bytes.len();
    assert!(matches!(transfer.append(vec![0; size + 1].into()).await, Err(SpoolError::TooLong { .. })));
    assert!(matches!(fixture.begin().await, Err(SpoolError::Busy { .. })));
    let other = Digest::of(b"other");
    let second = fixture.spool.receive(fixture.peer, other, 2048 - size as u64 + 1, Room::PLENTY).await;
    assert!(matches!(second, Err(SpoolError::OverQuota { .. })), "what is promised counts, not what has come");
    drop(transfer);
    let second = fixture.spool.receive(fixture.peer, other, 2048, Room::PLENTY).await;
    assert!(matches!(second, Ok(Receipt::Partial(_))));
    let huge = fixture.spool.receive(fixture.peer, fixture.digest, u64::MAX, Room::PLENTY).await;
    assert!(matches!(huge, Err(SpoolError::TooLarge { .. })));
}

#[tokio::test]
async fn old_files_are_cleaned_and_active_ones_are_not() {
    let fixture = fixture(1 << 20);
    let mut transfer = fixture.begin().await.unwrap();
    transfer.append(fixture.part(0, 10)).await.unwrap();
    let later = SystemTime::now() + Duration::from_hours(1);
    assert_eq!(fixture.spool.clean(Duration::from_mins(1), later).unwrap(), Cleaned::default());
    drop(transfer);
    assert_eq!(fixture.spool.clean(Duration::from_hours(2), later).unwrap(), Cleaned::default());
    assert_eq!(fixture.spool.clean(Duration::from_mins(1), later).unwrap(), Cleaned { files: 1, bytes: 10 });
}
