//! The tokenizer inside a GGUF file, as a Hugging Face `tokenizer.json`.

use std::collections::HashMap;

use engram_data::{Begin, Tokenizer};
use serde::{Serialize, Serializer};
use serde_json::{Value, json};

use crate::error::Result;
use crate::gguf::Gguf;

/// Token types of ggml.
const NORMAL: i64 = 1;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
const BYTE: i64 = 6;

/// Contractions, words with a sign before them, numbers up to three digits, other signs, line ends, blanks (Llama 3).
const LLAMA_3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// The same, with numbers one digit at a time (Qwen 2).
const QWEN_2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// Words by upper and lower case, numbers one digit at a time (Mistral's Tekken).
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// Numbers up to three digits; Chinese and Japanese; words with a sign before them, other signs, line ends, blanks
/// (DeepSeek V3).
const DEEPSEEK_3: [&str; 3] = [
    r"\p{N}{1,3}",
    "[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+",
    concat!(
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+",
        "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
    ),
];

/// Signs; words, numbers, other signs and blanks as GPT-2 has them; numbers; three digits (llama.cpp, where a file names no
/// rule of its own).
const DEFAULT: [&str; 4] = [
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
];

/// Names of tokens that end a turn, whatever a file calls the end of text.
const ENDS_OF_TURN: [&str; 8] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|eom_id|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
];

/// Tokens of Phi 3 behind which blanks are not swallowed.
const PHI_3_PLAIN: [&str; 3] = ["<unk>", "<s>", "<|endoftext|>"];

/// The tokenizer, and what stands before a text.
pub(crate) fn read(gguf: &Gguf) -> Result<(Tokenizer, Begin)> {
    let kind = gguf.text("tokenizer.ggml.model")?;
    let vocabulary = Vocabulary::of(gguf)?;
    let (json, begins) = match kind {
        "gpt2" => (byte_level_bpe(gguf, &vocabulary)?, begins_byte_level(gguf)),
        "llama" => (sentencepiece_bpe(gguf, &vocabulary)?, true),
        other => {
            let known = "byte-level BPE (`gpt2`) and SentencePiece (`llama`) are known";
            return Err(gguf.error(format!("its tokenizer is of kind `{other}`; {known}")));
        }
    };
    let end = token_name(gguf, &vocabulary.tokens, "tokenizer.ggml.eos_token_id")?;
    let origin = format!("{}: tokenizer", gguf.path().display());
    let tokenizer = Tokenizer::from_json(json.as_bytes(), &origin, Some(end))?;
    drop(json);
    let begin = "tokenizer.ggml.bos_token_id";
    let named = gguf.value(begin).is_some();
    if named {
        token_name(gguf, &vocabulary.tokens, begin)?;
    }
    let always = match gguf.value("tokenizer.ggml.add_bos_token") {
        Some(_) => gguf.bool("tokenizer.ggml.add_bos_token")?,
        None => begins && named,
    };
    let begin = match (always, named) {
        (true, _) => Begin::Always(gguf.integer(begin)? as u32),
        (false, true) => Begin::IfEmpty(gguf.integer(begin)? as u32),
        (false, false) => Begin::IfEmpty(tokenizer.end_of_text()),
    };
    Ok((tokenizer, begin))
}

/// Every token that ends an answer: those that the file names, and those whose name says it.
pub(crate) fn end_tokens(gguf: &Gguf) -> Result<Vec<u32>> {
    let vocabulary = Vocabulary::of(gguf)?;
    let mut ends = Vec::new();
    for key in ["eos_token_id", "eot_token_id", "eom_token_id"].map(|key| format!("tokenizer.ggml.{key}")) {
        if gguf.value(&key).is_some() {
            token_name(gguf, &vocabulary.tokens, &key)?;
            ends.push(gguf.integer(&key)? as u32);
        }
    }
    let of_turn = vocabulary.tokens.iter().zip(&vocabulary.types).zip(0..);
    let of_turn = of_turn.filter(|((name, kind), _)| **kind == CONTROL && ENDS_OF_TURN.contains(name));
    ends.extend(of_turn.map(|(_, id)| id));
    let mut seen = std::collections::BTreeSet::new();
    ends.retain(|id| seen.insert(*id));
    Ok(ends)
}

