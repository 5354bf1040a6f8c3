use std::path::{Path, PathBuf};

use clap::Args;
use engram_data::{ConversationSplit, ConversationSummary, Tokenizer, prepare_conversations};

use super::{chat, print};
use crate::conversation_lines::{Encoding, Problem, read};
use crate::failure::{Interrupted, refuse};
use crate::interrupt;
use crate::note::note;
use crate::table::Table;

/// Turn conversations into token shards with loss masks, for supervised fine-tuning (SFT).
///
/// A line is `{"prompt": …, "answer": …}` or `{"messages": [{"role": …, "content": …}, …]}`. The loss counts the
/// assistant's tokens and the token that ends its turn. Whole conversations are packed into windows.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram data sft chats.jsonl --tokenizer tokenizer.json --context 256 --out chats
  engram data sft chats.jsonl --tokenizer runs/smol/tokenizer.json --end '<|im_end|>' --context 2048 --out chats
  engram data sft answers.jsonl --tokenizer tokenizer.json --plain --context 256 --out answers
  engram train sft.toml --out runs/chat --from runs/small")]
pub(crate) struct Sft {
    /// JSON lines: `.jsonl` files, not compressed.
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// Tokenizer (a Hugging Face `tokenizer.json`).
    #[arg(long, value_name = "FILE")]
    tokenizer: PathBuf,
    /// Context of the model, `model.context`: inputs per window. No conversation may be longer.
    #[arg(long, value_name = "TOKENS")]
    context: usize,
    /// Folder to create.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Share of the conversations to hold out. A line's text alone decides whether it is held out.
    #[arg(long, value_name = "SHARE", default_value_t = 0.01)]
    hold_out: f64,
    /// Token that ends a conversation, the same as in `[text]` of the model's run.toml. The default is the first usual
    /// name that the tokenizer has.
    #[arg(long, value_name = "NAME")]
    end: Option<String>,
    /// Chat template: a Jinja file or a tokenizer_config.json. The default is the tokenizer_config.json beside the
    /// tokenizer, if it has one.
    #[arg(long, value_name = "FILE", conflicts_with = "plain")]
    chat_template: Option<PathBuf>,
    /// Use no chat template: an answer follows its prompt as it is.
    #[arg(long)]
    plain: bool,
    /// Skip and count conversations that are longer than the context. Without this option, the first is an error.
    #[arg(long)]
    skip_long: bool,
}

/// Number of skipped conversations that are named.
const NAMED: usize = 5;

impl Sft {
    /// Runs the command.
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let tokenizer = Tokenizer::load_ending(&self.tokenizer, self.end.as_deref())?;
        let template = self.template()?;
        match &template {
            Some((path, _)) => note(format_args!("chat template: {}", path.display())),
            None => note("no chat template: an answer follows its prompt as it is"),
        }
        let encoding = Encoding::new(&tokenizer, template.map(|(_, template)| template));
        interrupt::listen()?;
        let (mut conversations, mut long) = (Vec::new(), Vec::new());
        for path in &self.files {
            for record in read(path)? {
                if interrupt::asked() {
                    return Err(Interrupted("; nothing was written".to_owned()).into());
                }
                let conversation =
                    encoding.conversation(&record).map_err(|problem| problem.at(path, &record))?;
                let length = conversation.len();
                if length <= self.context {
                    conversations.push(conversation);
                    continue;
                }
                let problem = Problem(format!(
                    "the conversation has {length} tokens, more than the context of {}; split it, raise --context, or \
                     leave out such conversations with --skip-long",
                    self.context
                ));
                match self.skip_long {
                    true => long.push(problem.at(path, &record)),
                    false => return Err(problem.at(path, &record)),
                }
            }
        }
        tell_long(&long);
        if conversations.is_empty() {
            return refuse(
                "no conversation is left: the files have none, or all are longer than the context",
            );
        }
        let summary =
            prepare_conversations(&conversations, &tokenizer, &self.out, self.context, self.hold_out)?;
        if self.hold_out > 0.0 && summary.valid.conversations == 0 {
            note("no conversation falls into the held-out share; leave out `data.valid` when you train");
        }
        print(table(&summary, self.context).to_string())
    }

    /// The chat template and its file.
    fn template(&self) -> anyhow::Result<Option<(PathBuf, engram_infer::ChatTemplate)>> {
        if self.plain {
            return Ok(None);
        }
        if let Some(path) = &self.chat_template {
            return match chat::read(path)? {
                Some(template) => Ok(Some((path.clone(), template))),
                None => refuse(format!("{}: it has no chat_template", path.display())),
            };
        }
        let beside = self.tokenizer.parent().unwrap_or(Path::new("")).join("tokenizer_config.json");
        if !beside.exists() {
            return Ok(None);
        }
        Ok(chat::read(&beside)?.map(|template| (beside, template)))
    }
}

/// Reports conversations that were skipped.
fn tell_long(long: &[anyhow::Error]) {
    if long.is_empty() {
        return;
    }
    note(format_args!("conversations skipped because they are longer than the context: {}", long.len()));
    long.iter().take(NAMED).for_each(|problem| note(format_args!("  {problem}")));
    if long.len() > NAMED {
        note("  …");
    }
}

fn table(summary: &ConversationSummary, context: usize) -> Table {
    let mut table = Table::new(["split", "conversations", "tokens", "in the loss", "windows", "filled"]);
    for (name, split) in [("train", &summary.train), ("valid", &summary.valid)] {
        let ConversationSplit { conversations, windows, tokens, counted } = split;
        if *conversations > 0 {
            let filled = 100.0 * *tokens as f64 / (*windows as usize * context) as f64;
            table.row([
                name.to_owned(),
                conversations.to_string(),
                tokens.to_string(),
                counted.to_string(),
                windows.to_string(),
                format!("{filled:.0} %"),
            ]);
        }
    }
    table
}
