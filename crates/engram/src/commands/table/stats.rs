use std::fmt::Write;
use std::ops::Range;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use engram_address::AddressIdentity;
use engram_data::{TokenShards, Tokenizer};
use engram_eval::figure::{Axis, Figure, Scale, Series};
use engram_store::{HeadUse, NGramUse, RowFormat};
use serde::Serialize;

use crate::commands::addressing::{AddressingOptions, Loaded};
use crate::commands::{print, print_json};
use crate::corpus_options::open_corpus;
use crate::corpus_rows::{CorpusRows, OrderRows, PIECE, Sharers, TokenRows, WINDOWS, first_rows};
use crate::failure::{Interrupted, refuse};
use crate::files::write_file;
use crate::gate_text::visible;
use crate::interrupt;
use crate::note::note;
use crate::number::{bytes, short};
use crate::progress::Passage;
use crate::table::Table;

/// Show how a corpus uses the rows of a memory layer: reuse, collisions, hit rates of caches, and the hottest rows.
///
/// Takes the tokens as one sequence. Counts of reuse and collisions are exact. Hit rates are those of initially empty
/// LRU caches, for all sizes at once, estimated from a sample of the rows (SHARDS, Waldspurger et al., FAST 2015).
/// `pinned` is a cache that holds the most used rows of this corpus from the start. All memory layers read the same
/// number of rows with the same statistics, so a cache for two layers needs twice the size. Needs about 60 bytes of
/// memory per distinct n-gram.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram table stats data/train --preset v41 --tokenizer tokenizer.json --layer 1
  engram table stats data/train --checkpoint runs/small --svg hit-rates.svg
  engram table stats --text corpus.jsonl.zst --config configs/quickstart-memory.toml \\
    --tokenizer tokenizer.json --json")]
