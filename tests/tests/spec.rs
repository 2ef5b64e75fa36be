//! Holds `docs/spec` to `requirements.toml`, to the layouts and numbers of `viommu-wire`, and to its golden vectors.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use viommu_wire::{Event, Features, Properties, Request, layout};

const VECTORS: &str = include_str!("../../device/wire/tests/vectors.rs");
const NUMBERS: &str = include_str!("../../device/wire/src/numbers.rs");
const REQUIREMENTS: &str = include_str!("../requirements.toml");

/// Texts by their file name.
type Pages = BTreeMap<String, String>;

/// A normative statement: strength and words.
type Statements = BTreeMap<String, (String, String)>;

/// A layout of `viommu_wire::layout`.
struct Known {
    name: &'static str,
    size: usize,
    /// Names and offsets.
    fields: Vec<(&'static str, usize)>,
}

macro_rules! known {
    ($($name:ident { $($field:ident),* })*) => {
        vec![$(Known {
            name: stringify!($name),
            size: size_of::<layout::$name>(),
            fields: vec![$((stringify!($field), std::mem::offset_of!(layout::$name, $field))),*],
        }),*]
    };
}

/// Every layout that the extension adds or changes.
fn known() -> Vec<Known> {
    known! {
        AttachTableLayout { head, domain, endpoint, format, reserved, descriptor }
        UnbindLayout { pasid, reserved }
        SmmuTableLayout { ste0, ste1, reserved }
        VtdPageTableLayout { pgd, flags, addr_width, pasid, reserved }
        ArmPageTableLayout { pasid, asid, reserved0, tcr, ttbr0, ttbr1, mair, reserved1 }
        VtdPasidTableLayout { directory, untagged, directory_lg2, reserved }
        InvalidateLayout {
            head, scope, caches, flags, domain, pasid, id, address, nr_pages, page_size, reserved
        }
        PageResponseLayout { head, endpoint, flags, pasid, group_id, code, reserved }
        HwArmSmmu3Layout { reserved0, idr0, idr1, reserved2, idr3, reserved4, idr5 }
        HwIntelVtdLayout { reserved, cap, ecap }
        PasidSizeLayout { bits, reserved }
        TableFormatsLayout { reserved, formats }
        PageRequestsLayout { flags }
        FaultEventLayout { reason, reserved, flags, endpoint, pasid, address }
        PageRequestLayout { group_id, reserved, private_data }
    }
}

/// Everything that is wrong with `pages`.
fn problems(pages: &Pages, requirements: &str) -> Vec<String> {
    let required = match required(requirements) {
        Ok(required) => required,
        Err(error) => return vec![error],
    };
    let mut problems = Vec::new();
    problems.extend(statement_problems(pages, &required));
    problems.extend(reference_problems(pages, &required));
    problems.extend(layout_problems(pages));
    problems.extend(vector_problems(pages));
    problems.extend(number_problems(pages));
    problems.extend(link_problems(pages));
    for (page, text) in pages {
        let unmarked = prose(text).filter(|block| is_unmarked(block));
        problems.extend(unmarked.map(|block| format!("{page}: a private number is not marked so: {block}")));
    }
    problems
}

/// The statements of the extension.
fn required(requirements: &str) -> Result<Statements, String> {
    let document: toml::Table = toml::from_str(requirements).map_err(|error| error.to_string())?;
    let entries = document.get("requirement").and_then(toml::Value::as_array).ok_or("no requirements")?;
    let mut statements = Statements::new();
    for entry in entries {
        let text = |key: &str| entry.get(key).and_then(toml::Value::as_str);
        let strength = entry.get("strength").and_then(toml::Value::as_array).ok_or("no strength")?;
        let strength: Vec<&str> = strength.iter().filter_map(toml::Value::as_str).collect();
        let (id, statement) = text("id").zip(text("statement")).ok_or("no id or statement")?;
        if id.starts_with("X-") {
            statements.insert(id.into(), (strength.join(", "), statement.into()));
        }
    }
    Ok(statements)
}

/// Each statement stands once, in the words of `requirements.toml`.
fn statement_problems(pages: &Pages, required: &Statements) -> Vec<String> {
    let mut problems = Vec::new();
    let mut seen = BTreeSet::new();
    for (page, text) in pages {
        for block in prose(text) {
            let Some((id, rest)) = block.strip_prefix("- **X-").and_then(|rest| rest.split_once("** "))
            else {
                continue;
            };
            let id = format!("X-{id}");
            let Some((strength, statement)) = required.get(&id) else {
                problems.push(format!("{page}: {id} is not among the requirements"));
                continue;
            };
            if rest != format!("({strength}) {statement}") {
                problems.push(format!("{page}: {id} differs from the requirements: {rest}"));
            }
            if !seen.insert(id.clone()) {
                problems.push(format!("{page}: {id} stands twice"));
            }
        }
    }
    let missing = required.keys().filter(|id| !seen.contains(*id));
    problems.extend(missing.map(|id| format!("{id} stands nowhere")));
    problems
}

/// What other text says of ids is about statements that exist, and each is part of a conformance target.
fn reference_problems(pages: &Pages, required: &Statements) -> Vec<String> {
    let mut problems = Vec::new();
    for (page, text) in pages {
        let unknown = prose(text).flat_map(|block| ids(&block)).filter(|id| !required.contains_key(id));
        problems.extend(unknown.map(|id| format!("{page}: there is no {id}")));
    }
    let targets = pages.get("conformance.md").map_or("", String::as_str);
    let claimed: BTreeSet<String> = table_rows(targets).flat_map(|row| ids(&row.join(" "))).collect();
    let missing = required.keys().filter(|id| !claimed.contains(*id));
    problems.extend(missing.map(|id| format!("{id} is part of no target")));
    problems
}

/// `X-1, X-4 to X-6` as single ids.
fn ids(text: &str) -> Vec<String> {
    let mut ids = Vec::new();
    let words: Vec<&str> = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '-').collect();
    let number = |word: &str| word.strip_prefix("X-").and_then(|number| number.parse::<u32>().ok());
    for (at, word) in words.iter().enumerate() {
        let Some(last) = number(word) else { continue };
        let first = match at.checked_sub(2).map(|from| &words[from..at]) {
            Some([from, "to"]) => number(from).map_or(last, |first| first + 1),
            _ => last,
        };
        ids.extend((first..=last).map(|number| format!("X-{number}")));
    }
    ids
}

