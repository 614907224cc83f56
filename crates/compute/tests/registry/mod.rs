//! A registry with one image, on the loopback address, where the engine accepts plain HTTP.

use std::{collections::HashMap, io::Read as _, sync::Arc};

use peer_proto::{deploy::RegistryReference, id::Digest};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use xtask::image::{Compression, Image};

pub(crate) struct Registry {
    pub(crate) reference: RegistryReference,
    _server: JoinSet<()>,
}

impl Registry {
    pub(crate) async fn serve(image: &Image) -> Self {
        let mut blobs = HashMap::new();
        let mut manifest = None;
        let layout = image.oci_layout(Compression::Gzip).unwrap();
        for entry in tar::Archive::new(layout.as_slice()).entries().unwrap() {
            let mut entry = entry.unwrap();
            let path = entry.path().unwrap().display().to_string();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            if path == "index.json" {
                let index: Value = serde_json::from_slice(&bytes).unwrap();
                manifest = Some(index["manifests"][0]["digest"].as_str().unwrap().to_owned());
            }
            blobs.insert(Digest::of(&bytes).to_string(), bytes);
        }
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let reference = format!("{}/hello@{}", listener.local_addr().unwrap(), manifest.unwrap());
        let mut server = JoinSet::new();
        server.spawn(accept(listener, Arc::new(blobs)));
        Self { reference: reference.parse().unwrap(), _server: server }
    }
}

async fn accept(listener: TcpListener, blobs: Arc<HashMap<String, Vec<u8>>>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let blobs = blobs.clone();
        connections.spawn(async move { drop(answer(stream, &blobs).await) });
    }
}

/// Answers one request. The engine tries TLS first: that is a line that makes no sense.
async fn answer(stream: TcpStream, blobs: &HashMap<String, Vec<u8>>) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    let (mut request, mut line) = (Vec::new(), Vec::new());
    stream.read_until(b'\n', &mut request).await?;
    let request = String::from_utf8_lossy(&request).into_owned();
    while stream.read_until(b'\n', &mut line).await? > 2 {
        line.clear();
    }
    let mut words = request.split(' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let none = Vec::new();
    let unknown = br#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#.to_vec();
    let digest = path.rsplit('/').next().unwrap_or_default();
    let (status, body) = match blobs.get(digest) {
        Some(body) => ("200 OK", body),
        None if path == "/v2/" => ("200 OK", &none),
        None => ("404 Not Found", &unknown),
    };
    let kind = if path.contains("/manifests/") {
        "application/vnd.oci.image.manifest.v1+json"
    } else {
        "application/octet-stream"
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nDocker-Content-Digest: {digest}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    if method == "GET" {
        stream.write_all(body).await?;
    }
    stream.flush().await
}
