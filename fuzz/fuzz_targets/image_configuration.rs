//! The configuration of an image that a stranger offers.
#![no_main]

use libfuzzer_sys::fuzz_target;
use peer_compute::image::configuration::{parse, parse_offer};
use peer_proto::{
    deploy::{IMAGE_CONFIGURATION_MAX, ImageOffer, LAYER_SIZE_MAX, LAYERS_MAX},
    id::Digest,
};

fuzz_target!(|data: &[u8]| {
    let Ok(configuration) = parse(data) else { return };
    assert!(data.len() <= IMAGE_CONFIGURATION_MAX);
    assert_eq!(configuration.digest, Digest::of(data));
    let count = configuration.layers.len();
    assert!((1..=LAYERS_MAX).contains(&count));
    let offer = |layer_sizes| ImageOffer { configuration: data.to_vec(), layer_sizes };
    assert_eq!(parse_offer(&offer(vec![1; count])), Ok(configuration));
    assert!(parse_offer(&offer(vec![1; count + 1])).is_err());
    assert!(parse_offer(&offer(vec![LAYER_SIZE_MAX + 1; count])).is_err());
});
