//! The engine over HTTP, in the form of OpenAI's API.
//!
//! Nothing a client does keeps others from being served: what it sends is bounded in bytes and time, what it does
//! not read is thrown away with its connection, and when it leaves its place is free at the engine's next step.

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::body::{Body as HttpBody, Bytes};
use axum::extract::{Path, Request as HttpRequest, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;

use engram_infer::{ChatTemplate, Engine, Event, Failure, PromptOptions, TextCodec};

use crate::access_log::AccessLog;
use crate::answer::{self, Choice, Heading};
use crate::api::{Asked, Body, Terms, check_length};
use crate::api_error::ApiError;
use crate::call_parser::CallParser;
use crate::fields::{Endpoint, Fields};
use crate::grammars::Grammars;
use crate::openapi;
use crate::origin::Origins;
use crate::unread_body::Drained;

/// What a server allows its clients.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// Name of the model.
    pub model: String,
    /// What clients must send as a bearer token; none: nothing.
    pub api_key: Option<String>,
    /// Bytes of a request's body at most.
    pub body_bytes: usize,
    /// Connections at once; more wait to be accepted.
    pub connections: usize,
    /// Requests whose text is cut into tokens at once; others wait.
    pub readers: usize,
    /// Which pages may use the server, and under which names.
    pub origins: Origins,
    /// Whether an answer ends with the context where more tokens are asked for than are left of it.
    pub clip_max_tokens: bool,
    /// Whether names of special tokens in a text prompt are those tokens, where a request does not say.
    pub parse_special: bool,
    /// Whether every request is told on standard error.
    pub access_log: bool,
    /// Time without an event after which a stream gets a comment, so that nobody on the way closes it.
    pub keep_alive: Duration,
    /// Time that an answer may take.
    pub time_limit: Duration,
    /// Time that a client may take to send a request, or leave what it is sent unread.
    pub patience: Duration,
    /// Time that is left to running requests when the server is told to stop.
    pub drain: Duration,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            model: "engram".into(),
            api_key: None,
            body_bytes: 4 << 20,
            connections: 1024,
            readers: std::thread::available_parallelism().map_or(1, |cores| cores.get().div_ceil(2)),
            origins: Origins::default(),
            clip_max_tokens: false,
            parse_special: true,
            access_log: false,
            keep_alive: Duration::from_secs(10),
            time_limit: Duration::from_secs(300),
            patience: Duration::from_secs(30),
            drain: Duration::from_secs(30),
        }
    }
}

/// A memory as clients see it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemoryFacts {
    /// Its number among the engine's memories.
    pub memory: usize,
    /// Memory layers.
    pub layers: Vec<usize>,
    /// Longest n-gram that it looks up.
    pub max_order: usize,
    /// Overlays that lie on its rows.
    pub overlays: usize,
}

/// What the page shows of the model, the names by which clients choose a memory, and lines to add to the metrics.
#[derive(Default)]
pub struct Facts {
    /// Residual streams.
    pub streams: usize,
    /// What is read by those who ask for the model by its own name; none: no memory.
    pub memory: Option<MemoryFacts>,
    /// Memories that clients choose by asking for a model of this name.
    pub adapters: Vec<(String, MemoryFacts)>,
    /// Metrics of what lies outside of the engine, such as the caches of rows, in Prometheus's text format.
    pub metrics: Option<Box<dyn Fn() -> String + Send + Sync>>,
}

/// A model on the network.
pub struct Server {
    engine: Engine,
    codec: TextCodec,
    /// How a conversation becomes a text, or why none can.
    template: Result<ChatTemplate, String>,
    options: ServerOptions,
    facts: Facts,
    started: u64,
    answers: AtomicU64,
    readers: Semaphore,
    /// Whether the last request failed for want of memory rows.
    rows_failed: AtomicBool,
    access_log: Option<AccessLog>,
    grammars: Grammars,
}

const PAGE: &str = include_str!("page.html");

