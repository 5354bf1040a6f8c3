use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use anyhow::Context;
use bytesize::ByteSize;
use clap::Args;
use engram_infer::{Engine, EngineOptions};
use engram_serve::{Server, ServerOptions};
use tokio::net::TcpListener;

use super::chat::TemplateOption;
use super::print;
use crate::failure::refuse;
use crate::interrupt;
use crate::served::{ModelOptions, Served};

/// Answer over HTTP, in the form of OpenAI's API, with a page to try it at `/`.
///
/// Stops when it is interrupted or told to end (SIGTERM), after it has answered what it had taken.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram serve runs/quickstart/memory
  engram serve runs/large --tier direct --cache 4GiB --weights bf16
  engram serve runs/large --tier redis --node redis://127.0.0.1:7000 --port 9000
  ENGRAM_API_KEY=secret engram serve runs/chat --host 0.0.0.0
  curl http://127.0.0.1:8000/v1/completions -d '{\"prompt\": \"Once\", \"max_tokens\": 20}'")]
pub(crate) struct Serve {
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    template: TemplateOption,
    /// Address to listen at; other machines reach it only if you name one of theirs to reach.
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    host: IpAddr,
    /// Port to listen at; 0: any that is free.
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// Name of the model for clients; without it, that of the checkpoint's folder.
    #[arg(long, value_name = "NAME")]
    model_name: Option<String>,
    /// Requests that are computed at once.
    #[arg(long, value_name = "N", default_value_t = EngineOptions::default().running)]
    running: usize,
    /// Requests that may wait; more are refused with status 429.
    #[arg(long, value_name = "N", default_value_t = EngineOptions::default().waiting)]
    waiting: usize,
    /// Memory for what is kept of tokens already computed.
    #[arg(long, value_name = "SIZE", default_value_t = ByteSize::gib(1))]
    token_cache: ByteSize,
    /// Tokens of a page of it.
    #[arg(long, value_name = "N", default_value_t = EngineOptions::default().page)]
    page: usize,
    /// Tokens of a prompt that are read in a step.
    #[arg(long, value_name = "N", default_value_t = EngineOptions::default().chunk)]
    chunk: usize,
    /// Tokens of all prompts that are read in a step.
    #[arg(long, value_name = "N", default_value_t = EngineOptions::default().prompt_tokens)]
    prompt_tokens: usize,
    /// Tokens that are drafted by prompt look-up at most; 0: none. Answers are the same.
    #[arg(long, value_name = "N", default_value_t = EngineOptions::default().drafts)]
    drafts: usize,
    /// Longest body of a request.
    #[arg(long, value_name = "SIZE", default_value_t = ByteSize::mib(4))]
    max_body: ByteSize,
    /// Seconds that an answer may take.
    #[arg(long, value_name = "S", default_value_t = 300)]
    time_limit: u64,
    /// Seconds that a client may take to send a request, or leave an answer unread.
    #[arg(long, value_name = "S", default_value_t = 30)]
    patience: u64,
    /// Seconds that running requests have left when the server is told to end.
    #[arg(long, value_name = "S", default_value_t = 30)]
    drain: u64,
}

/// Where the key that clients must send is looked for. An option would be read by others in the list of processes.
const API_KEY: &str = "ENGRAM_API_KEY";

impl Serve {
    /// Runs the command.
    pub(crate) fn run(self) -> anyhow::Result<()> {
        for (name, seconds) in [("time-limit", self.time_limit), ("patience", self.patience)] {
            if seconds == 0 {
                return refuse(format!("--{name} is 0: take 1 second or more"));
            }
        }
        let Served { model, codec, facts, template } = self.model.open()?;
        let template = self.template.or(template)?;
        let engine_options = EngineOptions {
            running: self.running,
            waiting: self.waiting,
            page: self.page,
            cache_bytes: self.token_cache.as_u64() as usize,
            chunk: self.chunk,
            prompt_tokens: self.prompt_tokens,
            drafts: self.drafts,
            ..EngineOptions::default()
        };
        let engine = match Engine::start(model, engine_options) {
            Ok(engine) => engine,
            Err(error @ engram_infer::EngineError::Option { .. }) => return refuse(error.to_string()),
            Err(error) => return Err(error.into()),
        };
        let options = ServerOptions {
            model: self.model_name.unwrap_or_else(|| self.model.name()),
            api_key: std::env::var(API_KEY).ok().filter(|key| !key.is_empty()),
            body_bytes: self.max_body.as_u64() as usize,
            time_limit: Duration::from_secs(self.time_limit),
            patience: Duration::from_secs(self.patience),
            drain: Duration::from_secs(self.drain),
            ..ServerOptions::default()
        };
        if !self.host.is_loopback() && options.api_key.is_none() {
            eprintln!(
                "note: whoever reaches {} can use this server; set {API_KEY} to ask for a key",
                self.host
            );
        }
        let server = Server::new(engine, codec, template, options, facts);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        runtime.block_on(listen(server, self.host, self.port))
    }
}

async fn listen(server: Server, host: IpAddr, port: u16) -> anyhow::Result<()> {
    let listener = TcpListener::bind((host, port)).await;
    let listener = listener.with_context(|| format!("cannot listen at {host} port {port}"))?;
    let address = listener.local_addr()?;
    let asked = interrupt::asked_to_stop()?;
    print(format!("listening at http://{address}\n"))?;
    let stop = async {
        asked.await;
        eprintln!("stopping: answering what was taken");
    };
    server.run(listener, stop).await.context("cannot accept connections")
}
