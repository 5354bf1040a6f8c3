//! Bodies of requests: a server with a toy model answers each, never by saying that it failed.
//!
//! Input: a byte that chooses the endpoint, then the body.
#![no_main]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::OnceLock;
use std::time::Duration;

use engram_infer::EngineOptions;
use engram_serve::ServerOptions;
use libfuzzer_sys::fuzz_target;

#[path = "../../crates/serve/tests/toy/mod.rs"]
mod toy;

/// One server for the whole run.
fn server() -> SocketAddr {
    static ADDRESS: OnceLock<SocketAddr> = OnceLock::new();
    *ADDRESS.get_or_init(|| {
        let engine = EngineOptions { cache_bytes: 1 << 20, ..EngineOptions::default() };
        toy::serve(64, engine, ServerOptions { time_limit: Duration::from_secs(5), ..ServerOptions::default() })
    })
}

fuzz_target!(|input: &[u8]| {
    let Some((&choice, body)) = input.split_first() else { return };
    let address = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"][usize::from(choice % 4)];
    let mut stream = TcpStream::connect(server()).expect("a connection");
    let length = body.len();
    write!(stream, "POST {address} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n")
        .and_then(|()| stream.write_all(body))
        .expect("the server reads");
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply).expect("the server answers");
    let reply = String::from_utf8_lossy(&reply);
    let status: u16 = reply.get(9..12).and_then(|status| status.parse().ok()).expect("a status");
    assert!(status < 500, "{address} {:?}: {reply}", String::from_utf8_lossy(body));
});
