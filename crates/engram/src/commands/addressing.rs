//! Options that choose an addressing, shared by the commands that need one.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use engram_address::{AddressConfig, Addressing, LayerAddress, Vocabulary};
use engram_config::{MemoryConfig, load_model_config};
use engram_data::Tokenizer;
use engram_import::Checkpoint;
use engram_store::RowFormat;

use crate::failure::refuse;
use crate::number::grouped;

/// An addressing, from a configuration or preset with a tokenizer, or from a checkpoint.
#[derive(Debug, Args)]
pub(super) struct AddressingOptions {
    /// Tokenizer (a Hugging Face `tokenizer.json`). Goes with --config or --preset.
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Use the addressing of this configuration's `[model.memory]`.
    #[arg(long, value_name = "FILE", requires = "tokenizer")]
    config: Option<PathBuf>,
    /// Use a published addressing.
    #[arg(long, requires = "tokenizer", conflicts_with = "config")]
    preset: Option<Preset>,
    /// Use the addressing and tokenizer of a checkpoint, or of a run's newest checkpoint.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["config", "preset", "tokenizer"])]
    checkpoint: Option<PathBuf>,
}

/// A published addressing.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Preset {
    /// The demonstration's: layers 1 and 15, orders 2 and 3, 8 heads from 646,400 rows.
    Demo,
    /// DeepSeek-V4.1-Flash's: layers 1 and 14, orders 2 to 4, 8 heads from 16,000,000 rows.
    V41,
}

/// A model whose tables are published, to be planned for.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum Published {
    /// The demonstration's: layers 1 and 15, orders 2 and 3, 8 heads from 646,400 rows of 64 values.
    Demo,
    /// DeepSeek-V4.1-Flash's: layers 1 and 14, orders 2 to 4, 8 heads from 16,000,000 rows of 256 values in fp8.
    V41,
    /// Qwen3.8-Flash-Next's: layer 1, orders 2 and 3, 8 heads from 20,000,000 rows of 160 values in bf16.
    Qwen,
}

impl Published {
    /// What decides the sizes of its tables, the values of a row, and their layout.
    pub(super) fn tables(self) -> (AddressConfig, usize, RowFormat) {
        let of = |preset: Preset| (preset.addressing(), preset.rows().width, preset.rows().format);
        match self {
            Self::Demo => of(Preset::Demo),
            Self::V41 => of(Preset::V41),
            Self::Qwen => {
                let (layers, base_rows) = (vec![1], vec![20_000_000; 2]);
                (
                    AddressConfig { layers, base_rows, max_order: 3, ..Preset::Demo.addressing() },
                    160,
                    RowFormat::Bf16,
                )
            }
        }
    }
}

/// An addressing and its rows' shape.
#[derive(Debug)]
pub(super) struct Loaded {
    pub(super) addressing: Addressing,
    pub(super) tokenizer: Tokenizer,
    /// Values per row, their layout, and their standard deviation at the start.
    pub(super) rows: Rows,
}

/// The shape of an addressing's rows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows {
    pub(super) width: usize,
    pub(super) format: RowFormat,
    pub(super) deviation: f32,
}

impl AddressingOptions {
    /// The addressing that the options name.
    pub(super) fn load(&self) -> anyhow::Result<Loaded> {
        match self.load_if_named()? {
            Some(loaded) => Ok(loaded),
            None => refuse("name an addressing: --config or --preset with a --tokenizer, or a --checkpoint"),
        }
    }