/// The chat template with the names that it may use, as a Hugging Face `tokenizer_config.json`; none if there is none. One
/// that cannot be read is noted and left out: all but conversations works without.
pub(crate) fn chat_template(gguf: &Gguf, notes: &mut Vec<String>) -> Option<String> {
    gguf.value("tokenizer.chat_template")?;
    read_chat_template(gguf)
        .map_err(|error| notes.push(format!("its chat template is left out: {error}")))
        .ok()
}

fn read_chat_template(gguf: &Gguf) -> Result<String> {
    let tokens = gguf.texts("tokenizer.ggml.tokens")?;
    let default = gguf.text("tokenizer.chat_template")?;
    // Templates with names of their own stand beside the usual one.
    let mut others: Vec<Value> = Vec::new();
    for (key, _) in gguf.keys() {
        if let Some(name) = key.strip_prefix("tokenizer.chat_template.") {
            others.push(json!({"name": name, "template": gguf.text(key)?}));
        }
    }
    others.sort_by_key(|other| other["name"].to_string());
    let template = match others.is_empty() {
        true => json!(default),
        false => {
            others.insert(0, json!({"name": "default", "template": default}));
            Value::Array(others)
        }
    };
    let mut config = json!({
        "chat_template": template,
        "eos_token": token_name(gguf, &tokens, "tokenizer.ggml.eos_token_id")?,
    });
    for (name, key) in
        [("bos_token", "bos_token_id"), ("unk_token", "unknown_token_id"), ("pad_token", "padding_token_id")]
    {
        let key = format!("tokenizer.ggml.{key}");
        if gguf.value(&key).is_some() {
            config[name] = token_name(gguf, &tokens, &key)?.into();
        }
    }
    Ok(format!("{config:#}"))
}

/// Tokens and their types.
struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    types: Vec<i64>,
}

impl<'a> Vocabulary<'a> {
    fn of(gguf: &'a Gguf) -> Result<Self> {
        let tokens = gguf.texts("tokenizer.ggml.tokens")?;
        let types = match gguf.value("tokenizer.ggml.token_type") {
            Some(_) => {
                gguf.numbers("tokenizer.ggml.token_type")?.into_iter().map(|kind| kind as i64).collect()
            }
            None => vec![NORMAL; tokens.len()],
        };
        if types.len() != tokens.len() {
            return Err(gguf.error("metadata `tokenizer.ggml.token_type` does not give each token a type"));
        }
        Ok(Self { tokens, types })
    }

    /// Ids by token; the first of equals.
    fn by_name(&self) -> HashMap<&'a str, usize> {
        self.tokens.iter().enumerate().rev().map(|(id, token)| (*token, id)).collect()
    }

    /// Tokens that are found in a text before it is split.
    fn added(&self, gguf: &Gguf) -> Vec<Value> {
        let phi = gguf.text("general.architecture").is_ok_and(|name| name == "phi3");
        (self.tokens.iter().zip(&self.types).enumerate())
            .filter(|(_, (token, kind))| matches!(**kind, CONTROL | USER_DEFINED) && !token.is_empty())
            .map(|(id, (token, kind))| {
                let special = *kind == CONTROL;
                // As ggml has it for Phi 3.
                let swallows = phi && (special || *token == "</s>") && !PHI_3_PLAIN.contains(token);
                added_token(id, token, special, swallows)
            })
            .collect()
    }
}

