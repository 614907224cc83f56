//! What a single tracked file must not hold: too long a text, too long a function, banned words, names and paths.

use std::path::Path;

use syn::{Attribute, ImplItemFn, Item, ItemFn, Meta, TraitItemFn, spanned::Spanned, visit::Visit};

const MAX_FILE_LINES: usize = 500;
const MAX_FUNCTION_LINES: usize = 60;
/// Words for work left undone; it is either done or an issue.
const BANNED_WORDS: [&str; 3] = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")];
/// Names that say nothing about what a module is for.
const BANNED_MODULES: [&str; 7] = ["utils", "util", "helpers", "helper", "manager", "common", "misc"];
/// Places that exist on one machine only.
const BANNED_PATHS: [&str; 3] = [concat!("/wo", "rk/"), concat!("/tmp/", "plan"), concat!("/tmp/", "bash_jobs")];
/// What the programs must not do, in the code of our rooms outside of tests.
const BANNED_CALLS: [(&str, &str); 2] =
    [("process::Command", "the programs start no other program"), ("unbounded_channel", "every queue has an end")];
/// The files that start a program, each with the reason at its head.
const STARTS_A_PROGRAM: [&str; 2] = ["crates/compute/src/wall/nft.rs", "crates/node/src/program/runner.rs"];
const CODE: [&str; 4] = ["rs", "sh", "toml", "sql"];

/// Judges one file by its path (relative to the workspace) and its text.
pub fn judge(path: &str, text: &str) -> Vec<String> {
    let extension = Path::new(path).extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    let mut faults = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let number = index + 1;
        if let Some(found) = BANNED_PATHS.iter().find(|banned| line.contains(**banned)) {
            faults.push(format!("{path}:{number}: names {found}, a path of one machine"));
        }
        let words = || line.split(|letter: char| !letter.is_alphanumeric());
        if let Some(found) =
            BANNED_WORDS.iter().find(|banned| CODE.contains(&extension) && words().any(|word| word == **banned))
        {
            faults.push(format!("{path}:{number}: says {found}; do it, or file an issue"));
        }
    }
    if extension == "rs" {
        faults.extend(banned_calls(path, text));
        faults.extend(judge_rust(path, text));
    }
    faults
}

/// Judges the lines before a file's tests.
fn banned_calls(path: &str, text: &str) -> Vec<String> {
    if !path.starts_with("crates/") || is_test_file(path) {
        return Vec::new();
    }
    let lines = text.lines().take_while(|line| line.trim() != "#[cfg(test)]").enumerate();
    let found = lines.flat_map(|(index, line)| {
        // However it is imported.
        let starts = line.contains("process::") && line.contains("Command") && !STARTS_A_PROGRAM.contains(&path);
        let calls = BANNED_CALLS.iter().filter(move |(call, _)| match *call {
            "process::Command" => starts,
            call => line.contains(call),
        });
        calls.map(move |(call, why)| format!("{path}:{}: uses {call}, but {why}", index + 1))
    });
    found.collect()
}

fn is_test_file(path: &str) -> bool {
    path.split('/').any(|part| matches!(part, "tests" | "benches" | "tests.rs"))
}

fn judge_rust(path: &str, text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    let names = path.split('/').map(|part| part.strip_suffix(".rs").unwrap_or(part));
    if let Some(found) = names.into_iter().find(|name| BANNED_MODULES.contains(name)) {
        faults.push(format!("{path}: a module called {found:?} says nothing about what it holds"));
    }
    if is_test_file(path) {
        return faults;
    }
    let file = match syn::parse_file(text) {
        Ok(file) => file,
        Err(error) => {
            faults.push(format!("{path}:{}: cannot be parsed: {error}", error.span().start().line));
            return faults;
        }
    };
    let tests: usize = file.items.iter().filter(|item| is_for_tests(attributes(item))).map(lines).sum();
    let length = text.lines().count() - tests.min(text.lines().count());
    if length > MAX_FILE_LINES {
        faults.push(format!("{path}: {length} lines without its tests; at most {MAX_FILE_LINES}"));
    }
    let mut functions = Functions { path, faults };
    functions.visit_file(&file);
    functions.faults
}

struct Functions<'path> {
    path: &'path str,
    faults: Vec<String>,
}

impl Functions<'_> {
    /// Counts from the signature to the closing brace, both included; attributes and documentation are free.
    fn judge(&mut self, signature: &syn::Signature, body: &syn::Block) {
        let (start, end) = (signature.span().start().line, body.span().end().line);
        let length = end + 1 - start;
        if length > MAX_FUNCTION_LINES {
            let (path, name) = (self.path, &signature.ident);
            self.faults.push(format!("{path}:{start}: fn {name} has {length} lines; at most {MAX_FUNCTION_LINES}"));
        }
    }
}

