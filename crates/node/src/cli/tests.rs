#![expect(clippy::unwrap_used, reason = "a failing step is a failing test")]

use super::completion::leaves;
use super::*;

#[test]
fn grammar_is_sound() {
    grammar().debug_assert();
}

#[test]
fn every_leaf_has_json() {
    let leaves = leaves();
    for (path, command) in &leaves {
        assert!(command.get_arguments().any(|argument| argument.get_long() == Some("json")), "{path}");
    }
    let named: Vec<&str> = leaves.iter().map(|(path, _)| path.as_str()).collect();
    for path in ["deploy", "ps", "peers allow", "invite", "invite revoke", "audit", "audit verify", "port-forward"] {
        assert!(named.contains(&path), "{path} is not in {named:?}");
    }
}

#[test]
fn every_leaf_shows_an_example() {
    for (path, command) in leaves().iter().filter(|(_, command)| !command.is_hide_set()) {
        let help = command.get_long_about().map(ToString::to_string).unwrap_or_default();
        let example = help.lines().find_map(|line| line.strip_prefix("Example: peerctl ")).unwrap_or_default();
        assert!(example.starts_with(path.as_str()), "{path}: {help}");
    }
}

#[test]
fn json_may_stand_anywhere_before_a_containers_command() {
    for line in ["peerctl --json ps", "peerctl ps --json", "peerctl peers --json list", "peerctl audit verify --json"] {
        assert!(Arguments::try_parse_from(line.split(' ')).unwrap().global.json, "{line}");
    }
    let line = "peerctl deploy web --peer bob serve --json";
    let parsed = Arguments::try_parse_from(line.split(' ')).unwrap();
    assert!(!parsed.global.json);
}

#[test]
fn bad_command_lines_name_the_field() {
    for (line, field) in [
        ("peers add card --max-cpu 2", "--allow"),
        ("peers add card --allow everything", "--allow"),
        ("peers allow bob", "--allow"),
        ("peers allow bob --nothing --allow deploy", "--nothing"),
        ("peers allow bob --allow deploy --max-containers 0", "--max-containers"),
        ("peers allow bob --allow deploy --max-memory -1", "--max-memory"),
        ("peers allow bob --allow deploy --max-cpu 0", "--max-cpu"),
        ("peers allow bob --allow deploy --expires 0", "--expires"),
        ("peers rename bob Bob!", "<NAME>"),
        ("invite --ticket-expires 2h", "the grant's own end is --expires"),
        ("invite --expires 2h", "--allow"),
        ("logs web --tail -1", "--tail"),
        ("logs web --since yesterday", "--since"),
        ("port-forward web 0", "[LOCAL:]PORT"),
        ("port-forward web 70000", "[LOCAL:]PORT"),
        ("ps --hosted --peer bob", "--peer"),
        ("stop", "<DEPLOYMENT>"),
    ] {
        let error = Arguments::try_parse_from(format!("peerctl {line}").split(' ')).unwrap_err();
        assert!(error.to_string().contains(field), "{line}: {error}");
        assert_eq!(error.exit_code(), 2, "{line}");
    }
}

#[test]
fn a_missing_command_is_said_without_the_hidden_ones() {
    for line in ["peerctl --json", "peerctl peers --json"] {
        let error = Arguments::try_parse_from(line.split(' ')).unwrap_err();
        assert_eq!(output::sentence_of(&error), "a command is missing; --help lists the commands", "{line}");
    }
}

#[test]
fn references_are_bounded() {
    assert_eq!(parse_reference("web"), Ok("web".to_owned()));
    for text in ["", "a b", "a\n", "ä", &"a".repeat(129)] {
        assert!(parse_reference(text).is_err(), "{text}");
    }
}
