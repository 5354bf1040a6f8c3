//! Hashes of 32 bytes as text.

use std::fmt;

/// Shows bytes as lower-case hexadecimal digits, two each.
#[derive(Clone, Copy, Debug)]
pub struct Hexadecimal<'a>(pub &'a [u8]);

impl fmt::Display for Hexadecimal<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A text that is not the hexadecimal digits of 32 bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotHexadecimal {
    /// The text.
    pub text: String,
}

impl fmt::Display for NotHexadecimal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` is not a hash: it is written as 64 hexadecimal digits", self.text)
    }
}

impl std::error::Error for NotHexadecimal {}

/// The bytes that 64 hexadecimal digits stand for.
///
/// # Errors
/// If `text` has another length, or other characters.
pub fn parse_hexadecimal(text: &str) -> Result<[u8; 32], NotHexadecimal> {
    let digits: Option<Vec<u8>> =
        text.chars().map(|digit| digit.to_digit(16).map(|value| value as u8)).collect();
    match digits {
        Some(digits) if digits.len() == 64 => {
            Ok(std::array::from_fn(|i| digits[2 * i] << 4 | digits[2 * i + 1]))
        }
        _ => Err(NotHexadecimal { text: text.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_and_bytes_go_there_and_back() {
        let bytes: [u8; 32] = std::array::from_fn(|i| (i * 37) as u8);
        assert_eq!(parse_hexadecimal(&Hexadecimal(&bytes).to_string()), Ok(bytes));
        assert_eq!(parse_hexadecimal(&"aB".repeat(32)), Ok([0xab; 32]));
        for wrong in ["", "12", &"g".repeat(64), &"0".repeat(65), &"é".repeat(32), &" 0".repeat(32)] {
            let refused = parse_hexadecimal(wrong).unwrap_err().to_string();
            assert!(refused.contains("64 hexadecimal") && refused.contains(wrong), "{refused}");
        }
    }
}
