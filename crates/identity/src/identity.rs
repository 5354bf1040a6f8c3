use std::fmt;
use std::str::FromStr;

use crate::hexadecimal::{Hexadecimal, NotHexadecimal, parse_hexadecimal};

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
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The bytes, for a binary header.
    pub const fn as_bytes(&self) -> &[u8; 32] {
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdentityMismatch {
    /// The identity of the model in use.
    pub expected: AddressIdentity,
    /// The identity that the table or checkpoint carries.
    pub found: AddressIdentity,
}

impl fmt::Display for IdentityMismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { expected, found } = self;
        write!(
            f,
            "address identities differ: expected {expected}, found {found}; use the tokenizer and the whole address \
             configuration that the rows were trained with"
        )
    }
}

impl std::error::Error for IdentityMismatch {}

impl fmt::Display for AddressIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Hexadecimal(&self.0).fmt(f)
    }
}

impl fmt::Debug for AddressIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AddressIdentity({self})")
    }
}

impl FromStr for AddressIdentity {
    type Err = NotHexadecimal;

    fn from_str(text: &str) -> Result<Self, NotHexadecimal> {
        parse_hexadecimal(text).map(Self)
    }
}

#[cfg(feature = "serde")]
impl serde::Serialize for AddressIdentity {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(feature = "serde")]
impl<'de> serde::Deserialize<'de> for AddressIdentity {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: AddressIdentity = AddressIdentity::from_bytes([1; 32]);

    #[test]
    fn a_mismatch_names_both() {
        let found = AddressIdentity::from_bytes([2; 32]);
        assert!(ONE.check(&ONE).is_ok());
        let message = ONE.check(&found).unwrap_err().to_string();
        assert!(message.contains(&format!("expected {ONE}")), "{message}");
        assert!(message.contains(&format!("found {found}")), "{message}");
    }

    #[test]
    fn text_and_bytes_go_there_and_back() {
        assert_eq!(ONE.to_string().parse::<AddressIdentity>().unwrap(), ONE);
        assert_eq!(AddressIdentity::from_bytes(*ONE.as_bytes()), ONE);
        assert!(ONE.to_string().starts_with(&ONE.short()));
        assert!("12".parse::<AddressIdentity>().unwrap_err().to_string().contains("64 hexadecimal"));
    }

    #[test]
    #[cfg(feature = "serde")]
    fn json_holds_the_digits() {
        let json = serde_json::to_string(&ONE).unwrap();
        assert_eq!(json, format!("\"{ONE}\""));
        assert_eq!(serde_json::from_str::<AddressIdentity>(&json).unwrap(), ONE);
        assert!(serde_json::from_str::<AddressIdentity>("\"12\"").is_err());
    }
}
