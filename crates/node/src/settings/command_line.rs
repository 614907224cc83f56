//! The grammar of `peerd`: a flag for each key, and what to do.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;

use clap::builder::Styles;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};
use peer_state::durable;

use super::{DEFAULT_FILE, FILE_MAX, SettingError, Settings, keys, resolve};

/// What `peerd` is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    /// Serve until told to end.
    Run,
    /// Explain the configuration.
    CheckConfiguration {
        /// As JSON.
        json: bool,
    },
}

/// A command line with the configuration that it leads to.
#[derive(Debug)]
pub struct Invocation {
    /// What to do.
    pub task: Task,
    /// With what.
    pub settings: Result<Settings, Vec<SettingError>>,
}

/// The command line is wrong, or asks for help; what to print says the rest.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct UsageError(#[from] pub clap::Error);

/// Reads the command line, the environment and the file.
pub fn parse(
    arguments: impl IntoIterator<Item = OsString>,
    environment: &dyn Fn(&str) -> Option<String>,
) -> Result<Invocation, UsageError> {
    let matches = command().try_get_matches_from(arguments)?;
    let task = match matches.subcommand() {
        Some(("config", config)) => {
            let json = config.subcommand().is_some_and(|(_, check)| check.get_flag("json"));
            Task::CheckConfiguration { json }
        }
        _ => Task::Run,
    };
    let deepest = deepest(&matches);
    let mut flags = BTreeMap::new();
    for key in keys::KEYS {
        if deepest.value_source(key.name) == Some(ValueSource::CommandLine)
            && let Some(values) = deepest.get_many::<String>(key.name)
        {
            flags.insert(key.name, values.cloned().collect());
        }
    }
    let named = deepest.get_one::<String>("config").cloned().or_else(|| environment("PEER_CONFIG"));
    let settings = match read(named.as_deref()) {
        Ok(file) => {
            let file = file.as_ref().map(|(name, content)| (name.as_str(), content.as_str()));
            let accept_empty_database = matches.get_flag("accept_empty_database");
            resolve(&flags, environment, file).map(|settings| Settings { accept_empty_database, ..settings })
        }
        Err(error) => Err(vec![error]),
    };
    Ok(Invocation { task, settings })
}

/// Global flags are found in the innermost command.
fn deepest(matches: &ArgMatches) -> &ArgMatches {
    let mut deepest = matches;
    while let Some((_, inner)) = deepest.subcommand() {
        deepest = inner;
    }
    deepest
}

/// The file that was named, which must be there, or the usual one, if it is there.
fn read(named: Option<&str>) -> Result<Option<(String, String)>, SettingError> {
    let name = named.unwrap_or(DEFAULT_FILE);
    let failed = |reason: String| SettingError::File(name.to_owned(), reason);
    match durable::read(Path::new(name), FILE_MAX) {
        Ok(Some(bytes)) => match String::from_utf8(bytes) {
            Ok(content) => Ok(Some((name.to_owned(), content))),
            Err(_) => Err(failed("it is not UTF-8 text".into())),
        },
        Ok(None) if named.is_some() => Err(failed("there is no such file".into())),
        Ok(None) => Ok(None),
        Err(error) => Err(failed(error.source.to_string())),
    }
}

fn command() -> Command {
    let json = Arg::new("json").long("json").action(ArgAction::SetTrue).help("Print JSON on standard output");
    let check = Command::new("check").about("Explain every key, its value and where that comes from").arg(json);
    let config = Command::new("config").about("The configuration").subcommand(check).subcommand_required(true);
    let mut command = Command::new("peerd")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Lets friends run containers here, and yours run on their machines. Without a command: serve.")
        .styles(Styles::plain())
        .max_term_width(100)
        .subcommand(config)
        .arg(file_argument())
        .arg(empty_argument());
    for key in keys::KEYS {
        let action = if key.list { ArgAction::Append } else { ArgAction::Set };
        let help = format!("{} [env: {}]", key.help, key.variable());
        let argument = Arg::new(key.name).long(key.flag()).value_name(key.value).help(help).action(action);
        command = command.arg(argument.global(true).allow_hyphen_values(true));
    }
    command
}

fn empty_argument() -> Arg {
    let help = "Start with the identity though the database is new: with no peers, no deployments and no audit log";
    Arg::new("accept_empty_database").long("accept-empty-database").action(ArgAction::SetTrue).help(help)
}

fn file_argument() -> Arg {
    let help = format!("Configuration file [env: PEER_CONFIG] [default: {DEFAULT_FILE}, if it is there]");
    Arg::new("config").long("config").value_name("PATH").help(help).global(true)
}
