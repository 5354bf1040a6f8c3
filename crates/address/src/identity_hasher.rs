use engram_identity::AddressIdentity;

/// Hashes facts one after another, each as a little-endian number. Lists start with their length, so that different
/// lists of facts never give the same bytes.
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
        AddressIdentity::from_bytes(self.0.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
