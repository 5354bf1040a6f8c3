//! What a client sees while a long prompt is read.
#![allow(clippy::unwrap_used, reason = "a panic is a failure")]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use engram_config::ModelConfig;
use engram_import::HostTensor;
use engram_infer::{Decoder, Dtype, Engine, EngineOptions, Model, TextCodec};
use engram_serve::{Facts, Server, ServerOptions};
use serde_json::json;
use tokenizers::Tokenizer;
use tokenizers::models::wordlevel::WordLevel;

const CONTEXT: usize = 4096;

/// A model with one block of width 8, whose tokens are the letters of printable ASCII.
fn engine() -> Engine {
    let config: ModelConfig = serde_json::from_value(json!({
        "vocabulary": 95, "width": 8, "blocks": 1, "context": CONTEXT, "tied_head": true,
        "attention": {"kind": "plain", "heads": 1, "head_width": 8},
        "feed_forward": {"width": 8},
    }))
    .unwrap();
    let shapes: [(&str, &[usize]); 10] = [
        ("embedding", &[95, 8]),
        ("norm.weight", &[8]),
        ("blocks.0.attention_norm.weight", &[8]),
        ("blocks.0.attention.query.weight", &[8, 8]),
        ("blocks.0.attention.key.weight", &[8, 8]),
        ("blocks.0.attention.value.weight", &[8, 8]),
        ("blocks.0.attention.output.weight", &[8, 8]),
        ("blocks.0.feed_forward_norm.weight", &[8]),
        ("blocks.0.feed_forward.input.weight", &[8, 16]),
        ("blocks.0.feed_forward.output.weight", &[8, 8]),
    ];
    let weights: BTreeMap<String, HostTensor> = shapes
        .iter()
        .map(|(name, shape)| {
            let values = (0..shape.iter().product()).map(|i: usize| (i as f32).sin()).collect();
            ((*name).to_owned(), HostTensor { shape: shape.to_vec(), values })
        })
        .collect();
    let decoder = Decoder::new(&config, &weights, Dtype::F32).unwrap();
    // Sixteen tokens a step, so that a prompt takes many steps.
    let options = EngineOptions { chunk: 16, prompt_tokens: 16, ..EngineOptions::default() };
    Engine::start(Model::new(decoder, None, token_bytes()), options).unwrap()
}

fn token_bytes() -> Vec<Vec<u8>> {
    (b' '..=b'~').map(|letter| vec![letter]).collect()
}

fn codec() -> TextCodec {
    let words = (b' '..=b'~').zip(0..).map(|(letter, id)| (char::from(letter).to_string(), id)).collect();
    let model = WordLevel::builder().vocab(words).unk_token(" ".into()).build().unwrap();
    TextCodec::new(&Tokenizer::new(model), token_bytes(), 94)
}

fn start(options: ServerOptions) -> SocketAddr {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        runtime.unwrap().block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            sender.send(listener.local_addr().unwrap()).unwrap();
            let template = Err("a test has none".to_owned());
            let server = Server::new(engine(), codec(), template, options, Facts::default());
            server.run(listener, std::future::pending()).await.unwrap();
        });
    });
    receiver.recv().unwrap()
}

fn stream(address: SocketAddr, prompt: &[u32]) -> String {
    let body = json!({"prompt": prompt, "max_tokens": 2, "stream": true}).to_string();
    let mut connection = TcpStream::connect(address).unwrap();
    let length = body.len();
    write!(
        connection,
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n\
         {body}"
    )
    .unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).unwrap();
    answer
}

/// Proxies close a connection on which nothing comes for a while.
#[test]
fn a_stream_is_kept_alive_while_its_prompt_is_read() {
    let prompt: Vec<u32> = (0..CONTEXT as u32 - 2).map(|i| i * 7 % 95).collect();
    let often = start(ServerOptions { keep_alive: Duration::from_millis(1), ..ServerOptions::default() });
    let answer = stream(often, &prompt);
    let first = answer.find("data: ").expect("an answer");
    assert!(answer[..first].contains(": keep-alive\n\n"), "{answer}");
    assert!(answer.contains("data: [DONE]"), "{answer}");

    let never = start(ServerOptions { keep_alive: Duration::from_secs(600), ..ServerOptions::default() });
    let answer = stream(never, &prompt);
    assert!(answer.contains("data: [DONE]") && !answer.contains("keep-alive"), "{answer}");
}
