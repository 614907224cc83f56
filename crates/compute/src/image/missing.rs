//! Which layers of an image must travel. Pure.

use std::{collections::HashSet, hash::BuildHasher};

use peer_proto::id::Digest;

use crate::engine::ImageChain;

/// The layers that must come from the image's owner, lowest first, each once.
///
/// A layer need not come if some image of the engine begins with the same layers up to it, and its owner has supplied
/// every one of them before (`possessed`): who knows no more than a digest must not get at the bytes behind it.
pub fn missing(images: &[ImageChain], wanted: &[Digest], possessed: &HashSet<Digest, impl BuildHasher>) -> Vec<Digest> {
    let mut seen = HashSet::new();
    wanted[present(images, wanted, possessed)..].iter().filter(|layer| seen.insert(**layer)).copied().collect()
}

/// How many of the lowest layers need not come.
pub fn present(images: &[ImageChain], wanted: &[Digest], possessed: &HashSet<Digest, impl BuildHasher>) -> usize {
    let common = |chain: &ImageChain| chain.layers.iter().zip(wanted).take_while(|(one, other)| one == other).count();
    let in_engine = images.iter().map(common).max().unwrap_or(0);
    wanted[..in_engine].iter().take_while(|layer| possessed.contains(layer)).count()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn layer(n: u8) -> Digest {
        Digest([n; 32])
    }

    fn chain(layers: &[u8]) -> ImageChain {
        ImageChain { digest: layer(0), layers: layers.iter().copied().map(layer).collect() }
    }

    fn run(images: &[&[u8]], wanted: &[u8], possessed: &[u8]) -> Vec<Digest> {
        let images: Vec<_> = images.iter().map(|layers| chain(layers)).collect();
        let wanted: Vec<_> = wanted.iter().copied().map(layer).collect();
        missing(&images, &wanted, &possessed.iter().copied().map(layer).collect::<HashSet<_>>())
    }

    #[test]
    fn only_the_changed_layer_travels() {
        assert_eq!(run(&[&[1, 2, 3], &[9]], &[1, 2, 4], &[1, 2, 3]), [layer(4)]);
        assert_eq!(run(&[&[1, 2, 3]], &[1, 2], &[1, 2, 3]), []);
        assert_eq!(run(&[], &[1, 2, 1], &[1, 2]), [layer(1), layer(2)]);
        // The same layer elsewhere in a chain is of no use to the engine.
        assert_eq!(run(&[&[2, 1]], &[1, 2], &[1, 2]), [layer(1), layer(2)]);
    }

    #[test]
    fn g1_a_layer_cannot_be_claimed_by_its_digest_alone() {
        assert_eq!(run(&[&[1, 2, 3]], &[1, 2, 3], &[]), [layer(1), layer(2), layer(3)]);
        assert_eq!(run(&[&[1, 2, 3]], &[1, 2, 3], &[1, 3]), [layer(2), layer(3)]);
    }

    proptest! {
        #[test]
        fn what_does_not_travel_is_in_the_engine_and_possessed(
            images in proptest::collection::vec(proptest::collection::vec(0_u8..4, 0..5), 0..4),
            wanted in proptest::collection::vec(0_u8..4, 1..6),
            possessed in proptest::collection::hash_set(0_u8..4, 0..4),
        ) {
            let images: Vec<_> = images.iter().map(|layers| chain(layers)).collect();
            let wanted: Vec<_> = wanted.into_iter().map(layer).collect();
            let possessed: HashSet<Digest> = possessed.into_iter().map(layer).collect();
            let present = present(&images, &wanted, &possessed);
            prop_assert!(wanted[..present].iter().all(|layer| possessed.contains(layer)));
            prop_assert!(present == 0 || images.iter().any(|image| image.layers.starts_with(&wanted[..present])));
            let missing = missing(&images, &wanted, &possessed);
            prop_assert!(wanted[present..].iter().all(|layer| missing.contains(layer)));
        }
    }
}
