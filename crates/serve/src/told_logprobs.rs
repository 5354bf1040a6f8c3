//! How likely tokens were, as OpenAI's API tells it, and where in the text they begin.

use engram_infer::{TextCodec, TextStream, TokenLogprob};
use serde_json::{Map, Value, json};

use crate::fields::Endpoint;

/// A token, how likely it was, and how many characters of the text stand before it.
#[derive(Debug, Clone)]
pub(crate) struct ToldLogprob {
    pub(crate) token: u32,
    /// Nothing for the first token of a prompt.
    pub(crate) logprob: Option<TokenLogprob>,
    pub(crate) offset: usize,
}

/// The text of tokens one after another, to count its characters.
#[derive(Debug, Default)]
pub(crate) struct ToldText {
    text: String,
    characters: usize,
    stream: TextStream,
    /// Of a prompt that is told with its probabilities.
    logprobs: Option<Vec<ToldLogprob>>,
}

impl ToldText {
    /// The text of a prompt: special tokens by their names, but for one that opens it.
    pub(crate) fn of_prompt(tokens: &[u32], probable: bool, codec: &TextCodec) -> Self {
        let (mut told, mut logprobs) = (Self::default(), Vec::new());
        for (index, &token) in tokens.iter().enumerate() {
            let offset = match codec.bytes(token) {
                [] if index == 0 && codec.opens(token) => told.characters,
                [] => told.push(codec.shown(token).as_bytes()),
                bytes => told.push(bytes),
            };
            logprobs.push(ToldLogprob { token, logprob: None, offset });
        }
        let rest = std::mem::take(&mut told.stream).finish();
        told.characters += rest.chars().count();
        told.text += &rest;
        told.logprobs = probable.then_some(logprobs);
        told
    }

    /// What follows the text of `before`.
    pub(crate) fn after(before: Option<&Self>) -> Self {
        Self { characters: before.map_or(0, |before| before.characters), ..Self::default() }
    }

    /// Adds a generated token; gives how many characters stand before it, or before the one that it is a part of.
    pub(crate) fn add(&mut self, token: u32, codec: &TextCodec) -> usize {
        self.push(codec.bytes(token))
    }

    fn push(&mut self, bytes: &[u8]) -> usize {
        let offset = self.characters;
        let more = self.stream.push(bytes);
        self.characters += more.chars().count();
        self.text += &more;
        offset
    }

    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    pub(crate) fn is_probable(&self) -> bool {
        self.logprobs.is_some()
    }

    /// Adds how likely the next tokens of the prompt are; the first has no likelihood.
    pub(crate) fn add_logprobs(&mut self, logprobs: Vec<TokenLogprob>) {
        let told = self.logprobs.iter_mut().flatten().skip(1);
        let missing = told.filter(|told| told.logprob.is_none());
        missing.zip(logprobs).for_each(|(told, logprob)| told.logprob = Some(logprob));
    }

    pub(crate) fn take_logprobs(&mut self) -> Vec<ToldLogprob> {
        self.logprobs.take().unwrap_or_default()
    }
}

pub(crate) fn logprobs_json(endpoint: Endpoint, told: &[ToldLogprob], codec: &TextCodec) -> Value {
    match endpoint {
        Endpoint::Chat => {
            json!({"content": told.iter().map(|told| of_chat(told, codec)).collect::<Vec<_>>(), "refusal": null})
        }
        Endpoint::Completions => {
            let logprob = |told: &ToldLogprob| told.logprob.as_ref().map(|logprob| logprob.logprob);
            let top = |told: &ToldLogprob| {
                told.logprob.as_ref().map(|logprob| top_of_text(told.token, logprob, codec))
            };
            json!({
                "tokens": told.iter().map(|told| codec.shown(told.token)).collect::<Vec<_>>(),
                "token_logprobs": told.iter().map(logprob).collect::<Vec<_>>(),
                "top_logprobs": told.iter().map(top).collect::<Vec<_>>(),
                "text_offset": told.iter().map(|told| told.offset).collect::<Vec<_>>(),
            })
        }
    }
}

