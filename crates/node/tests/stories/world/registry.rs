//! A registry with one image, on the loopback address, where the engine accepts plain HTTP.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::Value;
use xtask::image::{Compression, Digest, Image};

/// The registry; it ends with the process of the test.
pub(crate) struct Registry {
    /// `host:port/hello@sha256:…`.
    pub(crate) reference: String,
    requests: Arc<AtomicUsize>,
}

impl Registry {
    pub(crate) fn serve(image: &Image) -> Self {
        let mut blobs = HashMap::new();
        let mut manifest = String::new();
        let layout = image.oci_layout(Compression::Gzip).unwrap();
        for entry in tar::Archive::new(layout.as_slice()).entries().unwrap() {
            let mut entry = entry.unwrap();
            let path = entry.path().unwrap().display().to_string();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            if path == "index.json" {
                let index: Value = serde_json::from_slice(&bytes).unwrap();
                index["manifests"][0]["digest"].as_str().unwrap().clone_into(&mut manifest);
            }
            blobs.insert(Digest::of(&bytes).to_string(), bytes);
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let reference = format!("{}/hello@{manifest}", listener.local_addr().unwrap());
        let requests = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&requests);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                counted.fetch_add(1, Ordering::SeqCst);
                // A connection that breaks off is the engine's own decision.
                drop(answer(stream, &blobs));
            }
        });
        Self { reference, requests }
    }

    /// How often anybody has connected.
    pub(crate) fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

/// Answers one request. The engine tries TLS first: that is a line that makes no sense.
fn answer(stream: TcpStream, blobs: &HashMap<String, Vec<u8>>) -> std::io::Result<()> {
    stream.set_read_timeout(Some(super::PATIENCE))?;
    let mut stream = BufReader::new(stream);
    let (mut request, mut line) = (Vec::new(), Vec::new());
    stream.read_until(b'\n', &mut request)?;
    let request = String::from_utf8_lossy(&request).into_owned();
    while request.contains("HTTP/1.1") && stream.read_until(b'\n', &mut line)? > 2 {
        line.clear();
    }
    let mut words = request.split(' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let digest = path.rsplit('/').next().unwrap_or_default();
    let unknown = br#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#;
    let (status, body) = match blobs.get(digest) {
        Some(body) => ("200 OK", body.as_slice()),
        None if path == "/v2/" => ("200 OK", &[][..]),
        None => ("404 Not Found", &unknown[..]),
    };
    let manifests = path.contains("/manifests/");
    let kind = if manifests { "application/vnd.oci.image.manifest.v1+json" } else { "application/octet-stream" };
    let length = body.len();
    let head = format!("HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n");
    let stream = stream.get_mut();
    stream.write_all(format!("{head}Docker-Content-Digest: {digest}\r\nConnection: close\r\n\r\n").as_bytes())?;
    if method == "GET" { stream.write_all(body) } else { Ok(()) }
}
