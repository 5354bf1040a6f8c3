use std::sync::Arc;

use engram_identity::AddressIdentity;

use crate::config::{
    AddressConfig, Arithmetic, Boundary, MAX_ORDER, StoredAddressing, StoredLayer, config_error,
};
use crate::error::{Result, ids_of};
use crate::hash::LayerAddress;
use crate::history::{History, Tokens, row_ids_of_sequence};
use crate::identity_hasher::IdentityHasher;
use crate::multipliers::draw_multipliers;
use crate::primes::assign_primes;
use crate::scheme::Scheme;
use crate::vocabulary::Vocabulary;

/// Maps token ids to row ids, for every memory layer of a model. Clones share their parts.
#[derive(Clone, Debug)]
pub struct Addressing {
    scheme: Arc<Scheme>,
    identity: AddressIdentity,
}

impl Addressing {
    /// Draws the multipliers and finds the primes for `config`.
    ///
    /// # Errors
    /// An invalid value, by its key.
    pub fn new(config: &AddressConfig, vocabulary: Vocabulary) -> Result<Self> {
        config.validate()?;
        let primes = assign_primes(config.layers.len(), &config.base_rows, config.heads)?;
        let layer = |(&layer, primes)| StoredLayer {
            layer,
            multipliers: draw_multipliers(config.seed, layer, vocabulary.classes(), config.max_order),
            primes,
        };
        let stored = StoredAddressing {
            layers: config.layers.iter().zip(primes).map(layer).collect(),
            pad_id: config.pad_id,
            boundary: config.boundary,
            arithmetic: config.arithmetic,
        };
        Self::from_stored(stored, vocabulary)
    }

    /// Uses multipliers and primes as stored in a checkpoint.
    ///
    /// # Errors
    /// An invalid value, by its key. With exact arithmetic also a multiplier that is not positive, or whose product
    /// with a class reaches 2^63.
    pub fn from_stored(stored: StoredAddressing, vocabulary: Vocabulary) -> Result<Self> {
        stored.validate()?;
        let StoredAddressing { layers, pad_id, boundary, arithmetic } = stored;
        let pad_class = class_of("pad_id", pad_id, &vocabulary)?;
        if let Boundary::After(token) | Boundary::Before(token) = boundary {
            class_of("boundary", token, &vocabulary)?;
        }
        if arithmetic == Arithmetic::Exact {
            layers.iter().try_for_each(|layer| refuse_inexact(layer, vocabulary.classes()))?;
        }
        let layers = layers
            .into_iter()
            .map(|StoredLayer { layer, multipliers, primes }| LayerAddress::new(layer, multipliers, primes))
            .collect();
        let scheme = Scheme { vocabulary, boundary, pad_class, pad_id, arithmetic, layers };
        Ok(Self { identity: identity_of(&scheme), scheme: Arc::new(scheme) })
    }

    /// Everything but the vocabulary, in the form that a checkpoint stores.
    pub fn to_stored(&self) -> StoredAddressing {
        let layer = |layer: &LayerAddress| StoredLayer {
            layer: layer.layer(),
            multipliers: layer.multipliers().to_vec(),
            primes: layer.primes().to_vec(),
        };
        StoredAddressing {
            layers: self.scheme.layers.iter().map(layer).collect(),
            pad_id: self.scheme.pad_id,
            boundary: self.scheme.boundary,
            arithmetic: self.scheme.arithmetic,
        }
    }

    /// The hash of everything that decides row ids.
    pub fn identity(&self) -> AddressIdentity {
        self.identity
    }

    /// The memory layers, in the order of the configuration.
    pub fn layers(&self) -> &[LayerAddress] {
        &self.scheme.layers
    }

    /// The memory layer of the block with this 0-based id, if it has memory.
    pub fn layer(&self, layer_id: usize) -> Option<&LayerAddress> {
        self.layers().iter().find(|layer| layer.layer() == layer_id)
    }

    /// Token ids to classes.
    pub fn vocabulary(&self) -> &Vocabulary {
        &self.scheme.vocabulary
    }

    /// Length of the longest n-gram.
    pub fn max_order(&self) -> usize {
        self.scheme.max_order()
    }

