//! The engine over HTTP, in the form of OpenAI's API.
//!
//! Nothing a client does keeps others from being served: what it sends is bounded in bytes and time, what it does
//! not read is thrown away with its connection, and when it leaves its place is free at the engine's next step.

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body as HttpBody, Bytes};
use axum::extract::{Path, Request as HttpRequest, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;

use crate::answer::{self, Choice, Heading};
use crate::api::{ApiError, Asked, Body, Endpoint, Terms};
use engram_infer::{ChatTemplate, Engine, Event, TextCodec};

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
    /// Choices of a request at most.
    pub choices: usize,
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
            choices: 16,
            time_limit: Duration::from_secs(300),
            patience: Duration::from_secs(30),
            drain: Duration::from_secs(30),
        }
    }
}

/// What the page shows of the model, and lines to add to the metrics.
#[derive(Default)]
pub struct Facts {
    /// Residual streams.
    pub streams: usize,
    /// Memory layers.
    pub memory_layers: Vec<usize>,
    /// Longest n-gram that the memory looks up; 0 without a memory.
    pub max_order: usize,
    /// Metrics of what lies outside of the engine, such as the caches of rows, in Prometheus's text format.
    pub metrics: Option<Box<dyn Fn() -> String + Send + Sync>>,
}

/// A model on the network.
pub struct Server {
    engine: Engine,
    codec: TextCodec,
    template: Option<ChatTemplate>,
    options: ServerOptions,
    facts: Facts,
    started: u64,
    answers: AtomicU64,
}

const PAGE: &str = include_str!("page.html");

impl Server {
    /// Serves `engine`, whose tokens are those of `codec`.
    pub fn new(
        engine: Engine,
        codec: TextCodec,
        template: Option<ChatTemplate>,
        options: ServerOptions,
        facts: Facts,
    ) -> Self {
        Self { engine, codec, template, options, facts, started: answer::now(), answers: AtomicU64::new(0) }
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
        let sent = sent.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or("");
        if same(sent.as_bytes(), key.as_bytes()) {
            return Ok(());
        }
        let message = "the API key is missing or wrong: send it as `Authorization: Bearer KEY`";
        Err(ApiError::new(StatusCode::UNAUTHORIZED, message).coded("invalid_api_key"))
    }

    fn check_model(&self, asked: Option<&str>) -> Result<(), ApiError> {
        match asked {
            Some(name) if name != self.options.model => {
                let message = format!("there is no model `{name}` here, only `{}`", self.options.model);
                Err(ApiError::new(StatusCode::NOT_FOUND, message).coded("model_not_found"))
            }
            _ => Ok(()),
        }
    }

    fn model(&self) -> Value {
        json!({
            "id": self.options.model, "object": "model", "created": self.started, "owned_by": "engram",
            "max_model_len": self.engine.context(),
            "engram": {
                "streams": self.facts.streams, "memory_layers": self.facts.memory_layers,
                "max_order": self.facts.max_order, "chat": self.template.is_some(),
            },
        })
    }

    /// A request's body, within its limits.
    async fn body(&self, request: HttpRequest) -> Result<Bytes, ApiError> {
        let limit = self.options.body_bytes;
        let read = timeout(self.options.patience, axum::body::to_bytes(request.into_body(), limit)).await;
        let late = |_| ApiError::new(StatusCode::REQUEST_TIMEOUT, "the request's body did not come in time");
        read.map_err(late)?.map_err(|error| {
            let message = format!("the body is longer than {limit} bytes, or broke off: {error}");
            ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message)
        })
    }
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
        .route("/metrics", get(metrics))
        .layer(middleware::from_fn_with_state(Arc::clone(&server), guard));
    Router::new()
        .route("/", get(page))
        .route("/health", get(health))
        .merge(guarded)
        .fallback(|| async {
            ApiError::new(StatusCode::NOT_FOUND, "there is nothing at this address").into_response()
        })
        .method_not_allowed_fallback(|| async {
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "this address takes another method").into_response()
        })
        .with_state(server)
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
    if server.engine.is_alive() {
        return Ok(Json(json!({"status": "ok"})));
    }
    Err(ApiError::new(
        StatusCode::SERVICE_UNAVAILABLE,
        "the engine has ended by an error: start the server again",
    ))
}

async fn metrics(State(server): State<Arc<Server>>) -> Response {
    let mut text = server.engine.metrics().text();
    if let Some(more) = &server.facts.metrics {
        text += &more();
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}

async fn models(State(server): State<Arc<Server>>) -> Json<Value> {
    Json(json!({"object": "list", "data": [server.model()]}))
}

async fn one_model(
    State(server): State<Arc<Server>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    server.check_model(Some(&id))?;
    Ok(Json(server.model()))
}

/// A text to be shown as tokens.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Tokenize {
    model: Option<String>,
    prompt: String,
    /// Whether special tokens are added, as they are to a prompt.
    #[serde(default = "yes")]
    add_special_tokens: bool,
}

fn yes() -> bool {
    true
}

