use std::fmt::Write;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use engram_address::{AddressConfig, AddressIdentity, Addressing, Vocabulary};
use engram_model::Compression;
use engram_train::{Tokenizer, load_model_config};
use serde::Serialize;

use super::{print, print_json, text_or_stdin};
use crate::failure::refuse;
use crate::gate_text::visible;

/// Shows which memory rows a text reads: per token its class, and per layer, order and head a row.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram rows --tokenizer tokenizer.json --preset v41 'Only Alexander the Great could tame the horse'
  engram rows --tokenizer tokenizer.json --config configs/quickstart-memory.toml --json < text.txt")]
pub(crate) struct Rows {
    /// Tokenizer, a Hugging Face `tokenizer.json`.
    #[arg(long, value_name = "FILE")]
    tokenizer: PathBuf,
    /// Take the addressing of this configuration's `[model.memory]`.
    #[arg(long, value_name = "FILE", required_unless_present = "preset")]
    config: Option<PathBuf>,
    /// Take a published addressing.
    #[arg(long, conflicts_with = "config")]
    preset: Option<Preset>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// The text; `-` or none: standard input.
    text: Option<String>,
}

/// A published addressing.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Preset {
    /// The demonstration's: layers 1 and 15, orders 2 and 3, 8 heads from 646,400 rows.
    Demo,
    /// DeepSeek-V4.1-Flash's: layers 1 and 14, orders 2 to 4, 8 heads from 16,000,000 rows.
    V41,
}

impl Preset {
    fn addressing(self) -> AddressConfig {
        let (layers, max_order, rows) = match self {
            Self::Demo => (vec![1, 15], 3, 646_400),
            Self::V41 => (vec![1, 14], 4, 16_000_000),
        };
        AddressConfig {
            seed: 0,
            layers,
            max_order,
            heads: 8,
            base_rows: vec![rows; max_order - 1],
            pad_id: 2,
            boundary: Default::default(),
            arithmetic: Default::default(),
        }
    }
}

/// Everything that decides a text's rows, and the rows.
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
        let tokenizer = Tokenizer::load(&self.tokenizer)?;
        let (config, compression) = self.addressing()?;
        let vocabulary = match compression {
            Compression::Normalised => Vocabulary::from_tokenizer(tokenizer.inner())?,
            Compression::None => Vocabulary::identity(tokenizer.vocabulary()),
        };
        let addressing = Addressing::new(&config, vocabulary)?;
        let text = text_or_stdin(self.text.as_deref())?;
        let listing = Listing::new(&tokenizer, &addressing, &text)?;
        if self.json { print_json(&listing) } else { print(listing.to_text()) }
    }

    fn addressing(&self) -> anyhow::Result<(AddressConfig, Compression)> {
        let Some(path) = &self.config else {
            return match self.preset {
                Some(preset) => Ok((preset.addressing(), Compression::Normalised)),
                None => refuse("name an addressing: --config or --preset"),
            };
        };
        match load_model_config(path)?.memory {
            Some(memory) => Ok((memory.addressing(), memory.compression)),
            None => refuse(format!("{}: its model has no memory (`[model.memory]`)", path.display())),
        }
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
            let _ = writeln!(out, "layer {layer}: {rows} rows, multipliers {multipliers:?}");
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