/// Each layout has the fields, offsets and size that the code has, without a gap.
fn layout_problems(pages: &Pages) -> Vec<String> {
    let mut problems = Vec::new();
    let known = known();
    let mut seen = BTreeSet::new();
    for (page, text) in pages {
        for (at, _) in text.match_indices("<!-- layout: ") {
            let (line, rest) = text[at..].split_once('\n').unwrap_or((&text[at..], ""));
            let words: Vec<&str> = line.split_whitespace().collect();
            let ["<!--", "layout:", name, "base", base, "size", size, "-->"] = words[..] else {
                problems.push(format!("{page}: {line}"));
                continue;
            };
            let Some(known) = known.iter().find(|known| known.name == name) else {
                problems.push(format!("{page}: there is no layout {name}"));
                continue;
            };
            seen.insert(known.name);
            let base: usize = base.parse().unwrap_or(usize::MAX);
            if size.parse() != Ok(known.size) {
                problems.push(format!("{page}: {name} has {} bytes, not {size}", known.size));
            }
            let mut next = base;
            let mut fields = Vec::new();
            for row in table_rows(rest.split("\n\n").next().unwrap_or("")) {
                let [offset, size, field, ..] = &row[..] else { continue };
                let (Ok(offset), Ok(size)) = (offset.parse::<usize>(), size.parse::<usize>()) else {
                    continue;
                };
                if offset != next {
                    problems.push(format!("{page}: {name}.{field} is at {offset}, and {next} follows"));
                }
                next = offset + size;
                fields.push((field.clone(), offset));
            }
            let plain = |field: &str| match field.strip_prefix("reserved") {
                Some(_) => "reserved".to_owned(),
                None => field.to_owned(),
            };
            let expected: Vec<(String, usize)> =
                known.fields.iter().map(|(field, offset)| (plain(field), base + offset)).collect();
            if fields != expected {
                problems.push(format!("{page}: {name} has {expected:?}, not {fields:?}"));
            }
            if next != base + known.size {
                problems.push(format!("{page}: {name} ends at {next}, not at {}", base + known.size));
            }
        }
    }
    let missing = known.iter().filter(|known| !seen.contains(known.name));
    problems.extend(missing.map(|known| format!("{} stands nowhere", known.name)));
    problems
}

