use std::io::{BufRead, IsTerminal};
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use engram_infer::{ChatTemplate, Engine, Message, Request, TextCodec};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use super::generate::{AnswerOptions, end_tokens};
use super::print;
use crate::failure::{Interrupted, refuse};
use crate::interrupt;
use crate::note::note;
use crate::served::{ModelOptions, say};

/// Chat with a model, one line at a time.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram chat runs/chat
  engram chat runs/small --chat-template configs/chat-template.jinja --stop 'User:' --temperature 0.7
  printf 'Who was Queen Anne?\\n' | engram chat runs/chat --system 'You answer in one sentence.'")]
pub(crate) struct Chat {
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    template: TemplateOption,
    /// System message: instructions that the model reads first.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Maximum number of tokens per answer. The default is the rest of the context.
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
    #[command(flatten)]
    answer: AnswerOptions,
}

/// Where the chat template comes from.
#[derive(Debug, Args)]
pub(crate) struct TemplateOption {
    /// Chat template: a Jinja file or a tokenizer_config.json. The default is the tokenizer_config.json in the
    /// checkpoint's folder.
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
}

impl TemplateOption {
    /// The template that the user named, or the checkpoint's own, or why there is none.
    pub(crate) fn or(
        &self,
        own: Result<ChatTemplate, String>,
    ) -> anyhow::Result<Result<ChatTemplate, String>> {
        let Some(path) = &self.chat_template else { return Ok(own) };
        match read(path)? {
            Some(template) => Ok(Ok(template)),
            None => refuse(format!("{}: it has no chat_template", path.display())),
        }
    }
}

/// The template in a file; none if a tokenizer_config.json has none.
pub(crate) fn read(path: &Path) -> anyhow::Result<Option<ChatTemplate>> {
    let text = match std::fs::read_to_string(path) {
        // A byte-order mark, with which some editors begin a file, would stand in every prompt.
        Ok(text) => text.trim_start_matches('\u{feff}').to_owned(),
        Err(error) => return refuse(format!("cannot read {}: {error}", path.display())),
    };
    let template = if path.extension().is_some_and(|extension| extension == "json") {
        ChatTemplate::from_tokenizer_config(&text)
    } else {
        ChatTemplate::new(text, String::new(), String::new()).map(Some)
    };
    template.or_else(|error| refuse(format!("{}: {error}", path.display())))
}

/// What the user types, one line at a time.
enum Lines {
    /// From a terminal, with a history of lines.
    Edited(Box<DefaultEditor>),
    /// From a file or a pipe, or from a terminal when the output goes elsewhere.
    Plain,
}

/// The result of reading a line.
enum Line {
    Text(String),
    /// Ctrl-C, or the end of the input.
    End,
}

impl Lines {
    fn new() -> anyhow::Result<Self> {
        let terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
        Ok(if terminal { Self::Edited(Box::new(DefaultEditor::new()?)) } else { Self::Plain })
    }

    fn next(&mut self) -> anyhow::Result<Line> {
        match self {
            Self::Edited(editor) => match editor.readline("> ") {
                Ok(line) => {
                    editor.add_history_entry(&line)?;
                    Ok(Line::Text(line))
                }
                Err(ReadlineError::Eof | ReadlineError::Interrupted) => Ok(Line::End),
                Err(error) => Err(error).context("cannot read the terminal"),
            },
            Self::Plain => {
                let mut bytes = Vec::new();
                let count = std::io::stdin().lock().read_until(b'\n', &mut bytes);
                if count.context("cannot read standard input")? == 0 || interrupt::asked() {
                    return Ok(Line::End);
                }
                let text = String::from_utf8_lossy(&bytes);
                if text.contains('\u{fffd}') {
                    note(format_args!("note: invalid UTF-8 in the line was replaced by \u{fffd}"));
                }
                Ok(Line::Text(text.into_owned()))
            }
        }
    }
}

/// The part of the context kept free for an answer: one in this many tokens.
const FREE_SHARE: usize = 8;

impl Chat {
    /// Runs the command.
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let answering = self.answer.request()?;
        let mut served = self.model.open()?;
        let own = std::mem::replace(&mut served.template, Err(String::new()));
        let template = match self.template.or(own)? {
            Ok(template) => template,
            Err(reason) => {
                return refuse(format!(
                    "{reason}; name one with --chat-template, such as configs/chat-template.jinja, or use \
                     `engram generate`"
                ));
            }
        };
        let (engine, codec) = served.for_one()?;
        let mut end_tokens = end_tokens(&codec, &answering.stop);
        end_tokens.extend(template.end_token().and_then(|name| codec.token(name)));
        interrupt::listen()?;
        let system: Vec<Message> = self.system.iter().map(|text| Message::new("system", text)).collect();
        let mut messages = system.clone();
        let mut lines = Lines::new()?;
        if matches!(lines, Lines::Edited(_)) {
            note(
                "Ctrl-C stops an answer; at the prompt it ends the session. /reset starts a new conversation.",
            );
        }
        loop {
            let Line::Text(line) = lines.next()? else { return Ok(()) };
            match line.trim() {
                "" => continue,
                "/reset" => {
                    messages.clone_from(&system);
                    note("new conversation");
                    continue;
                }
                text => messages.push(Message::new("user", text)),
            }
            let fitted = fitted(&template, (&engine, &codec), &mut messages, system.len())?;
            let Some(prompt) = fitted else { continue };
            let left = engine.longest() - prompt.len();
            let request = Request {
                end_tokens: end_tokens.clone(),
                prompt,
                max_tokens: self.max_tokens.unwrap_or(left).min(left),
                ..answering.clone()
            };
            let answer = say(&engine, request, &mut |text| print(text))?;
            print("\n")?;
            if answer.interrupted && (!interrupt::taken() || matches!(lines, Lines::Plain)) {
                return Err(Interrupted(String::new()).into());
            }
            messages.push(Message::new("assistant", &answer.text));
        }
    }
}

/// Tokens of the conversation. If they fill the context, the oldest turns after the first `keep` messages are left out.
/// Returns none if even the last message is too long, and removes that message.
fn fitted(
    template: &ChatTemplate,
    (engine, codec): (&Engine, &TextCodec),
    messages: &mut Vec<Message>,
    keep: usize,
) -> anyhow::Result<Option<Vec<u32>>> {
    let longest = engine.longest();
    let mut left_out = 0;
    loop {
        let text = template.render(messages).or_else(|error| refuse(error.to_string()))?;
        let prompt = codec.marked(&text)?;
        let last = messages.len() <= keep + 1;
        let free = if last { 1 } else { longest / FREE_SHARE };
        if prompt.len() + free <= longest {
            if left_out > 0 {
                note(format_args!(
                    "note: left out the oldest {left_out} messages: the model's context is {longest} tokens"
                ));
            }
            return Ok(Some(prompt));
        }
        if last {
            messages.pop();
            note(format_args!(
                "note: the line has {} tokens, and the model's context is {longest}: shorten it",
                prompt.len()
            ));
            return Ok(None);
        }
        // A question and its answer go together.
        let count = 2.min(messages.len() - keep - 1);
        messages.drain(keep..keep + count);
        left_out += count;
    }
}
