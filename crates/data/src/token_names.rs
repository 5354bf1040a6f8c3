//! The names of a vocabulary's tokens, in little memory: one text for all of them.

use std::collections::HashMap;
use std::fmt;
use std::hash::BuildHasher;

use hashbrown::{DefaultHashBuilder, HashTable};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

/// Names by id and ids by name. Ids may have gaps.
#[derive(Clone)]
pub(crate) struct TokenNames {
    /// All names, one after another, in the order of their ids.
    text: Box<str>,
    /// Where the name of each id ends, after a 0 for the start of the first. An id without a name ends where it starts.
    ends: Box<[u32]>,
    /// The ids that have a name, by its hash.
    ids: HashTable<u32>,
    hasher: DefaultHashBuilder,
}

/// Most ids for each name: a vocabulary with larger gaps would take more memory here than in a map.
const SPARSEST: usize = 4;

impl TokenNames {
    /// Takes names and their ids. None where two names have one id, or ids have large gaps.
    fn of(mut named: Vec<(u32, Box<str>)>) -> Option<Self> {
        named.sort_by_key(|(id, _)| *id);
        let count = named.last().map_or(0, |(id, _)| *id as usize + 1);
        let bytes: usize = named.iter().map(|(_, name)| name.len()).sum();
        let twice = named.windows(2).any(|pair| pair[0].0 == pair[1].0);
        if twice || count > SPARSEST * named.len() || u32::try_from(bytes).is_err() {
            return None;
        }
        let (mut text, mut ends) = (String::with_capacity(bytes), vec![0; count + 1]);
        for (id, name) in &named {
            let start = text.len() as u32;
            text.push_str(name);
            ends[*id as usize] = start;
            ends[*id as usize + 1] = text.len() as u32;
        }
        // An id without a name lies between two that have one.
        for id in 1..ends.len() {
            ends[id] = ends[id].max(ends[id - 1]);
        }
        let mut names = Self {
            text: text.into(),
            ends: ends.into(),
            ids: HashTable::new(),
            hasher: DefaultHashBuilder::default(),
        };
        let mut ids = HashTable::with_capacity(named.len());
        for (id, name) in &named {
            ids.insert_unique(names.hash(name), *id, |id| names.hash(names.slice(*id)));
        }
        names.ids = ids;
        Some(names)
    }

    /// The id of a name.
    pub(crate) fn id(&self, name: &str) -> Option<u32> {
        self.ids.find(self.hash(name), |id| self.slice(*id) == name).copied()
    }

    /// The name of an id.
    pub(crate) fn name(&self, id: u32) -> Option<&str> {
        let inside = (id as usize) < self.ends.len() - 1;
        let name = inside.then(|| self.slice(id))?;
        (self.id(name) == Some(id)).then_some(name)
    }

    /// How many names there are.
    pub(crate) fn len(&self) -> usize {
        self.ids.len()
    }

    /// One more than the largest id.
    pub(crate) fn id_count(&self) -> usize {
        self.ends.len() - 1
    }

    pub(crate) fn to_map(&self) -> HashMap<String, u32> {
        self.ids.iter().map(|id| (self.slice(*id).to_owned(), *id)).collect()
    }

    fn slice(&self, id: u32) -> &str {
        &self.text[self.ends[id as usize] as usize..self.ends[id as usize + 1] as usize]
    }

    fn hash(&self, name: &str) -> u64 {
        self.hasher.hash_one(name)
    }
}

/// A JSON object of names and ids, or none where [`TokenNames`] does not serve it.
pub(crate) struct ReadNames(pub(crate) Option<TokenNames>);

impl<'de> Deserialize<'de> for ReadNames {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = ReadNames;

            fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str("names of tokens with their ids")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<ReadNames, A::Error> {
                let mut named: Vec<(u32, Box<str>)> = Vec::new();
                while let Some((name, id)) = map.next_entry::<Box<str>, u32>()? {
                    named.push((id, name));
                }
                // If a name occurs twice, the last one counts: such a vocabulary is left to others.
                let mut sorted: Vec<&str> = named.iter().map(|(_, name)| &**name).collect();
                sorted.sort_unstable();
                let twice = sorted.windows(2).any(|pair| pair[0] == pair[1]);
                Ok(ReadNames(if twice { None } else { TokenNames::of(named) }))
            }
        }
        deserializer.deserialize_map(Names)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Option<TokenNames> {
        serde_json::from_str::<ReadNames>(json).unwrap().0
    }

    #[test]
    fn names_and_ids_find_each_other() {
        let names = read(r#"{"b": 3, "": 1, "\u00e9\n": 0, "ab": 4}"#).unwrap();
        assert_eq!((names.len(), names.id_count()), (4, 5));
        let found: Vec<Option<&str>> = (0..6).map(|id| names.name(id)).collect();
        assert_eq!(found, [Some("é\n"), Some(""), None, Some("b"), Some("ab"), None]);
        assert_eq!(
            ["b", "", "é\n", "ab", "a"].map(|name| names.id(name)),
            [Some(3), Some(1), Some(0), Some(4), None]
        );
        assert_eq!(names.to_map().len(), 4);
        assert_eq!(read("{}").unwrap().name(0), None);
    }

    #[test]
    fn what_needs_a_map_is_left_to_one() {
        for json in [r#"{"a": 1, "b": 1}"#, r#"{"a": 1, "a": 2}"#, r#"{"a": 4000000000}"#] {
            assert!(read(json).is_none(), "{json}");
        }
        assert!(serde_json::from_str::<ReadNames>(r#"{"a": -1}"#).is_err());
    }
}