    /// The history of an empty sequence.
    pub fn history(&self) -> History {
        History::new(Arc::clone(&self.scheme))
    }

    /// Row ids of a whole sequence in one memory layer's table, `[time, order, head]`. Replaces the contents of `out`.
    ///
    /// `layer_index` counts memory layers from 0; it is not the block's id.
    ///
    /// # Errors
    /// A token outside the vocabulary, a mask whose length differs from the tokens', a layer that does not exist.
    pub fn row_ids<'t>(
        &self,
        layer_index: usize,
        tokens: impl Into<Tokens<'t>>,
        out: &mut Vec<u64>,
    ) -> Result<()> {
        let tokens = tokens.into();
        out.resize(tokens.len() * self.scheme.layer(layer_index)?.slots(), 0);
        self.row_ids_into(layer_index, tokens, out)
    }

    /// The same, written to a slice of `tokens.len() * slots` entries.
    ///
    /// # Errors
    /// Those of [`row_ids`](Self::row_ids), and a slice of the wrong length.
    pub fn row_ids_into<'t>(
        &self,
        layer_index: usize,
        tokens: impl Into<Tokens<'t>>,
        out: &mut [u64],
    ) -> Result<()> {
        row_ids_of_sequence(&self.scheme, layer_index, tokens.into(), out)
    }
}

fn class_of(key: &'static str, token: u32, vocabulary: &Vocabulary) -> Result<u32> {
    vocabulary.class(token).or_else(|_| {
        config_error(key, format!("names token {token}; the vocabulary has {}", ids_of(vocabulary.len())))
    })
}

fn refuse_inexact(layer: &StoredLayer, classes: usize) -> Result<()> {
    let largest_class = classes as i128 - 1;
    let inexact =
        |multiplier: i64| multiplier <= 0 || i128::from(multiplier) * largest_class > i128::from(i64::MAX);
    match layer.multipliers.iter().find(|&&multiplier| inexact(multiplier)) {
        Some(multiplier) => config_error(
            "multipliers",
            format!(
                "of layer {}: {multiplier} is not positive, or times class {largest_class} it reaches 2^63; \
                 check that no digit was lost and that the vocabulary is the right one, \
                 or choose the wrapping arithmetic if the model uses it",
                layer.layer
            ),
        ),
        None => Ok(()),
    }
}

fn identity_of(scheme: &Scheme) -> AddressIdentity {
    let mut hasher = IdentityHasher::new();
    hasher.numbers(scheme.vocabulary.as_slice().iter().map(|&class| class.into()));
    hasher.number(scheme.pad_class.into());
    match scheme.boundary {
        Boundary::None => hasher.numbers([0].into_iter()),
        Boundary::After(token) => hasher.numbers([1, token.into()].into_iter()),
        Boundary::Before(token) => hasher.numbers([2, token.into()].into_iter()),
    }
    hasher.number(match scheme.arithmetic {
        Arithmetic::Exact => 0,
        Arithmetic::Wrapping => 1,
    });
    hasher.number(scheme.layers.len() as u64);
    for layer in &scheme.layers {
        hasher.number(layer.layer() as u64);
        hasher.numbers(layer.multipliers().iter().map(|&multiplier| multiplier as u64));
        hasher.number(layer.primes().len() as u64);
        layer.primes().iter().for_each(|heads| hasher.numbers(heads.iter().copied()));
    }
    hasher.finish()
}

