//! The tokenizer inside a GGUF file, as a Hugging Face `tokenizer.json`.

use engram_data::{Begin, Tokenizer};
use serde_json::{Map, Value, json};

use crate::error::Result;
use crate::gguf::{self, Gguf};

/// Token types of ggml.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// Llama 3's rule: contractions, words with a sign before them, numbers up to three digits, other signs, line ends,
/// blanks.
const LLAMA_3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// Qwen 2's rule: the same, with numbers one digit at a time.
const QWEN_2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// The tokenizer, and what stands before a text.
pub(crate) fn read(gguf: &Gguf) -> Result<(Tokenizer, Begin)> {
    let kind = gguf.text("tokenizer.ggml.model")?;
    if kind != "gpt2" {
        let problem = format!("its tokenizer is of kind `{kind}`; byte-level BPE (`gpt2`) is known");
        return Err(gguf.error(problem));
    }
    let tokens = gguf.texts("tokenizer.ggml.tokens")?;
    let types = token_types(gguf, tokens.len())?;
    let added: Vec<Value> = (tokens.iter().zip(&types).enumerate())
        .filter(|(_, (_, kind))| matches!(**kind, CONTROL | USER_DEFINED))
        .map(|(id, (content, kind))| added_token(id, content, *kind == CONTROL))
        .collect();
    let vocabulary: Map<String, Value> =
        tokens.iter().enumerate().map(|(id, token)| ((*token).to_owned(), id.into())).collect();
    let ignore_merges = gguf.text("tokenizer.ggml.pre").is_ok_and(|pre| pre == "llama-bpe");
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": pre_tokenizer(gguf)?,
        "post_processor": null,
        "decoder": byte_level(false),
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": ignore_merges,
            "vocab": vocabulary,
            "merges": gguf.texts("tokenizer.ggml.merges")?,
        },
    });
    let end = token_name(gguf, &tokens, "tokenizer.ggml.eos_token_id")?;
    let origin = format!("{}: tokenizer", gguf.path().display());
    let tokenizer = Tokenizer::from_json(tokenizer.to_string().as_bytes(), &origin, Some(end))?;
    let always = gguf.value("tokenizer.ggml.add_bos_token") == Some(&gguf::Value::Bool(true));
    let named = gguf.value("tokenizer.ggml.bos_token_id").is_some();
    let begin = match (always, named) {
        (true, _) => Begin::Always(gguf.integer("tokenizer.ggml.bos_token_id")? as u32),
        (false, true) => Begin::IfEmpty(gguf.integer("tokenizer.ggml.bos_token_id")? as u32),
        (false, false) => Begin::IfEmpty(tokenizer.end_of_text()),
    };
    Ok((tokenizer, begin))
}

/// The chat template with the names that it may use, as a Hugging Face `tokenizer_config.json`; none if there is none.
pub(crate) fn chat_template(gguf: &Gguf) -> Result<Option<String>> {
    if gguf.value("tokenizer.chat_template").is_none() {
        return Ok(None);
    }
    let tokens = gguf.texts("tokenizer.ggml.tokens")?;
    let mut config = json!({
        "chat_template": gguf.text("tokenizer.chat_template")?,
        "eos_token": token_name(gguf, &tokens, "tokenizer.ggml.eos_token_id")?,
    });
    if gguf.value("tokenizer.ggml.bos_token_id").is_some() {
        config["bos_token"] = token_name(gguf, &tokens, "tokenizer.ggml.bos_token_id")?.into();
    }
    Ok(Some(format!("{config:#}")))
}

/// How a text is split before its bytes are merged.
fn pre_tokenizer(gguf: &Gguf) -> Result<Value> {
    let split = |pattern: &str| {
        let split =
            json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        json!({"type": "Sequence", "pretokenizers": [split, byte_level(false)]})
    };
    Ok(match gguf.text("tokenizer.ggml.pre")? {
        "gpt-2" | "default" => byte_level(true),
        // Every digit by itself first, then GPT-2's rule.
        "smollm" => {
            let digits = json!({"type": "Digits", "individual_digits": true});
            json!({"type": "Sequence", "pretokenizers": [digits, byte_level(true)]})
        }
        "llama-bpe" => split(LLAMA_3),
        "qwen2" => split(QWEN_2),
        other => {
            let known = "gpt-2, smollm, llama-bpe and qwen2 are known";
            return Err(gguf.error(format!("its tokenizer splits text in the way `{other}`; {known}")));
        }
    })
}

fn byte_level(use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}

fn added_token(id: usize, content: &str, special: bool) -> Value {
    json!({
        "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        "special": special,
    })
}

fn token_types(gguf: &Gguf, count: usize) -> Result<Vec<i64>> {
    let kind = |value: &gguf::Value| match value {
        gguf::Value::Signed(kind) => Some(*kind),
        gguf::Value::Unsigned(kind) => i64::try_from(*kind).ok(),
        _ => None,
    };
    let types: Option<Vec<i64>> = match gguf.value("tokenizer.ggml.token_type") {
        Some(gguf::Value::Array(values)) => values.iter().map(kind).collect(),
        _ => None,
    };
    let types = types.filter(|types| types.len() == count);
    types.ok_or_else(|| gguf.error("metadata `tokenizer.ggml.token_type` does not give each token a type"))
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
            ("llama-bpe", vec![257, 258]),
            ("smollm", vec![one, two, 258]),
            ("qwen2", vec![one, two, 258]),
        ] {
            assert_eq!(encode(pre, "12ab"), expected, "{pre}");
        }
        // Four digits: three at a time, or all.
        assert_eq!(encode("gpt-2", "1212"), [257, 257]);
        assert_eq!(encode("llama-bpe", "1212"), [257, one, two]);
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

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        let refused = |file: &Writer, message: &str| {
            let error = read_back(file).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        };
        refused(&file("falcon"), "in the way `falcon`");
        refused(Writer::default().text("tokenizer.ggml.model", "llama"), "of kind `llama`");
        // A later value replaces an earlier one.
        refused(
            file("smollm").integers("tokenizer.ggml.token_type", &[1]),
            "does not give each token a type",
        );
        refused(file("smollm").integer("tokenizer.ggml.eos_token_id", 999), "999, outside the vocabulary");
    }
}
