//! Prepares a corpus and prints how long it takes: `prepare CORPUS TOKENIZER OUT`.

use std::ops::ControlFlow::Continue;
use std::path::Path;
use std::time::Instant;

use engram_data::{Corpus, PrepareOptions, Tokenizer, prepare};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [corpus, tokenizer, out] = arguments.as_slice() else {
        return Err("usage: prepare CORPUS TOKENIZER OUT".into());
    };
    let (corpus, tokenizer) = (Corpus::open(&[corpus])?, Tokenizer::load(Path::new(tokenizer))?);
    let options = PrepareOptions { hold_out: 0.01, ..Default::default() };
    let start = Instant::now();
    let summary = prepare(&corpus, &tokenizer, Path::new(out), &options, &mut |_| Continue(()))?;
    let (tokens, seconds) = (summary.train.tokens + summary.valid.tokens, start.elapsed().as_secs_f64());
    println!("{tokens} tokens in {seconds:.2} s: {:.2} million a second", tokens as f64 / seconds / 1e6);
    Ok(())
}
