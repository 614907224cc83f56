//! Images for the runs: the example web program, with layers of random bytes above it.

use std::fs;

use xtask::{
    examples,
    image::{Builder, Layer},
};

use crate::{Failure, chance::Chance};

/// Port that the example program listens on.
pub(crate) const PORT: u16 = 8080;

/// An archive, and the size of each of its layers from the bottom up.
pub(crate) struct Archive {
    pub(crate) bytes: Vec<u8>,
    pub(crate) layers: Vec<usize>,
    /// The image's id (`sha256:…`).
    pub(crate) id: String,
}

/// The example program below a layer of random bytes for each size (bytes), drawn from its own seed.
pub(crate) fn archive(name: &str, layers: &[(u64, usize)]) -> Result<Archive, Failure> {
    let program = fs::read(examples::path("hello")?)?;
    let mut builder = Builder::new(name).binary("/hello", &program);
    for (index, (seed, size)) in layers.iter().enumerate() {
        let data = Chance::new(*seed).bytes(*size);
        builder = builder.layer(Layer::new().file(&format!("/data/{index}"), &data, 0o644));
    }
    let image = builder.command(&["/hello"]).expose(PORT).build()?;
    let layers = image.layers.iter().map(|(_, tar)| tar.len()).collect();
    Ok(Archive { bytes: image.docker_archive()?, layers, id: image.id().to_string() })
}
