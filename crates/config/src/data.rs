//! The data of a run: one source, or several that are mixed by weight.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::ConfigError;

/// Prepared token shards and the tokenizer that made them (`engram data prepare`). Either `train`, or several sources in
/// `[[data.source]]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Shards to train on. Required without `[[data.source]]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train: Option<PathBuf>,
    /// Held-out shards. Without them, there are no held-out losses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub valid: Option<PathBuf>,
    /// The tokenizer, a Hugging Face `tokenizer.json`.
    pub tokenizer: PathBuf,
    /// Sources that are mixed, in place of `train` and `valid`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub source: Vec<SourceConfig>,
}

/// One of several sources, a table `[[data.source]]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct SourceConfig {
    /// Its name in reports and checkpoints.
    pub name: String,
    /// Shards to train on.
    pub train: PathBuf,
    /// Held-out shards. Without them, this source has no held-out loss.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub valid: Option<PathBuf>,
    /// Its share of the training windows, relative to the other sources' weights. Above 0.
    pub weight: f64,
}

/// A source of a run, whichever form of `[data]` names it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DataSource<'a> {
    /// Its name. The only source, which `data.train` names, has none.
    pub name: Option<&'a str>,
    /// Shards to train on.
    pub train: &'a Path,
    /// Held-out shards.
    pub valid: Option<&'a Path>,
    /// Its share of the training windows. The weights of all sources sum to 1.
    pub weight: f64,
}

impl DataConfig {
    /// One source, without a name.
    pub fn one(train: PathBuf, valid: Option<PathBuf>, tokenizer: PathBuf) -> Self {
        Self { train: Some(train), valid, tokenizer, source: Vec::new() }
    }

    /// Resolves relative paths against the folder of the file at `path`, which they were read from.
    pub fn resolve(&mut self, path: &Path) {
        let folder = path.parent().unwrap_or(Path::new(""));
        self.paths_mut().for_each(|data| *data = folder.join(&data));
    }

    /// All paths.
    pub fn paths_mut(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        let sources = self
            .source
            .iter_mut()
            .flat_map(|SourceConfig { train, valid, .. }| std::iter::once(train).chain(valid));
        self.train.iter_mut().chain([&mut self.tokenizer]).chain(&mut self.valid).chain(sources)
    }