// The history stores how many positions a token sees in 16 bits.
const _: () = assert!(MAX_ORDER <= u16::MAX as usize);

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> AddressConfig {
        AddressConfig {
            seed: 0,
            layers: vec![1, 14],
            max_order: 3,
            heads: 2,
            base_rows: vec![100, 100],
            pad_id: 2,
            boundary: Boundary::None,
            arithmetic: Arithmetic::Exact,
        }
    }

    fn addressing() -> Addressing {
        Addressing::new(&config(), Vocabulary::identity(50)).unwrap()
    }

    #[test]
    fn stored_addressing_is_the_same() {
        let json = serde_json::to_string(&addressing().to_stored()).unwrap();
        let stored = serde_json::from_str(&json).unwrap();
        let restored = Addressing::from_stored(stored, Vocabulary::identity(50)).unwrap();
        addressing().identity().check(&restored.identity()).unwrap();

        let (mut ids, mut restored_ids) = (Vec::new(), Vec::new());
        addressing().row_ids(1, &[7, 8, 9], &mut ids).unwrap();
        restored.row_ids(1, &[7, 8, 9], &mut restored_ids).unwrap();
        assert_eq!(ids, restored_ids);
    }

    #[test]
    fn whatever_changes_ids_changes_the_identity() {
        let mut swapped: Vec<u32> = (0..50).collect();
        swapped.swap(7, 8);
        let changes: [fn(&mut AddressConfig); 9] = [
            |config| config.seed = 1,
            |config| config.layers = vec![1, 15],
            |config| config.layers = vec![14, 1],
            |config| config.heads = 3,
            |config| (config.max_order, config.base_rows) = (4, vec![100; 3]),
            |config| config.base_rows[0] = 200,
            |config| config.pad_id = 3,
            |config| config.boundary = Boundary::After(3),
            |config| config.arithmetic = Arithmetic::Wrapping,
        ];
        let mut identities = vec![
            addressing().identity(),
            Addressing::new(&config(), Vocabulary::from_classes(swapped).unwrap()).unwrap().identity(),
            Addressing::new(&config(), Vocabulary::identity(51)).unwrap().identity(),
        ];
        for change in changes {
            let mut config = config();
            change(&mut config);
            identities.push(Addressing::new(&config, Vocabulary::identity(50)).unwrap().identity());
        }
        for (i, identity) in identities.iter().enumerate() {
            assert!(!identities[..i].contains(identity), "change {i}");
        }
        assert_eq!(addressing().identity(), identities[0]);
    }

    /// Tables and checkpoints on disk carry identities, so the hashed facts and their encoding must never change.
    #[test]
    fn the_identity_of_a_known_addressing() {
        let expected = "8ee1a21c3b6c430825fe9a72d055755b14128a475a00dae22aa172f773c6bb75";
        assert_eq!(addressing().identity().to_string(), expected);
    }

    #[test]
    fn exact_arithmetic_refuses_multipliers_that_overflow() {
        let with_multiplier = |multiplier, arithmetic| {
            let mut stored = addressing().to_stored();
            stored.layers[1].multipliers[2] = multiplier;
            stored.arithmetic = arithmetic;
            Addressing::from_stored(stored, Vocabulary::identity(50)).map(|_| ())
        };
        assert!(with_multiplier(i64::MAX / 49, Arithmetic::Exact).is_ok());
        for multiplier in [i64::MAX / 49 + 1, i64::MAX, 0, -1] {
            let error = with_multiplier(multiplier, Arithmetic::Exact).unwrap_err().to_string();
            assert!(error.contains(&format!("of layer 14: {multiplier} ")), "{error}");
            assert!(with_multiplier(multiplier, Arithmetic::Wrapping).is_ok());
        }
    }

    #[test]
    fn tokens_of_the_configuration_must_be_of_the_vocabulary() {
        let problem = |config: AddressConfig| {
            Addressing::new(&config, Vocabulary::identity(50)).unwrap_err().to_string()
        };
        let error = problem(AddressConfig { pad_id: 50, ..config() });
        assert!(error.contains("`pad_id`: names token 50"), "{error}");
        let empty = Addressing::new(&config(), Vocabulary::identity(0)).unwrap_err().to_string();
        assert!(empty.contains("`pad_id`: names token 2; the vocabulary has no ids"), "{empty}");
        let error = problem(AddressConfig { boundary: Boundary::Before(60), ..config() });
        assert!(error.contains("`boundary`: names token 60"), "{error}");
    }

    #[test]
    fn layers_are_found_by_their_block() {
        let addressing = addressing();
        assert_eq!(addressing.layer(14).unwrap().multipliers(), addressing.layers()[1].multipliers());
        assert!(addressing.layer(0).is_none());
        assert_eq!((addressing.max_order(), addressing.layers()[0].slots()), (3, 4));
    }
}
