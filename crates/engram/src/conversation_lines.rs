//! Conversations in JSON lines, and their tokens with what a loss counts of them.

use std::fmt::Display;
use std::io::{BufRead, BufReader};
use std::path::Path;

use anyhow::Context;
use engram_data::{Conversation, Tokenizer};
use engram_infer::{ChatTemplate, Conversation as Rendered, Message, PromptOptions, TextCodec};
use serde_json::Value;

use crate::failure::{Refused, refuse};

/// A line of a file.
#[derive(Debug)]
pub(crate) struct Record {
    /// Its number, from 1.
    line: usize,
    text: String,
}

/// What is wrong with a record.
#[derive(Debug)]
pub(crate) struct Problem(pub(crate) String);

/// A turn: who says what.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Turn {
    role: String,
    content: String,
}

/// Roles that a turn may have.
const ROLES: [&str; 3] = ["system", "user", "assistant"];

impl Problem {
    fn refuse<T>(problem: impl Display) -> Result<T, Self> {
        Err(Self(problem.to_string()))
    }

    /// With the place of the record.
    pub(crate) fn at(self, path: &Path, record: &Record) -> anyhow::Error {
        Refused(format!("{}:{}: {}", path.display(), record.line, self.0)).into()
    }
}

/// The lines of a file that are not blank.
///
/// # Errors
/// When the file is none of JSON lines, or cannot be read.
pub(crate) fn read(path: &Path) -> anyhow::Result<Vec<Record>> {
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or("");
    if !["jsonl", "ndjson"].contains(&ending) {
        return refuse(format!(
            "{}: conversations are read from .jsonl files; decompress it first",
            path.display()
        ));
    }
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) => return refuse(format!("cannot read {}: {error}", path.display())),
    };
    let mut records = Vec::new();
    for (index, line) in BufReader::new(file).split(b'\n').enumerate() {
        let line = line.with_context(|| format!("cannot read {}", path.display()))?;
        let Ok(text) = String::from_utf8(line) else {
            return refuse(format!(
                "{}:{}: invalid UTF-8; convert the text to UTF-8",
                path.display(),
                index + 1
            ));
        };
        let text = text.trim_start_matches('\u{feff}').trim();
        if !text.is_empty() {
            records.push(Record { line: index + 1, text: text.to_owned() });
        }
    }
    Ok(records)
}

/// Turns records into tokens.
pub(crate) struct Encoding {
    codec: TextCodec,
    end: u32,
    end_name: String,
    template: Option<ChatTemplate>,
}

/// A part of a conversation's text, and whether the assistant says it.
type Part = (String, bool);

impl Encoding {
    /// An encoding by `template`; without one, an answer follows its prompt.
    pub(crate) fn new(tokenizer: &Tokenizer, template: Option<ChatTemplate>) -> Self {
        let token_bytes = tokenizer.all_token_bytes().clone();
        let end = tokenizer.end_of_text();
        let codec = TextCodec::new(tokenizer.inner(), token_bytes, end);
        let end_name = tokenizer.inner().id_to_token(end).unwrap_or_default();
        Self { codec, end, end_name, template }
    }

    /// The tokens of a record. The loss counts the assistant's, up to the token that ends its turn.
    ///
    /// # Errors
    /// When it is not a conversation that can be learnt.
    pub(crate) fn conversation(&self, record: &Record) -> Result<Conversation, Problem> {
        let turns = turns(&record.text)?;
        let parts = match &self.template {
            Some(template) => {
                self.check_names(&turns)?;
                rendered(template, &turns)?
            }
            None => plain(turns)?,
        };
        let end = self.end;
        let mut tokens: Vec<(u32, bool)> = Vec::new();
        for (index, (text, is_answer)) in parts.iter().enumerate() {
            let mut ids = self.encode(text)?;
            let ending = ids.iter().position(|&id| id == end).filter(|_| *is_answer);
            if index + 1 == parts.len() {
                // What a template writes after the last turn's end is not part of the document.
                ids.truncate(ending.unwrap_or(ids.len()));
                ids.push(end);
            }
            let counts = |at: usize| *is_answer && ending.is_none_or(|ending| at <= ending);
            tokens.extend(ids.iter().enumerate().map(|(at, &id)| (id, counts(at))));
        }
        let bytes = parts.iter().map(|(text, _)| text.len() as u64).sum();
        Ok(Conversation::new(tokens, bytes, record.text.clone()))
    }

    /// Refuses turns that would end where they name the end of the text.
    fn check_names(&self, turns: &[Turn]) -> Result<(), Problem> {
        match turns.iter().position(|turn| turn.content.contains(&self.end_name)) {
            Some(index) => {
                let (role, name) = (&turns[index].role, &self.end_name);
                Problem::refuse(format!(
                    "turn {index} ({role}) contains {name}, which would end the conversation"
                ))
            }
            None => Ok(()),
        }
    }

    /// In what a template writes, special tokens are written by their names.
    fn encode(&self, text: &str) -> Result<Vec<u32>, Problem> {
        let options = PromptOptions { add_special_tokens: false, parse_special: self.template.is_some() };
        self.codec.prompt(text, options).or_else(Problem::refuse)
    }
}

