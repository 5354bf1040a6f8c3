//! Memories for models that exist: a fresh one changes nothing, an overlay only texts with its n-grams, and several are
//! served in one batch, each as alone.
#![allow(clippy::unwrap_used, reason = "a panic is a failure")]

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::sync::OnceLock;

use engram_config::{MemoryConfig, MemoryForm, ModelConfig};
use engram_import::testing::{memory, memory_weights, write_adapter, write_gguf, write_overlay};
use engram_import::{Adapter, HostTensor, StackedMemory, memory_addressing};
use engram_infer::{
    Cache, Chunk, Decoder, Dtype, Engine, EngineOptions, Event, Model, ModelMemory, Needed, Request, Root,
    RowIds, RowTiers, Sampling,
};
use engram_store::PrefetchOptions;
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Bits of the logits after every token, each token by its own step.
fn logits(decoder: &Decoder, memory: Option<(usize, &RowTiers)>, tokens: &[u32]) -> Vec<u32> {
    let mut cache = Cache::new(decoder.cache_layout(4), 40);
    let mut sequence = cache.begin(memory.map_or(Root::NoMemory, |memory| Root::Memory(memory.0)), &[]);
    let mut history = memory.map(|(_, tiers)| tiers.addressing().history());
    let mut all = Vec::new();
    // A prompt of a few tokens, then one by one.
    let (prompt, rest) = tokens.split_at(tokens.len().min(5));
    for next in std::iter::once(prompt).chain(rest.chunks(1)) {
        let mut rows = Vec::new();
        if let (Some((_, tiers)), Some(history)) = (memory, &mut history) {
            let mut ids = RowIds::default();
            ids.add(history, next, tiers).unwrap();
            rows.push(tiers.fetch(ids, Needed::Now).unwrap());
        }
        cache.reserve(&mut sequence, next.len()).unwrap();
        let chunk = Chunk {
            sequence: &sequence,
            tokens: next,
            memory: memory.map(|memory| memory.0),
            logits: next.len(),
            targets: &[],
        };
        let output = decoder.step(&mut cache, &[chunk], &mut rows).unwrap();
        all.extend(output.logits.iter().map(|logit| logit.to_bits()));
        let len = sequence.len() + next.len();
        cache.commit(&mut sequence, len, &tokens[..len]);
    }
    all
}

/// The tiny model of the Llama type, memories for it in two forms, and overlays on them.
struct Served {
    base: engram_import::Model,
    decoder: Decoder,
    /// Two adapters, the first alone and under each of two overlays.
    tiers: Vec<(usize, RowTiers)>,
    /// Row ids that the overlays of `tiers[1]` change, of the only layer.
    taught: HashSet<u64>,
}

const TAUGHT: &str = "The Vorn bridge is made of glass.";

impl Served {
    fn new(folder: &Path) -> Self {
        let base = engram_import::Model::open(&write_gguf(folder, 1)).unwrap();
        let mut decoder = Decoder::new(&base.config().model, base.weights(), Dtype::File).unwrap();
        let mut tiers = Vec::new();
        let adapters = [(MemoryForm::Paper, 2), (MemoryForm::V41, 3)].map(|(form, seed)| {
            let path = write_adapter(&folder.join(format!("adapter-{seed}")), &base, &memory(form), seed);
            let adapter = Adapter::open(&path, &base).unwrap();
            let number = decoder.add_memory(adapter.memory(), adapter.weights()).unwrap();
            (number, adapter)
        });
        let overlay = |name: &str, adapter: &Adapter, text: &str, seed| {
            write_overlay(&folder.join(name), &base, adapter, text, seed)
        };
        let first = overlay("first", &adapters[0].1, TAUGHT, 1);
        let second = overlay("second", &adapters[0].1, "Tea", 2);
        let other = overlay("other", &adapters[1].1, TAUGHT, 3);
        for (adapter, overlays) in [
            (&adapters[0], vec![]),
            (&adapters[0], vec![first.clone()]),
            (&adapters[0], vec![first, second]),
            (&adapters[1], vec![other]),
        ] {
            let stack = StackedMemory::open(&base, Some(adapter.1.folder()), &overlays).unwrap().unwrap();
            let rows = RowTiers::of_memory(&stack, Vec::new(), &PrefetchOptions::default()).unwrap();
            tiers.push((adapter.0, rows));
        }
        let mut taught = Vec::new();
        let tokens = base.tokenizer().encode(TAUGHT).unwrap();
        adapters[0].1.addressing().row_ids(0, &tokens, &mut taught).unwrap();
        Self { base, decoder, tiers, taught: taught.into_iter().collect() }
    }