impl Server {
    /// Serves `engine`, whose tokens are those of `codec`; conversations by `template`, or not for the reason that stands
    /// in its place.
    pub fn new(
        engine: Engine,
        codec: TextCodec,
        template: Result<ChatTemplate, String>,
        options: ServerOptions,
        facts: Facts,
    ) -> Self {
        // A server without a log is better than none.
        let access_log = options.access_log.then(|| AccessLog::start(std::io::stderr()).ok()).flatten();
        let (readers, started) = (Semaphore::new(options.readers.max(1)), answer::now());
        let (answers, rows_failed) = (AtomicU64::new(0), AtomicBool::new(false));
        let grammars = Grammars::default();
        Self {
            engine,
            codec,
            template,
            options,
            facts,
            started,
            answers,
            readers,
            rows_failed,
            access_log,
            grammars,
        }
    }

    /// Serves those who connect to `listener` until `stop`; then answers what it has taken, as far as it can in time.
    ///
    /// # Errors
    /// When connections can no longer be accepted.
    pub async fn run(self, listener: TcpListener, stop: impl Future<Output = ()>) -> std::io::Result<()> {
        let (connections, drain) = (Arc::new(Semaphore::new(self.options.connections)), self.options.drain);
        let patience = self.options.patience;
        let server = Arc::new(self);
        let service = TowerToHyperService::new(router(Arc::clone(&server)));
        let mut http = hyper::server::conn::http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(patience);
        let graceful = GracefulShutdown::new();
        let mut stop = pin!(stop);
        loop {
            let accepted = tokio::select! {
                accepted = accept(&listener, &connections) => accepted,
                () = &mut stop => break,
            };
            let Ok((stream, permit)) = accepted else {
                // Out of descriptors, or the client is gone already: others may have more luck in a moment.
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            };
            // A connection whose client reads nothing for so long is closed. Only these systems have the option;
            // elsewhere such a connection ends with the server.
            #[cfg(any(target_os = "linux", target_os = "android", target_os = "fuchsia"))]
            let _ = socket2::SockRef::from(&stream).set_tcp_user_timeout(Some(patience));
            let _ = stream.set_nodelay(true);
            let connection = graceful.watch(http.serve_connection(TokioIo::new(stream), service.clone()));
            tokio::spawn(async move {
                // A connection that breaks concerns nobody else.
                let _ = connection.await;
                drop(permit);
            });
        }
        drop(listener);
        server.engine.stop();
        let _ = timeout(drain, graceful.shutdown()).await;
        Ok(())
    }

    /// The address that `listener` is bound to.
    ///
    /// # Errors
    /// When the system does not say.
    pub fn address(listener: &TcpListener) -> std::io::Result<SocketAddr> {
        listener.local_addr()
    }

    fn check_key(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let Some(key) = &self.options.api_key else { return Ok(()) };
        let sent = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let sent = sent.and_then(|value| value.split_once(' '));
        let sent = sent
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map_or("", |(_, key)| key.trim());
        if same(sent.as_bytes(), key.as_bytes()) {
            return Ok(());
        }
        let message = "the API key is missing or wrong: send it as `Authorization: Bearer KEY`";
        Err(ApiError::new(StatusCode::UNAUTHORIZED, message).coded("invalid_api_key"))
    }

