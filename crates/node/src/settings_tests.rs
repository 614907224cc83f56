#![expect(clippy::unwrap_used, reason = "a failing step is a failing test")]

use std::ffi::OsString;

use super::*;

fn flags(pairs: &[(&'static str, &str)]) -> BTreeMap<&'static str, Vec<String>> {
    pairs.iter().map(|(key, value)| (*key, vec![(*value).to_owned()])).collect()
}

fn nothing(_: &str) -> Option<String> {
    None
}

fn source(settings: &Settings, key: &str) -> (String, String) {
    let setting = settings.explain().iter().find(|setting| setting.key == key).unwrap();
    (setting.value.clone(), setting.source.clone())
}

#[test]
fn flag_goes_before_environment_before_file_before_default() {
    let file = Some(("peerd.toml", "log = \"debug\"\noffer_containers = 3\nsocket = \"/run/a/b\"\n"));
    let environment = |name: &str| match name {
        "PEER_LOG" => Some("warn".to_owned()),
        "PEER_OFFER_CONTAINERS" => Some("4".to_owned()),
        _ => None,
    };
    let settings = resolve(&flags(&[("log", "error")]), &environment, file).unwrap();
    assert_eq!(source(&settings, "log"), ("error".into(), "flag".into()));
    assert_eq!(source(&settings, "offer_containers"), ("4".into(), "environment".into()));
    assert_eq!(source(&settings, "socket"), ("/run/a/b".into(), "file".into()));
    assert_eq!(source(&settings, "engine"), ("docker".into(), "default".into()));
    assert_eq!((settings.log.as_str(), settings.offer.containers), ("error", 4));
    assert_eq!(settings.explain().len(), keys::KEYS.len());
}

#[test]
fn every_wrong_value_and_unknown_key_is_reported_at_once() {
    let file = Some(("peerd.toml", "colour = \"red\"\nlog_format = \"xml\"\nlisten = [\"nowhere\"]\nengine = true\n"));
    let errors = resolve(&flags(&[("offer_memory", "0"), ("offer_cpu", "-1")]), &nothing, file).unwrap_err();
    let texts: Vec<_> = errors.iter().map(ToString::to_string).collect();
    for named in ["colour", "log_format", "listen", "engine", "offer_memory", "offer_cpu"] {
        assert!(texts.iter().any(|text| text.contains(named)), "{named}: {texts:?}");
    }
    assert_eq!(errors.len(), 6, "{texts:?}");
}

#[test]
fn values_that_mean_nothing_are_refused() {
    let cases = [
        ("data_dir", "relative/path"),
        ("socket", ""),
        ("socket_owner", "nobody-of-this-name"),
        ("user", "nobody-of-this-name"),
        ("user", "root"),
        ("listen", "/ip4/127.0.0.1/udp/4100"),
        ("listen", "/dns/example.org/tcp/4100"),
        ("announce", "/ip4/192.0.2.1/tcp/0"),
        ("announce", "/ip4/192.0.2.1/tcp/70000"),
        ("engine", "podman"),
        ("offer_cpu", "0"),
        ("offer_memory", "-1"),
        ("offer_containers", "0"),
        ("offer_containers", "+3"),
        ("offer_containers", "99999999999999999999"),
        ("image_size_max", "4 g"),
        ("egress", "on"),
        ("egress_subnets", "198.18.0.1/15"),
        ("egress_subnets", "198.18.0.0/29"),
        ("egress_resolvers", "dns.example.org"),
        ("metrics_listen", "0.0.0.0:9100"),
        ("metrics_listen", "192.0.2.1:9100"),
        ("metrics_listen", "example.org:80"),
        ("log", "peer_node=loud"),
        ("log_format", "JSON"),
        ("max_connections", "many"),
    ];
    for (key, value) in cases {
        let errors = resolve(&flags(&[(key, value)]), &nothing, None).unwrap_err();
        assert!(
            matches!(&errors[..], [SettingError::Value { key: named, from: Source::Flag, .. }] if *named == key),
            "{key}={value}: {errors:?}"
        );
    }
}

#[test]
fn lists_come_as_arrays_or_separated_by_commas() {
    let file = Some(("peerd.toml", "listen = [\"/ip4/127.0.0.1/tcp/0\", \"/ip6/::1/tcp/0\"]\n"));
    assert_eq!(resolve(&BTreeMap::new(), &nothing, file).unwrap().listen.len(), 2);
    let both = flags(&[("listen", "/ip4/127.0.0.1/tcp/0, /ip6/::1/tcp/0")]);
    assert_eq!(resolve(&both, &nothing, None).unwrap().listen.len(), 2);
    assert!(resolve(&flags(&[("listen", "")]), &nothing, None).unwrap().listen.is_empty());
    let none = resolve(&flags(&[("engine", "none")]), &nothing, None).unwrap();
    assert_eq!(none.engine_socket, None);
}

#[test]
fn socket_belongs_to_the_user_who_ran_sudo() {
    let environment = |name: &str| (name == "SUDO_UID").then(|| "1234".to_owned());
    assert_eq!(resolve(&BTreeMap::new(), &environment, None).unwrap().socket_owner, 1234);
    let nobody = resolve(&flags(&[("user", "nobody")]), &nothing, None).unwrap().user.unwrap();
    assert_eq!(resolve(&flags(&[("user", &nobody.uid.to_string())]), &nothing, None).unwrap().user, Some(nobody));
    assert_eq!(resolve(&BTreeMap::new(), &nothing, None).unwrap().user, None);
    assert_eq!(resolve(&flags(&[("socket_owner", "77")]), &environment, None).unwrap().socket_owner, 77);
}

#[test]
fn command_line_takes_flags_before_and_after_its_command() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("peerd.toml");
    std::fs::write(&file, "engine = \"none\"\n").unwrap();
    let arguments = ["peerd", "--log", "warn", "config", "check", "--json", "--config", file.to_str().unwrap()];
    let invocation = parse(arguments.map(OsString::from), &nothing).unwrap();
    assert_eq!(invocation.task, Task::CheckConfiguration { json: true });
    let settings = invocation.settings.unwrap();
    assert_eq!(source(&settings, "log"), ("warn".into(), "flag".into()));
    assert_eq!(source(&settings, "engine"), ("none".into(), "file".into()));
    let absent = ["peerd", "--config", "/nonexistent/peerd.toml"];
    let errors = parse(absent.map(OsString::from), &nothing).unwrap().settings.unwrap_err();
    assert!(matches!(&errors[..], [SettingError::File(..)]));
    assert!(parse(["peerd", "--colour", "red"].map(OsString::from), &nothing).is_err());
    assert!(parse(["peerd", "config"].map(OsString::from), &nothing).is_err());
}