pub(crate) struct Stats {
    /// Prepared shards: one file, or the folder of one split.
    #[arg(required_unless_present = "text")]
    shards: Option<PathBuf>,
    /// Use the texts of these files and folders (.txt, .jsonl, each also .zst or .gz; .parquet) instead.
    #[arg(long, value_name = "CORPUS", num_args = 1.., conflicts_with = "shards")]
    text: Vec<PathBuf>,
    #[command(flatten)]
    addressing: AddressingOptions,
    /// Layer of the model, counted from 0. Optional if the addressing has memory in only one layer.
    #[arg(long, value_name = "L")]
    layer: Option<u64>,
    /// Use only the first N tokens.
    #[arg(long, value_name = "N")]
    tokens: Option<u64>,
    /// Layout of a row, which converts a cache's rows to bytes. The default is the preset's, or f32.
    #[arg(long)]
    format: Option<RowFormat>,
    /// Share of the rows to estimate hit rates from; 1 is exact. The default samples enough rows for 16 million
    /// lookups.
    #[arg(long, value_name = "SHARE")]
    sample: Option<f64>,
    /// Tokens that fill the caches before hits are counted, in multiples of 8192.
    #[arg(long, value_name = "N", default_value_t = 0)]
    warm_up: u64,
    /// Number of hottest rows to show per order.
    #[arg(long, value_name = "N", default_value_t = 10)]
    hot: usize,
    /// Draw the hit rates as an SVG file.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// The statistics.
#[derive(Debug, Serialize)]
struct Report {
    identity: AddressIdentity,
    layer: u64,
    tokens: u64,
    /// Number of row lookups of all these tokens.
    lookups: u64,
    table_rows: u64,
    table_bytes: u64,
    bytes_per_row: usize,
    /// The share of the rows that hit rates were estimated from.
    sample: f64,
    /// Tokens that filled the caches before hits were counted.
    warm_up: u64,
    /// Distinct rows over lookups: the miss rate of an unlimited cache.
    first_lookups: f64,
    orders: Vec<Order>,
    hit_rates: Vec<HitRate>,
}

/// The n-grams of one length.
#[derive(Debug, Serialize)]
struct Order {
    order: usize,
    /// Distinct n-grams.
    n_grams: u64,
    /// N-grams that occur once.
    once: u64,
    /// Occurrences per distinct n-gram.
    reuse: f64,
    windows: Vec<WindowUse>,
    heads: Vec<Head>,
    hot: Vec<HotRow>,
}

/// Share of a window's lookups whose row the window has not looked up before.
#[derive(Debug, Serialize)]
struct WindowUse {
    tokens: u32,
    distinct: f64,
}

/// The rows of one hash head.
#[derive(Debug, Serialize)]
struct Head {
    rows: u64,
    used: u64,
    /// Expected value if n-grams hash to rows uniformly.
    expected_used: f64,
    /// Lookups per row that is used.
    reuse: f64,
    /// Rows with several n-grams.
    shared: u64,
    /// N-grams that share their row.
    colliding: u64,
    /// Expected value if n-grams hash to rows uniformly.
    expected_colliding: f64,
}

/// A row of the first head of an order.
#[derive(Debug, Serialize)]
struct HotRow {
    row: u64,
    lookups: u64,
    /// The n-gram that reads it most.
    text: String,
    /// Lookups by that n-gram.
    own: u64,
    /// Other n-grams on the row.
    others: usize,
    /// The one of them that reads it most.
    next: Option<String>,
}

/// Hit rates of a cache of this size.
#[derive(Debug, Serialize)]
struct HitRate {
    bytes: u64,
    rows: u64,
    /// A cache for each order alone.
    orders: Vec<f64>,
    /// One cache for all orders.
    all: f64,
    /// A cache that holds the most used rows from the start.
    pinned: f64,
}

/// Number of lookups to estimate hit rates from.
const SAMPLED_LOOKUPS: f64 = 16e6;

impl Stats {
    /// Runs the command.
    pub(super) fn run(self) -> anyhow::Result<()> {
        let loaded = self.addressing.load()?;
        let (layer, address) = loaded.layer(self.layer)?;
        if let Some(share) = self.sample.filter(|share| !(*share > 0.0 && *share <= 1.0)) {
            return refuse(format!("--sample is {share}, but must be above 0 and at most 1"));
        }
        interrupt::listen()?;
        let corpus = self.corpus(&loaded.tokenizer)?;
        let tokens = corpus.len();
        if tokens == 0 {
            return refuse("there are no tokens to count");
        }
        if self.warm_up >= tokens {
            return refuse(format!(
                "--warm-up {} leaves none of the {tokens} tokens to count hits for",
                self.warm_up
            ));
        }
        if u32::try_from(tokens).is_err() {
            return refuse(format!("{tokens} tokens are too many to count; reduce them with --tokens"));
        }
        let lookups = tokens * address.slots() as u64;
        let share = self.sample.unwrap_or((SAMPLED_LOOKUPS / lookups as f64).min(1.0));

        let mut study = CorpusRows::new(&loaded.addressing, layer, share)?;
        let mut left = self.warm_up;
        corpus.each_piece("counting rows", |piece| {
            study.add(piece)?;
            if left > 0 {
                left = left.saturating_sub(piece.len() as u64);
                study.count_hits_from_here();
            }
            Ok(())
        })?;
        let hot = hot_rows(&loaded, layer, &corpus, &study.orders, self.hot)?;
        let row_bytes = self.format.unwrap_or(loaded.rows.format).bytes_per_row(loaded.rows.width);
        let report = Report::new(&loaded, layer, &study, hot, row_bytes, self.warm_up);
        if let Some(path) = &self.svg {
            write_file(path, &report.figure().svg())?;
            note(format_args!("wrote {}", path.display()));
        }
        if self.json { print_json(&report) } else { print(report.to_text()) }
    }

