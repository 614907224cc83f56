//! Images: list, look up, load, export, pull, remove.

use std::{collections::HashMap, str::FromStr, sync::PoisonError, time::Duration};

use bollard::{
    models::{CreateImageInfo, ImageInspect},
    query_parameters::{
        CreateImageOptionsBuilder, ImportImageOptionsBuilder, ListImagesOptionsBuilder, RemoveImageOptionsBuilder,
    },
};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream, stream::BoxStream};
use peer_proto::{deploy::RegistryReference, id::Digest};
use tokio::time::timeout;

use super::{CHANGE, DockerEngine, LOOK_UP, call, failure};
use crate::{
    engine::{ArchiveStream, EngineError, ExportStream, ImageChain, ImageFacts, PullProgress, quote},
    image::configuration::Wishes,
};

/// A load may run this long, and as much longer as its size needs at the slowest bearable rate.
const LOAD: Duration = Duration::from_mins(5);
const LOAD_BYTES_PER_SECOND_MIN: u64 = 1 << 20;
/// A registry or a disk that is silent for this long is given up.
const IDLE: Duration = Duration::from_mins(2);
/// A pull as a whole.
const PULL: Duration = Duration::from_hours(1);

type Pieces = BoxStream<'static, Result<Bytes, bollard::errors::Error>>;

impl DockerEngine {
    pub(super) async fn list_chains(&self) -> Result<Vec<ImageChain>, EngineError> {
        let options = ListImagesOptionsBuilder::default().all(true).build();
        let images = call("list images", LOOK_UP, self.client()?.list_images(Some(options))).await?;
        let mut chains = HashMap::new();
        for image in images {
            let Ok(digest) = Digest::from_str(&image.id) else { continue };
            let known = self.chains.lock().unwrap_or_else(PoisonError::into_inner).get(&digest).cloned();
            let layers = match known {
                Some(layers) => layers,
                // Removed since the listing: it counts as absent.
                None => match self.image_facts(&image.id).await? {
                    Some(facts) => facts.layers,
                    None => continue,
                },
            };
            chains.insert(digest, layers);
        }
        (*self.chains.lock().unwrap_or_else(PoisonError::into_inner)).clone_from(&chains);
        Ok(chains.into_iter().map(|(digest, layers)| ImageChain { digest, layers }).collect())
    }

    pub(super) async fn image_facts(&self, name: &str) -> Result<Option<ImageFacts>, EngineError> {
        check_name(name)?;
        let inspected = timeout(LOOK_UP, self.client()?.inspect_image(name)).await;
        match inspected.map_err(|_| EngineError::TimedOut { operation: "inspect image".into() })? {
            Ok(report) => facts_of(report).map(Some),
            Err(error) if failure::status(&error) == Some(404) => Ok(None),
            Err(error) => Err(failure::translate("inspect image", error)),
        }
    }

    /// Loads an archive: a `docker-archive` tar of `size` bytes.
    pub async fn load_archive(&self, archive: ArchiveStream, size: u64) -> Result<(), EngineError> {
        let within = LOAD + Duration::from_secs(size / LOAD_BYTES_PER_SECOND_MIN);
        let options = ImportImageOptionsBuilder::default().quiet(true).build();
        let mut answers = self.client()?.import_image_stream(options, archive, None);
        let all = async {
            while answers.try_next().await?.is_some() {}
            Ok(())
        };
        call("load image", within, all).await.map_err(|error| match error {
            EngineError::Failed { message } | EngineError::Refused { message } => load_failure(message),
            other => other,
        })
    }

    pub(super) fn export_image(&self, name: &str) -> ExportStream {
        let client = match check_name(name).and_then(|()| self.client()) {
            Ok(client) => client,
            Err(error) => return stream::once(async { Err(error) }).boxed(),
        };
        let shown = quote(name);
        let pieces = client.export_image(name).boxed();
        stream::unfold(Some(pieces), move |pieces| next_piece(pieces, shown.clone())).boxed()
    }