    /// The sources, in order; of an invalid configuration, those that it names.
    pub fn sources(&self) -> Vec<DataSource<'_>> {
        let all: f64 = self.source.iter().map(|source| source.weight).sum();
        let one = self.train.as_deref().map(|train| DataSource {
            name: None,
            train,
            valid: self.valid.as_deref(),
            weight: 1.0,
        });
        let named = self.source.iter().map(|source| DataSource {
            name: Some(&source.name),
            train: &source.train,
            valid: source.valid.as_deref(),
            weight: source.weight / all,
        });
        one.into_iter().chain(named).collect()
    }

    /// The shards to train on and the held-out ones, for callers that need both and take one source.
    ///
    /// # Errors
    /// When there are several sources, or no held-out shards.
    pub fn train_and_held_out(&self) -> Result<(&Path, &Path), ConfigError> {
        let Some(train) = &self.train else {
            let reason =
                "holds several sources, and a study takes one: name it by `data.train` and `data.valid`";
            return Err(ConfigError::new("data.source", reason));
        };
        let reason = "is missing: name held-out shards (`engram data prepare --hold-out`)";
        let valid = self.valid.as_deref().ok_or_else(|| ConfigError::new("data.valid", reason))?;
        Ok((train, valid))
    }

    /// Refuses data that cannot be trained on.
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        if self.source.is_empty() {
            let reason = "is missing: name prepared shards, or several sources in `[[data.source]]`";
            return self.train.as_ref().map(|_| ()).ok_or_else(|| ConfigError::new("data.train", reason));
        }
        for (key, path) in [("data.train", &self.train), ("data.valid", &self.valid)] {
            if path.is_some() {
                let reason = "and `[[data.source]]` exclude each other: move it into a source";
                return Err(ConfigError::new(key, reason));
            }
        }
        for (index, SourceConfig { name, weight, .. }) in self.source.iter().enumerate() {
            let refuse = |key: &str, reason: String| {
                Err(ConfigError::new(format!("data.source[{index}].{key}"), reason))
            };
            if name.is_empty() {
                return refuse("name", "is empty: name the source".into());
            }
            if self.source[..index].iter().any(|before| before.name == *name) {
                return refuse("name", format!("names a second source {name:?}: names must differ"));
            }
            // Not a number is not above 0 either.
            if !(*weight > 0.0 && weight.is_finite()) {
                return refuse(
                    "weight",
                    format!("is {weight} for the source {name:?}: must be above 0 and finite"),
                );
            }
        }
        let all: f64 = self.source.iter().map(|source| source.weight).sum();
        match all.is_finite() {
            true => Ok(()),
            false => {
                Err(ConfigError::new("data.source", "has weights whose sum is too large: make them smaller"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(text: &str) -> Result<DataConfig, String> {
        let data: DataConfig = toml::from_str(text).map_err(|error| error.to_string())?;
        data.validate().map_err(|error| error.to_string())?;
        Ok(data)
    }

    const TWO: &str = "tokenizer = \"t\"\n[[source]]\nname = \"web\"\ntrain = \"w\"\nweight = 3\n\
                       [[source]]\nname = \"code\"\ntrain = \"c\"\nvalid = \"v\"\nweight = 1.0";

    #[test]
    fn weights_are_shares() {
        let mut two = data(TWO).unwrap();
        let shares: Vec<_> = two.sources().iter().map(|source| (source.name, source.weight)).collect();
        assert_eq!(shares, [(Some("web"), 0.75), (Some("code"), 0.25)]);
        two.resolve(Path::new("folder/run.toml"));
        assert_eq!(two.paths_mut().count(), 4);
        assert!(two.paths_mut().all(|path| path.starts_with("folder")));
        let one = data("tokenizer = \"t\"\ntrain = \"w\"").unwrap();
        let source = one.sources()[0];
        assert_eq!((source.name, source.train, source.weight), (None, Path::new("w"), 1.0));
        assert_eq!(toml::to_string(&one).unwrap(), "train = \"w\"\ntokenizer = \"t\"\n");
    }

    #[test]
    fn what_cannot_be_mixed_is_refused_by_key_and_source() {
        for (change, key, reason) in [
            (("weight = 1.0", "weight = 0"), "data.source[1].weight", "is 0 for the source \"code\""),
            (("weight = 1.0", "weight = -1"), "data.source[1].weight", "is -1 for the source \"code\""),
            (("weight = 1.0", "weight = nan"), "data.source[1].weight", "is NaN for the source \"code\""),
            (("weight = 1.0", "weight = inf"), "data.source[1].weight", "is inf for the source \"code\""),
            (("name = \"code\"", "name = \"web\""), "data.source[1].name", "a second source \"web\""),
            (("name = \"web\"", "name = \"\""), "data.source[0].name", "is empty"),
            (("tokenizer", "train = \"w\"\ntokenizer"), "data.train", "`[[data.source]]`"),
            (("tokenizer", "valid = \"w\"\ntokenizer"), "data.valid", "`[[data.source]]`"),
        ] {
            let message = data(&TWO.replacen(change.0, change.1, 1)).unwrap_err();
            assert!(message.starts_with(&format!("`{key}`")) && message.contains(reason), "{message}");
        }
        assert!(data("tokenizer = \"t\"").unwrap_err().starts_with("`data.train`: is missing"));
        assert!(data(&TWO.replacen("weight = 3", "", 1)).unwrap_err().contains("missing field `weight`"));
    }
}
