//! A server with a toy model: one block of width 8, a token for each letter of printable ASCII, and the end of a turn.
//!
//! The fuzz target `request` uses it as well.
#![allow(clippy::unwrap_used, reason = "a panic is a failure")]

use std::collections::BTreeMap;
use std::net::SocketAddr;

use engram_config::ModelConfig;
use engram_import::HostTensor;
use engram_infer::{
    ChatTemplate, Decoder, Dtype, Engine, EngineOptions, Model, TextCodec, TextTokenizer, TokenBytes,
};
use engram_serve::{Facts, Server, ServerOptions};
use serde_json::json;
use tokenizers::AddedToken;
use tokenizers::models::ModelWrapper;
use tokenizers::models::wordlevel::WordLevel;

const VOCABULARY: usize = 96;
const TEMPLATE: &str = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}assistant: ";

fn engine(context: usize, options: EngineOptions) -> Engine {
    let config: ModelConfig = serde_json::from_value(json!({
        "vocabulary": VOCABULARY, "width": 8, "blocks": 1, "context": context, "tied_head": true,
        "attention": {"kind": "plain", "heads": 1, "head_width": 8},
        "feed_forward": {"width": 8},
    }))
    .unwrap();
    let shapes: [(&str, &[usize]); 10] = [
        ("embedding", &[VOCABULARY, 8]),
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
    let decoder = Decoder::new(&config, &weights, Dtype::F32).unwrap();
    Engine::start(Model::new(decoder, None, token_bytes()), options).unwrap()
}

fn token_bytes() -> TokenBytes {
    (b' '..=b'~').map(|letter| vec![letter]).chain([vec![]]).collect()
}

fn codec() -> TextCodec {
    let end = VOCABULARY as u32 - 1;
    let letters = (b' '..=b'~').zip(0..).map(|(letter, id)| (char::from(letter).to_string(), id));
    let words = letters.chain([("<|end|>".to_owned(), end)]).collect();
    let model = WordLevel::builder().vocab(words).unk_token(" ".into()).build().unwrap();
    let mut tokenizer = TextTokenizer::new(ModelWrapper::from(model).into());
    tokenizer.add_special_tokens([AddedToken::from("<|end|>", true)]).unwrap();
    TextCodec::new(&tokenizer, token_bytes(), end)
}

/// Starts a server that runs until the process ends.
pub(crate) fn serve(context: usize, engine_options: EngineOptions, options: ServerOptions) -> SocketAddr {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        runtime.unwrap().block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            sender.send(listener.local_addr().unwrap()).unwrap();
            let template = ChatTemplate::new(TEMPLATE.into(), String::new(), "<|end|>".into());
            let template = template.map_err(|error| error.to_string());
            let engine = engine(context, engine_options);
            let server = Server::new(engine, codec(), template, options, Facts::default());
            server.run(listener, std::future::pending()).await.unwrap();
        });
    });
    receiver.recv().unwrap()
}