/// Each example is a golden vector, and whole.
fn vector_problems(pages: &Pages) -> Vec<String> {
    let mut problems = Vec::new();
    let mut count = 0;
    for (page, text) in pages {
        for (at, _) in text.match_indices("<!-- vector: ") {
            count += 1;
            let example = &text[at..];
            let words: Vec<&str> = example.lines().next().unwrap_or("").split_whitespace().collect();
            let block = example.split("```text\n").nth(1).and_then(|rest| rest.split("```").next());
            let (["<!--", "vector:", kind, name, "-->"], Some(block)) = (&words[..], block) else {
                problems.push(format!("{page}: {}", words.join(" ")));
                continue;
            };
            let digits: String = block.lines().filter(|line| !line.starts_with('+')).collect();
            let digits: String = digits.split_whitespace().collect();
            if !golden(name).contains(&digits) {
                problems.push(format!("{page}: {name} is not the golden vector"));
            }
            if !is_whole(kind, &bytes(block)) {
                problems.push(format!("{page}: {name} is no whole {kind}"));
            }
        }
    }
    if count == 0 {
        problems.push("there is no example".into());
    }
    problems
}

/// The string literals of a function of the golden vectors that are hex digits, without blanks.
fn golden(name: &str) -> Vec<String> {
    let Some((_, function)) = VECTORS.split_once(&format!("\nfn {name}() {{\n")) else { return Vec::new() };
    let function = function.split("\n}\n").next().unwrap_or("");
    let literals = function.split('"').skip(1).step_by(2);
    let digits = literals.map(|literal| literal.split_whitespace().collect::<String>());
    digits
        .filter(|digits| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_hexdigit()))
        .collect()
}

/// The bytes of an example: hex digits, and lines like `+ 104 zero bytes`.
fn bytes(block: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for line in block.lines() {
        if let Some(zeros) = line.strip_prefix("+ ").and_then(|rest| rest.strip_suffix(" zero bytes")) {
            bytes.resize(bytes.len() + zeros.parse::<usize>().unwrap_or(0), 0);
            continue;
        }
        let digits: Vec<u8> = line.bytes().filter(u8::is_ascii_hexdigit).collect();
        let value = |digit: u8| u8::try_from(char::from(digit).to_digit(16).unwrap()).unwrap();
        bytes.extend(digits.chunks_exact(2).map(|pair| value(pair[0]) << 4 | value(pair[1])));
    }
    bytes
}

/// Whether the bytes are one request, event or property, and nothing is missing or left over.
fn is_whole(kind: &str, bytes: &[u8]) -> bool {
    match kind {
        "request" => Request::decode(bytes).is_ok_and(|request| *request.encode() == *bytes),
        "event" => Event::decode(bytes).is_some_and(|event| event.encoded_len() == bytes.len()),
        "property" => {
            let properties: Vec<_> = Properties::new(bytes).collect();
            matches!(properties[..], [Ok(property)] if property.encoded_len() == bytes.len())
        }
        _ => false,
    }
}

/// The table of numbers has every one that the ratified text does not, and marks those that are private.
fn number_problems(pages: &Pages) -> Vec<String> {
    let readme = pages.get("README.md").map_or("", String::as_str);
    let section = readme.split_once("\n## Numbers\n").map_or("", |(_, rest)| rest);
    let section = section.split("\n## ").next().unwrap_or("");
    let found: BTreeMap<String, (String, bool)> = table_rows(section)
        .filter_map(|row| match &row[..] {
            [name, value, origin] => Some((name.clone(), (value.clone(), origin.contains("**private**")))),
            _ => None,
        })
        .collect();
    let expected = expected_numbers();
    let mut problems = Vec::new();
    for (name, number) in &expected {
        if found.get(name) != Some(number) {
            problems.push(format!("{name} is {number:?} (value, private), not {:?}", found.get(name)));
        }
    }
    let unknown = found.keys().filter(|name| !expected.contains_key(*name));
    problems.extend(unknown.filter(|name| *name != "name").map(|name| format!("there is no {name}")));
    problems
}