async fn tokenize(State(server): State<Arc<Server>>, request: HttpRequest) -> Result<Json<Value>, ApiError> {
    let bytes = server.body(request).await?;
    let asked: Tokenize = serde_json::from_slice(&bytes)
        .map_err(|error| ApiError::bad(format!("the request body is not as it must be: {error}")))?;
    server.check_model(asked.model.as_deref())?;
    let mut tokens =
        server.codec.document(&asked.prompt).map_err(|error| ApiError::bad(error.to_string()))?;
    if !asked.add_special_tokens {
        tokens.remove(0);
    }
    let texts: Vec<String> = tokens.iter().map(|&token| server.codec.shown(token)).collect();
    Ok(Json(json!({
        "tokens": tokens, "texts": texts, "count": texts.len(), "max_model_len": server.engine.context(),
    })))
}

async fn completions(State(server): State<Arc<Server>>, request: HttpRequest) -> Result<Response, ApiError> {
    answer(server, request, Endpoint::Completions).await
}

async fn chat(State(server): State<Arc<Server>>, request: HttpRequest) -> Result<Response, ApiError> {
    answer(server, request, Endpoint::Chat).await
}

async fn answer(server: Arc<Server>, request: HttpRequest, endpoint: Endpoint) -> Result<Response, ApiError> {
    let body = Body::parse(&server.body(request).await?)?;
    server.check_model(body.model.as_deref())?;
    let terms = Terms {
        codec: &server.codec,
        template: server.template.as_ref(),
        context: server.engine.context(),
        choices: server.options.choices,
        time_limit: server.options.time_limit,
    };
    let asked = body.ask(endpoint, &terms)?;
    let number = server.answers.fetch_add(1, Relaxed);
    let gates = asked.requests.iter().any(|request| request.gates);
    let heading = Heading::new(endpoint, number, &server.options.model, gates);
    let events = submit(&server.engine, &asked)?;
    if asked.stream {
        let (sender, receiver) = mpsc::channel(32);
        tokio::spawn(stream(server, heading, asked, events, sender));
        let mut response = HttpBody::from_stream(Receiving(receiver)).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        return Ok(response);
    }
    whole(&server, &heading, asked, events).await
}

/// The events of all choices, each with the choice's number.
type Events = mpsc::UnboundedReceiver<(usize, Event)>;

/// Hands the requests of all choices to the engine: all or none.
fn submit(engine: &Engine, asked: &Asked) -> Result<Events, ApiError> {
    let submitted: Vec<_> =
        asked.requests.iter().map(|request| engine.submit(request.clone())).collect::<Result<_, _>>()?;
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

async fn whole(
    server: &Server,
    heading: &Heading,
    asked: Asked,
    mut events: Events,
) -> Result<Response, ApiError> {
    let mut choices = choices(asked.echo);
    while let Some((index, event)) = events.recv().await {
        let choice = &mut choices[index];
        match event {
            Event::Token(token) => drop(choice.token(heading, token, &server.codec)),
            Event::Gates(gates) => drop(choice.gates(heading, gates, server.facts.streams)),
            Event::Done(summary) => drop(choice.done(heading, summary)),
            Event::Failed(failure) => return Err(failure.into()),
        }
    }
    if choices.iter().any(|choice| choice.summary.is_none()) {
        return Err(engram_infer::Failure::Stopped.into());
    }
    Ok(Json(answer::whole(heading, &choices, &server.codec, server.facts.streams)).into_response())
}

/// Sends an answer as it comes, as server-sent events. Ends when nobody reads any more.
async fn stream(
    server: Arc<Server>,
    heading: Heading,
    asked: Asked,
    mut events: Events,
    sender: mpsc::Sender<Bytes>,
) {
    let mut choices = choices(asked.echo);
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
        };
        let Some((index, event)) = event else { break };
        let choice = &mut choices[index];
        let chunk = match event {
            Event::Token(token) => choice.token(&heading, token, &server.codec),
            Event::Gates(gates) => Some(choice.gates(&heading, gates, server.facts.streams)),
            Event::Done(summary) => {
                left -= 1;
                Some(choice.done(&heading, summary))
            }
            Event::Failed(failure) => {
                out.json(&ApiError::from(failure).json()).await;
                return;
            }
        };
        if let Some(chunk) = chunk
            && !out.json(&chunk).await
        {
            return;
        }
    }
    if left > 0 {
        out.json(&ApiError::from(engram_infer::Failure::Stopped).json()).await;
        return;
    }
    if asked.include_usage && !out.json(&answer::usage_chunk(&heading, &choices)).await {
        return;
    }
    out.data("[DONE]").await;
}

fn choices(echo: Vec<String>) -> Vec<Choice> {
    echo.into_iter().enumerate().map(|(index, echo)| Choice::new(index, echo)).collect()
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
        let event = Bytes::from(format!("data: {data}\n\n"));
        matches!(timeout(self.patience, self.sender.send(event)).await, Ok(Ok(())))
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