/// GPT-2's kind: bytes as letters, merged in the order of the file.
fn byte_level_bpe(gguf: &Gguf, vocabulary: &Vocabulary<'_>) -> Result<String> {
    let pre = gguf.text("tokenizer.ggml.pre")?;
    let merges = gguf.texts("tokenizer.ggml.merges")?;
    let normalizer = if is_qwen(pre) { json!({"type": "NFC"}) } else { Value::Null };
    let around = [normalizer, pre_tokenizer(gguf, pre)?, byte_level(false)];
    let model = Bpe {
        ignore_merges: is_llama_3(pre) || pre == "tekken",
        vocab: NamedIds::of(vocabulary),
        merges,
        ..Bpe::default()
    };
    tokenizer_json(gguf, vocabulary.added(gguf), around, &model)
}

/// SentencePiece's BPE: pieces of characters, merged by their scores; what has no piece becomes bytes.
fn sentencepiece_bpe(gguf: &Gguf, vocabulary: &Vocabulary<'_>) -> Result<String> {
    let scores = gguf.numbers("tokenizer.ggml.scores")?;
    if scores.len() != vocabulary.tokens.len() {
        return Err(gguf.error("metadata `tokenizer.ggml.scores` does not give each token a score"));
    }
    let flag = |key: &str, other: bool| match gguf.value(key) {
        Some(_) => gguf.bool(key),
        None => Ok(other),
    };
    let prefixed = flag("tokenizer.ggml.add_space_prefix", true)?;
    if flag("tokenizer.ggml.remove_extra_whitespaces", false)? {
        return Err(
            gguf.error("metadata `tokenizer.ggml.remove_extra_whitespaces` is true: this is not known")
        );
    }
    let unknown = match gguf.value("tokenizer.ggml.unknown_token_id") {
        Some(_) => Some(token_name(gguf, &vocabulary.tokens, "tokenizer.ggml.unknown_token_id")?),
        None => None,
    };
    let blank = json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"});
    let normalizer = match prefixed {
        true => {
            json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u{2581}"}, blank]})
        }
        false => blank,
    };
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefixed {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let around = [normalizer, Value::Null, json!({"type": "Sequence", "decoders": decoders})];
    let model = Bpe {
        unk_token: unknown,
        fuse_unk: true,
        byte_fallback: vocabulary.types.contains(&BYTE),
        vocab: NamedIds::of(vocabulary),
        merges: merges_by_score(vocabulary, &scores),
        ..Bpe::default()
    };
    tokenizer_json(gguf, vocabulary.added(gguf), around, &model)
}

/// The model of a `tokenizer.json`. Names stay in the file that they are read from: a large vocabulary takes much memory.
#[derive(Serialize)]
#[serde(tag = "type", rename = "BPE")]
struct Bpe<'a, M> {
    dropout: Option<f32>,
    unk_token: Option<&'a str>,
    continuing_subword_prefix: Option<&'a str>,
    end_of_word_suffix: Option<&'a str>,
    fuse_unk: bool,
    byte_fallback: bool,
    ignore_merges: bool,
    vocab: NamedIds<'a>,
    merges: Vec<M>,
}

impl<M> Default for Bpe<'_, M> {
    fn default() -> Self {
        Self {
            dropout: None,
            unk_token: None,
            continuing_subword_prefix: None,
            end_of_word_suffix: None,
            fuse_unk: false,
            byte_fallback: false,
            ignore_merges: false,
            vocab: NamedIds(Vec::new()),
            merges: Vec::new(),
        }
    }
}

/// Names with their ids, in the order of the ids: the same file gives the same text, and so the same hash.
struct NamedIds<'a>(Vec<(&'a str, usize)>);

impl<'a> NamedIds<'a> {
    fn of(vocabulary: &Vocabulary<'a>) -> Self {
        let mut named: Vec<(&str, usize)> = vocabulary.by_name().into_iter().collect();
        named.sort_unstable_by_key(|(_, id)| *id);
        Self(named)
    }
}

