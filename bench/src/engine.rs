//! The container engine as the comparison: its own HTTP interface over its socket, and nothing of ours in between.

use serde_json::{Value, json};

use crate::{Failure, http};

/// A Docker Engine.
pub(crate) struct Engine {
    socket: String,
}

/// What to create: configuration and host configuration of a container that exists.
pub(crate) struct Recipe(Value);

impl Engine {
    pub(crate) fn new(socket: &str) -> Self {
        Self { socket: socket.to_owned() }
    }

    fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value, Failure> {
        let answer = http::connect_unix(&self.socket)?.send_json(method, path, body)?;
        if answer.status >= 400 {
            let text = String::from_utf8_lossy(&answer.body);
            return Err(format!("the engine answered {} to {method} {path}: {}", answer.status, text.trim()).into());
        }
        Ok(if answer.body.is_empty() { Value::Null } else { serde_json::from_slice(&answer.body)? })
    }

    /// How to make another container that is like this one, but belongs to nobody.
    pub(crate) fn recipe(&self, container: &str) -> Result<Recipe, Failure> {
        let facts = self.call("GET", &format!("/containers/{container}/json"), None)?;
        let mut body = facts["Config"].clone();
        body["HostConfig"] = facts["HostConfig"].clone();
        body["Labels"] = json!({});
        Ok(Recipe(body))
    }

    /// Creates and starts a container.
    pub(crate) fn run(&self, name: &str, recipe: &Recipe) -> Result<(), Failure> {
        self.call("POST", &format!("/containers/create?name={name}"), Some(&recipe.0))?;
        self.call("POST", &format!("/containers/{name}/start"), None).map(drop)
    }

    /// Ends and removes a container.
    pub(crate) fn remove(&self, name: &str) -> Result<(), Failure> {
        self.call("DELETE", &format!("/containers/{name}?force=true&v=true"), None).map(drop)
    }

    /// The first process of a running container.
    pub(crate) fn process(&self, container: &str) -> Result<u32, Failure> {
        let facts = self.call("GET", &format!("/containers/{container}/json"), None)?;
        let process = facts["State"]["Pid"].as_u64().filter(|process| *process != 0);
        Ok(u32::try_from(process.ok_or("the container does not run")?)?)
    }

    /// Names of all containers that carry this label.
    pub(crate) fn labelled(&self, label: &str, value: &str) -> Result<Vec<String>, Failure> {
        let containers = self.all()?;
        let ours = containers.iter().filter(|container| container["Labels"][label] == value);
        Ok(ours.map(|container| container["Names"][0].as_str().unwrap_or_default().to_owned()).collect())
    }

    /// How many containers run that do not carry this label.
    pub(crate) fn running_without(&self, label: &str, value: &str) -> Result<usize, Failure> {
        let foreign = |one: &&Value| one["State"] == "running" && one["Labels"][label] != value;
        Ok(self.all()?.iter().filter(foreign).count())
    }

    /// Whether the image is still in the engine.
    pub(crate) fn has_image(&self, image: &str) -> bool {
        self.call("GET", &format!("/images/{image}/json"), None).is_ok()
    }

    /// Removes an image, if it is there.
    pub(crate) fn remove_image(&self, image: &str) {
        // One that another container still uses stays.
        drop(self.call("DELETE", &format!("/images/{image}"), None));
    }

    fn all(&self) -> Result<Vec<Value>, Failure> {
        let containers = self.call("GET", "/containers/json?all=true", None)?;
        containers.as_array().cloned().ok_or_else(|| "the engine's list is no list".into())
    }
}