    /// The model that is asked for by name, or the base.
    fn choose(&self, asked: Option<&str>) -> Result<Chosen<'_>, ApiError> {
        let all = || self.models();
        match asked {
            None => Ok(Chosen { name: &self.options.model, memory: self.facts.memory.as_ref() }),
            Some(name) => all().find(|model| model.name == name).ok_or_else(|| {
                let names: Vec<String> = all().map(|model| format!("`{}`", model.name)).collect();
                let message = format!("the model `{name}` is unknown: this server has {}", names.join(", "));
                ApiError::new(StatusCode::NOT_FOUND, message).coded("model_not_found")
            }),
        }
    }

    /// The base, then its adapters.
    fn models(&self) -> impl Iterator<Item = Chosen<'_>> {
        let base = Chosen { name: &self.options.model, memory: self.facts.memory.as_ref() };
        let adapters = self.facts.adapters.iter();
        std::iter::once(base).chain(adapters.map(|(name, memory)| Chosen { name, memory: Some(memory) }))
    }

    fn model_json(&self, model: Chosen<'_>) -> Value {
        let none = MemoryFacts::default();
        let facts = model.memory.unwrap_or(&none);
        let parent = (model.name != self.options.model).then_some(&self.options.model);
        json!({
            "id": model.name, "object": "model", "created": self.started, "owned_by": "engram",
            "parent": parent, "max_model_len": self.engine.context(),
            "engram": {
                "streams": self.facts.streams, "memory_layers": facts.layers, "max_order": facts.max_order,
                "overlays": facts.overlays, "chat": self.template.is_ok(),
            },
        })
    }

    /// A request's body, within its limits.
    async fn body(&self, request: HttpRequest) -> Result<Bytes, ApiError> {
        let limit = self.options.body_bytes;
        let long = || {
            let message = format!("the request body is longer than {limit} bytes");
            ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message)
        };
        let length = request.headers().get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok());
        if length.and_then(|length| length.parse::<u64>().ok()).is_some_and(|length| length > limit as u64) {
            return Err(long());
        }
        let read = timeout(self.options.patience, axum::body::to_bytes(request.into_body(), limit)).await;
        let late = |_| ApiError::new(StatusCode::REQUEST_TIMEOUT, "the request's body did not come in time");
        read.map_err(late)?.map_err(|error| {
            let source = std::error::Error::source(&error);
            if source.is_some_and(|source| source.is::<http_body_util::LengthLimitError>()) {
                return long();
            }
            ApiError::bad(format!("the request body broke off: {error}"))
        })
    }

    fn terms(&self, model: Chosen<'_>) -> Terms<'_> {
        Terms {
            codec: &self.codec,
            memory: model.memory.map(|memory| memory.memory),
            template: self.template.as_ref().map_err(String::as_str),
            grammars: &self.grammars,
            context: self.engine.longest(),
            time_limit: self.options.time_limit,
            clip: self.options.clip_max_tokens,
            parse_special: self.options.parse_special,
        }
    }

    /// Remembers whether memory rows can be read.
    fn note(&self, failure: Option<&Failure>) {
        match failure {
            Some(Failure::Rows(_)) => self.rows_failed.store(true, Relaxed),
            Some(_) => {}
            None => self.rows_failed.store(false, Relaxed),
        }
    }
}

/// A model that a client asks for: the base, or the base with one of its adapters.
#[derive(Debug, Clone, Copy)]
struct Chosen<'a> {
    name: &'a str,
    memory: Option<&'a MemoryFacts>,
}

/// Does work that takes long away from the threads that serve connections, a few requests at a time.
async fn away<T: Send + 'static>(
    server: &Arc<Server>,
    work: impl FnOnce(&Server) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let broken = || {
        ApiError::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "the request could not be read: an error in the server",
        )
    };
    let _permit = server.readers.acquire().await.map_err(|_| broken())?;
    let own = Arc::clone(server);
    tokio::task::spawn_blocking(move || work(&own)).await.map_err(|_| broken())?
}

/// The next connection, when there may be one more.
async fn accept(
    listener: &TcpListener,
    connections: &Arc<Semaphore>,
) -> std::io::Result<(TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let permit = Arc::clone(connections).acquire_owned().await.map_err(std::io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    Ok((stream, permit))
}

/// Compares without telling by the time it takes where the two differ.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

fn router(server: Arc<Server>) -> Router {
    let guarded = Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{id}", get(one_model))
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat))
        .route("/tokenize", post(tokenize))
        .route("/detokenize", post(detokenize))
        .route("/tokenizer_info", get(tokenizer_info))
        .route("/metrics", get(metrics))
        .route("/openapi.json", get(openapi_document))
        .layer(middleware::from_fn_with_state(Arc::clone(&server), guard));
    Router::new()
        .route("/", get(page))
        .route("/health", get(health))
        .merge(guarded)
        .fallback(|uri: Uri| async move {
            let problem = format!("there is nothing at {}; /openapi.json lists the addresses", uri.path());
            ApiError::new(StatusCode::NOT_FOUND, problem).into_response()
        })
        .method_not_allowed_fallback(|| async {
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "this address takes another method").into_response()
        })
        .layer(middleware::from_fn_with_state(Arc::clone(&server), observe))
        .with_state(server)
}