impl Serialize for NamedIds<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().copied())
    }
}

/// A `tokenizer.json`. `around` are the normaliser, what splits a text, and the decoder.
fn tokenizer_json<M: Serialize>(
    gguf: &Gguf,
    added_tokens: Vec<Value>,
    around: [Value; 3],
    model: &Bpe<'_, M>,
) -> Result<String> {
    #[derive(Serialize)]
    struct TokenizerFile<'a, M> {
        version: &'static str,
        truncation: Value,
        padding: Value,
        added_tokens: Vec<Value>,
        normalizer: Value,
        pre_tokenizer: Value,
        post_processor: Value,
        decoder: Value,
        model: &'a M,
    }
    let [normalizer, pre_tokenizer, decoder] = around;
    let file = TokenizerFile {
        version: "1.0",
        truncation: Value::Null,
        padding: Value::Null,
        added_tokens,
        normalizer,
        pre_tokenizer,
        post_processor: Value::Null,
        decoder,
        model,
    };
    serde_json::to_string(&file).map_err(|error| gguf.error(format!("its tokenizer: {error}")))
}

/// All pairs of pieces that make a piece, the best piece first.
fn merges_by_score<'a>(vocabulary: &Vocabulary<'a>, scores: &[f64]) -> Vec<[&'a str; 2]> {
    let ids: HashMap<&str, usize> = (vocabulary.by_name().into_iter())
        .filter(|(_, id)| matches!(vocabulary.types[*id], NORMAL | USER_DEFINED))
        .collect();
    let mut merges: Vec<(f64, usize, usize, &str, &str)> = Vec::new();
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        // What a user defined is found before anything is merged.
        if vocabulary.types[id] != NORMAL || ids.get(token) != Some(&id) {
            continue;
        }
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(&l), Some(&r)) = (ids.get(left), ids.get(right)) {
                merges.push((scores[id], l, r, left, right));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    merges.into_iter().map(|(_, _, _, left, right)| [left, right]).collect()
}

