//! GGUF files for tests.
#![allow(missing_docs, reason = "each method adds what its name says")]

/// Writes GGUF files for tests.
#[derive(Default)]
pub struct Writer {
    metadata: Vec<u8>,
    pairs: u64,
    infos: Vec<u8>,
    tensors: u64,
    data: Vec<u8>,
}

pub(crate) fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

impl Writer {
    fn pair(&mut self, key: &str, kind: u32, value: &[u8]) -> &mut Self {
        self.metadata.extend([&text(key)[..], &kind.to_le_bytes(), value].concat());
        self.pairs += 1;
        self
    }

    pub fn integer(&mut self, key: &str, value: u32) -> &mut Self {
        self.pair(key, 4, &value.to_le_bytes())
    }

    pub fn float(&mut self, key: &str, value: f32) -> &mut Self {
        self.pair(key, 6, &value.to_le_bytes())
    }

    pub fn bool(&mut self, key: &str, value: bool) -> &mut Self {
        self.pair(key, 7, &[value.into()])
    }

    pub fn text(&mut self, key: &str, value: &str) -> &mut Self {
        self.pair(key, 8, &text(value))
    }

    pub fn texts(&mut self, key: &str, values: &[String]) -> &mut Self {
        let mut bytes = [&8_u32.to_le_bytes()[..], &(values.len() as u64).to_le_bytes()].concat();
        values.iter().for_each(|value| bytes.extend(text(value)));
        self.pair(key, 9, &bytes)
    }

    pub fn integers(&mut self, key: &str, values: &[i32]) -> &mut Self {
        let mut bytes = [&5_u32.to_le_bytes()[..], &(values.len() as u64).to_le_bytes()].concat();
        values.iter().for_each(|value| bytes.extend(value.to_le_bytes()));
        self.pair(key, 9, &bytes)
    }

    pub fn bytes_list(&mut self, key: &str, values: &[u8]) -> &mut Self {
        let count = (values.len() as u64).to_le_bytes();
        self.pair(key, 9, &[&0_u32.to_le_bytes()[..], &count, values].concat())
    }

    pub fn floats(&mut self, key: &str, values: &[f32]) -> &mut Self {
        let mut bytes = [&6_u32.to_le_bytes()[..], &(values.len() as u64).to_le_bytes()].concat();
        values.iter().for_each(|value| bytes.extend(value.to_le_bytes()));
        self.pair(key, 9, &bytes)
    }

    /// A tensor of ggml type `kind`; `shape` outermost first.
    pub fn tensor(&mut self, name: &str, shape: &[usize], kind: u32, data: &[u8]) -> &mut Self {
        self.infos.extend([&text(name)[..], &(shape.len() as u32).to_le_bytes()].concat());
        shape.iter().rev().for_each(|&size| self.infos.extend((size as u64).to_le_bytes()));
        self.infos.extend([&kind.to_le_bytes()[..], &(self.data.len() as u64).to_le_bytes()].concat());
        self.tensors += 1;
        self.data.extend(data);
        self.data.resize(self.data.len().next_multiple_of(32), 0);
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        let counts = [self.tensors.to_le_bytes(), self.pairs.to_le_bytes()].concat();
        let mut bytes = [b"GGUF", &3_u32.to_le_bytes()[..], &counts, &self.metadata, &self.infos].concat();
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        [bytes, self.data.clone()].concat()
    }
}
