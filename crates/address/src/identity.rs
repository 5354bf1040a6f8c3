use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::error::AddressError;

/// One hash over everything that decides row ids: classes, pad, boundary, arithmetic, and every layer's id,
/// multipliers and primes.
///
/// Tables and checkpoints carry the identity of the addressing they were made with. Rows read under another
/// one belong to other n-grams, and nothing would show it but a worse model: so a mismatch is refused.
/// It is written, also in files, as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AddressIdentity([u8; 32]);

impl AddressIdentity {
    /// The identity with these bytes, as a binary header stores it.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The bytes, for a binary header.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The first 12 digits, to show people.
    pub fn short(&self) -> String {
        self.to_string()[..12].to_owned()
    }

    /// Refuses `found`, the identity of a table or checkpoint, unless it is `self`, that of the running
    /// model.
    ///
    /// # Errors
    /// Both identities, if they differ.
    pub fn check(&self, found: &Self) -> Result<(), IdentityMismatch> {
        if self == found { Ok(()) } else { Err(IdentityMismatch { expected: *self, found: *found }) }
    }
}

/// Two parts were made with different addressing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "address identities differ: expected {expected}, found {found}; \
     use the tokenizer and the whole address configuration that the rows were trained with"
)]
pub struct IdentityMismatch {
    /// The identity of the model at hand.
    pub expected: AddressIdentity,
    /// The identity that the table or checkpoint carries.
    pub found: AddressIdentity,
}

impl fmt::Display for AddressIdentity {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(formatter, "{byte:02x}"))
    }
}

impl fmt::Debug for AddressIdentity {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "AddressIdentity({self})")
    }
}

impl FromStr for AddressIdentity {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let digits: Option<Vec<u8>> =
            text.chars().map(|digit| digit.to_digit(16).map(|value| value as u8)).collect();
        match digits {
            Some(digits) if digits.len() == 64 => {
                Ok(Self(std::array::from_fn(|i| digits[2 * i] << 4 | digits[2 * i + 1])))
            }
            _ => Err(AddressError::IdentityText { text: text.to_owned() }),
        }
    }
}

impl Serialize for AddressIdentity {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for AddressIdentity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// Hashes facts one after another, each as a little-endian number; lists with their length first, so that
/// no two different lists of facts give the same bytes.
pub(crate) struct IdentityHasher(blake3::Hasher);

impl IdentityHasher {
    pub(crate) fn new() -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"engram address identity, version 1");
        Self(hasher)
    }

    pub(crate) fn number(&mut self, number: u64) {
        self.0.update(&number.to_le_bytes());
    }

    pub(crate) fn numbers(&mut self, numbers: impl ExactSizeIterator<Item = u64>) {
        self.number(numbers.len() as u64);
        numbers.for_each(|number| self.number(number));
    }

    pub(crate) fn finish(self) -> AddressIdentity {
        AddressIdentity(self.0.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(number: u64) -> AddressIdentity {
        let mut hasher = IdentityHasher::new();
        hasher.number(number);
        hasher.finish()
    }

    #[test]
    fn a_mismatch_names_both() {
        let (expected, found) = (identity(1), identity(2));
        assert!(expected.check(&expected).is_ok());
        let message = expected.check(&found).unwrap_err().to_string();
        assert!(message.contains(&format!("expected {expected}")), "{message}");
        assert!(message.contains(&format!("found {found}")), "{message}");
    }

    #[test]
    fn text_and_bytes_go_there_and_back() {
        let identity = identity(1);
        assert_eq!(identity.to_string().parse::<AddressIdentity>().unwrap(), identity);
        assert_eq!(AddressIdentity::from_bytes(*identity.as_bytes()), identity);
        let json = serde_json::to_string(&identity).unwrap();
        assert_eq!(json, format!("\"{identity}\""));
        assert_eq!(serde_json::from_str::<AddressIdentity>(&json).unwrap(), identity);
        assert!(identity.to_string().starts_with(&identity.short()));
        for bad in ["", "12", &"g".repeat(64), &"0".repeat(65)] {
            assert!(bad.parse::<AddressIdentity>().unwrap_err().to_string().contains("64 hexadecimal"));
        }
    }

    #[test]
    fn lists_do_not_run_into_each_other() {
        let of = |lists: [&[u64]; 2]| {
            let mut hasher = IdentityHasher::new();
            lists.iter().for_each(|list| hasher.numbers(list.iter().copied()));
            hasher.finish()
        };
        assert_ne!(of([&[1], &[2, 3]]), of([&[1, 2], &[3]]));
    }
}
