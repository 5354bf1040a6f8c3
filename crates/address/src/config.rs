use serde::{Deserialize, Serialize};

use crate::error::{AddressError, Result};

/// The longest n-gram this crate hashes.
pub const MAX_ORDER: usize = 64;

/// The maximum number of heads per order. Published models have 8; with 3 orders of this many, a token reads 12,288
/// rows.
pub const MAX_HEADS: usize = 4096;

/// Everything that decides the row ids of a model, except its vocabulary.
///
/// ```
/// use engram_address::{AddressConfig, Boundary};
///
/// let config: AddressConfig = toml::from_str(r#"
///     layers = [1, 14]                # 0-based
///     max_order = 3                   # 2-grams and 3-grams
///     heads = 8                       # per order
///     base_rows = [646400, 646400]    # per order: where its heads' primes start
///     pad_id = 2
/// "#)?;
/// assert_eq!((config.seed, config.boundary), (0, Boundary::None));
/// # Ok::<(), toml::de::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddressConfig {
    /// Seed of the multipliers; default 0.
    #[serde(default)]
    pub seed: u64,
    /// Ids of the blocks with memory, 0-based. The ids decide the multipliers; their order decides the primes.
    pub layers: Vec<usize>,
    /// Length of the longest n-gram, at least 2.
    pub max_order: usize,
    /// Hash heads of every order.
    pub heads: usize,
    /// For each order 2..=`max_order`, the number of rows at which the search for its heads' primes starts.
    pub base_rows: Vec<u64>,
    /// Token whose class stands for everything before the start of a sequence.
    pub pad_id: u32,
    /// Tokens at which n-grams start again; none by default.
    #[serde(default)]
    pub boundary: Boundary,
    /// Arithmetic of classes times multipliers; exact by default.
    #[serde(default)]
    pub arithmetic: Arithmetic,
}

/// A token that n-grams do not cross: what lies beyond it counts as pad.
///
/// In TOML: `boundary = "none"`, `boundary = { after = 1 }`, `boundary = { before = 0 }`.
/// Qwen3.8-Flash-Next has its end-of-sequence token both as `after` and as `pad_id`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Boundary {
    /// N-grams reach across documents, as in the paper and in V4.1.
    #[default]
    None,
    /// The token ends its document (an end-of-sequence token). It sees the document; later tokens see neither it nor
    /// anything older.
    After(u32),
    /// The token starts its document (a beginning-of-sequence token). Neither it nor later tokens see anything older.
    Before(u32),
}

/// How classes and multipliers are multiplied. Both use the floored remainder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arithmetic {
    /// Multipliers are positive, and every product stays below 2^63. Others are refused.
    #[default]
    Exact,
    /// Any 64-bit multipliers; products wrap around as signed 64-bit integers.
    Wrapping,
}

/// An addressing with explicit multipliers and sizes, as a checkpoint stores it.
///
/// Multipliers are written as strings, because many readers of JSON convert numbers to doubles and lose the last
/// digits. Strings and integers are read; floating-point numbers are refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredAddressing {
    /// The memory layers in order.
    pub layers: Vec<StoredLayer>,
    /// Token whose class stands for everything before the start of a sequence.
    pub pad_id: u32,
    /// Tokens at which n-grams start again.
    #[serde(default)]
    pub boundary: Boundary,
    /// How classes and multipliers are multiplied.
    #[serde(default)]
    pub arithmetic: Arithmetic,
}

/// One memory layer of a [`StoredAddressing`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredLayer {
    /// Id of the block, 0-based.
    pub layer: usize,
    /// One per position of the longest n-gram, the current token first.
    #[serde(with = "exact_integers")]
    pub multipliers: Vec<i64>,
    /// Rows of every head: `[order][head]`, 2-grams first.
    pub primes: Vec<Vec<u64>>,
}

impl AddressConfig {
    /// Checks everything that does not need a vocabulary.
    ///
    /// # Errors
    /// The key of an invalid value.
    pub fn validate(&self) -> Result<()> {
        validate_shape(self.layers.iter().copied(), self.max_order, self.heads)?;
        if self.base_rows.len() != self.max_order - 1 {
            return config_error(
                "base_rows",
                format!(
                    "has {} entries; give one for each order from 2 to {}",
                    self.base_rows.len(),
                    self.max_order
                ),
            );
        }
        Ok(())
    }
}