fn expected_numbers() -> BTreeMap<String, (String, bool)> {
    /// Bits of the committee that no version has given away.
    const FIRST_PRIVATE: u32 = 50;
    const LAST_RATIFIED: u32 = 6;
    let mut numbers = BTreeMap::new();
    for (name, feature) in Features::DEVICE.iter_names() {
        let bit = feature.bits().trailing_zeros();
        if bit > LAST_RATIFIED {
            numbers.insert(format!("Feature {name}"), (format!("bit {bit}"), bit >= FIRST_PRIVATE));
        }
    }
    let mut comment = String::new();
    for line in NUMBERS.lines() {
        if let Some(text) = line.strip_prefix("///") {
            comment += text;
            continue;
        }
        let comment = std::mem::take(&mut comment);
        let Some((name, value)) = line.strip_prefix("pub const ").and_then(|rest| rest.split_once(": "))
        else {
            continue;
        };
        let value = value.split(" = ").nth(1).and_then(|value| value.strip_suffix(';')).unwrap_or("");
        let name = [("T_", "Request"), ("PROBE_", "Property"), ("FORMAT_", "Format")]
            .into_iter()
            .find_map(|(prefix, kind)| Some(format!("{kind} {}", name.strip_prefix(prefix)?)));
        if let Some(name) = name.filter(|_| !comment.contains("ratified")) {
            numbers.insert(name, (value.into(), comment.contains("**private**")));
        }
    }
    numbers
}

/// Links lead to files of the folder, and to headings that they have.
fn link_problems(pages: &Pages) -> Vec<String> {
    let mut problems = Vec::new();
    for (page, text) in pages {
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = pages.get(if file.is_empty() { page.as_str() } else { file });
            let has_anchor = |text: &String| {
                text.lines().filter_map(|line| line.split_once("# ")).any(|(_, title)| slug(title) == anchor)
            };
            if !target.is_some_and(|text| anchor.is_empty() || has_anchor(text)) {
                problems.push(format!("{page}: {link} leads nowhere"));
            }
        }
    }
    problems
}

/// The anchor of a heading.
fn slug(title: &str) -> String {
    let kept = title.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.map(|c| if c == ' ' { '-' } else { c.to_ascii_lowercase() }).collect()
}

/// Whether a block names a private number and does not say that it is one.
fn is_unmarked(block: &str) -> bool {
    const ALONE: [&str; 5] = ["0x80", "0x81", "0x800", "0x801", "0x802"];
    const PAIRS: [[&str; 2]; 3] = [["bit", "56"], ["format", "0"], ["type", "8"]];
    let lower = block.to_lowercase();
    let words: Vec<&str> =
        lower.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty()).collect();
    let names = words.iter().any(|word| ALONE.contains(word))
        || words.windows(2).any(|pair| PAIRS.iter().any(|known| pair == known));
    names && !words.contains(&"private")
}

/// Paragraphs, items of lists, headings and rows of tables, each in one line; no comments, no examples.
fn prose(text: &str) -> impl Iterator<Item = String> {
    let mut blocks: Vec<String> = Vec::new();
    let mut continues = false;
    let mut is_example = false;
    for line in text.lines() {
        if line.starts_with("```") {
            is_example = !is_example;
            continues = false;
            continue;
        }
        if is_example || line.is_empty() || line.starts_with("<!--") {
            continues = false;
            continue;
        }
        let is_own = line.starts_with(['|', '#']);
        let is_item =
            line.starts_with("- ") || line.split_once(". ").is_some_and(|(n, _)| n.parse::<u8>().is_ok());
        match blocks.last_mut().filter(|_| continues && !is_own && !is_item) {
            Some(block) => {
                block.push(' ');
                block.push_str(line.trim());
            }
            None => blocks.push(line.trim().to_owned()),
        }
        continues = !is_own;
    }
    blocks.into_iter()
}

/// The cells of each row of the tables of a text.
fn table_rows(text: &str) -> impl Iterator<Item = Vec<String>> {
    let rows = text.lines().filter_map(|line| line.strip_prefix('|')?.strip_suffix('|'));
    let cells = |row: &str| row.split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>();
    rows.map(cells).filter(|row| !row.iter().all(|cell| cell.bytes().all(|byte| byte == b'-')))
}

fn read_pages() -> Pages {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/spec");
    let files = std::fs::read_dir(folder).unwrap().map(Result::unwrap);
    files
        .map(|file| (file.file_name().into_string().unwrap(), std::fs::read_to_string(file.path()).unwrap()))
        .collect()
}

