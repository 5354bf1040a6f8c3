//! What makes tokens of words: byte-pair encoding in little memory, or one of the models of the crate `tokenizers`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::{Deserialize, Deserializer, Error};
use serde_json::value::RawValue;
use tokenizers::models::bpe::BpeTrainer;
use tokenizers::models::{ModelWrapper, TrainerWrapper};
use tokenizers::{
    DecoderWrapper, Model, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, Token, TokenizerImpl,
};

use crate::bpe::Bpe;

/// A tokenizer with any model.
pub(crate) type TokenizerWith<M> =
    TokenizerImpl<M, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

/// A tokenizer of the crate `tokenizers` whose copies share their vocabulary.
pub type TextTokenizer = TokenizerWith<TokenModel>;

/// The model of a [`TextTokenizer`]. Copies share it.
#[derive(Debug, Clone)]
pub struct TokenModel(Kind);

#[derive(Debug, Clone)]
enum Kind {
    Bpe(Arc<Bpe>),
    Other(Arc<ModelWrapper>),
}

impl TokenModel {
    /// Whether a word always has the same tokens, and they depend on nothing else.
    pub(crate) fn is_bpe(&self) -> bool {
        matches!(self.0, Kind::Bpe(_))
    }

    /// One more than the largest id.
    pub(crate) fn id_count(&self) -> usize {
        match &self.0 {
            Kind::Bpe(bpe) => bpe.names().id_count(),
            Kind::Other(model) => model.get_vocab().into_values().max().map_or(0, |id| id as usize + 1),
        }
    }
}

impl From<ModelWrapper> for TokenModel {
    fn from(model: ModelWrapper) -> Self {
        Self(Kind::Other(Arc::new(model)))
    }
}

impl<'de> Deserialize<'de> for TokenModel {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(serde::Deserialize)]
        struct Tagged {
            #[serde(rename = "type")]
            kind: Option<String>,
        }
        // Borrowed: the text of a large vocabulary is not copied.
        let json = <&RawValue>::deserialize(deserializer)?.get();
        let tagged: Tagged = serde_json::from_str(json).map_err(D::Error::custom)?;
        if tagged.kind.as_deref() == Some("BPE")
            && let Some(bpe) = Bpe::read(json).map_err(D::Error::custom)?
        {
            return Ok(Self(Kind::Bpe(Arc::new(bpe))));
        }
        serde_json::from_str::<ModelWrapper>(json).map(Self::from).map_err(D::Error::custom)
    }
}

impl Model for TokenModel {
    type Trainer = TrainerWrapper;

    fn tokenize(&self, word: &str) -> tokenizers::Result<Vec<Token>> {
        match &self.0 {
            Kind::Bpe(bpe) => bpe.tokenize(word),
            Kind::Other(model) => model.tokenize(word),
        }
    }

    fn token_to_id(&self, name: &str) -> Option<u32> {
        match &self.0 {
            Kind::Bpe(bpe) => bpe.names().id(name),
            Kind::Other(model) => model.token_to_id(name),
        }
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        match &self.0 {
            Kind::Bpe(bpe) => bpe.names().name(id).map(str::to_owned),
            Kind::Other(model) => model.id_to_token(id),
        }
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        match &self.0 {
            Kind::Bpe(bpe) => bpe.names().to_map(),
            Kind::Other(model) => model.get_vocab(),
        }
    }

    fn get_vocab_size(&self) -> usize {
        match &self.0 {
            Kind::Bpe(bpe) => bpe.names().len(),
            Kind::Other(model) => model.get_vocab_size(),
        }
    }

    fn save(&self, folder: &Path, prefix: Option<&str>) -> tokenizers::Result<Vec<PathBuf>> {
        match &self.0 {
            Kind::Bpe(_) => Err("this model is saved as a part of its tokenizer.json".into()),
            Kind::Other(model) => model.save(folder, prefix),
        }
    }

