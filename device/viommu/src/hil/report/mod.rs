//! The ways to tell what a run found.

mod html;
mod junit;
mod ktap;
mod svg;
mod terminal;
#[cfg(test)]
mod tests;

pub(crate) use html::html;
pub(crate) use junit::junit;
pub(crate) use ktap::ktap;
pub(crate) use terminal::{head, line, tail};

/// Text for an element or a quoted attribute of HTML and XML. What XML cannot hold at all becomes U+FFFD.
pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            '\n' | '\t' => escaped.push(character),
            // XML 1.0, 2.2: what is no character.
            '\0'..='\x1f' | '\u{fffe}' | '\u{ffff}' => escaped.push('\u{fffd}'),
            _ => escaped.push(character),
        }
    }
    escaped
}

/// Text that stays on its line.
fn one_line(text: &str) -> String {
    text.chars().map(|character| if character.is_control() { ' ' } else { character }).collect()
}
