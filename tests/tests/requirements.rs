//! Holds `requirements.toml` to the sources: every statement is there, and what must be tested is.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Deserialize;

const STRENGTHS: [&str; 6] = ["MUST", "MUST NOT", "SHOULD", "SHOULD NOT", "MAY", "plain"];
/// Statements of the ratified text: letter, and how many.
const RATIFIED: [(char, u32); 2] = [('D', 60), ('R', 15)];

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    requirement: Vec<Requirement>,
    #[serde(default)]
    bad_input: Vec<BadInput>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Requirement {
    id: String,
    strength: Vec<String>,
    statement: String,
    #[serde(default)]
    tests: Vec<String>,
    /// Why there is no test.
    note: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct BadInput {
    input: String,
    tests: Vec<String>,
}

/// Sources by their path from the root of the repository.
type Sources = BTreeMap<String, String>;

/// Everything that is wrong with `text`.
fn problems(text: &str, sources: &Sources) -> Vec<String> {
    let document: Document = match toml::from_str(text) {
        Ok(document) => document,
        Err(error) => return vec![error.to_string()],
    };
    let mut problems = missing_and_doubled(&document);
    let mut listed = BTreeSet::new();
    for requirement in &document.requirement {
        let Requirement { id, strength, statement, tests, note } = requirement;
        if strength.is_empty() || strength.iter().any(|strength| !STRENGTHS.contains(&&**strength)) {
            problems.push(format!("{id}: strength {strength:?}"));
        }
        if statement.trim().is_empty() {
            problems.push(format!("{id}: no statement"));
        }
        let needs_test =
            strength.iter().any(|strength| strength.contains("MUST") || strength.contains("SHOULD"));
        if tests.is_empty() && (needs_test || note.is_none()) {
            problems.push(format!("{id}: no test"));
        }
        for test in tests {
            problems.extend(not_a_test(test, sources).map(|reason| format!("{id}: {test}: {reason}")));
            match test.rsplit("::").next().and_then(id_of_function) {
                Some(named) if named != *id => problems.push(format!("{id}: {test} is named for {named}")),
                _ => {}
            }
            if !listed.insert((id.clone(), test.clone())) {
                problems.push(format!("{id}: {test} is listed twice"));
            }
        }
    }
    for BadInput { input, tests } in &document.bad_input {
        if tests.is_empty() {
            problems.push(format!("{input}: no test"));
        }
        for test in tests {
            problems.extend(not_a_test(test, sources).map(|reason| format!("{input}: {test}: {reason}")));
        }
    }
    for (path, source) in sources.iter().filter(|(path, _)| path.starts_with("tests/tests/conformance/")) {
        for function in test_functions(source) {
            if let Some(id) = id_of_function(function)
                && !listed.contains(&(id.clone(), format!("{path}::{function}")))
            {
                problems.push(format!("{id}: {path}::{function} is not listed"));
            }
        }
    }
    problems
}

fn missing_and_doubled(document: &Document) -> Vec<String> {
    let mut problems = Vec::new();
    let mut seen = BTreeMap::<(char, u32), u32>::new();
    for Requirement { id, .. } in &document.requirement {
        match parse_id(id) {
            Some(key) => *seen.entry(key).or_default() += 1,
            None => problems.push(format!("{id}: no such id")),
        }
    }
    // Our own have no fixed number, and no gap.
    let own = seen.keys().filter(|(letter, _)| *letter == 'X').map(|&(_, number)| number).max().unwrap_or(0);
    for (letter, count) in RATIFIED.into_iter().chain([('X', own)]) {
        for number in 1..=count {
            match seen.get(&(letter, number)) {
                Some(1) => {}
                Some(_) => problems.push(format!("{letter}-{number}: doubled")),
                None => problems.push(format!("{letter}-{number}: missing")),
            }
        }
    }
    problems
}

/// `D-17` as letter and number, where there is such a statement.
fn parse_id(id: &str) -> Option<(char, u32)> {
    let (letter, number) = id.split_once('-')?;
    let mut letters = letter.chars();
    let (letter, None) = (letters.next()?, letters.next()) else { return None };
    let number: u32 = number.parse().ok().filter(|&parsed: &u32| parsed.to_string() == number)?;
    let last = match letter {
        'X' => u32::MAX,
        letter => RATIFIED.iter().find(|(ratified, _)| *ratified == letter)?.1,
    };
    (1..=last).contains(&number).then_some((letter, number))
}

/// `D-17` of `d17_attach_reserved_must_be_zero`; `None` where the name has no such start.
fn id_of_function(name: &str) -> Option<String> {
    let letter = name.chars().next().filter(|letter| "drx".contains(*letter))?;
    let (number, _) = name[1..].split_once('_')?;
    if number.is_empty() || !number.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    Some(format!("{}-{number}", letter.to_ascii_uppercase()))
}

/// Why `path::function` is no test that runs.
fn not_a_test(test: &str, sources: &Sources) -> Option<String> {
    let Some((path, function)) = test.rsplit_once("::") else { return Some("not path::function".into()) };
    let Some(source) = sources.get(path) else { return Some("no such file".into()) };
    if !is_in_target(path, sources) {
        return Some("the file is part of no test target".into());
    }
    if test_functions(source).iter().all(|&found| found != function) {
        return Some("no such test in the file".into());
    }
    None
}

/// Whether a file is compiled as a test: `PACKAGE/tests/NAME.rs`, or `PACKAGE/tests/TARGET/NAME.rs` where `TARGET.rs`
/// declares it.
fn is_in_target(path: &str, sources: &Sources) -> bool {
    let Some(path) = path.strip_suffix(".rs") else { return false };
    let Some((folder, name)) = path.rsplit_once('/') else { return false };
    if folder == "tests" || folder.ends_with("/tests") {
        return true;
    }
    let declares = |source: &String| source.lines().any(|line| line.trim() == format!("mod {name};"));
    let Some((parent, _)) = folder.rsplit_once('/') else { return false };
    (parent == "tests" || parent.ends_with("/tests"))
        && sources.get(&format!("{folder}.rs")).is_some_and(declares)
}

/// The functions that `#[test]` stands directly before, or with other attributes and comments between. One that is
/// ignored is none.
fn test_functions(source: &str) -> Vec<&str> {
    let mut functions = Vec::new();
    let mut lines = source.lines().map(str::trim);
    while let Some(line) = lines.next() {
        if line != "#[test]" {
            continue;
        }
        let mut ignored = false;
        for line in lines.by_ref() {
            if line.starts_with("#[") || line.starts_with("//") || line.is_empty() {
                ignored |= line.starts_with("#[ignore");
                continue;
            }
            let name = line.strip_prefix("fn ").and_then(|rest| rest.split_once('(')).map(|(name, _)| name);
            functions.extend(name.filter(|_| !ignored));
            break;
        }
    }
    functions
}

/// The sources that the tests of this workspace are in.
fn read_sources() -> Sources {
    fn add(folder: &Path, name: &str, sources: &mut Sources) {
        for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
            let file = entry.file_name().into_string().unwrap();
            let path = format!("{name}/{file}");
            if entry.file_type().unwrap().is_dir() {
                add(&entry.path(), &path, sources);
            } else if file.ends_with(".rs") {
                sources.insert(path, std::fs::read_to_string(entry.path()).unwrap());
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut sources = Sources::new();
    add(&root.join("tests"), "tests/tests", &mut sources);
    for package in ["device/wire", "device/queue", "device/topology", "pgtable-formats"] {
        add(&root.join("..").join(package).join("tests"), &format!("{package}/tests"), &mut sources);
    }
    // What no rig outside of the core can bring about.
    add(&root.join("../device/src/tests"), "device/src/tests", &mut sources);
    sources
}

#[test]
fn every_statement_is_there_and_tested() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("requirements.toml");
    let problems = problems(&std::fs::read_to_string(path).unwrap(), &read_sources());
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

/// The checker itself, on input that is right but for one thing.
mod checker {
    use super::*;

    const FILE: &str = "tests/tests/conformance/attach.rs";

    /// Every statement, each with one test of its own name.
    fn document() -> (Vec<String>, Sources) {
        let ids =
            (1..=60).map(|n| ('D', n)).chain((1..=15).map(|n| ('R', n))).chain((1..=2).map(|n| ('X', n)));
        let mut source = String::new();
        let mut requirements = Vec::new();
        for (letter, number) in ids {
            let function = format!("{}{number}_holds", letter.to_ascii_lowercase());
            source += &format!("#[test]\nfn {function}() {{\n}}\n\n");
            requirements.push(format!(
                "[[requirement]]\nid = \"{letter}-{number}\"\nstrength = [\"MUST\"]\nstatement = \"It holds.\"\ntests = [\"{FILE}::{function}\"]\n"
            ));
        }
        let target = "mod conformance {\n    mod attach;\n}\n".to_owned();
        let sources = [(FILE.to_owned(), source), ("tests/tests/conformance.rs".to_owned(), target)];
        (requirements, sources.into())
    }

    /// What is found after `change`.
    fn found(change: impl FnOnce(&mut Vec<String>, &mut Sources)) -> Vec<String> {
        let (mut requirements, mut sources) = document();
        change(&mut requirements, &mut sources);
        problems(&requirements.join("\n"), &sources)
    }

    fn replace(requirements: &mut [String], index: usize, from: &str, to: &str) {
        assert!(requirements[index].contains(from));
        requirements[index] = requirements[index].replace(from, to);
    }

    #[test]
    fn finds_nothing_where_nothing_is_wrong() {
        assert_eq!(found(|_, _| ()), [""; 0]);
    }

    #[test]
    fn finds_missing_and_doubled_statements() {
        let problems = found(|requirements, _| {
            requirements.remove(16);
        });
        let not_listed = format!("D-17: {FILE}::d17_holds is not listed");
        assert_eq!(problems, ["D-17: missing", &not_listed]);
        let problems = found(|requirements, _| requirements.push(requirements[59].clone()));
        assert_eq!(problems[0], "D-60: doubled");
        let problems = found(|requirements, _| {
            requirements.remove(75);
        });
        assert_eq!(problems[0], "X-1: missing");
        for id in ["D-0", "D-61", "R-16", "Q-1", "D17", "D-017", "DD-1", ""] {
            let problems = found(|requirements, _| {
                requirements.push(
                    "[[requirement]]\nid = \"ID\"\nstrength = [\"MAY\"]\nstatement = \"s\"\nnote = \"n\"\n"
                        .replace("ID", id),
                );
            });
            assert_eq!(problems, [format!("{id}: no such id")]);
        }
    }

    #[test]
    fn finds_statements_without_tests() {
        for strength in ["MUST", "MUST NOT", "SHOULD", "SHOULD NOT"] {
            let problems = found(|requirements, _| {
                let entry = "[[requirement]]\nid = \"X-3\"\nstrength = [\"MAY\", \"S\"]\nstatement = \"s\"\nnote = \"n\"\n";
                requirements.push(entry.replace("\"S\"", &format!("\"{strength}\"")));
            });
            assert_eq!(problems, ["X-3: no test"], "{strength}");
        }
        let entry = "[[requirement]]\nid = \"X-3\"\nstrength = [\"MAY\", \"plain\"]\nstatement = \"s\"\n";
        assert_eq!(found(|requirements, _| requirements.push(entry.to_owned())), ["X-3: no test"]);
        let with_note = format!("{entry}note = \"cannot be seen from outside\"\n");
        assert_eq!(found(|requirements, _| requirements.push(with_note)), [""; 0]);
    }

    #[test]
    fn finds_tests_that_do_not_run() {
        let source = |from: &'static str, to: &'static str| {
            found(move |_, sources| {
                let source = sources.get_mut(FILE).unwrap();
                assert!(source.contains(from));
                *source = source.replace(from, to);
            })
        };
        let gone = [format!("D-17: {FILE}::d17_holds: no such test in the file")];
        assert_eq!(source("fn d17_holds", "fn renamed"), gone);
        assert_eq!(source("#[test]\nfn d17_holds", "fn d17_holds"), gone);
        assert_eq!(source("#[test]\nfn d17_holds", "// #[test]\nfn d17_holds"), gone);
        assert_eq!(source("#[test]\nfn d17_holds", "#[test]\n#[ignore]\nfn d17_holds"), gone);
        assert_eq!(
            source("#[test]\nfn d17_holds", "#[test]\n// Why.\n#[should_panic]\nfn d17_holds"),
            [""; 0]
        );
    }

    #[test]
    fn finds_files_that_are_no_tests() {
        let problems =
            found(|requirements, _| replace(requirements, 16, FILE, "tests/tests/conformance/none.rs"));
        assert_eq!(problems[0], "D-17: tests/tests/conformance/none.rs::d17_holds: no such file");
        let problems = found(|_, sources| {
            sources.insert(
                "tests/tests/conformance.rs".into(),
                "mod conformance {\n    // mod attach;\n}\n".into(),
            );
        });
        assert_eq!(problems[0], format!("D-1: {FILE}::d1_holds: the file is part of no test target"));
        assert_eq!(problems.len(), 77);
    }

    #[test]
    fn finds_tests_that_are_not_listed_or_at_the_wrong_place() {
        let problems = found(|_, sources| *sources.get_mut(FILE).unwrap() += "#[test]\nfn d17_too() {}\n");
        assert_eq!(problems, [format!("D-17: {FILE}::d17_too is not listed")]);
        let problems = found(|_, sources| *sources.get_mut(FILE).unwrap() += "#[test]\nfn d77_none() {}\n");
        assert_eq!(problems, [format!("D-77: {FILE}::d77_none is not listed")]);
        let problems =
            found(|_, sources| *sources.get_mut(FILE).unwrap() += "#[test]\nfn detach_works() {}\n");
        assert_eq!(problems, [""; 0]);
        let problems = found(|requirements, _| replace(requirements, 16, "d17_holds", "d18_holds"));
        let wrong = format!("D-17: {FILE}::d18_holds is named for D-18");
        assert_eq!(problems, [wrong, format!("D-17: {FILE}::d17_holds is not listed")]);
    }

    #[test]
    fn finds_malformed_entries() {
        let problems = found(|requirements, _| replace(requirements, 16, "[\"MUST\"]", "[\"OUGHT\"]"));
        assert_eq!(problems, ["D-17: strength [\"OUGHT\"]"]);
        let problems = found(|requirements, _| replace(requirements, 16, "[\"MUST\"]", "[]"));
        assert_eq!(problems, ["D-17: strength []"]);
        let problems = found(|requirements, _| replace(requirements, 16, "It holds.", " "));
        assert_eq!(problems, ["D-17: no statement"]);
        assert_eq!(found(|requirements, _| replace(requirements, 16, "tests =", "test =")).len(), 1);
        let problems = found(|requirements, _| {
            requirements.push("[[bad_input]]\ninput = \"noise\"\ntests = []\n".into());
        });
        assert_eq!(problems, ["noise: no test"]);
        let problems = found(|requirements, _| {
            requirements.push("[[bad_input]]\ninput = \"noise\"\ntests = [\"attach\"]\n".into());
        });
        assert_eq!(problems, ["noise: attach: not path::function"]);
    }
}
