//! The image of the program that runs inside containers' networks: brought into the engine when it is first needed, and
//! taken out when another version of the program has taken its place.

use std::{collections::HashMap, sync::Arc};

use bollard::query_parameters::ListImagesOptionsBuilder;
use peer_proto::{
    code::{Code, Problem},
    id::Digest,
};
use tokio::sync::Mutex;

use super::{DockerEngine, LOOK_UP, call};
use crate::{
    engine::EngineError,
    guest_program::{GuestProgram, LABEL},
};

#[derive(Debug, Default, Clone)]
pub(super) struct GuestImage {
    program: Option<GuestProgram>,
    /// Whether it has been brought and others have been looked for; held while that is done.
    brought: Arc<Mutex<bool>>,
}

impl GuestImage {
    pub(super) fn of(program: GuestProgram) -> Self {
        Self { program: Some(program), ..Self::default() }
    }

    pub(super) fn another(&self) -> Self {
        self.clone()
    }
}

impl DockerEngine {
    /// The program of ours that runs inside containers' networks, if there is one.
    pub fn guest_program(&self) -> Option<&GuestProgram> {
        self.guest.program.as_ref()
    }

    /// The image of the program that runs inside containers' networks, brought into the engine if it lacks it.
    pub async fn guest_image(&self) -> Result<Digest, EngineError> {
        let program = self.guest_program().ok_or_else(|| {
            let message = "there is no program to run inside containers' networks; install peer-guest beside peerd, or set \
                           `guest_program` to where it is";
            EngineError::Problem(Problem::new(Code::Internal, message))
        })?;
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