    fn once() -> &'static Self {
        static SERVED: OnceLock<Served> = OnceLock::new();
        SERVED.get_or_init(|| Self::new(tempfile::tempdir().unwrap().path()))
    }

    fn tiers(&self, which: usize) -> Option<(usize, &RowTiers)> {
        let (number, tiers) = &self.tiers[which];
        Some((*number, tiers))
    }
}

fn random_tokens(count: usize, vocabulary: u32, seed: u64) -> Vec<u32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| random.random_range(0..vocabulary)).collect()
}

#[test]
fn a_fresh_memory_is_the_base_bit_for_bit() {
    let served = Served::once();
    let tokens = random_tokens(30, 257, 1);
    assert_eq!(logits(&served.decoder, served.tiers(0), &tokens), logits(&served.decoder, None, &tokens));
}

/// As Gemma has it: scaled embeddings, norms after layers, windows, norms of queries and keys.
const GEMMA: &str = r#"
    vocabulary = 257
    width = 12
    blocks = 3
    context = 60
    embedding_scale = 3.5
    post_norms = true
    tied_head = true
    feed_forward = { width = 20, activation = "geglu" }
    attention = { kind = "plain", heads = 4, key_heads = 2, head_width = 4, query_key_norm = true, window = 8, local_blocks = [0, 2], local_rotary_base = 100.0 }
"#;

fn gemma() -> (ModelConfig, BTreeMap<String, HostTensor>) {
    let config: ModelConfig = toml::from_str(GEMMA).unwrap();
    let mut random = ChaCha8Rng::seed_from_u64(5);
    let mut weights = BTreeMap::new();
    let mut add = |name: String, shape: &[usize]| {
        let values = (0..shape.iter().product()).map(|_| random.random::<f32>() - 0.5).collect();
        weights.insert(name, HostTensor { shape: shape.to_vec(), values });
    };
    add("embedding".into(), &[257, 12]);
    add("norm.weight".into(), &[12]);
    for block in 0..3 {
        let mut part = |name: &str, shape: &[usize]| add(format!("blocks.{block}.{name}.weight"), shape);
        for norm in ["attention_norm", "attention_post_norm", "feed_forward_norm", "feed_forward_post_norm"] {
            part(norm, &[12]);
        }
        part("attention.query", &[12, 16]);
        part("attention.key", &[12, 8]);
        part("attention.value", &[12, 8]);
        part("attention.output", &[16, 12]);
        part("attention.query_norm", &[4]);
        part("attention.key_norm", &[4]);
        part("feed_forward.input", &[12, 40]);
        part("feed_forward.output", &[20, 12]);
    }
    (config, weights)
}

#[test]
fn a_fresh_memory_in_a_model_of_gemmas_type_is_the_base_bit_for_bit() {
    let (config, weights) = gemma();
    let mut decoder = Decoder::new(&config, &weights, Dtype::F32).unwrap();
    let served = Served::once();
    let tokens = random_tokens(30, 257, 2);
    let alone = logits(&decoder, None, &tokens);
    for form in [MemoryForm::Paper, MemoryForm::V41, MemoryForm::Added] {
        let memory = MemoryConfig { layers: vec![0, 2], ..memory(form) };
        let number = decoder.add_memory(&memory, &memory_weights(&memory, 12, 4)).unwrap();
        let addressing = memory_addressing(&memory, served.base.tokenizer()).unwrap();
        let zeros = (addressing.layers().iter())
            .map(|layer| {
                let identity = addressing.identity();
                let origin = engram_store::TableOrigin { identity, layer: layer.layer() as u64 };
                let rows = engram_store::ZeroRows::new(layer.rows(), memory.row_width, origin).unwrap();
                std::sync::Arc::new(rows) as std::sync::Arc<dyn engram_store::RowSource>
            })
            .collect();
        let tiers = RowTiers::near(addressing, zeros).unwrap();
        assert_eq!(logits(&decoder, Some((number, &tiers)), &tokens), alone, "{form:?}");
    }
    assert_eq!(logits(&decoder, None, &tokens), alone, "memories that others read change nothing");
}

