//! The data of a run: its sources, their shares of the training windows, and the position of a run in them.

use std::path::{Path, PathBuf};

use engram_config::{DataConfig, RunConfig};
use engram_data::{Mixture, Sampler, SamplerState, TokenShards, Tokenizer, Window};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The sources of a run, opened and checked against its tokenizer and context.
#[derive(Debug)]
pub(crate) struct Sources {
    list: Vec<Source>,
}

/// Prepared data that are a share of a run's.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) place: Place,
    /// Share of the training windows. Those of all sources sum to 1.
    pub(crate) weight: f64,
    pub(crate) train: Shards,
    pub(crate) valid: Option<Shards>,
}

/// Shards, and the path they were opened at.
#[derive(Debug)]
pub(crate) struct Shards {
    pub(crate) path: PathBuf,
    pub(crate) tokens: TokenShards,
}

/// Where a configuration names a source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// In `data.train`: the only source.
    Only,
    /// In the table of `[[data.source]]` at this index, under this name.
    Listed(usize, String),
}

/// A position in the training data, as a checkpoint stores it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Position {
    /// In the only source.
    Only(SamplerState),
    /// In each of several.
    Listed(Vec<SourcePosition>),
}

/// A position in one of several sources.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SourcePosition {
    /// The source's name.
    pub(crate) name: String,
    /// The data that this is a position in.
    pub(crate) identity: String,
    /// The position.
    pub(crate) sampler: SamplerState,
    /// The held-out data, if there are any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) held_out: Option<String>,
}

/// What a checkpoint says about the data of its run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Saved<'a> {
    /// The position.
    pub(crate) position: &'a Position,
    /// The data of the only source.
    pub(crate) data: Option<&'a str>,
    /// The held-out data of the only source.
    pub(crate) held_out: Option<&'a str>,
    /// The sources as the run's configuration names them.
    pub(crate) config: &'a DataConfig,
}

/// Data other than a run began with: the key that may allow it, and what differs.
struct Difference {
    key: &'static str,
    problem: String,
}

impl Sources {
    /// Opens the data of `config`.
    ///
    /// # Errors
    /// When they cannot be read, are shorter than a window, or were made with another tokenizer. If there are several
    /// sources, the error names the source and the key.
    pub(crate) fn open(config: &RunConfig, tokenizer: &Tokenizer) -> Result<Self> {
        let open = |path: &Path| -> Result<Shards> {
            let tokens = TokenShards::open(path)?;
            tokens.check_tokenizer(tokenizer)?;
            check_end(&tokens, tokenizer, path)?;
            Ok(Shards { path: path.to_owned(), tokens })
        };
        let train = |path: &Path| {
            let shards = open(path)?;
            // Before a model is made: a sampler refuses data that are shorter than a window.
            Sampler::new(config.train.seed, config.model.context, 1, shards.tokens.len())?;
            Ok(shards)
        };
        let valid = |path: &Path| {
            let shards = open(path)?;
            match shards.tokens.len() {
                1 => Err(Error::Mismatch(format!(
                    "{}: the held-out text has no token to predict; hold out more",
                    path.display()
                ))),
                _ => Ok(shards),
            }
        };
        let sources = config.data.sources().into_iter().enumerate().map(|(index, source)| {
            let place = source.name.map_or(Place::Only, |name| Place::Listed(index, name.to_owned()));
            let train = place.of("train", train(source.train))?;
            let valid = source.valid.map(|path| place.of("valid", valid(path))).transpose()?;
            Ok(Source { place, weight: source.weight, train, valid })
        });
        Ok(Self { list: sources.collect::<Result<_>>()? })
    }