fn is_llama_3(pre: &str) -> bool {
    matches!(pre, "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "pixtral" | "midm-2.0" | "lfm2")
}

fn is_qwen(pre: &str) -> bool {
    matches!(pre, "qwen2" | "deepseek-r1-qwen")
}

/// Whether a text begins with the token for it where the file does not say.
fn begins_byte_level(gguf: &Gguf) -> bool {
    gguf.text("tokenizer.ggml.pre").is_ok_and(|pre| is_llama_3(pre) || pre == "tekken")
}

/// How a text is split before its bytes are merged.
fn pre_tokenizer(gguf: &Gguf, pre: &str) -> Result<Value> {
    let splits = |patterns: &[&str]| {
        let split = |pattern: &&str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        let steps: Vec<Value> = patterns.iter().map(split).chain([byte_level(false)]).collect();
        json!({"type": "Sequence", "pretokenizers": steps})
    };
    Ok(match pre {
        "gpt-2" | "phi-2" => byte_level(true),
        "default" => splits(&DEFAULT),
        // Every digit by itself first, then GPT-2's rule.
        "smollm" => {
            let digits = json!({"type": "Digits", "individual_digits": true});
            json!({"type": "Sequence", "pretokenizers": [digits, byte_level(true)]})
        }
        pre if is_llama_3(pre) => splits(&[LLAMA_3]),
        pre if is_qwen(pre) => splits(&[QWEN_2]),
        "tekken" => splits(&[TEKKEN]),
        "deepseek-v3" => splits(&DEEPSEEK_3),
        other => {
            let known = "default, gpt-2, smollm, llama-bpe, qwen2, tekken and deepseek-v3 are known";
            return Err(gguf.error(format!("its tokenizer splits text in the way `{other}`; {known}")));
        }
    })
}

fn byte_level(use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}

fn added_token(id: usize, content: &str, special: bool, swallows: bool) -> Value {
    json!({
        "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": swallows, "normalized": false,
        "special": special,
    })
}

fn token_name<'a>(gguf: &Gguf, tokens: &[&'a str], key: &str) -> Result<&'a str> {
    let id = gguf.integer(key)?;
    tokens.get(id).copied().ok_or_else(|| gguf.error(format!("`{key}` is {id}, outside the vocabulary")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf_writer::Writer;
    use crate::testing::names;

    /// Bytes, two merges, and the end of text, with a rule for splitting.
    fn file(pre: &str) -> Writer {
        let (mut tokens, mut file) = (names(), Writer::default());
        tokens.extend(["12".into(), "ab".into(), "<|user|>".into()]);
        let mut types = vec![1; tokens.len()];
        (types[256], types[259]) = (3, 4);
        file.text("tokenizer.ggml.model", "gpt2").text("tokenizer.ggml.pre", pre);
        file.texts("tokenizer.ggml.tokens", &tokens).integers("tokenizer.ggml.token_type", &types);
        file.texts("tokenizer.ggml.merges", &["1 2".into(), "a b".into()]);
        file.integer("tokenizer.ggml.eos_token_id", 256);
        file
    }

    fn read_back(file: &Writer) -> Result<(Tokenizer, Begin)> {
        let place = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(place.path(), file.bytes()).unwrap();
        read(&Gguf::open(place.path())?)
    }

    fn encode(pre: &str, text: &str) -> Vec<u32> {
        read_back(&file(pre)).unwrap().0.encode(text).unwrap()
    }

    #[test]
    fn each_rule_splits_digits_its_own_way() {
        let byte = |letter: u8| encode("gpt-2", &char::from(letter).to_string())[0];
        let (one, two) = (byte(b'1'), byte(b'2'));
        for (pre, expected) in [
            ("gpt-2", vec![257, 258]),
            ("default", vec![257, 258]),
            ("llama-bpe", vec![257, 258]),
            ("smollm", vec![one, two, 258]),
            ("qwen2", vec![one, two, 258]),
            ("tekken", vec![one, two, 258]),
            ("deepseek-v3", vec![257, 258]),
        ] {
            assert_eq!(encode(pre, "12ab"), expected, "{pre}");
        }
        // Four digits: three at a time, or all.
        assert_eq!(encode("gpt-2", "1212"), [257, 257]);
        assert_eq!(encode("llama-bpe", "1212"), [257, one, two]);
        assert_eq!(encode("default", "1212"), [257, one, two]);
        // A sign before a word is a piece of its own, with the blank before it left to itself.
        assert_eq!(encode("default", " $ab").len(), 3);
    }

    /// Data that were prepared with a file's tokenizer name it by the hash of its text.
    #[test]
    fn a_file_gives_the_same_text_every_time() {
        let hash = || read_back(&file("smollm")).unwrap().0.hash();
        assert_eq!(hash(), hash());
        let text = read_back(&file("smollm")).unwrap().0.json().to_vec();
        let json: Value = serde_json::from_slice(&text).unwrap();
        let ids = json["model"]["vocab"].as_object().unwrap().values().map(|id| id.as_u64().unwrap());
        assert!(ids.is_sorted() && json["model"]["type"] == "BPE", "in the order of ids");
    }

    #[test]
    fn texts_come_back_and_names_of_special_tokens_are_text() {
        let (tokenizer, begin) = read_back(&file("smollm")).unwrap();
        assert_eq!((tokenizer.end_of_text(), begin), (256, Begin::IfEmpty(256)));
        for text in ["naïve 12 ab", "<|endoftext|>", " \n\t"] {
            let tokens = tokenizer.encode(text).unwrap();
            assert!(!tokens.contains(&256));
            assert_eq!(tokenizer.decode(&tokens).unwrap(), text);
        }
        let mut always = file("smollm");
        always.integer("tokenizer.ggml.bos_token_id", 7).bool("tokenizer.ggml.add_bos_token", true);
        assert_eq!(read_back(&always).unwrap().1, Begin::Always(7));
        let mut named = file("smollm");
        named.integer("tokenizer.ggml.bos_token_id", 7);
        assert_eq!(read_back(&named).unwrap().1, Begin::IfEmpty(7));
    }

    /// Llama 3's files of old do not say that a text begins with a token; SentencePiece's neither.
    #[test]
    fn the_begin_of_a_text_is_not_lost() {
        let mut llama = file("llama-bpe");
        llama.integer("tokenizer.ggml.bos_token_id", 7);
        assert_eq!(read_back(&llama).unwrap().1, Begin::Always(7));
        llama.bool("tokenizer.ggml.add_bos_token", false);
        assert_eq!(read_back(&llama).unwrap().1, Begin::IfEmpty(7));
        let mut wrong = file("llama-bpe");
        wrong.integer("tokenizer.ggml.bos_token_id", 1000);
        assert!(read_back(&wrong).unwrap_err().to_string().contains("1000, outside the vocabulary"));
    }

    #[test]
    fn every_end_of_an_answer_is_found() {
        let place = tempfile::NamedTempFile::new().unwrap();
        let mut file = file("smollm");
        file.integer("tokenizer.ggml.eot_token_id", 259);
        std::fs::write(place.path(), file.bytes()).unwrap();
        assert_eq!(end_tokens(&Gguf::open(place.path()).unwrap()).unwrap(), [256, 259]);
    }

    #[test]
    fn sentencepiece_merges_by_score_and_falls_back_to_bytes() {
        let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
        tokens.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
        let pieces = ["\u{2581}", "a", "b", "ab", "\u{2581}ab", "ba"];
        tokens.extend(pieces.map(String::from));
        let mut types = vec![2, 3, 3];
        types.extend([6; 256]);
        types.extend([1; 6]);
        let mut scores = vec![0.0; 259];
        // "ba" is better than "ab".
        scores.extend([-10.0, -10.0, -10.0, -2.0, -3.0, -1.0]);
        let mut file = Writer::default();
        file.text("tokenizer.ggml.model", "llama").texts("tokenizer.ggml.tokens", &tokens);
        file.integers("tokenizer.ggml.token_type", &types).floats("tokenizer.ggml.scores", &scores);
        file.integer("tokenizer.ggml.bos_token_id", 1).integer("tokenizer.ggml.eos_token_id", 2);
        file.integer("tokenizer.ggml.unknown_token_id", 0);
        let (tokenizer, begin) = read_back(&file).unwrap();
        assert_eq!(begin, Begin::Always(1));
        assert_eq!(tokenizer.encode("ab").unwrap(), [263]);
        assert_eq!(tokenizer.encode("aba").unwrap(), [259, 260, 264]);
        // A character without a piece: its bytes.
        assert_eq!(tokenizer.encode("\u{e9}").unwrap(), [259, 3 + 0xc3, 3 + 0xa9]);
        assert_eq!(tokenizer.decode(&[259, 3 + 0xc3, 3 + 0xa9]).unwrap(), "\u{e9}");
        file.bool("tokenizer.ggml.add_space_prefix", false);
        assert_eq!(read_back(&file).unwrap().0.encode("ab").unwrap(), [262]);
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        let refused = |file: &Writer, message: &str| {
            let error = read_back(file).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        };
        refused(&file("falcon"), "in the way `falcon`");
        refused(file("smollm").text("tokenizer.ggml.model", "t5"), "of kind `t5`");
        // A later value replaces an earlier one.
        refused(
            file("smollm").integers("tokenizer.ggml.token_type", &[1]),
            "does not give each token a type",
        );
        refused(file("smollm").integer("tokenizer.ggml.eos_token_id", 999), "999, outside the vocabulary");
    }
}