/// Checks where a request comes from, gives it an id, and tells about it.
async fn observe(State(server): State<Arc<Server>>, request: HttpRequest, next: Next) -> Response {
    let began = Instant::now();
    let request = Drained::wrap(request, server.options.patience);
    let id = request_id(request.headers(), &server);
    let origin = request.headers().get(header::ORIGIN).cloned();
    let what = (request.method().clone(), request.uri().path().to_owned());
    let origins = &server.options.origins;
    let mut response = match origins.preflight(request.method(), request.headers()) {
        Some(response) => response,
        None => match origins.check(request.headers(), request.uri()) {
            Ok(()) => next.run(request).await,
            Err(error) => error.into_response(),
        },
    };
    origins.mark(origin.as_ref(), &mut response);
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert("x-request-id", id);
    }
    if let Some(log) = &server.access_log {
        let (status, milliseconds) = (response.status().as_u16(), began.elapsed().as_millis());
        log.line(format!("{} {} {} {status} {milliseconds} ms {id}", answer::now(), what.0, what.1));
    }
    response
}

/// The client's name for a request, or one of ours.
fn request_id(headers: &HeaderMap, server: &Server) -> String {
    let sent = headers.get("x-request-id").and_then(|id| id.to_str().ok());
    let usual =
        |id: &&str| !id.is_empty() && id.len() <= 128 && id.bytes().all(|byte| byte.is_ascii_graphic());
    sent.filter(usual).map_or_else(
        || format!("req-{:x}-{:x}", server.started, server.answers.fetch_add(1, Relaxed)),
        str::to_owned,
    )
}

async fn guard(State(server): State<Arc<Server>>, request: HttpRequest, next: Next) -> Response {
    match server.check_key(request.headers()) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

async fn page() -> Response {
    let policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; \
                  img-src data:; base-uri 'none'; form-action 'none'";
    let headers =
        [(header::CONTENT_TYPE, "text/html; charset=utf-8"), (header::CONTENT_SECURITY_POLICY, policy)];
    (headers, PAGE).into_response()
}

async fn health(State(server): State<Arc<Server>>) -> Result<Json<Value>, ApiError> {
    let problem = if !server.engine.is_alive() {
        "the engine has ended by an error: start the server again"
    } else if server.rows_failed.load(Relaxed) {
        "the memory's rows cannot be read: the last request that needed them failed"
    } else {
        return Ok(Json(json!({"status": "ok"})));
    };
    Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, problem).coded("not_ready"))
}

