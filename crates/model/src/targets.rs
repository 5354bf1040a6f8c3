//! The next tokens that a loss is over.

use std::sync::Arc;

/// The next token after each of a batch, and which of them a loss counts.
#[derive(Debug, Clone, PartialEq)]
pub struct Targets {
    /// `[tokens]`.
    ids: Arc<[u32]>,
    /// Places of those that a loss counts, in order; none: all.
    counted: Option<Arc<[u32]>>,
}

impl Targets {
    /// The targets `ids`, of which a loss counts those marked in `counts`, both `[tokens]`.
    ///
    /// # Panics
    /// When there is not a mark for each target.
    pub fn counting(ids: Arc<[u32]>, counts: &[bool]) -> Self {
        assert_eq!(ids.len(), counts.len(), "a mark for each target");
        let places = (0..).zip(counts).filter(|(_, counts)| **counts).map(|(place, _)| place);
        Self { ids, counted: Some(places.collect()) }
    }

    /// All targets, `[tokens]`.
    pub fn ids(&self) -> &Arc<[u32]> {
        &self.ids
    }

    /// Places of those that a loss counts; none: all.
    pub(crate) fn counted(&self) -> Option<&Arc<[u32]>> {
        self.counted.as_ref()
    }

    /// Number of targets that a loss counts.
    pub fn count(&self) -> usize {
        self.counted.as_ref().map_or(self.ids.len(), |counted| counted.len())
    }
}

impl From<Arc<[u32]>> for Targets {
    fn from(ids: Arc<[u32]>) -> Self {
        Self { ids, counted: None }
    }
}

/// Factors on the losses that gradients are taken of.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shares {
    /// On the mean over the targets that count.
    pub loss: f32,
    /// On the losses that balance experts.
    pub balance: f32,
}