impl<'tree> Visit<'tree> for Functions<'_> {
    fn visit_item(&mut self, item: &'tree Item) {
        if !is_for_tests(attributes(item)) {
            syn::visit::visit_item(self, item);
        }
    }

    fn visit_item_fn(&mut self, function: &'tree ItemFn) {
        self.judge(&function.sig, &function.block);
        syn::visit::visit_item_fn(self, function);
    }

    fn visit_impl_item_fn(&mut self, function: &'tree ImplItemFn) {
        self.judge(&function.sig, &function.block);
        syn::visit::visit_impl_item_fn(self, function);
    }

    fn visit_trait_item_fn(&mut self, function: &'tree TraitItemFn) {
        if let Some(body) = &function.default {
            self.judge(&function.sig, body);
        }
        syn::visit::visit_trait_item_fn(self, function);
    }
}

fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        _ => &[],
    }
}

fn is_for_tests(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| match &attribute.meta {
        Meta::List(list) => list.path.is_ident("cfg") && list.tokens.to_string() == "test",
        Meta::Path(path) => path.is_ident("test"),
        Meta::NameValue(_) => false,
    })
}

fn lines(item: &Item) -> usize {
    item.span().end().line + 1 - item.span().start().line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function(lines: usize) -> String {
        format!("/// Doc.\n#[inline]\nfn long() {{\n{}}}\n", "    let _ = 1;\n".repeat(lines - 2))
    }

    #[test]
    fn functions_are_counted_from_signature_to_brace() {
        assert_eq!(judge("a.rs", &function(60)), Vec::<String>::new());
        assert_eq!(judge("a.rs", &function(61)), ["a.rs:3: fn long has 61 lines; at most 60"]);
        let inside = format!("impl X {{\n{}}}\n", function(61));
        assert_eq!(judge("a.rs", &inside).len(), 1);
    }

    #[test]
    fn tests_may_be_long() {
        let module = format!("#[cfg(test)]\nmod tests {{\n{}}}\n", function(600));
        assert_eq!(judge("a.rs", &module), Vec::<String>::new());
        assert_eq!(judge("crates/x/tests/a.rs", &function(600)), Vec::<String>::new());
    }

    #[test]
    fn files_are_counted_without_their_tests() {
        let tests = "#[cfg(test)]\nmod tests {\n    fn a() {}\n}\n";
        assert_eq!(judge("a.rs", &format!("{}{tests}", "const A: u8 = 1;\n".repeat(500))), Vec::<String>::new());
        let faults = judge("a.rs", &format!("{}{tests}", "const A: u8 = 1;\n".repeat(501)));
        assert_eq!(faults, ["a.rs: 501 lines without its tests; at most 500"]);
    }

    #[test]
    fn words_names_and_paths_are_found() {
        let undone = BANNED_WORDS[0];
        assert_eq!(judge("a.rs", &format!("// {undone}: later\n")).len(), 1);
        assert_eq!(judge("a.rs", &format!("// {undone}S are many\n")), Vec::<String>::new());
        assert_eq!(judge("notes.md", &format!("we never write {undone}\n")), Vec::<String>::new());
        assert_eq!(judge("crates/x/src/utils.rs", "").len(), 1);
        assert_eq!(judge("crates/x/src/manager/mod.rs", "").len(), 1);
        assert_eq!(judge("README.md", &format!("see {}x\n", BANNED_PATHS[0])).len(), 1);
        assert_eq!(judge("README.md", "a network/path\n"), Vec::<String>::new());
    }

    #[test]
    fn banned_calls_are_found_outside_of_tests() {
        let line = "use std::process::Command;\n";
        assert_eq!(judge("crates/x/src/a.rs", line).len(), 1);
        assert_eq!(
            judge("crates/x/src/a.rs", &format!("#[cfg(test)]\nmod tests {{\n    {line}}}\n")),
            Vec::<String>::new()
        );
        assert_eq!(judge("crates/x/src/a.rs", "use tokio::process::{Child, Command};\n").len(), 1);
        for path in STARTS_A_PROGRAM {
            assert_eq!(judge(path, line), Vec::<String>::new());
        }
        assert_eq!(judge("crates/x/tests/a.rs", line), Vec::<String>::new());
        assert_eq!(judge("xtask/src/a.rs", line), Vec::<String>::new());
    }

    #[test]
    fn what_is_not_rust_is_said_with_its_line() {
        assert!(
            judge("a.rs", "fn a() {}\nfn (").first().is_some_and(|fault| fault.starts_with("a.rs:2: cannot be parsed"))
        );
    }
}
