//! The server as its clients meet it: over HTTP, with a small trained model behind it.
#![allow(clippy::unwrap_used, reason = "a panic is a failure")]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use common::{CONFIG, Random, Workshop, wait_until};
use serde_json::{Value, json};

/// A run in `run/`, of a model with a longer context than the other tests'.
fn workshop() -> &'static Workshop {
    static WORKSHOP: OnceLock<Workshop> = OnceLock::new();
    WORKSHOP.get_or_init(|| {
        let workshop = Workshop::prepared();
        let config = CONFIG
            .replace("context = 32", "context = 160")
            .replace("evaluate_tokens = 200", "evaluate_tokens = 161");
        workshop.write("long.toml", config);
        workshop.ok("train long.toml --out run --steps 6");
        workshop.write("template.jinja", include_str!("../../../configs/chat-template.jinja"));
        workshop
    })
}

/// The same with room for descriptions of tools, as `wide`.
fn wide() -> &'static Workshop {
    static WIDE: OnceLock<&'static Workshop> = OnceLock::new();
    WIDE.get_or_init(|| {
        let workshop = workshop();
        let config = CONFIG
            .replace("context = 32", "context = 2048")
            .replace("evaluate_tokens = 200", "evaluate_tokens = 2049");
        workshop.write("wide.toml", config);
        workshop.ok("train wide.toml --out wide --steps 6");
        workshop
    })
}

/// A server that ends with the test.
struct Server {
    child: Child,
    address: String,
}

struct Reply {
    status: u16,
    head: String,
    body: String,
}

impl Server {
    fn start(options: &str) -> Self {
        Self::start_with(options, None)
    }

    fn start_with(options: &str, key: Option<&str>) -> Self {
        Self::start_of("run", options, key)
    }

    fn start_of(run: &str, options: &str, key: Option<&str>) -> Self {
        let line = format!("serve {run} --port 0 {options}");
        let mut command = workshop().command(line.split_whitespace());
        command.env_remove("ENGRAM_API_KEY").stdout(Stdio::piped()).stderr(Stdio::null());
        if let Some(key) = key {
            command.env("ENGRAM_API_KEY", key);
        }
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening at http://").expect("an address").to_owned();
        Self { child, address }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    fn send(&self, head: &str, body: &str) -> TcpStream {
        let mut stream = self.connect();
        let length = body.len();
        write!(
            stream,
            "{head}\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        stream
    }

    fn ask(&self, head: &str, body: &str) -> Reply {
        Reply::read(self.send(head, body))
    }

    fn get(&self, path: &str) -> Reply {
        self.ask(&format!("GET {path} HTTP/1.1"), "")
    }

    fn post(&self, path: &str, body: &Value) -> Reply {
        self.ask(&format!("POST {path} HTTP/1.1"), &body.to_string())
    }

    /// A completion that must succeed.
    fn complete(&self, body: Value) -> Value {
        let reply = self.post("/v1/completions", &body);
        assert_eq!(reply.status, 200, "{}", reply.body);
        reply.json()
    }

    fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").body;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{name} in\n{text}")).parse().unwrap()
    }

    fn signal(&self, signal: &str) {
        assert!(
            Command::new("kill").args([signal, &self.child.id().to_string()]).status().unwrap().success()
        );
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Reply {
    fn read(mut stream: TcpStream) -> Self {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        let text = String::from_utf8(bytes).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no head in {text:?}"));
        let head = head.to_lowercase();
        let body = if head.contains("transfer-encoding: chunked") { unchunk(body) } else { body.to_owned() };
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Self { status, head, body }
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error} in {}", self.body))
    }

    /// The data of server-sent events.
    fn events(&self) -> Vec<Value> {
        assert!(self.head.contains("text/event-stream"), "{}", self.head);
        let mut events: Vec<&str> =
            self.body.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect();
        assert_eq!(events.pop(), Some("[DONE]"));
        events.into_iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }
}

fn unchunk(mut body: &str) -> String {
    let mut text = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        text += &rest[..size];
        body = &rest[size + 2..];
    }
    text
}

#[test]
fn a_text_is_completed_whole_and_streamed() {
    let server = Server::start("");
    let request = json!({"prompt": "Queen Anne", "max_tokens": 12, "temperature": 0, "logprobs": 2});
    let whole = server.complete(request.clone());
    assert_eq!((&whole["object"], &whole["model"]), (&json!("text_completion"), &json!("run")));
    let choice = &whole["choices"][0];
    let text = choice["text"].as_str().unwrap();
    assert_eq!((&choice["finish_reason"], &choice["index"]), (&json!("length"), &json!(0)));
    assert_eq!(whole["usage"]["completion_tokens"], 12);
    let logprobs = &choice["logprobs"];
    assert_eq!(logprobs["tokens"].as_array().unwrap().len(), 12);
    assert_eq!(logprobs["top_logprobs"][0].as_object().unwrap().len(), 2);
    let best = logprobs["top_logprobs"][3]
        .as_object()
        .unwrap()
        .values()
        .map(|v| v.as_f64().unwrap())
        .fold(-99.0, f64::max);
    assert_eq!(logprobs["token_logprobs"][3], best, "the likeliest was taken");

    let mut streamed = request;
    streamed["stream"] = true.into();
    streamed["stream_options"] = json!({"include_usage": true});
    let events = server.post("/v1/completions", &streamed).events();
    let joined: String = events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect();
    assert_eq!(joined, text);
    let (usage, parts) = events.split_last().unwrap();
    assert_eq!((&usage["choices"], &usage["usage"]["completion_tokens"]), (&json!([]), &json!(12)));
    assert_eq!(parts.last().unwrap()["choices"][0]["finish_reason"], "length");
    assert!(parts.iter().all(|part| part["id"] == parts[0]["id"]));

    // The command answers the same.
    let generated = workshop().ok_arguments([
        "generate",
        "run",
        "--prompt",
        "Queen Anne",
        "--max-tokens",
        "12",
        "--temperature",
        "0",
    ]);
    assert_eq!(generated, format!("Queen Anne{text}\n"));
    // Several prompts, several choices, repeated prompts.
    let many =
        server.complete(json!({"prompt": ["Ada", "my"], "n": 2, "max_tokens": 3, "echo": true, "seed": 5}));
    let texts: Vec<&str> =
        many["choices"].as_array().unwrap().iter().map(|choice| choice["text"].as_str().unwrap()).collect();
    assert_eq!(texts.len(), 4);
    assert!(
        texts[..2].iter().all(|text| text.starts_with("Ada"))
            && texts[2..].iter().all(|text| text.starts_with("my"))
    );
}