    pub(super) async fn pull_image(
        &self,
        reference: &RegistryReference,
        size_max: u64,
        progress: &mut (dyn FnMut(PullProgress) + Send),
    ) -> Result<Digest, EngineError> {
        let name = reference.to_string();
        let before = self.list_chains().await?;
        let options = CreateImageOptionsBuilder::default().from_image(&name).build();
        let mut answers = self.client()?.create_image(Some(options), None, None);
        let absent = || EngineError::NoSuchImage { image: quote(&name) };
        let mut layers = Layers::default();
        let fetch = async {
            loop {
                let step = timeout(IDLE, answers.try_next()).await;
                match step.map_err(|_| EngineError::TimedOut { operation: "pull image".into() })? {
                    Ok(Some(info)) => {
                        let state = layers.note(info);
                        if state.total.max(state.received) > size_max {
                            return Err(EngineError::ImageTooLarge { size_max });
                        }
                        progress(state);
                    }
                    Ok(None) => return Ok(()),
                    Err(error) if failure::status(&error) == Some(404) => return Err(absent()),
                    Err(error) => {
                        return Err(match failure::translate("pull image", error) {
                            EngineError::Failed { message } if message.contains("manifest unknown") => absent(),
                            EngineError::Failed { message } if message.contains("verification failed") => {
                                EngineError::InvalidImage { message }
                            }
                            other => other,
                        });
                    }
                }
            }
        };
        timeout(PULL, fetch).await.map_err(|_| EngineError::TimedOut { operation: "pull image".into() })??;
        let facts = self.image_facts(&name).await?.ok_or_else(absent)?;
        if facts.size > size_max {
            if !before.iter().any(|known| known.digest == facts.digest) {
                self.delete_image(facts.digest).await?;
            }
            return Err(EngineError::ImageTooLarge { size_max });
        }
        Ok(facts.digest)
    }

    pub(super) async fn delete_image(&self, image: Digest) -> Result<(), EngineError> {
        let name = image.to_string();
        let Some(facts) = self.image_facts(&name).await? else { return Ok(()) };
        // We load without names. Whoever named it since wants to keep it, and removal by digest would take the name too.
        if let Some(tag) = facts.names.first() {
            return Err(EngineError::InUse { message: format!("the image is named {}", quote(tag)) });
        }
        let options = RemoveImageOptionsBuilder::default().noprune(true).build();
        let removal = self.client()?.remove_image(&name, Some(options), None);
        match timeout(CHANGE, removal).await.map_err(|_| EngineError::TimedOut { operation: "remove image".into() })? {
            Ok(_) => Ok(()),
            Err(error) if failure::status(&error) == Some(404) => Ok(()),
            Err(error) => Err(failure::translate("remove image", error)),
        }
    }
}

/// The pieces of an image's tar, each with a deadline.
async fn next_piece(pieces: Option<Pieces>, image: String) -> Option<(Result<Bytes, EngineError>, Option<Pieces>)> {
    let mut pieces = pieces?;
    match timeout(IDLE, pieces.next()).await {
        Err(_) => Some((Err(EngineError::TimedOut { operation: "export image".into() }), None)),
        Ok(None) => None,
        Ok(Some(Ok(piece))) => Some((Ok(piece), Some(pieces))),
        // Docker answers 500 for an unknown name here, other engines 404.
        Ok(Some(Err(error))) => {
            let absent = failure::status(&error) == Some(404) || error.to_string().contains("No such image");
            let error =
                if absent { EngineError::NoSuchImage { image } } else { failure::translate("export image", error) };
            Some((Err(error), None))
        }
    }
}

/// A name goes into the path of a request: nothing that could lead elsewhere may be in it.
fn check_name(name: &str) -> Result<(), EngineError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-/:@".contains(&b);
    let valid = (1..=512).contains(&name.len())
        && name.bytes().all(plain)
        && name.as_bytes()[0].is_ascii_alphanumeric()
        && name.split('/').all(|part| !part.is_empty() && part != "." && part != "..");
    if valid {
        Ok(())
    } else {
        Err(EngineError::Refused { message: format!("'{}' is not an image's name", quote(name)) })
    }
}

