//! An image archive on disk, in either of the two formats.
#![no_main]

use std::io::{Read as _, Write as _};

use libfuzzer_sys::fuzz_target;
use peer_compute::image::{
    archive::{Archive, Selection},
    configuration::parse_offer,
};
use peer_proto::id::Digest;

fuzz_target!(|data: &[u8]| {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(data).expect("the file takes it");
    let Ok(archive) = Archive::open(file.path(), &Selection::default()) else { return };
    let offer = archive.offer();
    assert_eq!(offer.digest(), archive.digest());
    let configuration = parse_offer(&offer).expect("what an archive offers is a sound offer");
    assert_eq!(configuration.architecture, archive.architecture());
    for (index, layer) in archive.layers().iter().enumerate() {
        let mut bytes = Vec::new();
        let Ok(reader) = archive.open_layer(index) else { continue };
        if reader.take(layer.size + 1).read_to_end(&mut bytes).is_ok() && layer.size > 0 {
            assert_eq!((bytes.len() as u64, Digest::of(&bytes)), (layer.size, layer.diff_id));
        }
    }
    assert!(archive.open_layer(archive.layers().len()).is_err());
});
