#![expect(clippy::unwrap_used, reason = "tests")]

use peer_proto::identity::Identity;

use super::*;

const SOON: Duration = Duration::from_secs(20);

struct Fixture {
    transfers: Arc<Transfers>,
    owner: PeerId,
    offer: ImageOffer,
    layers: Vec<Digest>,
    bytes: Vec<u8>,
    _directory: tempfile::TempDir,
}

fn fixture() -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(3);
    archive.append_data(&mut header, "a", b"abc".as_slice()).unwrap();
    let bytes = archive.into_inner().unwrap();
    let spool = Spool::open(directory.path(), 1 << 20).unwrap();
    let transfers = Transfers { spool, stock: Stock::default(), patience: SOON, state: Mutex::default() };
    Fixture {
        transfers: Arc::new(transfers),
        owner: Identity::generate().peer_id(),
        offer: ImageOffer { configuration: Vec::new(), layer_sizes: vec![bytes.len() as u64] },
        layers: vec![Digest::of(&bytes)],
        bytes,
        _directory: directory,
    }
}

fn request(n: u8) -> RequestHash {
    RequestHash([n; 32])
}

impl Fixture {
    fn expect(&self, owner: PeerId, n: u8) -> Result<Option<Arc<Transfer>>, Problem> {
        self.transfers.attend(request(n));
        self.transfers.expect(owner, request(n), &self.offer, &self.layers)
    }

    async fn claim(&self, transfer: &Transfer) -> Option<SpoolTransfer> {
        self.transfers
            .claim(transfer, self.owner, self.layers[0], self.bytes.len() as u64, spool::Room::PLENTY)
            .await
            .unwrap()
    }

    fn part(&self, from: usize, to: usize) -> Bytes {
        Bytes::copy_from_slice(&self.bytes[from..to])
    }
}

#[test]
fn v5_one_owner_cannot_take_every_place() {
    let fixture = fixture();
    for n in 0..16 {
        assert!(fixture.expect(fixture.owner, n).unwrap().is_some());
    }
    assert_eq!(fixture.expect(fixture.owner, 16).unwrap_err().code, Code::NoCapacity);
    assert!(fixture.expect(fixture.owner, 15).unwrap().is_some(), "it has its place already");
    assert!(fixture.expect(Identity::generate().peer_id(), 17).unwrap().is_some());
    fixture.transfers.leave(request(0));
    assert!(fixture.transfers.find(request(0)).is_none(), "nobody is there any more");
    assert!(fixture.expect(fixture.owner, 16).unwrap().is_some());
}

#[tokio::test]
async fn a_transfer_ends_with_its_sender_and_whoever_waits_sees_it() {
    let fixture = fixture();
    let (waiting, transfer) = (fixture.transfers.wait(request(0)), fixture.expect(fixture.owner, 0).unwrap().unwrap());
    fixture.transfers.leave(request(0));
    assert!(transfer.progresses(SOON).await, "it is woken");
    let expected = fixture.transfers.expect(fixture.owner, request(0), &fixture.offer, &fixture.layers);
    assert!(expected.unwrap().is_none(), "and learns that nothing more will come");
    drop(waiting);
    assert!(fixture.transfers.find(request(0)).is_none());
    // Whoever waits may pause while the sender is there.
    fixture.expect(fixture.owner, 1).unwrap();
    drop(fixture.transfers.wait(request(1)));
    assert!(fixture.transfers.find(request(1)).is_some());
    fixture.transfers.leave(request(1));
    assert!(fixture.transfers.find(request(1)).is_none());
}

#[tokio::test]
async fn a_layer_that_another_request_sends_is_waited_for() {
    let fixture = fixture();
    let [one, two] = [0, 1].map(|n| fixture.expect(fixture.owner, n).unwrap().unwrap());
    let mut first = fixture.claim(&one).await.unwrap();
    first.append(fixture.part(0, 700)).await.unwrap();
    let (second, ()) = tokio::join!(fixture.claim(&two), async { drop(first) });
    let mut second = second.unwrap();
    assert_eq!(second.offset(), 700, "it goes on where the other stopped");
    second.append(fixture.part(700, fixture.bytes.len())).await.unwrap();
    let (first, stored) = tokio::join!(fixture.claim(&one), second.finish());
    assert!(first.is_none() && stored.is_ok(), "there is nothing left to send");
}

#[tokio::test]
async fn what_has_come_by_another_way_need_not_be_sent() {
    let fixture = fixture();
    let transfer = fixture.expect(fixture.owner, 0).unwrap().unwrap();
    let other = fixture.claim(&transfer).await.unwrap();
    fixture.transfers.done(request(0));
    assert!(fixture.claim(&transfer).await.is_none());
    drop(other);
    assert!(fixture.transfers.needed_elsewhere(fixture.owner, &fixture.layers[0], request(1)));
    assert!(!fixture.transfers.needed_elsewhere(fixture.owner, &fixture.layers[0], request(0)));
}