impl StoredAddressing {
    /// Checks everything that does not need a vocabulary.
    ///
    /// # Errors
    /// The key of an invalid value.
    pub fn validate(&self) -> Result<()> {
        let (orders, heads) = match self.layers.first() {
            Some(first) => (first.primes.len(), first.primes.first().map_or(0, Vec::len)),
            None => (1, 1),
        };
        validate_shape(self.layers.iter().map(|layer| layer.layer), orders + 1, heads)?;
        for StoredLayer { layer, multipliers, primes } in &self.layers {
            if multipliers.len() != orders + 1 {
                return config_error(
                    "multipliers",
                    format!("of layer {layer}: {} are given, {} are needed", multipliers.len(), orders + 1),
                );
            }
            if primes.len() != orders || primes.iter().any(|order| order.len() != heads) {
                return config_error(
                    "primes",
                    format!(
                        "of layer {layer} are not {orders} orders of {heads} heads, as in the first layer"
                    ),
                );
            }
            if let Some(rows) = primes.iter().flatten().find(|&&rows| rows == 0 || rows > u64::from(u32::MAX))
            {
                return config_error(
                    "primes",
                    format!("of layer {layer}: a head cannot have {rows} rows; give 1 to {}", u32::MAX),
                );
            }
        }
        Ok(())
    }
}

fn validate_shape(layers: impl Iterator<Item = usize>, max_order: usize, heads: usize) -> Result<()> {
    let mut seen = Vec::new();
    for layer in layers {
        if seen.contains(&layer) {
            return config_error("layers", format!("names layer {layer} twice; a layer has one memory"));
        }
        seen.push(layer);
    }
    if seen.is_empty() {
        return config_error("layers", "is empty; name the 0-based ids of the layers with memory".into());
    }
    if !(2..=MAX_ORDER).contains(&max_order) {
        return config_error("max_order", format!("is {max_order}; give a length from 2 to {MAX_ORDER}"));
    }
    check_heads(heads)?;
    Ok(())
}

/// Fails if an order cannot have this many heads.
pub(crate) fn check_heads(heads: usize) -> Result<()> {
    match heads {
        0 => config_error("heads", "is 0; every order needs at least one".into()),
        1..=MAX_HEADS => Ok(()),
        _ => config_error("heads", format!("is {heads}; give a number from 1 to {MAX_HEADS}")),
    }
}

pub(crate) fn config_error<T>(key: &'static str, problem: String) -> Result<T> {
    Err(AddressError::Config { key, problem })
}

/// 64-bit integers written as strings, read from strings or integers.
mod exact_integers {
    use std::fmt;

    use serde::de::{Error, Visitor};
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(integers: &[i64], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(integers.iter().map(i64::to_string))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<i64>, D::Error> {
        let integers = Vec::<ExactInteger>::deserialize(deserializer)?;
        Ok(integers.into_iter().map(|ExactInteger(integer)| integer).collect())
    }

    struct ExactInteger(i64);

    impl<'de> Deserialize<'de> for ExactInteger {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            deserializer.deserialize_any(ExactIntegerVisitor).map(Self)
        }
    }

    struct ExactIntegerVisitor;

