//! The words, for a terminal.

use std::fmt::Write as _;

use super::analysis::Analysis;
use super::story;

const WIDTH: usize = 100;

/// Everything in words; the page has the pictures.
pub(super) fn text(analysis: &Analysis) -> String {
    let mut text = String::new();
    let paragraphs = story::whole(analysis).into_iter().chain(story::cautions(analysis));
    paragraphs.for_each(|paragraph| wrap(&mut text, "", &paragraph));
    for facts in &analysis.endpoints {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "\nendpoint {}", facts.endpoint);
        for paragraph in story::endpoint(facts, analysis.unit) {
            wrap(&mut text, "  ", &paragraph);
        }
    }
    text.truncate(text.trim_end().len());
    text
}

fn wrap(text: &mut String, indent: &str, paragraph: &str) {
    let mut length = 0;
    for word in paragraph.split(' ') {
        if length > 0 && length + 1 + word.chars().count() > WIDTH {
            text.push('\n');
            length = 0;
        }
        text.push_str(if length == 0 { indent } else { " " });
        length += if length == 0 { indent.len() } else { 1 } + word.chars().count();
        text.push_str(word);
    }
    text.push('\n');
}