    fn get_trainer(&self) -> TrainerWrapper {
        match &self.0 {
            Kind::Bpe(_) => BpeTrainer::default().into(),
            Kind::Other(model) => model.get_trainer(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    /// Letters, some pairs, bytes where asked, with what varies between tokenizers.
    fn model(options: &Value) -> Value {
        let mut names = vec!["<unk>".to_owned()];
        names.extend(["a", "b", "c", "é", "▁", "ab", "bc", "abc", "aa", "▁a", "▁ab", "ba"].map(String::from));
        let parts = ["##a", "##b", "##c", "##bc", "abc</w>", "c</w>", "b</w>", "ab</w>", "##ab"];
        names.extend(parts.map(String::from));
        if options["byte_fallback"] == true {
            names.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
        }
        let vocabulary: serde_json::Map<String, Value> =
            names.into_iter().enumerate().map(|(id, name)| (name, Value::from(id))).collect();
        let mut model = json!({"type": "BPE", "vocab": vocabulary, "merges": [
            ["b", "c"], ["a", "b"], ["a", "a"], ["▁", "a"], ["▁a", "b"], ["a", "bc"], ["b", "a"], ["ab", "c"]
        ]});
        for (key, value) in options.as_object().unwrap() {
            model[key] = value.clone();
        }
        model
    }

    fn kinds() -> Vec<Value> {
        let prefixed = json!([["##b", "##c"], ["##a", "##bc"], ["a", "##b"], ["a", "##bc"]]);
        let mut kinds: Vec<Value> = [
            json!({}),
            json!({"unk_token": "<unk>"}),
            json!({"unk_token": "<unk>", "fuse_unk": true, "dropout": 0.0}),
            json!({"unk_token": "<unk>", "byte_fallback": true, "fuse_unk": true}),
            json!({"byte_fallback": true}),
            json!({"ignore_merges": true}),
            json!({"end_of_word_suffix": "</w>", "merges": ["#version: 0.2", "a b", "ab c</w>", "a b</w>"]}),
            json!({"merges": [["a", "b"], ["b", "c"], ["a", "b"], ["a", "bc"], ["ab", "c"]]}),
        ]
        .iter()
        .map(model)
        .collect();
        let mut continued = model(&json!({"continuing_subword_prefix": "##", "merges": prefixed}));
        continued["vocab"]["##abc"] = json!(40);
        kinds.push(continued);
        kinds
    }

    fn read(model: &Value) -> TokenModel {
        serde_json::from_str(&model.to_string()).unwrap()
    }

    proptest! {
        #[test]
        fn its_tokens_are_those_of_the_general_model(word in "[abcé▁xö]{0,24}|(ab|abc|bc|▁ab){0,8}|\\PC{0,12}") {
            for kind in kinds() {
                let (own, general) = (read(&kind), serde_json::from_value::<ModelWrapper>(kind.clone()).unwrap());
                prop_assert!(own.is_bpe());
                prop_assert_eq!(own.tokenize(&word).unwrap(), general.tokenize(&word).unwrap(), "{}", kind);
            }
        }
    }

    #[test]
    fn its_names_are_those_of_the_general_model() {
        for kind in kinds() {
            let (own, general) = (read(&kind), serde_json::from_value::<ModelWrapper>(kind.clone()).unwrap());
            assert_eq!(own.get_vocab(), general.get_vocab());
            assert_eq!(own.get_vocab_size(), general.get_vocab_size());
            for id in 0..300 {
                assert_eq!(own.id_to_token(id), general.id_to_token(id), "{id}");
            }
            for name in ["ab", "", "zz", "##abc"] {
                assert_eq!(own.token_to_id(name), general.token_to_id(name), "{name}");
            }
        }
    }

    #[test]
    fn what_is_unusual_stays_with_the_general_model() {
        let mut shared = model(&json!({}));
        shared["vocab"]["zz"] = json!(1);
        let untyped: Value = {
            let mut model = model(&json!({}));
            model.as_object_mut().unwrap().remove("type");
            model
        };
        let words = json!({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"});
        for kind in [model(&json!({"dropout": 0.5})), shared, untyped, words] {
            assert!(!read(&kind).is_bpe(), "{kind}");
        }
    }

    #[test]
    fn merges_of_tokens_that_are_not_there_are_refused() {
        for (merges, named) in [
            (json!([["a", "b"], ["c", "a"]]), "merge 2 needs the token \"ca\""),
            (json!(["a b c"]), "merge 1 is not a pair"),
            (json!([["zz", "a"]]), "merge 1 needs the token \"zz\""),
        ] {
            let model = model(&json!({"merges": merges}));
            let error = serde_json::from_str::<TokenModel>(&model.to_string()).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
        let model = model(&json!({"unk_token": "<nobody>"}));
        assert!(read(&model).tokenize("x").unwrap_err().to_string().contains("<nobody>"));
    }
}
