//! The image of the program that runs inside containers' networks: brought into the engine when it is first needed, and
//! taken out when another version of the program has taken its place.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use bollard::query_parameters::ListImagesOptionsBuilder;
use peer_proto::{
    code::{Code, Problem},
    id::Digest,
};
use tokio::{
    sync::{Mutex, OnceCell},
    task::spawn_blocking,
};

use super::{DockerEngine, LOOK_UP, call};
use crate::{
    engine::EngineError,
    guest_program::{GuestProgram, LABEL},
};

/// The program and its image. Clones share what is known of them.
#[derive(Debug, Default, Clone)]
pub(super) struct GuestImage {
    path: Option<PathBuf>,
    /// The program, once it has been needed.
    program: Arc<OnceCell<GuestProgram>>,
    /// Whether it has been brought and others have been looked for; held while that is done.
    brought: Arc<Mutex<bool>>,
}

impl GuestImage {
    pub(super) fn at(path: &Path) -> Self {
        Self { path: Some(path.to_owned()), ..Self::default() }
    }
}

impl DockerEngine {
    /// The program of ours that runs inside containers' networks, read when it is first asked for.
    pub async fn guest_program(&self) -> Result<&GuestProgram, EngineError> {
        let path = self.guest.path.as_deref().ok_or_else(|| {
            let message = "there is no program to run inside containers' networks; install peer-guest beside peerd, or set \
                           `guest_program` to where it is";
            EngineError::Problem(Problem::new(Code::Internal, message))
        })?;
        let read = || async {
            let path = path.to_owned();
            let read = spawn_blocking(move || GuestProgram::read(&path)).await;
            let read = read.map_err(|error| EngineError::failed(&error.to_string()))?;
            read.map_err(|error| EngineError::Problem(error.problem()))
        };
        self.guest.program.get_or_try_init(read).await
    }

    /// The image of the program that runs inside containers' networks, brought into the engine if it lacks it.
    pub async fn guest_image(&self) -> Result<Digest, EngineError> {
        let program = self.guest_program().await?;
        let mut brought = self.guest.brought.lock().await;
        let image = program.image();
        // It is looked for each time: nothing keeps its engine's owner from removing it.
        if self.image_facts(&image.to_string()).await?.is_none() {
            let (archive, size) = program.archive().map_err(|error| EngineError::Problem(error.problem()))?;
            self.load_archive(archive, size).await?;
            if self.image_facts(&image.to_string()).await?.is_none() {
                return Err(EngineError::failed("it did not keep the image of the program for containers' networks"));
            }
        }
        if !*brought {
            *brought = true;
            self.remove_former(image).await;
        }
        Ok(image)
    }

    /// Removes images of other versions that no container uses. A daemon of another version that shares the engine brings
    /// its own again when it needs it.
    async fn remove_former(&self, present: Digest) {
        let removed = async {
            let filters = HashMap::from([("label", vec![LABEL])]);
            let options = ListImagesOptionsBuilder::default().filters(&filters).build();
            for image in call("list images", LOOK_UP, self.client()?.list_images(Some(options))).await? {
                let Ok(digest) = image.id.parse::<Digest>() else { continue };
                // The label alone proves nothing: what somebody has named or fetched is his.
                let named = image.repo_tags.iter().chain(&image.repo_digests).any(|name| !name.starts_with("<none>"));
                if digest == present || named {
                    continue;
                }
                match self.delete_image(digest).await {
                    Err(EngineError::InUse { .. } | EngineError::Refused { .. }) => {}
                    other => other?,
                }
            }
            Ok::<(), EngineError>(())
        };
        if let Err(error) = removed.await {
            tracing::warn!(%error, "former images of the program for containers' networks could not be removed");
        }
    }
}