#[test]
fn a_conversation_goes_through_the_template() {
    let server = Server::start("--chat-template template.jinja");
    let request = json!({"messages": [{"role": "user", "content": "Ada?"}], "max_tokens": 5, "seed": 1, "logprobs": true, "top_logprobs": 1});
    let reply = server.post("/v1/chat/completions", &request);
    assert_eq!(reply.status, 200, "{}", reply.body);
    let whole = reply.json();
    let message = &whole["choices"][0]["message"];
    assert_eq!((&whole["object"], &message["role"]), (&json!("chat.completion"), &json!("assistant")));
    assert_eq!(whole["choices"][0]["logprobs"]["content"][0]["top_logprobs"].as_array().unwrap().len(), 1);
    // It is what follows the template's text.
    let plain = server.complete(json!({"prompt": "User: Ada?\nAssistant:", "max_tokens": 5, "seed": 1}));
    assert_eq!(message["content"], plain["choices"][0]["text"]);

    let mut streamed = request;
    streamed["stream"] = true.into();
    let events = server.post("/v1/chat/completions", &streamed).events();
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    let joined: String =
        events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(message["content"], joined);

    let wrong =
        server.post("/v1/chat/completions", &json!({"messages": [{"role": "robot", "content": "x"}]}));
    assert_eq!(wrong.status, 400);
    assert!(wrong.body.contains("robot"), "{}", wrong.body);

    let said = workshop().shell(
        "printf 'Ada?\\n' | \"$ENGRAM\" chat run --chat-template template.jinja --max-tokens 5 --temperature 0",
    );
    assert_eq!(said.status, Some(0), "{}", said.stderr);
    let request =
        json!({"messages": [{"role": "user", "content": "Ada?"}], "max_tokens": 5, "temperature": 0});
    let answer = server.post("/v1/chat/completions", &request).json();
    assert_eq!(format!("{}\n", answer["choices"][0]["message"]["content"].as_str().unwrap()), said.stdout);
}

#[test]
fn gates_and_the_memory_switch() {
    let server = Server::start("");
    let request = json!({"prompt": "Queen Anne", "max_tokens": 8, "temperature": 0, "gates": true});
    let with = server.complete(request.clone());
    let gates = &with["choices"][0]["engram"]["gates"];
    let positions: usize =
        gates.as_array().unwrap().iter().map(|part| part["layers"][0].as_array().unwrap().len()).sum();
    let prompt = with["usage"]["prompt_tokens"].as_u64().unwrap() as usize;
    assert!(positions >= prompt + 7, "{positions} positions");
    for gate in gates[0]["layers"][0][1].as_array().unwrap() {
        assert!((0.0..=1.0).contains(&gate.as_f64().unwrap()));
    }
    let mut without = request;
    without["memory"] = false.into();
    let without = server.complete(without);
    let shut = &without["choices"][0]["engram"]["gates"][0]["layers"][0];
    assert!(
        shut.as_array().unwrap().iter().flat_map(|gates| gates.as_array().unwrap()).all(|gate| *gate == 0.0)
    );

    let page = server.get("/");
    assert!(page.head.contains("text/html") && page.body.contains("<title>Engram</title>"));
    assert!(
        !page.body.contains("http://") && !page.body.contains("https://"),
        "nothing comes from elsewhere"
    );
    let model = &server.get("/v1/models").json()["data"][0];
    assert_eq!((&model["id"], &model["engram"]["memory_layers"]), (&json!("run"), &json!([1])));
    assert_eq!(server.get("/v1/models/run").json()["id"], "run");
    assert_eq!(server.get("/health").json(), json!({"status": "ok"}));
    let tokens = server.post("/tokenize", &json!({"prompt": "Queen Anne"})).json();
    let plain =
        server.post("/tokenize", &json!({"prompt": "Queen Anne é", "add_special_tokens": false})).json();
    let text = server.post("/detokenize", &json!({"tokens": plain["tokens"]}));
    assert_eq!((text.status, &text.json()["prompt"]), (200, &json!("Queen Anne é")));
    assert_eq!(server.post("/detokenize", &json!({"tokens": [100_000]})).status, 400);
    let info = server.get("/tokenizer_info").json();
    assert_eq!((&info["eos_token"], &info["chat_template"]), (&json!("<|endoftext|>"), &Value::Null));
    assert_eq!(tokens["count"].as_u64().unwrap() as usize, prompt);
    assert_eq!(
        tokens["texts"].as_array().unwrap()[1..]
            .iter()
            .map(|text| text.as_str().unwrap())
            .collect::<String>(),
        "Queen Anne"
    );
}

