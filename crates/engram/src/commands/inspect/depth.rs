use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use engram_data::TokenShards;
use engram_eval::depth::{self, Aligned, DepthError, DepthOptions, Divergence, FEWEST, Positions};
use engram_train::Trained;
use serde::Serialize;

use crate::commands::{print, print_json};
use crate::device::DeviceKind;
use crate::failure::refuse;
use crate::files::write_figure;
use crate::interrupt;
use crate::progress::Progress;
use crate::table::Table;

/// Measure how early a model's layers predict its output, and which layers of another model they resemble.
///
/// LogitLens applies the model's own head to the state after every block and measures the divergence from the final
/// distribution. CKA measures the similarity of every layer of A with every layer of B at the last tokens of names,
/// unbiased, over minibatches. The soft alignment of a layer of A is the mean of its most similar layers of B, weighted
/// by similarity (arXiv 2601.07372, section 6.1). Layer n is the state after n blocks.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram inspect depth runs/memory runs/baseline --shards data/valid
  engram inspect depth runs/memory runs/baseline --shards data/valid --figures figures --json > depth.json
  engram inspect depth runs/memory --shards data/valid --lens-tokens 100000")]
pub(crate) struct Depth {
    /// Model A: a checkpoint, or a run's folder (its newest checkpoint is used).
    checkpoint: PathBuf,
    /// Model B, with the same tokenizer, to compare layers with. Without it, only LogitLens is computed.
    other: Option<PathBuf>,
    /// Prepared shards to measure on: one file, or the folder of one split.
    #[arg(long, value_name = "PATH")]
    shards: PathBuf,
    /// Number of tokens for LogitLens, from the beginning.
    #[arg(long, value_name = "N", default_value_t = DepthOptions::default().lens_tokens)]
    lens_tokens: usize,
    /// Tokens at which layers are compared.
    #[arg(long, value_enum, default_value = "names")]
    positions: PositionsArgument,
    /// Number of these tokens, from the beginning.
    #[arg(long, value_name = "N", default_value_t = DepthOptions::default().samples)]
    samples: usize,
    /// Number of these tokens per CKA minibatch.
    #[arg(long, value_name = "N", default_value_t = DepthOptions::default().batch)]
    batch: usize,
    /// Most similar layers that a soft alignment averages [default: 5, as in the paper, but no more than half of B's]
    #[arg(long, value_name = "N")]
    neighbours: Option<usize>,
    /// Write the figures `lens` and, with two checkpoints, `cka` into this folder, as SVG and PNG.
    #[arg(long, value_name = "FOLDER")]
    figures: Option<PathBuf>,
    /// Device to compute on.
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceKind,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum PositionsArgument {
    /// The last token of every name: two or more words with capital letters.
    Names,
    /// Every token.
    All,
}

/// The results.
#[derive(Debug, Serialize)]
struct Findings {
    shards: PathBuf,
    options: DepthOptions,
    models: Vec<Lens>,
    alignment: Option<AlignmentFindings>,
}

/// LogitLens of one model.
#[derive(Debug, Serialize)]
struct Lens {
    checkpoint: PathBuf,
    divergences: Vec<Divergence>,
}

/// Similarity of A's layers to B's.
#[derive(Debug, Serialize)]
struct AlignmentFindings {
    /// Number of tokens measured.
    tokens: usize,
    /// `[layers of A][layers of B]`; null where a layer has the same state at every token.
    cka: Vec<Vec<f64>>,
    soft: Vec<Aligned>,
}

impl Depth {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let mut options = self.options()?;
        let device = self.device.open()?;
        let paths: Vec<&PathBuf> = std::iter::once(&self.checkpoint).chain(&self.other).collect();
        let models = paths.iter().map(|path| Trained::open(path, &device)).collect::<Result<Vec<_>, _>>()?;
        if let Some(b) = models.get(1) {
            options.neighbours = self.neighbours(b.config().model.blocks)?;
        }
        let shards = TokenShards::open(&self.shards)?;
        interrupt::listen()?;
        let mut lenses = Vec::new();
        for (path, model) in paths.iter().zip(&models) {
            let divergences = followed("reading with the lens: window", |progress| {
                depth::logit_lens(model, &shards, &options, progress)
            })?;
            lenses.push(Lens { checkpoint: path.to_path_buf(), divergences });
        }
        let alignment = match &models[..] {
            [a, b] => Some(align([a, b], &shards, &options)?),
            _ => None,
        };
        let findings = Findings { shards: self.shards.clone(), options, models: lenses, alignment };
        if let Some(folder) = &self.figures {
            findings.draw(folder)?;
        }
        if self.json { print_json(&findings) } else { print(findings.tables()) }
    }

