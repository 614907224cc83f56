//! The command line of the project's own tools.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command-line tool speaks on its standard streams")]

use std::{
    error::Error,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Args, Parser, ValueEnum};
use xtask::{
    advisories, examples, image,
    image::{Builder, Layer},
    sbom, tidy,
};

/// The project's own tools.
#[derive(Debug, Parser)]
#[command(name = "xtask")]
enum Task {
    /// Writes a container image made of files, the same bytes for the same input.
    Image(Box<ImageArgs>),
    /// Builds the example programs and the one that runs inside containers' networks statically, and prints their paths.
    Examples,
    /// Builds the program that runs inside containers' networks, lays it beside the daemon, and prints its path.
    Guest,
    /// Looks for known vulnerabilities in the crates that are built.
    Advisories {
        /// The directory of a copy of the RustSec advisory database; without it the list of floors alone is compared.
        database: Option<PathBuf>,
    },
    /// Writes a bill of materials (CycloneDX JSON) of what a crate of ours links.
    Sbom {
        /// The crate, such as peer-node.
        package: String,
        /// Where the bill is written.
        output: PathBuf,
    },
    /// Checks arrows between crates, lengths, words and documents; prints what is wrong.
    Tidy,
}

#[derive(Debug, Args)]
struct ImageArgs {
    /// Name and tag inside the archive.
    #[arg(long)]
    name: String,
    /// The program, put at the path of --as in the first layer.
    #[arg(long)]
    binary: PathBuf,
    /// Where the program is put.
    #[arg(long = "as", default_value = "/app")]
    destination: String,
    /// A further layer that holds one file.
    #[arg(long, value_name = "HOST=IN_IMAGE", value_parser = pair)]
    layer_file: Vec<(String, String)>,
    /// One word of the command; repeat for its arguments. The program itself when left out.
    #[arg(long)]
    cmd: Vec<String>,
    /// A port that the image says it listens on.
    #[arg(long)]
    expose: Vec<u16>,
    /// A variable of the environment.
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    env: Vec<(String, String)>,
    /// The user that the image asks for.
    #[arg(long)]
    user: Option<String>,
    /// A volume that the image asks for.
    #[arg(long)]
    volume: Vec<String>,
    /// A label.
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    label: Vec<(String, String)>,
    /// One word of a health check; repeat for its arguments.
    #[arg(long)]
    healthcheck: Vec<String>,
    /// The working directory.
    #[arg(long)]
    workdir: Option<String>,
    /// Where the archive is written.
    #[arg(long)]
    output: PathBuf,
    /// The archive's layout.
    #[arg(long, value_enum, default_value_t = Format::Docker)]
    format: Format,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    /// What `docker save` writes and `docker load` reads.
    Docker,
    /// An OCI image layout in a tar.
    Oci,
    /// The same, its layers compressed with gzip.
    OciGzip,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (left, right) = text.split_once('=').ok_or("expected LEFT=RIGHT")?;
    if left.is_empty() { Err("nothing stands before '='".to_owned()) } else { Ok((left.to_owned(), right.to_owned())) }
}

fn main() -> ExitCode {
    let done = match Task::parse() {
        Task::Image(args) => write_image(&args),
        Task::Examples => build_examples(),
        Task::Guest => build_guest(),
        Task::Advisories { database } => look_for_advisories(database.as_deref()),
        Task::Sbom { package, output } => write_bill(&package, &output),
        Task::Tidy => run_tidy(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn write_image(args: &ImageArgs) -> Result<(), Box<dyn Error>> {
    let read = |path: &str| fs::read(path).map_err(|error| format!("cannot read {path}: {error}"));
    let program = read(&args.binary.to_string_lossy())?;
    let mut builder = Builder::new(&args.name).layer(Layer::new().file(&args.destination, &program, 0o755));
    for (host, inside) in &args.layer_file {
        builder = builder.layer(Layer::new().file(inside, &read(host)?, 0o644));
    }
    for port in &args.expose {
        builder = builder.expose(*port);
    }
    for (name, value) in &args.env {
        builder = builder.environment(name, value);
    }
    for (name, value) in &args.label {
        builder = builder.label(name, value);
    }
    for volume in &args.volume {
        builder = builder.volume(volume);
    }
    if let Some(user) = &args.user {
        builder = builder.user(user);
    }
    if let Some(directory) = &args.workdir {
        builder = builder.working_directory(directory);
    }
    if !args.healthcheck.is_empty() {
        builder = builder.healthcheck(&args.healthcheck);
    }
    let image =
        if args.cmd.is_empty() { builder.command(&[&args.destination]) } else { builder.command(&args.cmd) }.build()?;
    let archive = match args.format {
        Format::Docker => image.docker_archive(),
        Format::Oci => image.oci_layout(image::Compression::None),
        Format::OciGzip => image.oci_layout(image::Compression::Gzip),
    }?;
    fs::write(&args.output, archive).map_err(|error| format!("cannot write {}: {error}", args.output.display()))?;
    println!("{}", image.id());
    Ok(())
}

fn build_examples() -> Result<(), Box<dyn Error>> {
    for name in examples::NAMES {
        println!("{}", examples::build(name)?.display());
    }
    build_guest()
}

fn build_guest() -> Result<(), Box<dyn Error>> {
    println!("{}", examples::build_guest()?.display());
    Ok(())
}

fn look_for_advisories(database: Option<&Path>) -> Result<(), Box<dyn Error>> {
    let root = examples::workspace_root();
    let compared = match database {
        Some(database) => advisories::check(&root, database),
        None => advisories::check_floors(&root),
    }?;
    for finding in &compared.findings {
        let kind = finding.informational.as_deref().unwrap_or("VULNERABLE");
        println!("{}: {} ({kind})", finding.id, finding.package);
    }
    let against =
        if database.is_some() { format!("the database up to {}", compared.newest) } else { "floors".to_owned() };
    match compared.findings.iter().filter(|finding| finding.informational.is_none()).count() {
        0 => {
            println!("advisories: {} crates against {against}, no known vulnerability", compared.crates);
            Ok(())
        }
        bad => Err(format!("{bad} known vulnerabilities; update those crates, or judge them in deny.toml").into()),
    }
}

fn write_bill(package: &str, bill: &Path) -> Result<(), Box<dyn Error>> {
    let (components, faults) = sbom::write(&examples::workspace_root(), package, bill)?;
    for fault in &faults {
        println!("{}: {fault}", bill.display());
    }
    match faults.len() {
        0 => {
            println!("{}: {components} components, complete", bill.display());
            Ok(())
        }
        count => Err(format!("{count} faults in {}", bill.display()).into()),
    }
}

fn run_tidy() -> Result<(), Box<dyn Error>> {
    let faults = tidy::check(&examples::workspace_root())?;
    for fault in &faults {
        println!("{fault}");
    }
    match faults.len() {
        0 => {
            println!("tidy: nothing to say");
            Ok(())
        }
        count => Err(format!("tidy found {count} faults").into()),
    }
}
