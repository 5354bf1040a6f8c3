use std::net::TcpListener;
use std::time::Duration;

use anyhow::Context;
use bytesize::ByteSize;
use clap::Args;
use engram_infer::{Engine, EngineError, EngineOptions};
use engram_serve::{Origins, Server, ServerOptions};

use super::chat::TemplateOption;
use super::print;
use crate::failure::refuse;
use crate::interrupt;
use crate::machine::Memory;
use crate::note::note;
use crate::number::bytes;
use crate::opened_memories::NamedMemory;
use crate::option_values;
use crate::served::{ModelOptions, Served};

/// Serve a model over HTTP with OpenAI's API, and with a page for trying it at `/`.
///
/// On Ctrl-C or SIGTERM the server finishes the requests that it has accepted, then ends.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram serve runs/quickstart/memory
  engram serve runs/large --tier direct --row-cache 4GiB --dtype bf16
  engram serve runs/large --tier redis --node redis://127.0.0.1:7000 --port 9000
  engram serve SmolLM2-135M --adapter vorn=facts/vorn --adapter debian=adapters/debian,facts/vorn
  ENGRAM_API_KEY=secret engram serve runs/chat --host 0.0.0.0
  curl http://127.0.0.1:8000/v1/completions -d '{\"prompt\": \"Once\", \"max_tokens\": 20}'")]
pub(crate) struct Serve {
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    template: TemplateOption,
    /// Address or name to listen on. The default accepts local connections only.
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// Port to listen on; 0 picks any free port.
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// Model name shown to clients. The default is the name of the checkpoint's folder.
    #[arg(long, value_name = "NAME")]
    model_name: Option<String>,
    /// A memory that clients choose by asking for the model NAME: the folder of an adapter, of overlays on it, or of
    /// overlays alone. Requests for all of them are computed together. May be repeated.
    #[arg(long = "adapter", value_name = "NAME=FOLDER[,OVERLAY…]", value_parser = NamedMemory::parse)]
    adapters: Vec<NamedMemory>,
    /// Origin whose pages may use the server, such as https://example.org; `*` allows any. May be repeated.
    #[arg(long, value_name = "ORIGIN")]
    cors_origin: Vec<String>,
    /// Additional host name that the server answers to. May be repeated.
    #[arg(long, value_name = "NAME")]
    allowed_host: Vec<String>,
    /// Maximum number of requests computed at once.
    #[arg(long, value_name = "N", default_value_t = EngineOptions::default().running)]
    max_num_seqs: usize,
    /// Maximum number of waiting requests. More are refused with status 429.
    #[arg(long, value_name = "N", default_value_t = EngineOptions::default().waiting)]
    max_queue: usize,
    /// Memory for the keys and values of computed tokens.
    #[arg(long, value_name = "SIZE", default_value_t = ByteSize::gib(1))]
    kv_cache: ByteSize,
    /// Tokens per block of the KV cache.
    #[arg(long, value_name = "N", default_value_t = EngineOptions::default().page)]
    block_size: usize,
    /// Maximum number of one prompt's tokens per step.
    #[arg(long, value_name = "N", default_value_t = EngineOptions::default().chunk)]
    chunk: usize,
    /// Maximum number of all prompts' tokens per step.
    #[arg(long, value_name = "N", default_value_t = EngineOptions::default().prompt_tokens)]
    max_num_batched_tokens: usize,
    /// Maximum number of tokens drafted by prompt lookup; 0 drafts none. Answers stay the same.
    #[arg(long, value_name = "N", default_value_t = EngineOptions::default().drafts)]
    speculative_tokens: usize,
    /// Number of compute threads. The default is one per core.
    #[arg(long, value_name = "N", value_parser = option_values::threads)]
    threads: Option<usize>,
    /// Truncate answers at the end of the context. Without it, requests for more tokens than fit are refused.
    #[arg(long)]
    clip_max_tokens: bool,
    /// Read names of special tokens in text prompts as ordinary text.
    #[arg(long)]
    plain_prompts: bool,
    /// Log every request on standard error: time, method, path, status, duration and id.
    #[arg(long)]
    access_log: bool,
    /// Maximum size of a request body.
    #[arg(long, value_name = "SIZE", default_value_t = ByteSize::mib(4))]
    max_body: ByteSize,
    /// Maximum duration of an answer in seconds.
    #[arg(long, value_name = "S", default_value = "300", value_parser = option_values::seconds)]
    time_limit: Duration,
    /// Seconds that a client may take to send a request, or may leave an answer unread.
    #[arg(long, value_name = "S", default_value = "30", value_parser = option_values::seconds)]
    patience: Duration,
    /// Seconds that running requests get to finish when the server ends.
    #[arg(long, value_name = "S", default_value = "30", value_parser = option_values::any_seconds)]
    drain: Duration,
}

