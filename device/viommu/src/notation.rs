//! How numbers, ranges and byte strings are written, on the command line, at the console and in captures.

use std::fmt::Write as _;
use std::num::IntErrorKind;

/// What is wrong with a number or a byte string.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotationError {
    #[error("`{0}` is not a number (decimal, or hexadecimal with 0x)")]
    Number(String),
    #[error("`{text}` is above {limit:#x}")]
    Large { text: String, limit: u64 },
    #[error("`{0}` is not a range A-B of two numbers")]
    Range(String),
    #[error("range `{0}` ends before it starts")]
    Inverted(String),
    #[error("byte string has an odd number of digits")]
    Odd,
    #[error("`{0}` is not a hexadecimal digit")]
    Digit(char),
}

/// A number: decimal, or hexadecimal with `0x`.
pub(crate) fn number(text: &str) -> Result<u64, NotationError> {
    let (digits, radix) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None => (text, 10),
    };
    parse(text, digits, radix)
}

/// A hexadecimal number, with `0x` or without.
pub(crate) fn hex_number(text: &str) -> Result<u64, NotationError> {
    parse(text, text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")).unwrap_or(text), 16)
}

/// A number of at most `limit`.
pub(crate) fn number_up_to(text: &str, limit: u64) -> Result<u64, NotationError> {
    match number(text)? {
        value if value <= limit => Ok(value),
        _ => Err(NotationError::Large { text: abbreviated(text), limit }),
    }
}

/// A number of 32 bits.
pub(crate) fn number32(text: &str) -> Result<u32, NotationError> {
    let value = number_up_to(text, u32::MAX.into())?;
    u32::try_from(value).map_err(|_| NotationError::Number(abbreviated(text)))
}

/// A size in bytes: a number, or a decimal one with K, M or G.
pub(crate) fn size(text: &str) -> Result<u64, NotationError> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (text.get(..text.len() - 1), 10),
        Some(b'M' | b'm') => (text.get(..text.len() - 1), 20),
        Some(b'G' | b'g') => (text.get(..text.len() - 1), 30),
        _ => (Some(text), 0),
    };
    let value = number(digits.unwrap_or_default())?;
    let limit = u64::MAX >> shift;
    if value > limit {
        Err(NotationError::Large { text: abbreviated(text), limit })
    } else {
        Ok(value << shift)
    }
}

/// `A-B`, both ends inside.
pub(crate) fn range(text: &str) -> Result<(u64, u64), NotationError> {
    let (first, last) = text.split_once('-').ok_or_else(|| NotationError::Range(abbreviated(text)))?;
    let (first, last) = (number(first)?, number(last)?);
    if first <= last { Ok((first, last)) } else { Err(NotationError::Inverted(abbreviated(text))) }
}

/// A byte string: two hexadecimal digits a byte, in the order of memory.
pub(crate) fn bytes(text: &str) -> Result<Vec<u8>, NotationError> {
    let mut bytes = Vec::with_capacity(text.len() / 2);
    let mut high = None;
    for character in text.chars() {
        let digit = character
            .to_digit(16)
            .and_then(|digit| u8::try_from(digit).ok())
            .ok_or(NotationError::Digit(character))?;
        match high.take() {
            None => high = Some(digit),
            Some(high) => bytes.push(high << 4 | digit),
        }
    }
    if high.is_none() { Ok(bytes) } else { Err(NotationError::Odd) }
}

/// `bytes` as a byte string.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// The start of `text`, so that an error stays one readable line.
pub(crate) fn abbreviated(text: &str) -> String {
    const LONGEST: usize = 40;
    if text.chars().count() <= LONGEST {
        return text.escape_debug().to_string();
    }
    let start: String = text.chars().take(LONGEST).collect();
    format!("{}...", start.escape_debug())
}

fn parse(text: &str, digits: &str, radix: u32) -> Result<u64, NotationError> {
    // `from_str_radix` takes a sign.
    if !digits.starts_with(|character: char| character.is_digit(radix)) {
        return Err(NotationError::Number(abbreviated(text)));
    }
    u64::from_str_radix(digits, radix).map_err(|error| match error.kind() {
        IntErrorKind::PosOverflow => NotationError::Large { text: abbreviated(text), limit: u64::MAX },
        _ => NotationError::Number(abbreviated(text)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_decimal_or_hexadecimal_and_nothing_else() {
        assert_eq!(number("0"), Ok(0));
        assert_eq!(number("010"), Ok(10));
        assert_eq!(number("0x1F"), Ok(31));
        assert_eq!(number("18446744073709551615"), Ok(u64::MAX));
        assert_eq!(hex_number("ff"), Ok(255));
        assert_eq!(hex_number("0xff"), Ok(255));
        for text in ["", "0x", "+1", "-1", "1f", "0x+1", "0xg", "1_000", " 1", "١"] {
            assert!(matches!(number(text), Err(NotationError::Number(_))), "{text}");
        }
        assert!(matches!(number("18446744073709551616"), Err(NotationError::Large { .. })));
        assert!(matches!(number("0x10000000000000000"), Err(NotationError::Large { .. })));
        assert!(matches!(number32("0x100000000"), Err(NotationError::Large { .. })));
        assert!(number_up_to("5", 4).is_err());
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(size("256M"), Ok(256 << 20));
        assert_eq!(size("1g"), Ok(1 << 30));
        assert_eq!(size("0x1000"), Ok(4096));
        assert_eq!(size("4K"), Ok(4096));
        assert!(size("M").is_err());
        assert!(size("17179869184G").is_err());
        assert!(size("é").is_err());
    }

    #[test]
    fn ranges_have_both_ends_inside() {
        assert_eq!(range("0x8000000-0x80fffff"), Ok((0x800_0000, 0x80f_ffff)));
        assert_eq!(range("0-18446744073709551615"), Ok((0, u64::MAX)));
        assert!(matches!(range("5-4"), Err(NotationError::Inverted(_))));
        assert!(matches!(range("5"), Err(NotationError::Range(_))));
        assert!(range("-5").is_err());
    }

    #[test]
    fn byte_strings_go_both_ways() {
        assert_eq!(bytes("00fF10"), Ok(vec![0, 0xff, 0x10]));
        assert_eq!(bytes(""), Ok(vec![]));
        assert_eq!(hex(&[0, 0xff, 0x10]), "00ff10");
        assert_eq!(bytes("0"), Err(NotationError::Odd));
        assert_eq!(bytes("0x00"), Err(NotationError::Digit('x')));
        assert_eq!(bytes("0é"), Err(NotationError::Digit('é')));
    }
}