async fn metrics(State(server): State<Arc<Server>>) -> Response {
    let mut text = server.engine.metrics().text();
    if let Some(more) = &server.facts.metrics {
        text += &more();
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}

async fn openapi_document(State(server): State<Arc<Server>>) -> Json<Value> {
    let names: Vec<&str> = server.models().map(|model| model.name).collect();
    Json(openapi::document(&names))
}

async fn models(State(server): State<Arc<Server>>) -> Json<Value> {
    let all: Vec<Value> = server.models().map(|model| server.model_json(model)).collect();
    Json(json!({"object": "list", "data": all}))
}

async fn one_model(
    State(server): State<Arc<Server>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    Ok(Json(server.model_json(server.choose(Some(&id))?)))
}

/// A text to be shown as tokens.
fn tokens_of(server: &Server, bytes: &[u8]) -> Result<Value, ApiError> {
    let fields = Fields::parse(bytes)?;
    let fields = fields.only(&["model", "prompt", "add_special_tokens", "parse_special"])?;
    let model = server.choose(fields.get::<String>("model")?.as_deref())?;
    let prompt: Option<String> = fields.get("prompt")?;
    let prompt = prompt.ok_or_else(|| ApiError::of("prompt", "`prompt` is missing"))?;
    let options = PromptOptions {
        parse_special: fields.get("parse_special")?.unwrap_or(server.options.parse_special),
        add_special_tokens: fields.get("add_special_tokens")?.unwrap_or(true),
    };
    check_length(&prompt, "prompt", &server.terms(model))?;
    let tokens =
        server.codec.prompt(&prompt, options).map_err(|error| ApiError::of("prompt", error.to_string()))?;
    let texts: Vec<String> = tokens.iter().map(|&token| server.codec.shown(token)).collect();
    let count = texts.len();
    Ok(json!({"tokens": tokens, "texts": texts, "count": count, "max_model_len": server.engine.context()}))
}

async fn tokenize(State(server): State<Arc<Server>>, request: HttpRequest) -> Result<Json<Value>, ApiError> {
    let bytes = server.body(request).await?;
    away(&server, move |server| tokens_of(server, &bytes)).await.map(Json)
}

/// The text of tokens; special tokens by their names.
fn text_of(server: &Server, bytes: &[u8]) -> Result<Value, ApiError> {
    let fields = Fields::parse(bytes)?.only(&["model", "tokens"])?;
    server.choose(fields.get::<String>("model")?.as_deref())?;
    let tokens: Option<Vec<u32>> = fields.get("tokens")?;
    let tokens = tokens.ok_or_else(|| ApiError::of("tokens", "`tokens` is missing"))?;
    let known = server.codec.token_bytes().len();
    if let Some(token) = tokens.iter().find(|&&token| token as usize >= known) {
        return Err(ApiError::of(
            "tokens",
            format!("`tokens` has {token}, which is not a token of this model"),
        ));
    }
    let bytes = tokens.iter().flat_map(|&token| match server.codec.bytes(token) {
        [] => server.codec.shown(token).into_bytes(),
        bytes => bytes.to_vec(),
    });
    let bytes: Vec<u8> = bytes.collect();
    Ok(json!({"prompt": String::from_utf8_lossy(&bytes)}))
}

async fn detokenize(
    State(server): State<Arc<Server>>,
    request: HttpRequest,
) -> Result<Json<Value>, ApiError> {
    let bytes = server.body(request).await?;
    away(&server, move |server| text_of(server, &bytes)).await.map(Json)
}

/// What a client has to know to cut texts as this server does.
async fn tokenizer_info(State(server): State<Arc<Server>>) -> Json<Value> {
    let codec = &server.codec;
    Json(json!({
        "bos_token": codec.shown(codec.opening_token()), "eos_token": codec.shown(codec.end_of_text()),
        "chat_template": server.template.as_ref().ok().map(ChatTemplate::source),
    }))
}

async fn completions(State(server): State<Arc<Server>>, request: HttpRequest) -> Result<Response, ApiError> {
    answer(server, request, Endpoint::Completions).await
}

async fn chat(State(server): State<Arc<Server>>, request: HttpRequest) -> Result<Response, ApiError> {
    answer(server, request, Endpoint::Chat).await
}

async fn answer(server: Arc<Server>, request: HttpRequest, endpoint: Endpoint) -> Result<Response, ApiError> {
    let bytes = server.body(request).await?;
    let asked = away(&server, move |server| {
        let body = Body::parse(endpoint, &bytes)?;
        let model = server.choose(body.model()?.as_deref())?;
        Ok((model.name.to_owned(), body.ask(&server.terms(model))?))
    });
    let (name, asked) = asked.await?;
    let number = server.answers.fetch_add(1, Relaxed);
    let gates = asked.requests.iter().any(|request| request.gates);
    let heading = Heading::new(endpoint, number, &name, gates, asked.include_usage);
    let heading = heading.with_tools(asked.calls.is_some());
    let events = submit(&server.engine, &asked)?;
    if asked.stream {
        let (sender, receiver) = mpsc::channel(32);
        tokio::spawn(stream(server, heading, asked, events, sender));
        let mut response = HttpBody::from_stream(Receiving(receiver)).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        return Ok(response);
    }
    whole(&server, &heading, asked, events).await
}

/// The events of all choices, each with the choice's number.
type Events = mpsc::UnboundedReceiver<(usize, Event)>;

/// Hands the requests of all choices to the engine: all or none.
fn submit(engine: &Engine, asked: &Asked) -> Result<Events, ApiError> {
    let submitted = engine.submit_all(asked.requests.clone())?;
    let (sender, receiver) = mpsc::unbounded_channel();
    for (index, mut events) in submitted.into_iter().enumerate() {
        let sender = sender.clone();
        tokio::spawn(async move {
            loop {
                let event = tokio::select! {
                    event = events.recv() => event,
                    // Nobody listens any more: with this receiver the request's place is free.
                    () = sender.closed() => break,
                };
                let Some(event) = event else { break };
                if sender.send((index, event)).is_err() {
                    break;
                }
            }
        });
    }
    Ok(receiver)
}

/// Tells a choice what came of it; gives the parts that a stream shows.
fn tell(
    server: &Server,
    heading: &Heading,
    choice: &mut Choice,
    event: Event,
) -> Result<Vec<Value>, Failure> {
    Ok(match event {
        Event::Token(token) => choice.token(heading, token, &server.codec),
        Event::Gates(gates) => vec![choice.gates(heading, gates, server.facts.streams)],
        Event::PromptLogprobs(logprobs) => {
            choice.prompt_logprobs(logprobs);
            Vec::new()
        }
        Event::Done(summary) => {
            server.note(None);
            choice.done(heading, summary, &server.codec)
        }
        Event::Failed(failure) => {
            server.note(Some(&failure));
            return Err(failure);
        }
    })
}

async fn whole(
    server: &Server,
    heading: &Heading,
    asked: Asked,
    mut events: Events,
) -> Result<Response, ApiError> {
    let mut choices = choices(&asked, &server.codec);
    while let Some((index, event)) = events.recv().await {
        tell(server, heading, &mut choices[index], event)?;
    }
    if choices.iter().any(|choice| choice.summary.is_none()) {
        return Err(Failure::Stopped.into());
    }
    Ok(Json(answer::whole(heading, &choices, asked.n, &server.codec, server.facts.streams)).into_response())
}

/// Sends an answer as it comes, as server-sent events. Ends when nobody reads any more.
async fn stream(
    server: Arc<Server>,
    heading: Heading,
    asked: Asked,
    mut events: Events,
    sender: mpsc::Sender<Bytes>,
) {
    let mut choices = choices(&asked, &server.codec);
    let mut out = Sending { sender, patience: server.options.patience };
    for (choice, request) in choices.iter_mut().zip(&asked.requests) {
        if let Some(chunk) = choice.open(&heading, &request.prompt, &server.codec)
            && !out.json(&chunk).await
        {
            return;
        }
    }
    let mut left = choices.len();
    while left > 0 {
        let event = tokio::select! {
            event = events.recv() => event,
            () = out.sender.closed() => return,
            () = tokio::time::sleep(server.options.keep_alive) => {
                if !out.raw(": keep-alive\n\n".into()).await {
                    return;
                }
                continue;
            }
        };
        let Some((index, event)) = event else { break };
        left -= usize::from(matches!(event, Event::Done(_)));
        let parts = match tell(&server, &heading, &mut choices[index], event) {
            Ok(parts) => parts,
            Err(failure) => {
                out.json(&ApiError::from(failure).json()).await;
                return;
            }
        };
        for part in parts {
            if !out.json(&part).await {
                return;
            }
        }
    }
    if left > 0 {
        out.json(&ApiError::from(Failure::Stopped).json()).await;
        return;
    }
    if asked.include_usage && !out.json(&answer::usage_chunk(&heading, &choices, asked.n)).await {
        return;
    }
    out.data("[DONE]").await;
}

fn choices(asked: &Asked, codec: &TextCodec) -> Vec<Choice> {
    let choice = |(index, request): (usize, &engram_infer::Request)| {
        let echo = asked.echo.then_some(&request.prompt[..]);
        let choice = Choice::new(index, echo, request.prompt_logprobs.is_some(), codec);
        choice.calling(asked.calls.map(CallParser::new))
    };
    asked.requests.iter().enumerate().map(choice).collect()
}

/// Server-sent events to one client.
struct Sending {
    sender: mpsc::Sender<Bytes>,
    patience: Duration,
}

impl Sending {
    /// Sends an event; `false` when the client has left, or does not read.
    async fn json(&mut self, value: &Value) -> bool {
        self.data(&value.to_string()).await
    }

    async fn data(&mut self, data: &str) -> bool {
        self.raw(format!("data: {data}\n\n")).await
    }

    async fn raw(&mut self, text: String) -> bool {
        matches!(timeout(self.patience, self.sender.send(Bytes::from(text))).await, Ok(Ok(())))
    }
}

/// A channel as a body.
struct Receiving(mpsc::Receiver<Bytes>);

impl futures_core::Stream for Receiving {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context).map(|bytes| bytes.map(Ok))
    }
}