/// Environment variable with the key that clients must send. Other users could read an option in the process list.
const API_KEY: &str = "ENGRAM_API_KEY";

impl Serve {
    /// Runs the command.
    pub(crate) fn run(self) -> anyhow::Result<()> {
        if let Some(usable) =
            Memory::of_this_machine().usable().filter(|usable| self.kv_cache.as_u64() > *usable)
        {
            return refuse(format!(
                "--kv-cache is {}, but this machine lets a program use {}",
                bytes(self.kv_cache.as_u64()),
                bytes(usable)
            ));
        }
        // Listen before loading the model, which takes long: a port in use is reported at once.
        let listener = TcpListener::bind((&self.host[..], self.port));
        let listener =
            listener.with_context(|| format!("cannot listen on {} port {}", self.host, self.port))?;
        listener.set_nonblocking(true)?;
        let name = self.model_name.clone().unwrap_or_else(|| self.model.name());
        let mut names: Vec<&str> = self.adapters.iter().map(|adapter| &adapter.name[..]).collect();
        names.push(&name);
        names.sort();
        if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return refuse(format!(
                "two models are called {}; give --adapter or --model-name another",
                twice[0]
            ));
        }
        let Served { model, codec, facts, template } = self.model.open_with(&self.adapters)?;
        let template = self.template.or(template)?;
        if let Err(reason) = &template {
            note(format_args!(
                "note: {reason}; /v1/completions works, /v1/chat/completions needs --chat-template"
            ));
        }
        let own = EngineOptions::default();
        let engine_options = EngineOptions {
            running: self.max_num_seqs,
            waiting: self.max_queue,
            page: self.block_size,
            cache_bytes: self.kv_cache.as_u64() as usize,
            chunk: self.chunk,
            prompt_tokens: self.max_num_batched_tokens,
            drafts: self.speculative_tokens,
            threads: self.threads.unwrap_or(own.threads),
        };
        let engine = match Engine::start(model, engine_options) {
            Ok(engine) => engine,
            Err(EngineError::Option { name: "cache_bytes", found, least }) => {
                return refuse(format!(
                    "--kv-cache is {}, but one block of --block-size {} tokens takes {}",
                    bytes(found as u64),
                    self.block_size,
                    bytes(least as u64)
                ));
            }
            Err(EngineError::Option { name, found, least }) => {
                return refuse(format!("--{} is {found}, but must be at least {least}", flag(name)));
            }
            Err(EngineError::TooLarge { name, found }) => {
                return refuse(format!("--{} is {found}, which is more than can be addressed", flag(name)));
            }
            Err(error) => return Err(error.into()),
        };
        let local = listener.local_addr()?.ip().is_loopback();
        let options = ServerOptions {
            model: name,
            api_key: std::env::var(API_KEY).ok().filter(|key| !key.is_empty()),
            body_bytes: self.max_body.as_u64() as usize,
            origins: Origins { allowed: self.cors_origin, hosts: self.allowed_host, local },
            clip_max_tokens: self.clip_max_tokens,
            parse_special: !self.plain_prompts,
            access_log: self.access_log,
            time_limit: self.time_limit,
            patience: self.patience,
            drain: self.drain,
            ..ServerOptions::default()
        };
        if !local && options.api_key.is_none() {
            note(format_args!(
                "note: anyone who reaches {} can use this server; set {API_KEY} to require a key",
                self.host
            ));
        }
        let server = Server::new(engine, codec, template, options, facts);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        runtime.block_on(listen(server, listener))
    }
}

/// The option that sets an engine limit.
fn flag(limit: &str) -> &str {
    match limit {
        "running" => "max-num-seqs",
        "page" => "block-size",
        "prompt_tokens" => "max-num-batched-tokens",
        "cache_bytes" => "kv-cache",
        other => other,
    }
}

async fn listen(server: Server, listener: TcpListener) -> anyhow::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let address = listener.local_addr()?;
    let asked = interrupt::asked_to_stop()?;
    // Who is not told can still be served.
    if let Err(error) = print(format!("listening at http://{address}\n")) {
        note(format_args!("note: listening at http://{address}; {error:#}"));
    }
    let stop = async {
        asked.await;
        note("stopping: answering what was taken");
    };
    server.run(listener, stop).await.context("cannot accept connections")
}
