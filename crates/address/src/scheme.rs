use crate::config::{Arithmetic, Boundary};
use crate::error::{AddressError, Result};
use crate::hash::LayerAddress;
use crate::vocabulary::Vocabulary;

/// What decides row ids, shared by an addressing and its histories.
#[derive(Debug)]
pub(crate) struct Scheme {
    pub(crate) vocabulary: Vocabulary,
    pub(crate) boundary: Boundary,
    pub(crate) pad_class: u32,
    pub(crate) pad_id: u32,
    pub(crate) arithmetic: Arithmetic,
    /// At least one.
    pub(crate) layers: Vec<LayerAddress>,
}

impl Scheme {
    pub(crate) fn max_order(&self) -> usize {
        self.layers[0].multipliers().len()
    }

    pub(crate) fn layer(&self, index: usize) -> Result<&LayerAddress> {
        let layers = || self.layers.iter().map(LayerAddress::layer).collect();
        self.layers.get(index).ok_or_else(|| AddressError::LayerIndex { index, layers: layers() })
    }
}
