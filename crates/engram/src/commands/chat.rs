use std::io::{BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use engram_infer::{ChatTemplate, Message, Request};

use super::generate::AnswerOptions;
use super::print;
use crate::failure::refuse;
use crate::interrupt;
use crate::served::{ModelOptions, say};

/// Talk with a model, a line at a time.
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
    /// What the model is told first.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Tokens of an answer at most; without it, what is left of the context.
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
    #[command(flatten)]
    answer: AnswerOptions,
}

/// Where the chat template comes from.
#[derive(Debug, Args)]
pub(crate) struct TemplateOption {
    /// How a conversation becomes a text: a Jinja template, or a tokenizer_config.json. Without it, the
    /// tokenizer_config.json in the checkpoint's folder.
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
}

impl TemplateOption {
    /// The template that was asked for, or else the checkpoint's own.
    pub(crate) fn or(&self, own: Option<ChatTemplate>) -> anyhow::Result<Option<ChatTemplate>> {
        let Some(path) = &self.chat_template else { return Ok(own) };
        match read(path)? {
            Some(template) => Ok(Some(template)),
            None => refuse(format!("{}: it has no chat_template", path.display())),
        }
    }
}

/// The template in a file; none where a tokenizer_config.json has none.
pub(crate) fn read(path: &Path) -> anyhow::Result<Option<ChatTemplate>> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) => return refuse(format!("cannot read {}: {error}", path.display())),
    };
    let template = if path.extension().is_some_and(|extension| extension == "json") {
        ChatTemplate::from_tokenizer_config(&text)
    } else {
        ChatTemplate::new(text, String::new(), String::new()).map(Some)
    };
    template.or_else(|error| refuse(format!("{}: {error}", path.display())))
}

impl Chat {
    /// Runs the command.
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let answering = self.answer.request()?;
        let mut served = self.model.open()?;
        let Some(template) = self.template.or(served.template.take())? else {
            return refuse(
                "this model has no chat template: name one with --chat-template, such as \
                 configs/chat-template.jinja, or use `engram generate`",
            );
        };
        let (engine, codec) = served.for_one()?;
        let mut end_tokens = vec![codec.end_of_text()];
        end_tokens.extend(template.end_token().and_then(|name| codec.token(name)));
        interrupt::listen()?;
        let said =
            |role: &str, content: &str| Message { role: role.into(), content: content.into(), name: None };
        let mut messages: Vec<Message> = self.system.iter().map(|text| said("system", text)).collect();
        let input = std::io::stdin();
        let asks = input.is_terminal();
        loop {
            if asks {
                eprint!("> ");
                std::io::stderr().flush()?;
            }
            let mut line = String::new();
            if input.lock().read_line(&mut line).context("cannot read standard input")? == 0
                || interrupt::asked()
            {
                return Ok(());
            }
            if line.trim().is_empty() {
                continue;
            }
            messages.push(said("user", line.trim()));
            let prompt =
                codec.marked(&template.render(&messages).or_else(|error| refuse(error.to_string()))?)?;
            let left = engine.context().saturating_sub(prompt.len());
            if left == 0 {
                return refuse(format!(
                    "the conversation has filled the model's context of {}",
                    engine.context()
                ));
            }
            let request = Request {
                end_tokens: end_tokens.clone(),
                prompt,
                max_tokens: self.tokens.unwrap_or(left).min(left),
                ..answering.clone()
            };
            let answer = say(&engine, request, &mut |text| print(text))?;
            print("\n")?;
            messages.push(said("assistant", &answer.text));
        }
    }
}