    /// The sources, in the order of the configuration.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Source> {
        self.list.iter()
    }

    /// The order of the training windows, at `position`.
    ///
    /// # Errors
    /// A position that the data do not have.
    pub(crate) fn mixture(&self, config: &RunConfig, position: &Position) -> Result<Mixture> {
        let weights: Vec<_> = self.iter().map(|source| (source.weight, source.train.tokens.len())).collect();
        Ok(Mixture::new(config.train.seed, config.model.context, &weights)?.at(&position.states())?)
    }

    /// Copies the tokens of a window into `out`.
    ///
    /// # Errors
    /// When the data are damaged.
    pub(crate) fn read(&self, window: Window, out: &mut [u32]) -> Result<()> {
        Ok(self.list[window.source].train.tokens.read(window.start, out)?)
    }

    /// The position at which `states` are the samplers of these sources.
    pub(crate) fn position(&self, states: Vec<SamplerState>) -> Position {
        let position = |(source, sampler): (&Source, SamplerState)| match &source.place {
            Place::Only => None,
            Place::Listed(_, name) => Some(SourcePosition {
                name: name.clone(),
                identity: source.train.identity(),
                sampler,
                held_out: source.valid.as_ref().map(Shards::identity),
            }),
        };
        let listed: Option<Vec<_>> = self.iter().zip(states.iter().copied()).map(position).collect();
        listed.map_or_else(|| Position::Only(states[0]), Position::Listed)
    }

    /// The position at the beginning of the data.
    pub(crate) fn beginning(&self) -> Position {
        self.position(vec![SamplerState::default(); self.list.len()])
    }

    /// What identifies the training data of the only source; none of several, whose positions hold it.
    pub(crate) fn data(&self) -> Option<String> {
        self.only().map(|source| source.train.identity())
    }

    /// What identifies the held-out data of the only source.
    pub(crate) fn held_out(&self) -> Option<String> {
        self.only()?.valid.as_ref().map(Shards::identity)
    }

    fn only(&self) -> Option<&Source> {
        self.iter().find(|source| source.place == Place::Only)
    }

    /// Whether these data come in the order of those of a checkpoint, under the same seed.
    pub(crate) fn are(&self, saved: Saved<'_>) -> bool {
        self.other_training(saved).is_none()
    }

    /// Whether a run goes on at the position of a checkpoint. If not, it reads its data from their beginning.
    ///
    /// # Errors
    /// When the data are not the checkpoint's, and `allowed` does not name the key that changes them.
    pub(crate) fn resume(&self, saved: Saved<'_>, allowed: &[String]) -> Result<bool> {
        let training = self.other_training(saved);
        let goes_on = training.is_none();
        training.into_iter().chain(self.other_held_out(saved)).try_for_each(|other| other.check(allowed))?;
        Ok(goes_on)
    }

    /// How the training data differ from the checkpoint's, if they do.
    fn other_training(&self, saved: Saved<'_>) -> Option<Difference> {
        let Position::Listed(before) = saved.position else {
            return self.other_only(saved);
        };
        let names: Vec<_> = self.iter().filter_map(|source| source.place.name()).collect();
        let names_before: Vec<_> = before.iter().map(|source| source.name.as_str()).collect();
        if names != names_before {
            let (key, now) = match names[..] {
                [] => ("data.train", "`data.train`".to_owned()),
                _ => ("data.source", format!("the sources {names:?}")),
            };
            let problem = format!("`{key}`: this run began with the sources {names_before:?}, now {now}");
            return Some(Difference { key, problem });
        }
        let shares = saved.config.sources();
        self.iter().zip(before).enumerate().find_map(|(index, (source, before))| {
            let identical = source.train.identity() == before.identity;
            // Weights that were scaled are the same shares, except for the last bit.
            let share = shares.get(index).map_or(f64::NAN, |source| source.weight);
            let problem = match (identical, (share - source.weight).abs() < 1e-12) {
                (true, true) => return None,
                (false, _) => not_the_data(&source.train.path),
                (true, false) => format!("{share} of the windows, now {}", source.weight),
            };
            let key = if identical { "weight" } else { "train" };
            Some(Difference { key: "data.source", problem: source.place.say(key, &problem) })
        })
    }

    fn other_only(&self, saved: Saved<'_>) -> Option<Difference> {
        match self.only() {
            None => Some(Difference {
                key: "data.source",
                problem: "`data.source`: this run began with one source, `data.train`".to_owned(),
            }),
            Some(source) if saved.data != Some(&source.train.identity()) => {
                Some(Difference { key: "data.train", problem: not_the_data(&source.train.path) })
            }
            Some(_) => None,
        }
    }

    /// How held-out data differ from the checkpoint's, if both have some.
    fn other_held_out(&self, saved: Saved<'_>) -> Option<Difference> {
        self.iter().find_map(|source| {
            let (before, key) = match (&source.place, saved.position) {
                (Place::Only, _) => (saved.held_out, "data.valid"),
                (Place::Listed(_, name), Position::Listed(list)) => {
                    let before = list.iter().find(|before| before.name == *name);
                    (before.and_then(|before| before.held_out.as_deref()), "data.source")
                }
                (Place::Listed(..), Position::Only(_)) => return None,
            };
            let now = source.valid.as_ref()?;
            (before? != now.identity())
                .then(|| Difference { key, problem: source.place.say("valid", &not_the_data(&now.path)) })
        })
    }
}

impl Position {
    /// The positions in all sources, in their order.
    pub(crate) fn states(&self) -> Vec<SamplerState> {
        match self {
            Self::Only(state) => vec![*state],
            Self::Listed(list) => list.iter().map(|source| source.sampler).collect(),
        }
    }
}

impl Shards {
    fn identity(&self) -> String {
        self.tokens.identity().to_string()
    }
}

impl Place {
    /// The name of one of several sources.
    pub(crate) fn name(&self) -> Option<&str> {
        match self {
            Self::Only => None,
            Self::Listed(_, name) => Some(name),
        }
    }

    /// A problem with one of several sources has its key and name before it.
    fn say(&self, key: &str, problem: &str) -> String {
        match self {
            Self::Only => problem.to_owned(),
            Self::Listed(index, name) => format!("`data.source[{index}].{key}`, source {name:?}: {problem}"),
        }
    }

    fn of<T>(&self, key: &str, result: Result<T>) -> Result<T> {
        result.map_err(|error| match (self, error.is_input()) {
            (Self::Listed(..), true) => Error::Mismatch(self.say(key, &error.to_string())),
            _ => error,
        })
    }
}

impl Difference {
    /// Refuses it unless a key is allowed to change.
    fn check(self, allowed: &[String]) -> Result<()> {
        if allowed.iter().any(|allowed| allowed == "data" || allowed == self.key) {
            return Ok(());
        }
        let Self { key, problem } = self;
        Err(Error::Mismatch(format!("{problem}; to continue with other data: --change {key}")))
    }
}

fn not_the_data(path: &Path) -> String {
    format!("{}: not the data that this run began with", path.display())
}

/// Refuses data whose documents end otherwise than the model's texts: nothing else would notice.
fn check_end(shards: &TokenShards, tokenizer: &Tokenizer, path: &Path) -> Result<()> {
    let name = |token: u32| tokenizer.inner().id_to_token(token).unwrap_or_else(|| format!("token {token}"));
    let (found, expected) = (shards.end_of_text(), tokenizer.end_of_text());
    if found == expected {
        return Ok(());
    }
    let (path, found, expected) = (path.display(), name(found), name(expected));
    Err(Error::Mismatch(format!(
        "{path}: its documents end with {found:?}, but a text of this model with {expected:?} (`text.end`); prepare the \
         data with `--end {expected:?}`"
    )))
}