    fn options(&self) -> anyhow::Result<DepthOptions> {
        if self.batch < FEWEST {
            return refuse(format!(
                "--batch {}: the unbiased estimate needs at least {FEWEST} tokens",
                self.batch
            ));
        }
        if self.samples < self.batch {
            return refuse(format!(
                "--samples {}: must be at least the {} of a minibatch (--batch)",
                self.samples, self.batch
            ));
        }
        if self.lens_tokens == 0 {
            return refuse("--lens-tokens 0: must be at least 1");
        }
        Ok(DepthOptions {
            positions: match self.positions {
                PositionsArgument::Names => Positions::Names,
                PositionsArgument::All => Positions::All,
            },
            samples: self.samples,
            batch: self.batch,
            neighbours: DepthOptions::default().neighbours,
            lens_tokens: self.lens_tokens,
        })
    }

    /// Number of neighbours among the `layers` of B. The mean over all of them would be the same for every layer of A.
    fn neighbours(&self, layers: usize) -> anyhow::Result<usize> {
        match self.neighbours {
            None => Ok(DepthOptions::default().neighbours.min(layers.div_ceil(2))),
            Some(neighbours) if (1..=layers).contains(&neighbours) => Ok(neighbours),
            Some(neighbours) => {
                refuse(format!("--neighbours {neighbours}: must be 1 to {layers}, the number of layers of B"))
            }
        }
    }
}

fn align(
    models: [&Trained; 2],
    shards: &TokenShards,
    options: &DepthOptions,
) -> anyhow::Result<AlignmentFindings> {
    let what = format!("comparing layers: {}", options.positions);
    let (alignment, tokens) =
        followed(&what, |progress| depth::alignment(models, shards, options, progress))?;
    let soft = alignment.soft_alignment(options.neighbours);
    Ok(AlignmentFindings { tokens, cka: alignment.cka(), soft })
}

/// Runs `work` and shows its progress.
fn followed<T>(
    what: &str,
    work: impl FnOnce(&mut dyn FnMut(u64, u64) -> bool) -> Result<T, DepthError>,
) -> anyhow::Result<T> {
    let mut progress = None;
    let mut report = |done: u64, total: u64| {
        let progress = progress.get_or_insert_with(|| Progress::new(total));
        progress.show(done, || format!("{what} {done} of {total}"));
        !interrupt::asked()
    };
    match work(&mut report) {
        Ok(value) => Ok(value),
        Err(DepthError::Train(error)) => Err(error.into()),
        Err(error) => refuse(error.to_string()),
    }
}

impl Findings {
    fn tables(&self) -> String {
        let letters = ["A", "B"];
        let mut text = String::new();
        for (letter, lens) in letters.iter().zip(&self.models) {
            text += &format!("{letter}: {}\n", lens.checkpoint.display());
        }
        let mut table = Table::new(
            std::iter::once("after block".to_owned())
                .chain(letters.iter().zip(&self.models).map(|(letter, _)| format!("KL, {letter}"))),
        );
        let deepest = self.models.iter().map(|lens| lens.divergences.len()).max().unwrap_or(0);
        for depth in 0..deepest {
            let cell = |lens: &Lens| match lens.divergences.get(depth) {
                Some(point) => with_error(point.nats, point.error, 4),
                None => String::new(),
            };
            table.row(std::iter::once((depth + 1).to_string()).chain(self.models.iter().map(cell)));
        }
        text += &format!("\n{table}");
        if let Some(alignment) = &self.alignment {
            text += &format!("\n{}", alignment.table());
        }
        text
    }

    fn draw(&self, folder: &Path) -> anyhow::Result<()> {
        let curves: Vec<(String, &[Divergence])> = self
            .models
            .iter()
            .map(|lens| (lens.checkpoint.display().to_string(), &lens.divergences[..]))
            .collect();
        write_figure(folder, "lens", &depth::figures::lens(&curves).svg())?;
        if let (Some(alignment), [a, b]) = (&self.alignment, &curves[..]) {
            write_figure(folder, "cka", &depth::figures::cka(&alignment.cka, &alignment.soft, [&a.0, &b.0]))?;
        }
        Ok(())
    }
}

impl AlignmentFindings {
    fn table(&self) -> Table {
        let layers = self.cka.first().map_or(0, Vec::len);
        let header = std::iter::once(format!("CKA, {} tokens", self.tokens))
            .chain((1..=layers).map(|layer| format!("B {layer}")))
            .chain(["like B's".to_owned()]);
        let mut table = Table::new(header);
        for (row, aligned) in self.cka.iter().zip(&self.soft) {
            let similarity = |cka: &f64| if cka.is_nan() { "–".into() } else { format!("{cka:.2}") };
            let cells = std::iter::once(format!("A {}", aligned.depth))
                .chain(row.iter().map(similarity))
                .chain([with_error(aligned.aligned, aligned.error, 2)]);
            table.row(cells);
        }
        table
    }
}

fn with_error(value: f64, error: Option<f64>, digits: usize) -> String {
    match error {
        Some(error) => format!("{value:.digits$} ± {error:.digits$}"),
        None => format!("{value:.digits$}"),
    }
}