    impl Visitor<'_> for ExactIntegerVisitor {
        type Value = i64;

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            formatter.write_str(
                "a 64-bit integer or its digits in a string (a floating-point number is not exact)",
            )
        }

        fn visit_i64<E: Error>(self, integer: i64) -> Result<i64, E> {
            Ok(integer)
        }

        fn visit_u64<E: Error>(self, integer: u64) -> Result<i64, E> {
            i64::try_from(integer)
                .map_err(|_| E::invalid_value(serde::de::Unexpected::Unsigned(integer), &self))
        }

        fn visit_str<E: Error>(self, digits: &str) -> Result<i64, E> {
            digits.parse().map_err(|_| E::invalid_value(serde::de::Unexpected::Str(digits), &self))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> AddressConfig {
        AddressConfig {
            seed: 0,
            layers: vec![1, 15],
            max_order: 3,
            heads: 8,
            base_rows: vec![1000, 1000],
            pad_id: 2,
            boundary: Boundary::None,
            arithmetic: Arithmetic::Exact,
        }
    }

    #[test]
    fn unusable_values_are_named() {
        assert!(config().validate().is_ok());
        let problem = |change: fn(&mut AddressConfig)| {
            let mut config = config();
            change(&mut config);
            config.validate().unwrap_err().to_string()
        };
        assert!(problem(|c| c.layers.clear()).contains("`layers`"));
        assert!(problem(|c| c.layers.push(15)).contains("layer 15 twice"));
        assert!(problem(|c| c.max_order = 1).contains("`max_order`"));
        assert!(problem(|c| c.max_order = MAX_ORDER + 1).contains("`max_order`"));
        assert!(problem(|c| c.heads = 0).contains("`heads`"));
        assert!(problem(|c| c.base_rows.push(1)).contains("`base_rows`: has 3 entries"));
    }

    #[test]
    fn unusable_stored_values_are_named() {
        let layer = |layer| StoredLayer { layer, multipliers: vec![1, 3], primes: vec![vec![5, 7]] };
        let stored = StoredAddressing {
            layers: vec![layer(1), layer(4)],
            pad_id: 0,
            boundary: Boundary::None,
            arithmetic: Arithmetic::Exact,
        };
        assert!(stored.validate().is_ok());
        let problem = |change: fn(&mut StoredAddressing)| {
            let mut stored = stored.clone();
            change(&mut stored);
            stored.validate().unwrap_err().to_string()
        };
        assert!(problem(|s| s.layers.clear()).contains("`layers`"));
        assert!(problem(|s| s.layers[1].layer = 1).contains("layer 1 twice"));
        assert!(
            problem(|s| s.layers[1].multipliers.push(5)).contains("of layer 4: 3 are given, 2 are needed")
        );
        assert!(
            problem(|s| s.layers[1].primes[0].truncate(1)).contains("of layer 4 are not 1 orders of 2 heads")
        );
        assert!(problem(|s| s.layers[0].primes[0][1] = 0).contains("cannot have 0 rows"));
        assert!(problem(|s| s.layers[0].primes[0][1] = 1 << 32).contains("cannot have 4294967296 rows"));
        assert!(problem(|s| s.layers[0].primes.clear()).contains("`max_order`"));
    }

    #[test]
    fn multipliers_are_never_doubles() {
        // 2^53 + 1 is the first integer a double cannot hold.
        let layer = StoredLayer { layer: 1, multipliers: vec![9007199254740993, -3], primes: vec![vec![5]] };
        let text = serde_json::to_string(&layer).unwrap();
        assert!(text.contains(r#"["9007199254740993","-3"]"#), "{text}");
        assert_eq!(serde_json::from_str::<StoredLayer>(&text).unwrap(), layer);
        assert_eq!(
            serde_json::from_str::<StoredLayer>(&text.replace("\"9007199254740993\"", "9007199254740993"))
                .unwrap(),
            layer
        );
        for bad in ["9007199254740993.0", "\"9.007e15\"", "9223372036854775808"] {
            let text = text.replace("\"9007199254740993\"", bad);
            let error = serde_json::from_str::<StoredLayer>(&text).unwrap_err().to_string();
            assert!(error.contains("64-bit integer"), "{error}");
        }
    }

    #[test]
    fn boundaries_in_toml() {
        let boundary = |text: &str| {
            let rest = "layers = [1]\nmax_order = 2\nheads = 1\nbase_rows = [10]\npad_id = 2\n";
            toml::from_str::<AddressConfig>(&format!("{rest}{text}")).map(|config| config.boundary)
        };
        assert_eq!(boundary("").unwrap(), Boundary::None);
        assert_eq!(boundary("boundary = \"none\"").unwrap(), Boundary::None);
        assert_eq!(boundary("boundary = { after = 1 }").unwrap(), Boundary::After(1));
        assert_eq!(boundary("boundary = { before = 0 }").unwrap(), Boundary::Before(0));
        assert!(boundary("bounday = \"none\"").unwrap_err().to_string().contains("bounday"));
    }
}