#[test]
fn the_specification_says_what_the_code_does() {
    let problems = problems(&read_pages(), REQUIREMENTS);
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

/// The checker itself, on the text as it is but for one thing.
mod checker {
    use super::*;

    /// What is found after one replacement, of which there has to be something to replace.
    #[track_caller]
    fn found(page: &str, from: &str, to: &str) -> Vec<String> {
        let mut pages = read_pages();
        let text = pages.get_mut(page).unwrap();
        assert!(text.contains(from), "{from}");
        *text = text.replacen(from, to, 1);
        problems(&pages, REQUIREMENTS)
    }

    #[track_caller]
    fn finds(page: &str, from: &str, to: &str, expected: &str) {
        let problems = found(page, from, to);
        assert!(problems.iter().any(|problem| problem.contains(expected)), "{problems:#?}");
    }

    #[test]
    fn finds_statements_that_differ() {
        finds("invalidate.md", "**X-16** (MUST)", "**X-16** (SHOULD)", "X-16 differs");
        finds(
            "invalidate.md",
            "does not exist is rejected with NOENT",
            "does not exist is rejected with INVAL",
            "X-16 differs",
        );
        finds("invalidate.md", "- **X-16** (MUST)", "- X-16", "X-16 stands nowhere");
        finds("invalidate.md", "**X-16** (MUST)", "**X-17** (MUST)", "X-17 stands twice");
        finds("invalidate.md", "**X-16** (MUST)", "**X-999** (MUST)", "X-999 is not among");
    }

    #[test]
    fn finds_requirements_that_stand_nowhere() {
        let more = "\n[[requirement]]\nid = \"X-999\"\nstrength = [\"MAY\"]\nstatement = \"s\"\n";
        let problems = problems(&read_pages(), &format!("{REQUIREMENTS}{more}"));
        assert_eq!(problems, ["X-999 stands nowhere", "X-999 is part of no target"]);
    }

    #[test]
    fn finds_ids_that_are_not() {
        finds("status.md", "| X-16 |", "| X-998 |", "there is no X-998");
        finds("conformance.md", "X-1 to X-20", "X-2 to X-20", "X-1 is part of no target");
        assert_eq!(ids("X-1, X-4 to X-6 and D-7"), ["X-1", "X-4", "X-5", "X-6"]);
    }

    #[test]
    fn finds_layouts_that_differ() {
        let page = "invalidate.md";
        finds(page, "| 12 | 4 | pasid |", "| 12 | 2 | pasid |", "is at 16, and 14 follows");
        finds(page, "| 12 | 4 | pasid |", "| 12 | 4 | tag |", "InvalidateLayout has");
        finds(page, "size 60 -->", "size 64 -->", "60 bytes, not 64");
        finds(page, "| 41 | 19 | reserved |", "| 41 | 20 | reserved |", "ends at 61");
        finds(page, "layout: InvalidateLayout", "layout: InvalidateLayouts", "no layout InvalidateLayouts");
        finds(
            page,
            "<!-- layout: InvalidateLayout",
            "<!-- InvalidateLayout",
            "InvalidateLayout stands nowhere",
        );
    }

    #[test]
    fn finds_examples_that_differ() {
        let page = "invalidate.md";
        finds(page, "07000000 01 03", "07000000 01 01", "invalidate_domain is not the golden vector");
        finds(page, "+ 48 zero bytes", "+ 47 zero bytes", "invalidate_domain is no whole request");
        finds(page, "request invalidate_domain", "event invalidate_domain", "no whole event");
        finds(page, "request invalidate_domain", "request invalidate_nothing", "not the golden vector");
    }

    #[test]
    fn finds_numbers_that_differ() {
        finds("README.md", "| bit 56 |", "| bit 57 |", "Feature PAGE_REQUEST");
        finds("README.md", "| 0x801 | **private** |", "| 0x801 | proposal |", "Property TABLE_FORMATS");
        finds("README.md", "| Format ARM_PT |", "| Format ARM |", "Format ARM_PT");
        assert!(expected_numbers().len() > 12);
    }

    #[test]
    fn finds_private_numbers_without_a_mark() {
        finds("probe.md", "Type 0x802 (**private**).", "Type 0x802.", "not marked so: Type 0x802.");
        assert!(is_unmarked("Feature bit 56.") && is_unmarked("Format 0x81"));
        assert!(!is_unmarked("at 0x80001000") && !is_unmarked("format 0 (private)"));
    }

    #[test]
    fn finds_links_that_lead_nowhere() {
        finds("README.md", "](probe.md)", "](probes.md)", "probes.md leads nowhere");
        finds("features.md", "#page_resp", "#page_response", "leads nowhere");
    }
}
