//! What a client sees while a long prompt is read.
#![allow(clippy::unwrap_used, reason = "a panic is a failure")]

mod toy;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use engram_infer::EngineOptions;
use engram_serve::ServerOptions;
use serde_json::json;

const CONTEXT: usize = 4096;

/// A server that reads sixteen tokens a step, so that a prompt takes many steps.
fn start(keep_alive: Duration) -> SocketAddr {
    let engine = EngineOptions { chunk: 16, prompt_tokens: 16, ..EngineOptions::default() };
    toy::serve(CONTEXT, engine, ServerOptions { keep_alive, ..ServerOptions::default() })
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
    let often = start(Duration::from_millis(1));
    let answer = stream(often, &prompt);
    let first = answer.find("data: ").expect("an answer");
    assert!(answer[..first].contains(": keep-alive\n\n"), "{answer}");
    assert!(answer.contains("data: [DONE]"), "{answer}");

    let never = start(Duration::from_secs(600));
    let answer = stream(never, &prompt);
    assert!(answer.contains("data: [DONE]") && !answer.contains("keep-alive"), "{answer}");
}