fn facts_of(report: ImageInspect) -> Result<ImageFacts, EngineError> {
    let id = report.id.unwrap_or_default();
    let digest = id.parse().map_err(|_| EngineError::failed(&format!("'{id}' is not an image's digest")))?;
    let layers = report.root_fs.and_then(|files| files.layers).unwrap_or_default();
    let layers = layers.iter().map(|layer| layer.parse()).collect::<Result<_, _>>();
    let config = report.config.unwrap_or_default();
    Ok(ImageFacts {
        digest,
        layers: layers.map_err(|_| EngineError::failed("an image's layer has no digest"))?,
        architecture: report.architecture.unwrap_or_default(),
        size: report.size.and_then(|size| size.try_into().ok()).unwrap_or_default(),
        wishes: Wishes {
            system: report.os.unwrap_or_default(),
            user: config.user.unwrap_or_default(),
            command: config.cmd.unwrap_or_default(),
            entrypoint: config.entrypoint.unwrap_or_default(),
            working_directory: config.working_dir.unwrap_or_default(),
            volumes: config.volumes.unwrap_or_default(),
            exposed_ports: config.exposed_ports.unwrap_or_default(),
        },
        names: report.repo_tags.unwrap_or_default(),
        references: report.repo_digests.unwrap_or_default(),
    })
}

/// Why a load failed, from the engine's words: it gives no codes.
fn load_failure(message: String) -> EngineError {
    let says = |words: &[&str]| words.iter().any(|word| message.contains(word));
    if says(&["signal: ", "cannot allocate memory", "too many open files", "input/output error", "read-only file"]) {
        EngineError::Failed { message }
    } else if says(&["rocessing tar file", "ApplyLayer"]) {
        // The layer is here, and what it holds cannot be unpacked: the file that is not there is one of the image's.
        EngineError::InvalidImage { message }
    } else if says(&["no such file or directory", "not found", "does not exist"]) {
        EngineError::MissingLayer { message }
    } else if says(&["invalid diffID", "invalid", "archive/tar", "unexpected EOF", "mismatch"]) {
        EngineError::InvalidImage { message }
    } else {
        EngineError::Failed { message }
    }
}

/// What the layers of a pull report, each for itself.
#[derive(Debug, Default)]
struct Layers(HashMap<String, PullProgress>);

impl Layers {
    fn note(&mut self, info: CreateImageInfo) -> PullProgress {
        if let (Some(id), Some("Downloading"), Some(detail)) = (info.id, info.status.as_deref(), info.progress_detail) {
            let number = |value: Option<i64>| value.and_then(|value| value.try_into().ok()).unwrap_or(0);
            self.0.insert(id, PullProgress { received: number(detail.current), total: number(detail.total) });
        }
        let sum = |each: fn(&PullProgress) -> u64| self.0.values().map(each).fold(0, u64::saturating_add);
        PullProgress { received: sum(|layer| layer.received), total: sum(|layer| layer.total) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for name in ["../containers/json", "a/../../b", "a?b", "-a", "/a", "a//b", "", "a%2fb", "a b", "a#b"] {
            assert!(check_name(name).is_err(), "{name}");
        }
        for name in ["hello:1", "registry.example:5000/a/b@sha256:00", "sha256:00"] {
            assert!(check_name(name).is_ok(), "{name}");
        }
    }

    #[test]
    fn v4_a_layer_that_cannot_be_unpacked_is_not_a_missing_one() {
        let failure = |message: &str| load_failure(message.to_owned());
        let link = "Error processing tar file(exit status 1): link /nothing /a: no such file or directory";
        assert!(matches!(failure(link), EngineError::InvalidImage { .. }));
        let absent = "open /var/lib/docker/tmp/docker-import-1/0a.tar: no such file or directory";
        assert!(matches!(failure(absent), EngineError::MissingLayer { .. }));
        let killed = "Error processing tar file(signal: killed): ";
        assert!(matches!(failure(killed), EngineError::Failed { .. }));
    }

    #[test]
    fn pull_progress_adds_up_the_layers() {
        let step = |id: &str, current, total| CreateImageInfo {
            id: Some(id.into()),
            status: Some("Downloading".into()),
            progress_detail: Some(bollard::models::ProgressDetail { current: Some(current), total: Some(total) }),
            ..CreateImageInfo::default()
        };
        let mut layers = Layers::default();
        layers.note(step("a", 1, 10));
        layers.note(step("b", 2, 20));
        assert_eq!(layers.note(step("a", 5, 10)), PullProgress { received: 7, total: 30 });
    }
}