    fn corpus(&self, tokenizer: &Tokenizer) -> anyhow::Result<Tokens> {
        let limit = self.tokens.unwrap_or(u64::MAX);
        match &self.shards {
            Some(path) => {
                let shards = TokenShards::open(path)?;
                shards.check_tokenizer(tokenizer)?;
                let count = shards.len().min(limit);
                Ok(Tokens::InShards(shards, count))
            }
            None => encode(&self.text, tokenizer, limit).map(Tokens::InMemory),
        }
    }
}

/// For every order, the rows of its `count` most frequent n-grams in the first head, and the n-grams that share them.
fn hot_rows(
    loaded: &Loaded,
    layer: usize,
    corpus: &Tokens,
    orders: &[OrderRows],
    count: usize,
) -> anyhow::Result<Vec<Vec<HotRow>>> {
    let Loaded { addressing, tokenizer, .. } = loaded;
    let row_of = |index: usize, n_gram: &NGramUse| -> anyhow::Result<u64> {
        let tokens = corpus.until(u64::from(n_gram.last), addressing.max_order())?;
        Ok(first_rows(addressing, layer, &tokens)?[index])
    };
    let rows_of = |(index, order): (usize, &OrderRows)| {
        order.of.hottest(count).iter().map(|n_gram| row_of(index, n_gram)).collect::<anyhow::Result<Vec<_>>>()
    };
    let rows = orders.iter().enumerate().map(rows_of).collect::<anyhow::Result<Vec<_>>>()?;

    let heads = addressing.layers()[layer].heads();
    let watch = |(index, rows): (usize, &Vec<u64>)| Sharers::new(index, heads, rows.iter().copied());
    let mut sharers: Vec<Sharers> = rows.iter().enumerate().map(watch).collect();
    if count > 0 {
        let mut sequence = TokenRows::new(addressing, layer)?;
        corpus.each_piece("finding n-grams that share the hottest rows", |piece| {
            sequence.next(piece)?;
            sharers.iter_mut().for_each(|sharers| sharers.add(&sequence));
            Ok(())
        })?;
    }
    let hot = |row: u64, sharers: &Sharers, order: usize| {
        let n_grams = sharers.of_row(row);
        let text =
            |&(_, last): &(u64, u64)| corpus.until(last, order).map(|tokens| text_of(tokenizer, &tokens));
        let (first, others) = n_grams.split_first().context("a hot row is looked up")?;
        Ok(HotRow {
            row,
            lookups: n_grams.iter().map(|n_gram| n_gram.0).sum(),
            text: text(first)?,
            own: first.0,
            others: others.len(),
            next: others.first().map(text).transpose()?,
        })
    };
    let of_order = |((rows, sharers), order): ((Vec<u64>, &Sharers), &OrderRows)| {
        rows.into_iter().map(|row| hot(row, sharers, order.order)).collect()
    };
    rows.into_iter().zip(&sharers).zip(orders).map(of_order).collect()
}

fn text_of(tokenizer: &Tokenizer, tokens: &[u32]) -> String {
    let bytes: Vec<u8> = tokens.iter().flat_map(|&token| tokenizer.token_bytes(token)).copied().collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The tokens.
enum Tokens {
    /// Number of tokens used, from the first on.
    InShards(TokenShards, u64),
    InMemory(Vec<u32>),
}

impl Tokens {
    fn len(&self) -> u64 {
        match self {
            Self::InShards(_, count) => *count,
            Self::InMemory(tokens) => tokens.len() as u64,
        }
    }

    fn read(&self, range: Range<u64>) -> anyhow::Result<Vec<u32>> {
        match self {
            Self::InShards(shards, _) => Ok(shards.tokens(range)?),
            Self::InMemory(tokens) => Ok(tokens[range.start as usize..range.end as usize].to_vec()),
        }
    }

    /// The token at `last` and those before it, up to `count` in all.
    fn until(&self, last: u64, count: usize) -> anyhow::Result<Vec<u32>> {
        self.read((last + 1).saturating_sub(count as u64)..last + 1)
    }

    /// Passes all tokens on in pieces, and shows progress.
    fn each_piece(
        &self,
        name: &'static str,
        mut work: impl FnMut(&[u32]) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let mut passage = Passage::of_tokens(name, self.len());
        for first in (0..self.len()).step_by(PIECE) {
            let end = self.len().min(first + PIECE as u64);
            work(&self.read(first..end)?)?;
            if passage.show(end, self.len()).is_break() {
                return Err(Interrupted(": nothing was written".into()).into());
            }
        }
        Ok(())
    }
}

/// The tokens of all texts, each text with its end token.
fn encode(paths: &[PathBuf], tokenizer: &Tokenizer, limit: u64) -> anyhow::Result<Vec<u32>> {
    let corpus = open_corpus(paths, "text")?;
    let mut passage = Passage::new("reading", corpus.bytes(), 1);
    let mut tokens = Vec::new();
    let mut documents = corpus.documents();
    while let Some(document) = documents.next() {
        tokens.extend(tokenizer.encode(&document?)?);
        tokens.push(tokenizer.end_of_text());
        if passage.show(documents.bytes_read(), corpus.bytes()).is_break() {
            return Err(Interrupted(": nothing was written".into()).into());
        }
        if tokens.len() as u64 >= limit {
            tokens.truncate(limit as usize);
            break;
        }
    }
    Ok(tokens)
}

impl Report {
    fn new(
        loaded: &Loaded,
        layer: usize,
        study: &CorpusRows,
        hot: Vec<Vec<HotRow>>,
        bytes_per_row: usize,
        warm_up: u64,
    ) -> Self {
        let address = &loaded.addressing.layers()[layer];
        let order = |(order, hot): (&OrderRows, Vec<HotRow>)| {
            let (n_grams, tokens) = (order.of.n_grams().len() as u64, order.of.lookups());
            Order {
                order: order.order,
                n_grams,
                once: order.of.n_grams().filter(|n_gram| n_gram.count == 1).count() as u64,
                reuse: tokens as f64 / n_grams as f64,
                windows: order
                    .of
                    .windows()
                    .map(|(tokens, distinct)| WindowUse { tokens, distinct })
                    .collect(),
                heads: order.of.heads().iter().map(|head| Head::new(head, tokens)).collect(),
                hot,
            }
        };
        let orders: Vec<Order> = study.orders.iter().zip(hot).map(order).collect();
        let used: u64 = orders.iter().flat_map(|order| &order.heads).map(|head| head.used).sum();
        let tokens = study.orders[0].of.lookups();
        let lookups = tokens * address.slots() as u64;
        Self {
            identity: loaded.addressing.identity(),
            layer: address.layer() as u64,
            tokens,
            lookups,
            table_rows: address.rows(),
            table_bytes: address.rows() * bytes_per_row as u64,
            bytes_per_row,
            sample: study.all.share(),
            warm_up,
            first_lookups: used as f64 / lookups as f64,
            hit_rates: hit_rates(study, used, bytes_per_row as u64),
            orders,
        }
    }

    fn to_text(&self) -> String {
        let mut text = String::new();
        let Self { tokens, lookups, table_rows, .. } = self;
        let _ = writeln!(
            text,
            "layer {} of the addressing {}: {} tokens look up {} rows of {} ({}, {} bytes each)\n",
            self.layer,
            self.identity.short(),
            short(*tokens),
            short(*lookups),
            short(*table_rows),
            bytes(self.table_bytes),
            self.bytes_per_row
        );
        let _ = writeln!(text, "{}", self.reuse());
        let _ = writeln!(text, "{}", self.windows());
        let _ = writeln!(text, "{}", self.heads());
        let _ = writeln!(text, "{}", self.rates());
        let _ = writeln!(
            text,
            "hit rates from {:.3} of the rows, after {} tokens; {:.1} % of lookups are the first of a row",
            self.sample,
            short(self.warm_up),
            100.0 * self.first_lookups
        );
        for order in self.orders.iter().filter(|order| !order.hot.is_empty()) {
            let _ = write!(text, "\n{}", order.hot(*tokens));
        }
        text
    }

    fn reuse(&self) -> Table {
        let mut table =
            Table::new(["n-grams", "distinct", "occur once", "times each", "rows used", "of the table"]);
        for order in &self.orders {
            let used: u64 = order.heads.iter().map(|head| head.used).sum();
            let rows: u64 = order.heads.iter().map(|head| head.rows).sum();
            table.row([
                format!("{}-grams", order.order),
                short(order.n_grams),
                percent(order.once as f64 / order.n_grams as f64),
                format!("{:.2}", order.reuse),
                short(used),
                percent(used as f64 / rows as f64),
            ]);
        }
        table
    }

    fn windows(&self) -> Table {
        let header = WINDOWS.map(|tokens| format!("{} tokens", short(tokens.into())));
        let mut table = Table::new(std::iter::once("distinct within".to_owned()).chain(header));
        for order in &self.orders {
            let cells = order.windows.iter().map(|window| percent(window.distinct));
            table.row(std::iter::once(format!("{}-grams", order.order)).chain(cells));
        }
        table
    }

    fn heads(&self) -> Table {
        let header = ["head", "rows", "used", "by chance", "lookups/row", "n-grams sharing", "by chance"];
        let mut table = Table::new(header);
        for order in &self.orders {
            for (index, head) in (1..).zip(&order.heads) {
                table.row([
                    format!("{}-grams, {index}", order.order),
                    head.rows.to_string(),
                    percent(head.used as f64 / head.rows as f64),
                    percent(head.expected_used / head.rows as f64),
                    format!("{:.2}", head.reuse),
                    percent(head.colliding as f64 / order.n_grams as f64),
                    percent(head.expected_colliding / order.n_grams as f64),
                ]);
            }
        }
        table
    }

    fn rates(&self) -> Table {
        let orders = self.orders.iter().map(|order| format!("{}-grams", order.order));
        let header = ["cache".to_owned(), "rows".to_owned()].into_iter().chain(orders);
        let mut table = Table::new(header.chain(["all", "pinned", ""].map(String::from)));
        // Every second size is enough for people.
        for rate in self.hit_rates.iter().rev().step_by(2).collect::<Vec<_>>().into_iter().rev() {
            let orders = rate.orders.iter().map(|&rate| percent(rate));
            let cells = [bytes(rate.bytes), short(rate.rows)].into_iter().chain(orders);
            table.row(cells.chain([percent(rate.all), percent(rate.pinned), bar(rate.all)]));
        }
        table
    }

    /// Hit rates by the size of a cache.
    fn figure(&self) -> Figure {
        let series = |name: String, colour: usize, dashed: bool, rate: &dyn Fn(&HitRate) -> f64| {
            let line = self.hit_rates.iter().map(|at| (at.bytes.max(1) as f64, rate(at))).collect();
            Series { name, colour, dashed, line, ..Series::default() }
        };
        let mut all = vec![
            series("all orders, LRU".into(), 0, false, &|at| at.all),
            series("all orders, most used rows pinned".into(), 1, true, &|at| at.pinned),
        ];
        for (index, order) in self.orders.iter().enumerate() {
            let name = format!("{}-grams alone, LRU", order.order);
            all.push(series(name, index + 2, false, &|at| at.orders[index]));
        }
        let (tokens, table) = (short(self.tokens), bytes(self.table_bytes));
        Figure {
            title: format!("Lookups served by a cache: {tokens} tokens, a table of {table}"),
            x: Axis { label: "cache, bytes".into(), scale: Scale::Logarithmic },
            y: Axis { label: "hit rate".into(), scale: Scale::Linear },
            series: all,
        }
    }
}

impl Head {
    fn new(head: &HeadUse, tokens: u64) -> Self {
        Self {
            rows: head.rows,
            used: head.used,
            expected_used: head.expected_used,
            reuse: tokens as f64 / head.used.max(1) as f64,
            shared: head.shared,
            colliding: head.colliding,
            expected_colliding: head.expected_colliding,
        }
    }
}

impl Order {
    fn hot(&self, tokens: u64) -> Table {
        let header = [format!("hottest {}-grams", self.order).as_str(), "lookups", "of all", "row of head 1"]
            .map(String::from);
        let mut table = Table::new(
            header.into_iter().chain(["others on it", "of its lookups", "the next"].map(String::from)),
        );
        for hot in &self.hot {
            table.row([
                format!("“{}”", visible(&hot.text)),
                short(hot.own),
                percent(hot.own as f64 / tokens as f64),
                hot.row.to_string(),
                hot.others.to_string(),
                percent((hot.lookups - hot.own) as f64 / hot.lookups as f64),
                hot.next.as_ref().map_or(String::new(), |next| format!("“{}”", visible(next))),
            ]);
        }
        table
    }
}

/// Hit rates of caches of 64 KiB and its doublings, until all used rows fit.
fn hit_rates(study: &CorpusRows, used: u64, row_bytes: u64) -> Vec<HitRate> {
    let pinned = pinned(study);
    let at = |bytes: u64| {
        let rows = bytes / row_bytes;
        HitRate {
            bytes,
            rows,
            orders: study.orders.iter().map(|order| order.distances.hit_rate(rows)).collect(),
            all: study.all.hit_rate(rows),
            pinned: pinned(rows),
        }
    };
    let last = (16..63).find(|power| 1u64 << power >= used * row_bytes).unwrap_or(63);
    (16..=last.max(17)).map(|power| at(1 << power)).collect()
}

/// The hit rate of pinning the most used rows, by their number. A row with several n-grams counts once for each of
/// them, which makes the rate a little too low where rows are shared.
fn pinned(study: &CorpusRows) -> impl Fn(u64) -> f64 {
    let mut counts: Vec<(u32, u64)> = Vec::new();
    for order in &study.orders {
        let heads = order.of.heads().len() as u64;
        counts.extend(order.of.n_grams().map(|n_gram| (n_gram.count, heads)));
    }
    counts.sort_unstable_by(|a, b| b.cmp(a));
    let total: u64 = counts.iter().map(|&(count, heads)| u64::from(count) * heads).sum();
    // Rows and lookups at every change of the count.
    let mut steps: Vec<(u64, u64)> = vec![(0, 0)];
    let (mut rows, mut lookups) = (0, 0);
    for of_count in counts.chunk_by(|a, b| a.0 == b.0) {
        rows += of_count.iter().map(|&(_, heads)| heads).sum::<u64>();
        lookups += of_count.iter().map(|&(count, heads)| u64::from(count) * heads).sum::<u64>();
        steps.push((rows, lookups));
    }
    move |rows| {
        let after = steps.partition_point(|step| step.0 <= rows);
        let (have, served) = steps[after - 1];
        // Between changes every row has the same number of lookups.
        let more = steps
            .get(after)
            .map_or(0.0, |&(at, then)| (rows - have) as f64 * (then - served) as f64 / (at - have) as f64);
        (served as f64 + more) / total.max(1) as f64
    }
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// A bar of twelve cells.
fn bar(share: f64) -> String {
    let eighths = (share.clamp(0.0, 1.0) * 96.0).round() as usize;
    let rest = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"][eighths % 8];
    let bar = "█".repeat(eighths / 8) + rest;
    format!("{bar:<12}")
}