#[test]
fn bad_requests_get_an_error_object_and_the_server_lives() {
    let server = Server::start("--max-body 2KB");
    let complete = "POST /v1/completions HTTP/1.1";
    let long = "Ada ".repeat(200);
    for (head, body, status, words) in [
        (complete, "{".to_owned(), 400, "line 1"),
        (complete, "".to_owned(), 400, "EOF"),
        (complete, "\u{0}\u{1}".to_owned(), 400, "expected value"),
        (complete, json!({"prompt": "a", "max_tokens": "many"}).to_string(), 400, "many"),
        (complete, json!({"prompt": "a", "colour": 1}).to_string(), 400, "colour"),
        (complete, json!({"prompt": "a", "temperature": -1}).to_string(), 400, "temperature"),
        (complete, json!({"prompt": "a", "max_tokens": 10_000}).to_string(), 400, "context"),
        (
            complete,
            json!({"prompt": "a", "max_tokens": u64::MAX}).to_string(),
            400,
            "a whole number from 0 to",
        ),
        (complete, json!({"prompt": long}).to_string(), 400, "context is 160"),
        (complete, json!({"prompt": [1, 99_999]}).to_string(), 400, "99999"),
        (complete, json!({"prompt": []}).to_string(), 400, "empty"),
        (complete, json!({"prompt": "a", "model": "gpt"}).to_string(), 404, "gpt"),
        (complete, json!({"prompt": "x".repeat(3000)}).to_string(), 413, "2000 bytes"),
        (
            "POST /v1/chat/completions HTTP/1.1",
            json!({"messages": [{"role": "user", "content": "a"}]}).to_string(),
            400,
            "--chat-template",
        ),
        ("POST /tokenize HTTP/1.1", "{}".to_owned(), 400, "prompt"),
        ("GET /v1/completions HTTP/1.1", String::new(), 405, "method"),
        ("GET /nowhere HTTP/1.1", String::new(), 404, "nothing"),
        ("GET /v1/models/gpt HTTP/1.1", String::new(), 404, "gpt"),
    ] {
        let reply = server.ask(head, &body);
        assert_eq!(reply.status, status, "{head} {body}: {}", reply.body);
        let error = &reply.json()["error"];
        assert!(error["message"].as_str().unwrap().contains(words), "{head} {body}: {error}");
        assert_eq!(error["type"], "invalid_request_error");
    }
    let mut random = Random(3);
    for _ in 0..50 {
        let garbage: Vec<u8> = (0..random.below(300)).map(|_| random.below(256) as u8).collect();
        let mut stream = server.connect();
        let _ = stream.write_all(&garbage);
        let _ = stream.shutdown(Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
    }
    server.complete(json!({"prompt": "Ada", "max_tokens": 2}));
}

#[test]
fn clients_that_hang_or_leave_keep_nobody_waiting() {
    let server = Server::start("--max-num-seqs 2 --patience 2");
    // Heads and bodies that never end.
    let mut hanging = Vec::new();
    for start in [
        "POST /v1/comp",
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{\"prompt\"",
    ] {
        let mut stream = server.connect();
        stream.write_all(start.as_bytes()).unwrap();
        hanging.push(stream);
    }
    // Clients that leave before the end, of the whole and of a stream.
    for stream in [false, true] {
        for _ in 0..6 {
            let body = json!({"prompt": "Ada", "max_tokens": 150, "stream": stream});
            drop(server.send("POST /v1/completions HTTP/1.1", &body.to_string()));
        }
    }
    server.complete(json!({"prompt": "Ada", "max_tokens": 2}));
    wait_until("the places to be free", || {
        server.metric("engram_running_requests") == 0.0 && server.metric("engram_cache_pages_in_use") == 0.0
    });
    let begun = Instant::now();
    let body = Reply::read(hanging.pop().unwrap());
    assert_eq!(body.status, 408, "{}", body.body);
    let _ = hanging.pop().unwrap().read_to_end(&mut Vec::new());
    assert!(begun.elapsed() < Duration::from_secs(20), "they were sent away");
}

/// A client that sends its whole request before it reads meets the answer, not a reset connection.
#[test]
fn a_refusal_reaches_a_client_that_still_sends() {
    let server = Server::start_with("", Some("sesame"));
    let (short, long) = (2 << 20, 6 << 20);
    let key = "authorization: Bearer sesame\r\n";
    for (address, key, length, status) in [
        ("POST /v1/completions", key, long, 413),
        ("POST /v1/completions", "", short, 401),
        ("POST /nothing", key, short, 404),
        ("GET /v1/completions", key, short, 405),
        ("POST /v1/completions", "origin: http://elsewhere\r\n", short, 403),
    ] {
        for chunked in [false, true] {
            let mut stream = server.connect();
            let framing = if chunked {
                "transfer-encoding: chunked".into()
            } else {
                format!("content-length: {length}")
            };
            write!(
                stream,
                "{address} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{key}{framing}\r\n\r\n"
            )
            .unwrap();
            let part = vec![b' '; 1 << 20];
            for _ in 0..length >> 20 {
                if chunked {
                    write!(stream, "{:x}\r\n", part.len()).unwrap();
                }
                stream.write_all(&part).unwrap_or_else(|error| panic!("{address} {key}: {error}"));
                if chunked {
                    stream.write_all(b"\r\n").unwrap();
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            if chunked {
                stream.write_all(b"0\r\n\r\n").unwrap();
            }
            assert_eq!(Reply::read(stream).status, status, "{address} {key} {chunked}");
        }
    }
    // A client that waits to be asked for its body is refused without it.
    let mut stream = server.connect();
    let head = "POST /nothing HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nexpect: 100-continue\r\ncontent-length: 9\r\n\r\n";
    stream.write_all(head.as_bytes()).unwrap();
    assert_eq!(Reply::read(stream).status, 404);
}

/// Options that a server would fail over later are refused before it opens its model.
#[test]
fn options_out_of_bounds_are_refused() {
    for (options, named) in [
        ("--threads 0", "--threads"),
        ("--threads 100000", "--threads"),
        ("--time-limit 0", "--time-limit"),
        ("--time-limit 18446744073709551615", "--time-limit"),
        ("--patience 18446744073709551615", "--patience"),
        ("--drain 18446744073709551615", "--drain"),
        ("--kv-cache 15EiB", "--kv-cache"),
        ("--kv-cache 64TiB", "--kv-cache"),
        ("--block-size 0", "--block-size"),
        ("--block-size 18446744073709551615", "--block-size"),
        ("--block-size 9000000000000000", "--block-size"),
    ] {
        let outcome = workshop().run(&format!("serve run --port 0 {options}"));
        assert_eq!(outcome.status, Some(2), "{options}: {}", outcome.stderr);
        assert!(outcome.stderr.contains(named), "{options}: {}", outcome.stderr);
    }
}

#[test]
fn as_many_wait_as_may() {
    let server = Server::start("--max-num-seqs 1 --max-queue 1 --speculative-tokens 0");
    let body = json!({"prompt": "Ada", "max_tokens": 150, "n": 2}).to_string();
    // Each has two choices, for one of which there is no place while another's runs.
    let streams: Vec<TcpStream> =
        (0..8).map(|_| server.send("POST /v1/completions HTTP/1.1", &body)).collect();
    let replies: Vec<Reply> = streams.into_iter().map(Reply::read).collect();
    let busy: Vec<&Reply> = replies.iter().filter(|reply| reply.status == 429).collect();
    assert!(!busy.is_empty());
    assert!(
        busy.iter()
            .all(|reply| reply.head.contains("retry-after: 1") && reply.body.contains("rate_limit_error"))
    );
    wait_until("a place", || {
        server.post("/v1/completions", &json!({"prompt": "Ada", "max_tokens": 2})).status == 200
    });
}

#[test]
fn a_key_is_asked_for() {
    let server = Server::start_with("", Some("sesame"));
    let models =
        |key: &str| server.ask(&format!("GET /v1/models HTTP/1.1\r\nauthorization: {key}"), "").status;
    assert_eq!((models("Bearer sesame"), models("Bearer sesam"), models("sesame")), (200, 401, 401));
    let refused = server.post("/v1/completions", &json!({"prompt": "Ada"}));
    assert_eq!((refused.status, &refused.json()["error"]["type"]), (401, &json!("authentication_error")));
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn told_to_end_it_answers_what_it_took() {
    let mut server = Server::start("--speculative-tokens 0");
    let body = json!({"prompt": "Ada", "max_tokens": 150}).to_string();
    let streams: Vec<TcpStream> =
        (0..10).map(|_| server.send("POST /v1/completions HTTP/1.1", &body)).collect();
    wait_until("all to be taken", || server.metric("engram_prompt_tokens_total") >= 10.0 * 3.0);
    server.signal("-TERM");
    for stream in streams {
        assert_eq!(Reply::read(stream).status, 200);
    }
    assert!(server.child.wait().unwrap().success());
    assert!(TcpStream::connect(&server.address).is_err());
}

#[test]
fn impossible_options_are_refused() {
    workshop().fails("serve nowhere", 2, &["nowhere"]);
    workshop().fails("serve run --max-num-seqs 0", 2, &["--max-num-seqs", "at least 1"]);
    workshop().fails("serve run --kv-cache 10B", 2, &["--kv-cache"]);
    workshop().fails("serve run --chat-template nowhere.jinja", 2, &["nowhere.jinja"]);
    workshop().fails("serve run --node redis://127.0.0.1:1", 2, &["--tier redis"]);
    workshop().fails("chat run", 2, &["--chat-template"]);
    workshop().fails("generate run --prompt Ada --max-tokens 1000", 2, &["context is 160"]);
    workshop().fails("generate run --prompt Ada --min-p 2", 2, &["--min-p", "from 0 to 1"]);
    workshop().fails("serve run --running 3", 2, &["--running", "--max-num-seqs"]);
    // Old names that many scripts have are still taken.
    workshop().fails("serve run --token-cache 10B", 2, &["`--token-cache` is now `--kv-cache`", "one block"]);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    workshop().fails(&format!("serve run --port {port}"), 1, &[&port]);
    let empty = workshop().shell("\"$ENGRAM\" generate run --prompt Ada --stop ''");
    assert_eq!(empty.status, Some(2), "{}", empty.stderr);
    assert!(empty.stderr.contains("--stop"), "{}", empty.stderr);
}

#[test]
fn rows_come_from_any_tier() {
    let ask = |options: &str| {
        let server = Server::start(options);
        let answer = server.complete(json!({"prompt": "Queen Anne", "max_tokens": 20, "temperature": 0}));
        let hits =
            options.contains("cache").then(|| server.metric("engram_rows_total{layer=\"1\",from=\"cache\"}"));
        assert!(hits.is_none_or(|hits| hits > 0.0), "rows come again");
        answer["choices"][0]["text"].clone()
    };
    let expected = ask("");
    for options in
        ["--tier ram", "--tier direct", "--tier direct --row-cache 1MiB", "--tier mapped --row-cache 1MiB"]
    {
        assert_eq!(ask(options), expected, "{options}");
    }
}

/// What clients of the field do: an answer is sent back, prompts are scored, texts are counted in characters.
#[test]
fn answers_can_be_sent_back_and_prompts_scored() {
    let server = Server::start("--chat-template template.jinja --clip-max-tokens");
    let chat = |messages: Value| {
        let body = json!({"messages": messages, "max_tokens": 4096, "temperature": 0, "n": 2});
        let reply = server.post("/v1/chat/completions", &body);
        assert_eq!(reply.status, 200, "{}", reply.body);
        reply.json()
    };
    let first = chat(json!([{"role": "user", "content": "Ada?"}]));
    let message = first["choices"][0]["message"].clone();
    assert_eq!(first["choices"].as_array().unwrap().len(), 2);
    assert_eq!(message, first["choices"][1]["message"], "the likeliest tokens are the same");
    let tokens = first["usage"]["prompt_tokens"].as_u64().unwrap();
    let one = server.post(
        "/v1/chat/completions",
        &json!({"messages": [{"role": "user", "content": "Ada?"}], "max_tokens": 1}),
    );
    assert_eq!(one.json()["usage"]["prompt_tokens"], tokens, "a prompt counts once");
    chat(
        json!([{"role": "user", "content": "A"}, {"role": "assistant", "content": null}, {"role": "user", "content": "B"}]),
    );
    let short =
        json!([{"role": "user", "content": "A"}, {"role": "assistant", "content": "b", "refusal": null}]);
    chat(short);

    let echo = json!({"prompt": "Queen Anne", "max_tokens": 0, "echo": true, "logprobs": 2});
    let scored = server.complete(echo.clone());
    let (choice, logprobs) = (&scored["choices"][0], &scored["choices"][0]["logprobs"]);
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("Queen Anne"), &json!("length")));
    let told = logprobs["token_logprobs"].as_array().unwrap();
    assert_eq!(told.len() as u64, scored["usage"]["prompt_tokens"].as_u64().unwrap());
    assert!(told[0].is_null() && told[1..].iter().all(|logprob| logprob.as_f64().unwrap() <= 0.0));
    assert_eq!(logprobs["top_logprobs"][0], Value::Null);
    let names = |index: usize| logprobs["top_logprobs"][index].as_object().unwrap().clone();
    for index in 1..told.len() {
        let token = logprobs["tokens"][index].as_str().unwrap();
        assert_eq!(names(index)[token], told[index], "the token is among the top ones");
    }
    // Continued, the prompt's probabilities are the same, and a stream tells the same as a whole answer.
    let mut more = echo;
    more["max_tokens"] = 3.into();
    more["temperature"] = 0.into();
    let whole = server.complete(more.clone());
    let all = whole["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap().clone();
    assert_eq!((&all[..told.len()], all.len()), (&told[..], told.len() + 3));
    more["stream"] = true.into();
    let events = server.post("/v1/completions", &more).events();
    let parts = |field: &str| -> Vec<Value> {
        let choices = events.iter().filter_map(|event| event["choices"][0]["logprobs"][field].as_array());
        choices.flatten().cloned().collect()
    };
    assert_eq!(parts("token_logprobs"), all);
    assert_eq!(json!(parts("text_offset")), whole["choices"][0]["logprobs"]["text_offset"]);
    let text: String = events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect();
    assert_eq!(whole["choices"][0]["text"], text);
    // An answer that ends at once tells how likely its end was: a token for each that `usage` counts.
    more["max_tokens"] = 1.into();
    more["logit_bias"] = json!({"5": 100});
    more["stop_token_ids"] = json!([5]);
    let events = server.post("/v1/completions", &more).events();
    let ends: Vec<&Value> = events.iter().map(|event| &event["choices"][0]["logprobs"]).collect();
    more["stream"] = false.into();
    let ended = server.complete(more);
    let choice = &ended["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("Queen Anne"), &json!("stop")));
    assert_eq!(ended["usage"]["completion_tokens"], 1);
    let with_end = choice["logprobs"]["token_logprobs"].as_array().unwrap();
    assert_eq!((&with_end[..told.len()], with_end.len()), (&told[..], told.len() + 1));
    assert_eq!(ends.iter().filter_map(|end| end["tokens"].as_array()).flatten().count(), with_end.len());
}

#[test]
fn pages_of_other_origins_and_names_are_refused_unless_allowed() {
    let server = Server::start("--cors-origin http://localhost:3000");
    let ask = |head: &str, headers: &str| server.ask(&format!("{head} HTTP/1.1\r\n{headers}"), "");
    let preflight =
        "access-control-request-method: POST\r\naccess-control-request-headers: authorization,x-a";
    let asked = ask("OPTIONS /v1/chat/completions", &format!("origin: http://localhost:3000\r\n{preflight}"));
    assert_eq!(asked.status, 204);
    assert!(asked.head.contains("access-control-allow-origin: http://localhost:3000"), "{}", asked.head);
    assert!(asked.head.contains("access-control-allow-headers: authorization,x-a"), "{}", asked.head);
    assert_eq!(ask("GET /v1/models", "origin: http://evil.example").status, 403);
    let allowed = ask("GET /v1/models", "origin: http://localhost:3000\r\nx-request-id: mine-1");
    assert_eq!(allowed.status, 200);
    assert!(allowed.head.contains("x-request-id: mine-1"), "{}", allowed.head);
    let mut stream = server.connect();
    stream.write_all(b"GET /health HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n").unwrap();
    assert_eq!(Reply::read(stream).status, 400);
    let mut stream = server.connect();
    stream.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n20\r\n{\"prompt\"").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 400"), "{answer}");
    let document = server.get("/openapi.json").json();
    assert!(document["paths"]["/v1/completions"]["post"].is_object());
}

/// The table's file is cut short while the server runs. Requests fail with the reason, and `/health` says it too.
#[test]
fn a_server_whose_rows_cannot_be_read_is_not_ready() {
    let place = workshop().path("cut");
    std::fs::create_dir(&place).unwrap();
    let checkpoints = workshop().path("run/checkpoints");
    let newest = std::fs::read_dir(checkpoints).unwrap().map(|entry| entry.unwrap().path()).max().unwrap();
    for file in std::fs::read_dir(newest).unwrap().map(|entry| entry.unwrap().path()) {
        std::fs::copy(&file, place.join(file.file_name().unwrap())).unwrap();
    }
    let server = Server::start_of("cut", "--tier direct", None);
    assert_eq!(server.get("/health").status, 200);
    for file in std::fs::read_dir(&place).unwrap().map(|entry| entry.unwrap().path()) {
        if file.extension().is_some_and(|ending| ending == "table") {
            std::fs::OpenOptions::new().write(true).open(file).unwrap().set_len(4096).unwrap();
        }
    }
    let reply = server.post("/v1/completions", &json!({"prompt": "What is lost", "max_tokens": 4}));
    assert_eq!(reply.status, 503, "{}", reply.body);
    assert_eq!(reply.json()["error"]["code"], "memory_rows_unavailable");
    let health = server.get("/health");
    assert_eq!(health.status, 503, "{}", health.body);
    assert_eq!(health.json()["error"]["code"], "not_ready");
    assert!(health.body.contains("rows cannot be read"), "{}", health.body);
}

/// Chats that do not say how long they may get run at once, and with a cache that holds few of them all are answered.
#[test]
fn chats_without_a_limit_share_a_small_cache() {
    let ask = |options: &str| {
        let server =
            Server::start(&format!("--chat-template template.jinja --speculative-tokens 0 {options}"));
        let body = |number: usize| {
            json!({"messages": [{"role": "user", "content": format!("Ada {number}?")}], "temperature": 0})
                .to_string()
        };
        let head = "POST /v1/chat/completions HTTP/1.1";
        let streams: Vec<TcpStream> = (0..16).map(|number| server.send(head, &body(number))).collect();
        let answers: Vec<Value> =
            streams.into_iter().map(|stream| Reply::read(stream).json()["choices"].clone()).collect();
        (answers, server.metric("engram_preempted_requests_total"))
    };
    let texts = |answers: &[Value]| {
        answers.iter().map(|choices| choices[0]["message"]["content"].clone()).collect::<Vec<_>>()
    };
    let (roomy, none) = ask("");
    let (tight, some) = ask("--kv-cache 200KB");
    assert_eq!(none, 0.0);
    assert!(some > 0.0, "none lost its place");
    assert_eq!(texts(&tight), texts(&roomy));
    assert!(texts(&tight).iter().all(|text| text.is_string()));
}

/// A function of a weather service, and one without arguments.
fn tools() -> Value {
    let parameters = json!({
        "type": "object", "required": ["city"], "additionalProperties": false,
        "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    });
    json!([
        {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": parameters}},
        {"type": "function", "function": {"name": "clock"}},
    ])
}

#[test]
fn an_answer_follows_a_schema() {
    wide();
    let schema = json!({
        "type": "object", "required": ["name", "born", "of"], "additionalProperties": false,
        "properties": {
            "name": {"enum": ["Ada", "Queen Anne"]}, "born": {"type": "integer", "minimum": 1000, "maximum": 1999},
            "of": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        },
    });
    let format =
        json!({"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": true}});
    let mut found = Vec::new();
    for options in ["", "--speculative-tokens 0", "--kv-cache 3MiB"] {
        let server = Server::start_of("wide", &format!("--chat-template template.jinja {options}"), None);
        let body = |number: usize, stream: bool| {
            json!({
                "messages": [{"role": "user", "content": format!("Who is {number}?")}], "response_format": format,
                "temperature": number % 2, "seed": number, "max_tokens": 400, "stream": stream,
            })
            .to_string()
        };
        let head = "POST /v1/chat/completions HTTP/1.1";
        let streams: Vec<_> = (0..6)
            .flat_map(|number| [false, true].map(|stream| server.send(head, &body(number, stream))))
            .collect();
        let replies: Vec<Reply> = streams.into_iter().map(Reply::read).collect();
        for pair in replies.chunks(2) {
            let choice = &pair[0].json()["choices"][0];
            let text = choice["message"]["content"].as_str().unwrap().to_owned();
            let person: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{text}: {error}"));
            assert!(["Ada", "Queen Anne"].contains(&person["name"].as_str().unwrap()), "{text}");
            assert!((1000..2000).contains(&person["born"].as_i64().unwrap()), "{text}");
            assert!(
                person["of"].as_array().unwrap().len() <= 3 && person.as_object().unwrap().len() == 3,
                "{text}"
            );
            assert_eq!(choice["finish_reason"], "stop");
            let events = pair[1].events();
            let streamed: String =
                events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
            assert_eq!(streamed, text);
            found.push(text);
        }
    }
    assert_eq!(
        (&found[..6], &found[..6]),
        (&found[6..12], &found[12..]),
        "drafts and lost places change nothing"
    );
    let server = Server::start_of("wide", "--chat-template template.jinja", None);
    let object = server.complete(json!({
        "prompt": "Ada", "response_format": {"type": "json_object"}, "max_tokens": 30, "logprobs": 1, "temperature": 0,
    }));
    assert!(object["choices"][0]["text"].as_str().unwrap().starts_with('{'), "{object}");
    let messages = json!([{"role": "user", "content": "Ada?"}]);
    for (format, named) in [
        (
            json!({"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "array", "uniqueItems": true}}}),
            "uniqueItems",
        ),
        (json!({"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}), "not"),
        (json!({"type": "json_schema", "json_schema": {"name": "a"}}), "schema"),
        (json!({"type": "grammar"}), "response_format.type"),
    ] {
        let reply =
            server.post("/v1/chat/completions", &json!({"messages": messages, "response_format": format}));
        assert_eq!(
            (reply.status, reply.json()["error"]["param"].as_str()),
            (400, Some("response_format")),
            "{format}"
        );
        assert!(reply.body.contains(named), "{format}: {}", reply.body);
    }
}

#[test]
fn an_answer_calls_functions() {
    wide();
    let server = Server::start_of("wide", "--chat-template template.jinja", None);
    let ask = |more: Value| {
        let mut body = json!({
            "messages": [{"role": "user", "content": "How is the weather?"}], "tools": tools(), "max_tokens": 300,
            "temperature": 0,
        });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.post("/v1/chat/completions", &body)
    };
    let weather = json!({"tool_choice": {"type": "function", "function": {"name": "weather"}}});
    let reply = ask(weather.clone());
    assert_eq!(reply.status, 200, "{}", reply.body);
    let choice = reply.json()["choices"][0].clone();
    assert_eq!(
        (&choice["finish_reason"], &choice["message"]["content"]),
        (&json!("tool_calls"), &Value::Null)
    );
    let calls = choice["message"]["tool_calls"].as_array().unwrap().clone();
    assert_eq!(
        (calls.len(), &calls[0]["type"], &calls[0]["function"]["name"]),
        (1, &json!("function"), &json!("weather"))
    );
    let arguments: Value = serde_json::from_str(calls[0]["function"]["arguments"].as_str().unwrap()).unwrap();
    assert!(["Oslo", "Rome"].contains(&arguments["city"].as_str().unwrap()), "{arguments}");
    assert!(calls[0]["id"].as_str().unwrap().starts_with("call_"), "{calls:?}");

    // The same in pieces.
    let mut streamed = weather;
    streamed["stream"] = true.into();
    let events = ask(streamed).events();
    let mut joined = String::new();
    for delta in
        events.iter().flat_map(|event| event["choices"].as_array().unwrap()).map(|choice| &choice["delta"])
    {
        assert!(delta["content"].as_str().is_none_or(str::is_empty), "{delta}");
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            assert_eq!(call["index"], 0);
            joined += call["function"]["arguments"].as_str().unwrap();
        }
    }
    assert_eq!(joined, calls[0]["function"]["arguments"].as_str().unwrap());
    let names: Vec<&str> = events
        .iter()
        .filter_map(|event| event["choices"][0]["delta"]["tool_calls"][0]["function"]["name"].as_str())
        .collect();
    assert_eq!(names, ["weather"]);
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");

    // One of them has to be called; none may; any may; one at most.
    for seed in 0..4 {
        let any = ask(
            json!({"tool_choice": "required", "parallel_tool_calls": false, "temperature": 1, "seed": seed}),
        );
        let calls = any.json()["choices"][0]["message"]["tool_calls"].clone();
        assert_eq!(calls.as_array().unwrap().len(), 1, "{}", any.body);
        let name = calls[0]["function"]["name"].as_str().unwrap();
        assert!(["weather", "clock"].contains(&name));
        if name == "clock" {
            let arguments: Value =
                serde_json::from_str(calls[0]["function"]["arguments"].as_str().unwrap()).unwrap();
            assert_eq!(arguments, json!({}));
        }
    }
    let none = ask(json!({"tool_choice": "none", "max_tokens": 8})).json();
    assert!(
        none["choices"][0]["message"]["content"].is_string()
            && none["choices"][0]["message"]["tool_calls"].is_null()
    );
    let auto = ask(json!({"tool_choice": "auto", "max_tokens": 8}));
    assert_eq!(auto.status, 200, "{}", auto.body);
    assert!(
        auto.json()["usage"]["prompt_tokens"].as_u64() > none["usage"]["prompt_tokens"].as_u64(),
        "it is told of tools"
    );

    // What a function gave is told in the next turn.
    let turns = json!([
        {"role": "user", "content": "How is the weather?"}, choice["message"],
        {"role": "tool", "tool_call_id": calls[0]["id"], "content": "Rain."},
    ]);
    let next = ask(json!({"messages": turns, "max_tokens": 8}));
    assert_eq!(next.status, 200, "{}", next.body);
    for (more, parameter) in [
        (json!({"tool_choice": {"type": "function", "function": {"name": "radio"}}}), "tool_choice"),
        (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
        (json!({"tools": [], "tool_choice": "required"}), "tool_choice"),
    ] {
        let reply = ask(more.clone());
        assert_eq!((reply.status, reply.json()["error"]["param"].as_str()), (400, Some(parameter)), "{more}");
    }
}

/// A template that is none costs conversations, and nothing else.
#[test]
fn a_broken_template_costs_conversations_only() {
    let workshop = workshop();
    std::fs::create_dir_all(workshop.path("broken")).unwrap();
    let folder = Some(workshop.path("run/checkpoints")).filter(|path| path.is_dir());
    let newest = folder.unwrap().read_dir().unwrap().map(|entry| entry.unwrap().path()).max().unwrap();
    for entry in newest.read_dir().unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), workshop.path("broken").join(entry.file_name())).unwrap();
    }
    for (template, reason) in [
        (json!("{% frobnicate %}"), "frobnicate"),
        (json!("{{ messages"), "syntax error"),
        (json!(3), "must be a text"),
        (json!([{"name": "rag", "template": "a"}]), "rag"),
    ] {
        workshop.write("broken/tokenizer_config.json", json!({"chat_template": template}).to_string());
        workshop.fails("chat broken", 2, &[reason, "--chat-template"]);
        workshop.ok("generate broken --prompt Ada --max-tokens 2");
    }
    let server = Server::start_of("broken", "", None);
    server.complete(json!({"prompt": "Ada", "max_tokens": 2}));
    let refused =
        server.post("/v1/chat/completions", &json!({"messages": [{"role": "user", "content": "Ada?"}]}));
    assert_eq!(refused.status, 400);
    assert!(refused.body.contains("rag"), "{}", refused.body);
    // A template that does not end is stopped.
    workshop.write(
        "broken/tokenizer_config.json",
        json!({"chat_template": "{% for i in range(100000) %}{% for j in range(100000) %}{{ i }}{% endfor %}{% endfor %}"})
            .to_string(),
    );
    let server = Server::start_of("broken", "", None);
    let refused =
        server.post("/v1/chat/completions", &json!({"messages": [{"role": "user", "content": "Ada?"}]}));
    assert_eq!(refused.status, 400, "{}", refused.body);
}

/// Nobody reads what the server says: its disk is full, or the other end of the pipe is gone.
#[cfg(target_os = "linux")]
#[test]
fn a_server_that_cannot_write_serves() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let line = format!("serve run --port {port} --access-log --host 0.0.0.0");
    for full in [true, false] {
        let mut command = workshop().command(line.split_whitespace());
        command.env_remove("ENGRAM_API_KEY");
        let out = || -> Stdio {
            match full {
                true => std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap().into(),
                // The end that is read is closed at once.
                false => std::io::pipe().unwrap().1.into(),
            }
        };
        let child = command.stdout(out()).stderr(out()).spawn().unwrap();
        let server = Server { child, address: format!("127.0.0.1:{port}") };
        wait_until("it listens", || TcpStream::connect(&server.address).is_ok());
        for _ in 0..3 {
            server.complete(json!({"prompt": "Ada", "max_tokens": 2}));
            assert_eq!(server.get("/health").status, 200);
        }
        server.signal("-TERM");
        let mut server = server;
        assert!(server.child.wait().unwrap().success());
    }
}

/// Runs a client in Python against a server. The interpreter that `ENGRAM_TEST_PYTHON` names must have its module.
fn client(script: &str, module: &str) {
    client_of("run", script, module);
}

fn client_of(run: &str, script: &str, module: &str) {
    let python = std::env::var("ENGRAM_TEST_PYTHON").unwrap_or_else(|_| "python3".into());
    let there = Command::new(&python).args(["-c", &format!("import {module}")]).output();
    let there = there.is_ok_and(|output| output.status.success());
    assert!(there, "{python} has no {module}: name one that has with ENGRAM_TEST_PYTHON");
    let server = Server::start_of(run, "--chat-template template.jinja", None);
    let script = format!("{}/tests/clients/{script}", env!("CARGO_MANIFEST_DIR"));
    let output =
        Command::new(python).args([&script, &format!("http://{}", server.address), run]).output().unwrap();
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
}

// Cargo lists these as ignored, with the reason. To run them:
// ENGRAM_TEST_PYTHON=venv/bin/python cargo test -p engram-lm --test serving -- --ignored

#[test]
#[ignore = "needs Python with the package openai; set ENGRAM_TEST_PYTHON"]
fn the_openai_client_is_served() {
    wide();
    client_of("wide", "openai_client.py", "openai");
}

#[test]
#[ignore = "needs Python with the package litellm; set ENGRAM_TEST_PYTHON"]
fn litellm_is_served() {
    client("litellm_client.py", "litellm");
}

#[test]
#[ignore = "needs Python with the package lm_eval; set ENGRAM_TEST_PYTHON"]
fn the_evaluation_harness_is_served() {
    client("lm_eval_client.py", "lm_eval");
}

#[test]
#[ignore = "needs Python with the package schemathesis; set ENGRAM_TEST_PYTHON"]
fn the_openapi_document_holds() {
    client("schemathesis_client.py", "schemathesis");
}

/// Needs a browser, which a machine that builds seldom has: run it by name.
#[test]
#[ignore = "needs Playwright and a browser"]
fn the_page_works_in_a_browser() {
    client("page_in_browser.py", "playwright");
}

#[test]
fn a_chat_begins_anew_leaves_out_what_is_old_and_refuses_a_line_that_is_too_long() {
    let chat = |lines: &str| {
        workshop().write("lines.txt", lines);
        let line =
            "\"$ENGRAM\" chat run --chat-template template.jinja --max-tokens 4 --temperature 0 < lines.txt";
        workshop().shell(line).expect(0, &[])
    };
    let once = chat("Ada?\n");
    // A byte-order mark before a template is not part of a prompt.
    workshop().write("marked.jinja", format!("\u{feff}{}", workshop().read("template.jinja")));
    let marked =
        "printf 'Ada?\\n' | \"$ENGRAM\" chat run --chat-template marked.jinja --max-tokens 4 --temperature 0";
    assert_eq!(workshop().shell(marked).expect(0, &[]).stdout, once.stdout);
    let twice = chat("Ada?\n/reset\nAda?\n");
    assert!(twice.stderr.contains("new conversation"), "{}", twice.stderr);
    assert_eq!(twice.stdout, once.stdout.repeat(2), "nothing of the first conversation is left");
    let long = chat(&format!("{}\nAda?\n", "whale ".repeat(500)));
    assert!(long.stderr.contains("shorten it"), "{}", long.stderr);
    assert_eq!(long.stdout, once.stdout, "the long line is forgotten");
    let full = chat(&"Queen Anne and Ada?\n".repeat(12));
    assert!(full.stderr.contains("left out the oldest"), "{}", full.stderr);
}

#[test]
fn the_number_of_threads_changes_no_answer() {
    let body = json!({"prompt": "Queen Anne", "max_tokens": 12, "temperature": 0, "logprobs": 1});
    let answers = ["", "--threads 1", "--threads 3"].map(|options| {
        let answer = Server::start(options).complete(body.clone());
        (answer["choices"][0]["text"].clone(), answer["choices"][0]["logprobs"].clone())
    });
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
}

/// Large prompts are read on threads of their own. How long it takes is measured by `benches/serving/limits.py`.
#[test]
fn health_is_answered_while_large_prompts_are_read() {
    let server = Server::start("");
    let body = json!({"prompt": "word ".repeat(800_000), "max_tokens": 1}).to_string();
    std::thread::scope(|scope| {
        let posts: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| server.ask("POST /v1/completions HTTP/1.1", &body).status))
            .collect();
        while !posts.iter().all(|post| post.is_finished()) {
            let begun = Instant::now();
            assert_eq!(server.ask("GET /health HTTP/1.1", "").status, 200);
            assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        }
        posts.into_iter().for_each(|post| assert_eq!(post.join().unwrap(), 400));
    });
}
