//! Builds the programs under `examples/` statically: they run in an image that holds nothing else. So does the program
//! that the daemon puts into containers' networks, which is built alike and laid beside the daemon.
//!
//! They are built for the machine's target by its name, which keeps their own compiler flags apart from everything
//! else in the target directory.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

/// The programs that can be built.
pub const NAMES: [&str; 3] = ["hello", "probe", "syscalls"];

/// The program that the daemon runs inside containers' networks.
const GUEST: &str = "peer-guest";

/// Which of them are a single file of C.
const IN_C: [&str; 1] = ["syscalls"];

/// Why an example program is not there.
#[derive(Debug, thiserror::Error)]
pub enum ExampleError {
    /// Cargo or the compiler could not be started.
    #[error("cannot run {program}: {source}")]
    Run {
        /// Which program.
        program: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The program cannot be laid beside the others.
    #[error("cannot copy the program to {}: {source}", .path.display())]
    Copy {
        /// Where to.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Cargo or the compiler failed.
    #[error("{program} failed: {message}")]
    Failed {
        /// Which program.
        program: String,
        /// Its last words.
        message: String,
    },
    /// It has not been built.
    #[error("{} is not there; build it with: cargo run --release -p xtask -- examples", .0.display())]
    NotBuilt(PathBuf),
}

/// The workspace's root directory.
pub fn workspace_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_path_buf).unwrap_or_default()
}

/// Where the static program of the example called `name` lies, if it has been built.
pub fn path(name: &str) -> Result<PathBuf, ExampleError> {
    let path = expected(name, &host()?);
    if path.is_file() { Ok(path) } else { Err(ExampleError::NotBuilt(path)) }
}

/// Where the program lies that runs inside containers' networks, if it has been built.
pub fn guest_path() -> Result<PathBuf, ExampleError> {
    let path = target().join("release").join(GUEST);
    if path.is_file() { Ok(path) } else { Err(ExampleError::NotBuilt(path)) }
}

/// Builds the example called `name` (one of [`NAMES`]) and tells where its program lies.
pub fn build(name: &str) -> Result<PathBuf, ExampleError> {
    let host = host()?;
    if IN_C.contains(&name) {
        return compile(name, &host);
    }
    build_package(&format!("peer-example-{name}"), &[], &host)
}

/// Builds the program that runs inside containers' networks, lays it beside the daemon, where that looks for it, and tells
/// where it lies.
pub fn build_guest() -> Result<PathBuf, ExampleError> {
    let built = build_package(GUEST, &["--bin", GUEST, "--features", "program"], &host()?)?;
    let path = target().join("release").join(GUEST);
    // By a rename: a daemon may be reading the old one.
    let fresh = path.with_extension("new");
    let copied = std::fs::copy(&built, &fresh).and_then(|_| std::fs::rename(&fresh, &path));
    copied.map_err(|source| ExampleError::Copy { path: path.clone(), source })?;
    Ok(path)
}

fn build_package(package: &str, more: &[&str], host: &str) -> Result<PathBuf, ExampleError> {
    let cargo = env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let mut command = Command::new(&cargo);
    command.current_dir(workspace_root());
    command.args(["rustc", "--quiet", "--release", "--locked", "--target", host, "-p", package]);
    command.args(more).args(["--", "-C", "target-feature=+crt-static"]);
    run(&mut command, &cargo)?;
    let path = target().join(host).join("release").join(package);
    if path.is_file() { Ok(path) } else { Err(ExampleError::NotBuilt(path)) }
}

/// Compiles `examples/NAME/NAME.c`.
fn compile(name: &str, host: &str) -> Result<PathBuf, ExampleError> {
    let compiler = env::var("CC").unwrap_or_else(|_| "cc".to_owned());
    let path = expected(name, host);
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)
            .map_err(|source| ExampleError::Run { program: directory.display().to_string(), source })?;
    }
    let source = workspace_root().join("examples").join(name).join(format!("{name}.c"));
    run(Command::new(&compiler).args(["-O1", "-Wall", "-Werror", "-static", "-o"]).arg(&path).arg(source), &compiler)?;
    Ok(path)
}

fn expected(name: &str, host: &str) -> PathBuf {
    target().join(host).join("release").join(format!("peer-example-{name}"))
}

fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace_root().join("target"), PathBuf::from)
}

/// The machine's own target, as the compiler names it.
fn host() -> Result<String, ExampleError> {
    let compiler = env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    let text = run(Command::new(&compiler).arg("-vV"), &compiler)?;
    let host = text.lines().find_map(|line| line.strip_prefix("host: ")).map(str::to_owned);
    host.ok_or_else(|| ExampleError::Failed { program: compiler, message: "it names no host".to_owned() })
}

/// Runs a program to its end and returns what it printed.
pub(crate) fn run(command: &mut Command, program: &str) -> Result<String, ExampleError> {
    let output = command.output().map_err(|source| ExampleError::Run { program: program.to_owned(), source })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(ExampleError::Failed { program: program.to_owned(), message })
}