/// The turns of a record; the last is the assistant's.
fn turns(text: &str) -> Result<Vec<Turn>, Problem> {
    let value: Value =
        serde_json::from_str(text).or_else(|error| Problem::refuse(format!("malformed JSON: {error}")))?;
    let record = value.as_object().ok_or_else(|| Problem("must be an object".into()))?;
    let turn = |role: &str, key: &str| -> Result<Turn, Problem> {
        match record.get(key).and_then(Value::as_str) {
            Some(content) => Ok(Turn { role: role.into(), content: content.into() }),
            None => Problem::refuse(format!("`{key}` must be a text")),
        }
    };
    let turns = match (record.get("messages"), record.contains_key("prompt") || record.contains_key("answer"))
    {
        (Some(_), true) => {
            return Problem::refuse("has `messages` beside `prompt` or `answer`; leave one form out");
        }
        (Some(messages), false) => messages_of(messages)?,
        (None, true) => vec![turn("user", "prompt")?, turn("assistant", "answer")?],
        (None, false) => return Problem::refuse("has neither `messages` nor `prompt` and `answer`"),
    };
    check(&turns)?;
    Ok(turns)
}

fn messages_of(messages: &Value) -> Result<Vec<Turn>, Problem> {
    let list = messages.as_array().ok_or_else(|| Problem("`messages` must be a list".into()))?;
    let text = |index: usize, message: &Value, key: &str| match message.get(key).and_then(Value::as_str) {
        Some(text) => Ok(text.to_owned()),
        None => Problem::refuse(format!("`messages[{index}].{key}` must be a text")),
    };
    let turn = |(index, message): (usize, &Value)| {
        let (role, content) = (text(index, message, "role")?, text(index, message, "content")?);
        if !ROLES.contains(&role.as_str()) {
            return Problem::refuse(format!(
                "`messages[{index}].role` is {role:?}: must be system, user or assistant"
            ));
        }
        Ok(Turn { role, content })
    };
    list.iter().enumerate().map(turn).collect()
}

/// Refuses turns that teach nothing.
fn check(turns: &[Turn]) -> Result<(), Problem> {
    let is_answer = |turn: &&Turn| turn.role == "assistant";
    if !turns.iter().any(|turn| is_answer(&turn)) {
        return Problem::refuse("has no turn of the assistant: there is nothing to learn");
    }
    if turns.iter().filter(is_answer).any(|turn| turn.content.trim().is_empty()) {
        return Problem::refuse("has an empty answer");
    }
    match turns.last() {
        Some(last) if last.role == "assistant" => Ok(()),
        _ => Problem::refuse("ends with a turn that is not the assistant's: remove that turn"),
    }
}

/// Prompt and answer as they are.
fn plain(turns: Vec<Turn>) -> Result<Vec<Part>, Problem> {
    match <[Turn; 2]>::try_from(turns) {
        Ok([prompt, answer]) if prompt.role == "user" => {
            Ok(vec![(prompt.content, false), (answer.content, true)])
        }
        _ => Problem::refuse(
            "`messages` of more than a prompt and an answer need a chat template (--chat-template)",
        ),
    }
}

