use std::fmt::Write;

use clap::Args;
use engram_address::{AddressIdentity, Addressing};
use engram_data::Tokenizer;
use serde::Serialize;

use super::addressing::{AddressingOptions, Loaded};
use super::{print, print_json, text_or_stdin};
use crate::gate_text::visible;

/// Show which memory rows a text reads: each token's class, and its row per layer, order and head.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram rows --tokenizer tokenizer.json --preset v41 'Only Alexander the Great could tame the horse'
  engram rows --tokenizer tokenizer.json --config configs/quickstart-memory.toml --json < text.txt")]
pub(crate) struct Rows {
    #[command(flatten)]
    addressing: AddressingOptions,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// The text. Without it, or with `-`, standard input is read.
    text: Option<String>,
}

/// What decides a text's rows, and the rows.
#[derive(Debug, Serialize)]
struct Listing {
    identity: AddressIdentity,
    layers: Vec<Layer>,
    tokens: Vec<Token>,
}

#[derive(Debug, Serialize)]
struct Layer {
    /// The block, counted from 0.
    layer: usize,
    /// Rows of its table.
    rows: u64,
    /// As strings, because most readers of JSON round numbers beyond 2⁵³.
    #[serde(serialize_with = "crate::json::as_strings")]
    multipliers: Vec<i64>,
    /// Rows of each head, `[order][head]`.
    primes: Vec<Vec<u64>>,
}

#[derive(Debug, Serialize)]
struct Token {
    id: u32,
    text: String,
    class: u32,
    /// `[layer][order][head]`.
    rows: Vec<Vec<Vec<u64>>>,
}

impl Rows {
    /// Runs the command.
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let Loaded { addressing, tokenizer, .. } = self.addressing.load()?;
        let text = text_or_stdin(self.text.as_deref())?;
        let listing = Listing::new(&tokenizer, &addressing, &text)?;
        if self.json { print_json(&listing) } else { print(listing.to_text()) }
    }
}

impl Listing {
    fn new(tokenizer: &Tokenizer, addressing: &Addressing, text: &str) -> anyhow::Result<Self> {
        let ids = tokenizer.encode(text)?;
        let rows = (0..addressing.layers().len())
            .map(|index| {
                let mut rows = Vec::new();
                addressing.row_ids(index, &ids, &mut rows).map(|()| rows)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let of_token = |time: usize| {
            let of_layer = |(layer, rows): (&engram_address::LayerAddress, &Vec<u64>)| {
                let rows = &rows[time * layer.slots()..(time + 1) * layer.slots()];
                rows.chunks(layer.heads()).map(<[u64]>::to_vec).collect()
            };
            addressing.layers().iter().zip(&rows).map(of_layer).collect()
        };
        let token = |(time, &id): (usize, &u32)| {
            let text = String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned();
            Ok(Token { id, text, class: addressing.vocabulary().class(id)?, rows: of_token(time) })
        };
        let layer = |layer: &engram_address::LayerAddress| Layer {
            layer: layer.layer(),
            rows: layer.rows(),
            multipliers: layer.multipliers().to_vec(),
            primes: layer.primes().to_vec(),
        };
        Ok(Self {
            identity: addressing.identity(),
            layers: addressing.layers().iter().map(layer).collect(),
            tokens: ids.iter().enumerate().map(token).collect::<anyhow::Result<_>>()?,
        })
    }

    fn to_text(&self) -> String {
        let mut out = format!("addressing {}\n", self.identity.short());
        for Layer { layer, rows, multipliers, .. } in &self.layers {
            let multipliers = multipliers.iter().map(i64::to_string).collect::<Vec<_>>().join(", ");
            let _ = writeln!(out, "layer {layer}: {rows} rows, multipliers [{multipliers}]");
        }
        for (time, token) in self.tokens.iter().enumerate() {
            let text = visible(&token.text);
            let _ = writeln!(out, "\n{time} “{text}”  token {}, class {}", token.id, token.class);
            for (layer, rows) in self.layers.iter().zip(&token.rows) {
                for (index, heads) in rows.iter().enumerate() {
                    let width = layer.rows.to_string().len();
                    let heads: Vec<String> = heads.iter().map(|row| format!("{row:>width$}")).collect();
                    let (layer, order) = (layer.layer, index + 2);
                    let _ = writeln!(out, "  layer {layer:>2}, {order}-gram  {}", heads.join(" "));
                }
            }
        }
        out
    }
}
