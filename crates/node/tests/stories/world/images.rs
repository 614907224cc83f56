//! Images made of bytes, their files, and the engine's own command line for looking at it from outside.

use std::path::PathBuf;
use std::process::Command;

use tempfile::TempDir;
use xtask::examples;
use xtask::image::{Builder, Compression, Image, Layer};

use super::machine::Output;
use super::salt;

/// The web program of the examples, under a digest that no other test has.
pub(crate) fn hello() -> Image {
    salted("hello").build().unwrap()
}

/// The hostile guest of the examples.
pub(crate) fn probe() -> Image {
    salted("probe").build().unwrap()
}

/// One of the example programs in an image that can be changed further.
pub(crate) fn salted(name: &str) -> Builder {
    let program = std::fs::read(examples::path(name).unwrap()).unwrap();
    let base = Layer::new().directory("/tmp").directory("/etc").directory("/data").directory("/usr").directory("/dev");
    let builder =
        Builder::new(&format!("{name}:test")).layer(base.directory("/proc")).binary(&format!("/{name}"), &program);
    builder.layer(Layer::new().file("/salt", salt().as_bytes(), 0o644)).command(&[format!("/{name}")]).expose(8080)
}

/// A shell that runs this script.
pub(crate) fn shell(script: &str) -> Image {
    let program = std::fs::read("/bin/busybox").expect("busybox-static is installed");
    let names = ["sh", "sleep", "nc", "printf", "cat", "seq"];
    let layer = Layer::new().file("/bin/busybox", &program, 0o755).directory("/tmp").directory("/etc");
    let layer = names.iter().fold(layer, |layer, name| layer.link(&format!("/bin/{name}"), "busybox"));
    let salt = Layer::new().file("/salt", salt().as_bytes(), 0o644);
    Builder::new("shell:test").layer(layer).layer(salt).command(&["/bin/sh", "-c", script]).build().unwrap()
}

/// A web server as many images have one: it begins as root, gives files to its worker, and becomes that user.
pub(crate) fn ordinary() -> Image {
    shell(
        "/bin/busybox mkdir -p /run/site && echo hello > /run/site/index.html && \
         /bin/busybox chown -R 65534:65534 /run/site && exec /bin/busybox httpd -f -u 65534:65534 -p 8080 -h /run/site",
    )
}

/// So many bytes that no other call gives.
pub(crate) fn noise(length: usize) -> Vec<u8> {
    let seed: Vec<u8> = salt().into_bytes();
    let mut state = seed.iter().fold(1_u64, |state, byte| state.wrapping_mul(0x100_0000_01b3) ^ u64::from(*byte));
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(length).collect()
}

/// An image in the local engine under a name of its own, removed at the end.
pub(crate) struct Loaded {
    pub(crate) name: String,
    pub(crate) id: String,
}

impl Loaded {
    pub(crate) fn load(image: &Image, files: &Files) -> Self {
        let mut named = image.clone();
        named.name = format!("peer-test-{}:1", salt());
        docker(&["load", "--input", &files.write(&named)]);
        Self { name: named.name, id: image.id().to_string() }
    }

    pub(crate) fn is_there(&self) -> bool {
        docker_try(&["image", "inspect", &self.name]).status == 0
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        docker_try(&["rmi", "--force", &self.name]);
    }
}

/// A directory of files to deploy.
pub(crate) struct Files {
    directory: TempDir,
}

impl Files {
    pub(crate) fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    /// Writes the image as a Docker archive and gives its path.
    pub(crate) fn write(&self, image: &Image) -> String {
        self.bytes(&format!("{}.tar", image.id().hex()), &image.docker_archive().unwrap())
    }

    /// Writes the image as an OCI layout in a tar.
    pub(crate) fn write_oci(&self, image: &Image, compression: Compression) -> String {
        self.bytes(&format!("{}-oci.tar", image.id().hex()), &image.oci_layout(compression).unwrap())
    }

    /// Writes the image as an OCI layout in a directory.
    pub(crate) fn write_oci_directory(&self, image: &Image) -> String {
        let path = self.directory.path().join(format!("{}-oci", image.id().hex()));
        let layout = image.oci_layout(Compression::Gzip).unwrap();
        tar::Archive::new(layout.as_slice()).unpack(&path).unwrap();
        path.display().to_string()
    }

    /// Writes a file and gives its path.
    pub(crate) fn bytes(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.path(name);
        std::fs::write(&path, bytes).unwrap();
        path.display().to_string()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

/// Runs the engine's own command line, which must succeed.
#[track_caller]
pub(crate) fn docker(arguments: &[&str]) -> String {
    docker_try(arguments).success().stdout
}

/// Runs the engine's own command line.
pub(crate) fn docker_try(arguments: &[&str]) -> Output {
    Output::of(Command::new("docker").args(arguments))
}