    /// The addressing that the options name; none without options.
    pub(super) fn load_if_named(&self) -> anyhow::Result<Option<Loaded>> {
        if let Some(path) = &self.checkpoint {
            let checkpoint = Checkpoint::open(path)?;
            let config = checkpoint.folder().join("run.toml");
            let tokenizer = Tokenizer::load(&checkpoint.folder().join("tokenizer.json"))?;
            return Loaded::of_memory(load_model_config(&config)?.memory, &config, tokenizer).map(Some);
        }
        let (Some(path), true) = (&self.tokenizer, self.config.is_some() || self.preset.is_some()) else {
            return Ok(None);
        };
        let tokenizer = Tokenizer::load(path)?;
        if let Some(path) = &self.config {
            return Loaded::of_memory(load_model_config(path)?.memory, path, tokenizer).map(Some);
        }
        let Some(preset) = self.preset else { return Ok(None) };
        let vocabulary = Vocabulary::from_tokenizer(tokenizer.inner())?;
        let addressing = Addressing::new(&preset.addressing(), vocabulary)?;
        preset.check(&addressing, path)?;
        Ok(Some(Loaded { addressing, tokenizer, rows: preset.rows() }))
    }
}

impl Loaded {
    fn of_memory(memory: Option<MemoryConfig>, config: &Path, tokenizer: Tokenizer) -> anyhow::Result<Self> {
        let Some(memory) = memory else {
            return refuse(format!("{}: its model has no memory (`[model.memory]`)", config.display()));
        };
        let addressing = engram_train::addressing(&memory, tokenizer.inner())?;
        let rows = Rows { width: memory.row_width, format: RowFormat::F32, deviation: memory.row_init };
        Ok(Self { addressing, tokenizer, rows })
    }

    /// The memory layer of block `wanted`, or the only one, and its index among the memory layers.
    pub(super) fn layer(&self, wanted: Option<u64>) -> anyhow::Result<(usize, &LayerAddress)> {
        let layers = self.addressing.layers();
        let found = match wanted {
            Some(wanted) => layers.iter().position(|layer| layer.layer() as u64 == wanted),
            None => (layers.len() == 1).then_some(0),
        };
        let Some(index) = found else {
            let names: Vec<String> = layers.iter().map(|layer| layer.layer().to_string()).collect();
            let given = wanted.map_or("name one".to_owned(), |wanted| format!("--layer {wanted} is not one"));
            return refuse(format!("the addressing has memory in the layers {}: {given}", names.join(", ")));
        };
        Ok((index, &layers[index]))
    }
}

/// Size of DeepSeek's tokenizer, which both published addressings were made with, and its number of classes.
const TOKENS: usize = 129_280;
const CLASSES: usize = 99_092;

impl Preset {
    /// The identity of the published tables' addressing: classes, multipliers and primes.
    fn identity(self) -> &'static str {
        match self {
            Self::Demo => "50fc032ce59688d52158a2ad19281634692cff3df0f9a73ab3f9c5856b8144a3",
            Self::V41 => "f9acf548a34ee1a5b2ad8892c35403d3442140f14a9f96e905efd4f0120b12e5",
        }
    }

    /// Refuses an addressing of another tokenizer. Its rows would belong to other n-grams, and nothing would show it.
    fn check(self, addressing: &Addressing, tokenizer: &Path) -> anyhow::Result<()> {
        if addressing.identity().to_string() == self.identity() {
            return Ok(());
        }
        let vocabulary = addressing.vocabulary();
        let found = match (vocabulary.len(), vocabulary.classes()) {
            (TOKENS, CLASSES) => "this one has the same counts, but different tokens".to_owned(),
            (tokens, classes) => {
                format!("this one has {} in {}", grouped(tokens as u64), grouped(classes as u64))
            }
        };
        refuse(format!(
            "{}: not the tokenizer of the published addressing, which has {} tokens in {} classes; {found}. Use \
             DeepSeek's tokenizer.json (V3 and later), or a --config of your own",
            tokenizer.display(),
            grouped(TOKENS as u64),
            grouped(CLASSES as u64),
        ))
    }

    fn rows(self) -> Rows {
        let (width, format) = match self {
            Self::Demo => (64, RowFormat::F32),
            Self::V41 => (256, RowFormat::Fp8E4m3),
        };
        Rows { width, format, deviation: 0.0 }
    }

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