/// The text of the turns by a template, in parts. Each begins where a prompt to the model would end.
fn rendered(template: &ChatTemplate, turns: &[Turn]) -> Result<Vec<Part>, Problem> {
    let messages: Vec<Message> = turns.iter().map(|turn| Message::new(&turn.role, &turn.content)).collect();
    let text = |count: usize, add_generation_prompt: bool| {
        let messages = &messages[..count];
        let conversation = Rendered { messages, add_generation_prompt, ..Rendered::default() };
        template.render_all(&conversation).or_else(Problem::refuse)
    };
    let (mut parts, mut before) = (Vec::new(), String::new());
    for (index, _) in turns.iter().enumerate().filter(|(_, turn)| turn.role == "assistant") {
        let (prompt, all) = (text(index, true)?, text(index + 1, false)?);
        let (Some(asked), Some(answer)) = (prompt.strip_prefix(&before), all.strip_prefix(&prompt)) else {
            return Problem::refuse(format!(
                "the chat template writes the turns before `messages[{index}]` differently once that turn is there: the \
                 conversation cannot be learnt turn by turn"
            ));
        };
        if answer.is_empty() {
            return Problem::refuse(format!("the chat template leaves out `messages[{index}]`"));
        }
        parts.extend([(asked.to_owned(), false), (answer.to_owned(), true)]);
        before = all;
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow::Continue;

    use engram_data::{Corpus, TokenizerTraining};
    use serde_json::json;

    use super::*;

    const TEMPLATE: &str = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>\n{% endfor %}\
                            {% if add_generation_prompt %}<|assistant|>{% endif %}";

    fn tokenizer() -> Tokenizer {
        let corpus = Corpus::embedded("a.txt", b"some words, and some other words").unwrap();
        let training = TokenizerTraining { vocabulary: 258, ..Default::default() };
        Tokenizer::train(&corpus, &training, &mut |_| Continue(())).unwrap()
    }

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::new(source.into(), String::new(), String::new()).unwrap()
    }

    fn record(value: &Value) -> Record {
        Record { line: 1, text: value.to_string() }
    }

    fn said(turns: &[(&str, &str)]) -> Value {
        let turns: Vec<_> =
            turns.iter().map(|(role, content)| json!({"role": role, "content": content})).collect();
        json!({ "messages": turns })
    }

    /// The text that is counted, with `$` for the end-of-text token, and all of it.
    fn seen(template: Option<ChatTemplate>, value: &Value) -> (String, String) {
        let tokenizer = tokenizer();
        let conversation = Encoding::new(&tokenizer, template).conversation(&record(value)).unwrap();
        let text = |only_counted: bool| {
            let tokens = conversation.tokens().filter(|(_, counts)| *counts || !only_counted);
            let name = |token| match token == tokenizer.end_of_text() {
                true => "$".to_owned(),
                false => String::from_utf8(tokenizer.token_bytes(token).to_vec()).unwrap(),
            };
            tokens.map(|(token, _)| name(token)).collect::<String>()
        };
        (text(true), text(false))
    }

    #[test]
    fn the_loss_counts_the_answers_and_what_ends_them() {
        let found = seen(None, &json!({"prompt": "2+2=", "answer": "four", "id": 7}));
        assert_eq!(found, ("four$".into(), "2+2=four$".into()));
        let turns =
            said(&[("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]);
        let all = "<|system|>S$\n<|user|>a$\n<|assistant|>b$\n<|user|>c$\n<|assistant|>d$";
        assert_eq!(seen(Some(template(TEMPLATE)), &turns), ("b$d$".into(), all.into()));
        let one = json!({"prompt": "a", "answer": "b"});
        let all = "<|user|>a$\n<|assistant|>b$";
        assert_eq!(seen(Some(template(TEMPLATE)), &one), ("b$".into(), all.into()));
        // A template whose turns end otherwise: the end of the text is added.
        let other = TEMPLATE.replace("<|endoftext|>", "#");
        assert_eq!(seen(Some(template(&other)), &one).0, "b#\n$");
        // Without a template, a name of a token is text.
        assert_eq!(seen(None, &json!({"prompt": "a", "answer": "<|endoftext|>"})).0, "<|endoftext|>$");
    }

    #[test]
    fn what_cannot_be_learnt_is_refused_by_name() {
        let tokenizer = tokenizer();
        let refused = |template: Option<ChatTemplate>, value: &Value, expected: &str| {
            let found = Encoding::new(&tokenizer, template).conversation(&record(value));
            let Problem(message) = found.unwrap_err();
            assert!(message.contains(expected), "{message}");
        };
        let user = ("user", "a");
        for (value, expected) in [
            (json!([1]), "must be an object"),
            (json!({"text": "a"}), "neither `messages` nor `prompt`"),
            (json!({"prompt": "a"}), "`answer` must be a text"),
            (json!({"prompt": "a", "answer": 3}), "`answer` must be a text"),
            (json!({"prompt": "a", "answer": " \n"}), "empty answer"),
            (json!({"prompt": "a", "answer": "b", "messages": []}), "leave one form out"),
            (json!({"messages": "a"}), "`messages` must be a list"),
            (json!({"messages": [{"role": "user"}]}), "`messages[0].content`"),
            (said(&[user, ("bot", "b")]), "`messages[1].role` is \"bot\""),
            (said(&[user]), "no turn of the assistant"),
            (said(&[]), "no turn of the assistant"),
            (said(&[user, ("assistant", "")]), "empty answer"),
            (said(&[user, ("assistant", "b"), user]), "not the assistant's"),
        ] {
            refused(None, &value, expected);
            refused(Some(template(TEMPLATE)), &value, expected);
        }
        let turns = said(&[user, ("assistant", "b"), user, ("assistant", "c")]);
        refused(None, &turns, "need a chat template");
        refused(
            Some(template(TEMPLATE)),
            &json!({"prompt": "a", "answer": "b<|endoftext|>"}),
            "turn 1 (assistant)",
        );
        let changing = "{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}";
        refused(Some(template(changing)), &turns, "`messages[1]`");
        let malformed = Record { line: 3, text: "{".into() };
        let Problem(message) = Encoding::new(&tokenizer, None).conversation(&malformed).unwrap_err();
        assert!(message.contains("malformed JSON"), "{message}");
    }

    #[test]
    fn a_line_that_is_refused_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        std::fs::write(&path, "\u{feff}{}\r\n\n  \n[1]\n").unwrap();
        let records = read(&path).unwrap();
        assert_eq!(records.iter().map(|record| record.line).collect::<Vec<_>>(), [1, 4]);
        assert_eq!(records[0].text, "{}");
        let error = Problem("is wrong".into()).at(&path, &records[1]).to_string();
        assert!(error.ends_with("a.jsonl:4: is wrong"), "{error}");
        std::fs::write(&path, b"{}\n\xff\n").unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("a.jsonl:2: invalid UTF-8"));
        let error = read(&folder.path().join("a.jsonl.zst")).unwrap_err().to_string();
        assert!(error.contains("decompress it first"), "{error}");
    }
}
