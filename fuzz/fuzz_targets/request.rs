//! Bodies of requests: a server with a toy model answers each, never by saying that it failed.
//!
//! Input: a byte that chooses the endpoint, then the body.
#![no_main]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::OnceLock;
use std::time::Duration;

use engram_config::ModelConfig;
use engram_import::HostTensor;
use engram_infer::{ChatTemplate, Decoder, Dtype, Engine, EngineOptions, Model, TextCodec, TextTokenizer, TokenBytes};
use engram_serve::{Facts, Server, ServerOptions};
use libfuzzer_sys::fuzz_target;
use tokenizers::AddedToken;
use tokenizers::models::ModelWrapper;
use tokenizers::models::wordlevel::WordLevel;

/// Tokens: printable ASCII, one each, and the end of a turn.
const VOCABULARY: u32 = 96;
const TEMPLATE: &str = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}assistant: ";

const CONFIG: &str = r#"
    vocabulary = 96
    width = 8
    blocks = 1
    context = 64
    tied_head = true
    attention = { kind = "plain", heads = 1, head_width = 8 }
    feed_forward = { width = 8 }
"#;

fn engine() -> Engine {
    let config: ModelConfig = toml::from_str(CONFIG).expect("a configuration");
    let shapes: [(&str, &[usize]); 10] = [
        ("embedding", &[96, 8]),
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
    let made = shapes.map(|(name, shape)| {
        let values = (0..shape.iter().product()).map(|i: usize| (i as f32).sin()).collect();
        (name.to_owned(), HostTensor { shape: shape.to_vec(), values })
    });
    let weights: BTreeMap<_, _> = made.into_iter().collect();
    let decoder = Decoder::new(&config, &weights, Dtype::F32).expect("a decoder");
    let options = EngineOptions { cache_bytes: 1 << 20, ..EngineOptions::default() };
    Engine::start(Model::new(decoder, None, token_bytes()), options).expect("an engine")
}

fn token_bytes() -> TokenBytes {
    (b' '..=b'~').map(|letter| vec![letter]).chain([vec![]]).collect()
}

fn codec() -> TextCodec {
    let letters = (b' '..=b'~').zip(0..).map(|(letter, id)| (char::from(letter).to_string(), id));
    let words = letters.chain([("<|end|>".to_owned(), VOCABULARY - 1)]).collect();
    let model = WordLevel::builder().vocab(words).unk_token(" ".into()).build().expect("a vocabulary");
    let mut tokenizer = TextTokenizer::new(ModelWrapper::from(model).into());
    tokenizer.add_special_tokens([AddedToken::from("<|end|>", true)]).expect("a special token");
    TextCodec::new(&tokenizer, token_bytes(), VOCABULARY - 1)
}

/// One server for the whole run.
fn server() -> SocketAddr {
    static ADDRESS: OnceLock<SocketAddr> = OnceLock::new();
    *ADDRESS.get_or_init(|| {
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
            runtime.expect("a runtime").block_on(async {
                let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
                sender.send(listener.local_addr().expect("an address")).expect("a receiver");
                let template = ChatTemplate::new(TEMPLATE.into(), String::new(), "<|end|>".into());
                let template = template.map_err(|error| error.to_string());
                let options = ServerOptions { time_limit: Duration::from_secs(5), ..ServerOptions::default() };
                let server = Server::new(engine(), codec(), template, options, Facts::default());
                server.run(listener, std::future::pending()).await.expect("a server");
            });
        });
        receiver.recv().expect("an address")
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