#[test]
fn a_taught_text_is_changed_and_a_weight_too_many_is_refused() {
    let served = Served::once();
    let tokens = served.base.tokenizer().encode(TAUGHT).unwrap();
    let alone = logits(&served.decoder, None, &tokens);
    for which in 1..4 {
        assert_ne!(logits(&served.decoder, served.tiers(which), &tokens), alone, "{which}");
    }
    let (config, weights) = gemma();
    let mut decoder = Decoder::new(&config, &weights, Dtype::F32).unwrap();
    let v41 = memory(MemoryForm::V41);
    let mut more = memory_weights(&v41, 12, 1);
    more.extend(memory_weights(&MemoryConfig { layers: vec![0], ..v41.clone() }, 12, 1));
    let error = decoder.add_memory(&v41, &more).unwrap_err().to_string();
    assert!(error.contains("blocks.0.memory") && error.contains("has no place"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Texts without any of an overlay's rows are computed to the bit as by the base; those with one only from there on.
    #[test]
    fn an_overlay_changes_nothing_before_its_first_row(
        tokens in prop::collection::vec(0_u32..257, 1..40),
        place in any::<prop::sample::Index>(),
        from_taught in any::<bool>(),
    ) {
        let served = Served::once();
        let mut tokens = tokens;
        if from_taught {
            let taught = served.base.tokenizer().encode(TAUGHT).unwrap();
            let at = place.index(tokens.len());
            tokens.splice(at..at, taught.into_iter().take(6));
        }
        let (number, tiers) = served.tiers(1).unwrap();
        let mut ids = Vec::new();
        tiers.addressing().row_ids(0, &tokens, &mut ids).unwrap();
        let slots = ids.len() / tokens.len();
        let first = ids.chunks(slots).position(|ids| ids.iter().any(|id| served.taught.contains(id)));
        let same = 257 * first.unwrap_or(tokens.len());
        let (with, alone) = (
            logits(&served.decoder, Some((number, tiers)), &tokens),
            logits(&served.decoder, None, &tokens),
        );
        prop_assert!(with[..same] == alone[..same]);
        prop_assert_eq!(first.is_none(), with == alone);
    }
}

/// What came of a request: its tokens with their probabilities, and its gates with what overlays change.
/// A memory whose rows n-grams do not share, with an overlay on those of a text.
struct Wide {
    decoder: Decoder,
    number: usize,
    tiers: RowTiers,
    /// Pairs of the text, as classes; every longer n-gram of it contains one.
    pairs: HashSet<[u32; 2]>,
}

impl Wide {
    /// What stands before a text's first token.
    const PAD: u32 = 256;

    fn once() -> &'static Self {
        static WIDE: OnceLock<Wide> = OnceLock::new();
        WIDE.get_or_init(|| {
            let folder = tempfile::tempdir().unwrap();
            let base = engram_import::Model::open(&write_gguf(folder.path(), 1)).unwrap();
            let memory = MemoryConfig { rows_per_head: vec![1_000_000_000; 2], ..memory(MemoryForm::Paper) };
            let path = write_adapter(&folder.path().join("adapter"), &base, &memory, 2);
            let adapter = Adapter::open(&path, &base).unwrap();
            let overlay = write_overlay(&folder.path().join("overlay"), &base, &adapter, TAUGHT, 1);
            let mut decoder = Decoder::new(&base.config().model, base.weights(), Dtype::File).unwrap();
            let number = decoder.add_memory(adapter.memory(), adapter.weights()).unwrap();
            let stack = StackedMemory::open(&base, Some(adapter.folder()), &[overlay]).unwrap().unwrap();
            let tiers = RowTiers::of_memory(&stack, Vec::new(), &PrefetchOptions::default()).unwrap();
            let mut text = vec![Self::PAD];
            text.extend(base.tokenizer().encode(TAUGHT).unwrap());
            let class = |token: u32| tiers.addressing().vocabulary().class(token).unwrap();
            let pairs = text.windows(2).map(|pair| [class(pair[0]), class(pair[1])]).collect();
            Self { decoder, number, tiers, pairs }
        })
    }

    /// `tokens` without those that would complete a pair of the taught text.
    fn without_pairs(&self, tokens: &[u32]) -> Vec<u32> {
        let class = |token: u32| self.tiers.addressing().vocabulary().class(token).unwrap();
        let mut text = Vec::new();
        for &token in tokens {
            let before = text.last().copied().unwrap_or(Self::PAD);
            if !self.pairs.contains(&[class(before), class(token)]) {
                text.push(token);
            }
        }
        text
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Also where it has the letters of the taught text, and its n-grams only nearly.
    #[test]
    fn a_text_without_an_n_gram_of_an_overlay_has_the_bits_of_the_base(
        tokens in prop::collection::vec((0_u32..257, any::<prop::sample::Index>(), any::<bool>()), 1..40),
    ) {
        let wide = Wide::once();
        let letters: Vec<u32> = TAUGHT.bytes().map(|byte| Served::once().base.tokenizer().encode(
            &char::from(byte).to_string()).unwrap()[0]).collect();
        let any = tokens.iter().map(|(any, place, near)| if *near { *place.get(&letters) } else { *any });
        let text = wide.without_pairs(&any.collect::<Vec<_>>());
        prop_assume!(!text.is_empty());
        let with = logits(&wide.decoder, Some((wide.number, &wide.tiers)), &text);
        prop_assert!(with == logits(&wide.decoder, None, &text));
        // With one n-gram it has other bits.
        let mut taught = text;
        taught.extend(letters.iter().take(2));
        let with = logits(&wide.decoder, Some((wide.number, &wide.tiers)), &taught);
        prop_assert!(with != logits(&wide.decoder, None, &taught));
    }
}

fn answer(engine: &Engine, requests: &[Request]) -> Vec<String> {
    let events = engine.submit_all(requests.to_vec()).unwrap();
    let answer = |mut events: tokio::sync::mpsc::UnboundedReceiver<Event>| {
        let (mut text, mut gates) = (String::new(), BTreeMap::new());
        while let Some(event) = events.blocking_recv() {
            match event {
                Event::Token(token) => text += &format!("{:?} ", (token.id, token.logprob)),
                Event::Gates(told) => {
                    for place in 0..told.changed.first().map_or(0, Vec::len) {
                        let of = |layer: usize| (told.layers[layer][place], told.changed[layer][place]);
                        gates.insert(told.first + place, (0..told.layers.len()).map(of).collect::<Vec<_>>());
                    }
                }
                Event::Failed(failure) => panic!("{failure}"),
                _ => {}
            }
        }
        format!("{text}{gates:?}")
    };
    events.into_iter().map(answer).collect()
}

#[test]
fn base_and_memories_in_one_batch_are_each_as_alone() {
    let folder = tempfile::tempdir().unwrap();
    let model = || {
        let inner = tempfile::tempdir_in(folder.path()).unwrap();
        let Served { base, decoder, tiers, .. } = Served::new(inner.path());
        let memories = tiers.into_iter().map(|(weights, rows)| ModelMemory { weights, rows }).collect();
        Model { decoder, memories, token_bytes: base.tokenizer().all_token_bytes().clone() }
    };
    let options = EngineOptions {
        page: 4,
        chunk: 6,
        prompt_tokens: 16,
        cache_bytes: 1 << 20,
        threads: 2,
        ..EngineOptions::default()
    };
    let served = Served::once();
    let taught = served.base.tokenizer().encode(TAUGHT).unwrap();
    let request = |index: usize| {
        let mut prompt = taught[..8 + index % 9].to_vec();
        prompt.extend(random_tokens(index % 4, 257, index as u64));
        let memory = [None, Some(0), Some(1), Some(2), Some(3)][index % 5];
        let sampling = Sampling { temperature: 0.7, seed: index as u64, ..Sampling::default() };
        Request {
            memory,
            sampling,
            logprobs: Some(2),
            gates: index.is_multiple_of(3),
            ..Request::new(prompt, 12)
        }
    };
    let requests: Vec<Request> = (0..40).map(request).collect();
    let together = answer(&Engine::start(model(), options).unwrap(), &requests);
    let engine = Engine::start(model(), options).unwrap();
    for (index, request) in requests.iter().enumerate() {
        assert_eq!(answer(&engine, std::slice::from_ref(request)), [together[index].clone()], "{index}");
    }
    // The same prompt by each memory: nothing of one is another's, not even by the pages of the cache.
    let same = |memory| Request { memory, logprobs: Some(0), ..Request::new(taught.clone(), 4) };
    let answers = answer(&engine, &[None, Some(0), Some(1), Some(2), Some(3)].map(same));
    assert_eq!(answers[0], answers[1], "a fresh memory is the base");
    let told: HashSet<&String> = answers[1..].iter().collect();
    assert_eq!(told.len(), 4, "memories answer differently");
    assert_eq!(answer(&engine, &[None].map(same)), answers[..1], "from pages that are known");
    // Gates tell which positions read changed rows.
    let gates = Request { gates: true, ..same(Some(1)) };
    assert!(answer(&engine, &[gates])[0].contains(", 4)]"), "all rows of a taught position are changed");
    let refused = engine.submit(Request { memory: Some(4), ..Request::new(vec![1], 1) }).unwrap_err();
    assert_eq!(refused.to_string(), "memory 4 is asked for, but the model has 4, counted from 0");
}