/// The likeliest tokens, and the one that came if it is not among them, as OpenAI adds it.
fn top_of_text(token: u32, logprob: &TokenLogprob, codec: &TextCodec) -> Map<String, Value> {
    let came = std::iter::once((token, logprob.logprob));
    // Where two tokens are shown alike the likelier stays, and the one that came in any case.
    let likeliest_last = logprob.top.iter().rev().copied();
    likeliest_last.chain(came).map(|(token, logprob)| (codec.shown(token), logprob.into())).collect()
}

/// A token with as many of the likeliest as were asked for. One that came without being among them takes the last's place.
fn of_chat(told: &ToldLogprob, codec: &TextCodec) -> Value {
    let one = |token: u32, logprob: f32| json!({"token": codec.shown(token), "logprob": logprob, "bytes": codec.bytes(token)});
    let Some(logprob) = &told.logprob else { return Value::Null };
    let mut top = logprob.top.clone();
    if !top.iter().any(|(token, _)| *token == told.token)
        && let Some(last) = top.last_mut()
    {
        *last = (told.token, logprob.logprob);
    }
    let mut shown = one(told.token, logprob.logprob);
    shown["top_logprobs"] = top.into_iter().map(|(token, logprob)| one(token, logprob)).collect();
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokens: `a`, two halves of `é`, a special one that opens a text, another.
    fn codec() -> TextCodec {
        let words =
            ["a", "1", "2", "<s>", "<|eot|>"].iter().zip(0..).map(|(name, id)| ((*name).to_owned(), id));
        let model =
            tokenizers::models::wordlevel::WordLevel::builder().vocab(words.collect()).unk_token("a".into());
        let model = tokenizers::models::ModelWrapper::from(model.build().unwrap());
        let mut tokenizer = engram_infer::TextTokenizer::new(model.into());
        let special = ["<s>", "<|eot|>"].map(|name| tokenizers::AddedToken::from(name, true));
        tokenizer.add_special_tokens(special).unwrap();
        let bytes: [&[u8]; 5] = [b"a", b"\xc3", b"\xa9", b"", b""];
        TextCodec::new(&tokenizer, bytes.into_iter().collect(), 3)
    }

    fn logprob(of: f32, top: &[(u32, f32)]) -> TokenLogprob {
        TokenLogprob { logprob: of, top: top.to_vec() }
    }

    #[test]
    fn offsets_count_characters_of_the_whole_text() {
        let codec = codec();
        let mut told = ToldText::after(None);
        let offsets: Vec<usize> = [0, 1, 2, 1, 2, 0].iter().map(|&token| told.add(token, &codec)).collect();
        assert_eq!(offsets, [0, 1, 1, 2, 2, 3]);
        let mut prompt = ToldText::of_prompt(&[3, 0, 1, 2, 4, 0], true, &codec);
        assert_eq!(prompt.text(), "aé<|eot|>a");
        let mut told = ToldText::after(Some(&prompt));
        assert_eq!((told.add(0, &codec), told.add(0, &codec)), (10, 11));
        prompt.add_logprobs(vec![logprob(-1.0, &[]), logprob(-2.0, &[])]);
        prompt.add_logprobs(vec![logprob(-3.0, &[])]);
        let told = prompt.take_logprobs();
        let found: Vec<Option<f32>> =
            told.iter().map(|told| told.logprob.as_ref().map(|l| l.logprob)).collect();
        assert_eq!(found, [None, Some(-1.0), Some(-2.0), Some(-3.0), None, None]);
        assert_eq!(told.iter().map(|told| told.offset).collect::<Vec<_>>(), [0, 0, 1, 1, 2, 9]);
    }

    #[test]
    fn the_token_that_came_is_among_the_top_ones() {
        let told = ToldLogprob { token: 2, logprob: Some(logprob(-3.0, &[(0, -0.5), (1, -1.0)])), offset: 0 };
        let text = logprobs_json(Endpoint::Completions, std::slice::from_ref(&told), &codec());
        assert_eq!(text["top_logprobs"], json!([{"a": -0.5, "bytes:\\xc3": -1.0, "bytes:\\xa9": -3.0}]));
        let chat = logprobs_json(Endpoint::Chat, std::slice::from_ref(&told), &codec());
        let top = chat["content"][0]["top_logprobs"].as_array().unwrap();
        assert_eq!((top.len(), &top[1]["bytes"], &top[0]["token"]), (2, &json!([0xa9]), &json!("a")));
    }
}
