#[global_allocator]
static GLOBAL: mimalloc::MiMalloc = mimalloc::MiMalloc;
use engram_train::*;
use std::ops::ControlFlow;
use std::path::Path;
fn main() {
    let args: Vec<String> = std::env::args().collect();
    let dir = Path::new("/tmp/dev");
    std::fs::create_dir_all(dir).unwrap();
    let tok = dir.join("tokenizer.json");
    let valid = Corpus::open(&["/tmp/wt/m/data/quickstart.valid.jsonl.zst"]).unwrap();
    let train = Corpus::open(&["/tmp/wt/m/data/quickstart.train.jsonl.zst"]).unwrap();
    if !tok.exists() {
        let t = std::time::Instant::now();
        let tk = Tokenizer::train(
            &train,
            &TokenizerTraining { vocabulary: 4096, ..Default::default() },
            &mut |_| ControlFlow::Continue(()),
        )
        .unwrap();
        tk.save(&tok).unwrap();
        println!("tokenizer {:?}", t.elapsed());
        let o = PrepareOptions::default();
        prepare(&train, &tk, &dir.join("t"), &o, &mut |_| ControlFlow::Continue(())).unwrap();
        prepare(&valid, &tk, &dir.join("v"), &o, &mut |_| ControlFlow::Continue(())).unwrap();
        println!("prepared {:?}", t.elapsed());
    }
    let mut config = RunConfig::load(Path::new(&args[1])).unwrap();
    let find = |d: &str| {
        let p = dir.join(d).join("train");
        if p.exists() { p } else { dir.join(d) }
    };
    config.data.train = find("t");
    config.data.valid = find("v");
    config.data.tokenizer = tok;
    let steps: u64 = args[2].parse().unwrap();
    config.train.steps = steps;
    if args.len() > 4 {
        for a in &args[4..] {
            let (k, v) = a.split_once('=').unwrap();
            let f: f32 = v.parse().unwrap();
            match k {
                "muon" => config.train.optimizer.muon_rate = f,
                "adam" => config.train.optimizer.adam_rate = f,
                "factor" => config.train.memory.rate_factor = f,
                "init" => config.model.memory.as_mut().unwrap().row_init = f,
                "seed" => config.train.seed = f as u64,
                "batch" => config.train.batch = f as usize,
                "decay" => config.train.optimizer.weight_decay = f,
                "rowwise" => config.train.memory.optimizer = RowOptimizerKind::RowWiseAdam,
                _ => panic!(),
            }
        }
    }
    let out = Path::new(&args[3]);
    let _ = std::fs::remove_dir_all(out);
    let mut trainer = Trainer::new(config, out, &burn::tensor::Device::flex()).unwrap();
    println!("start {:?}", trainer.evaluate().unwrap());
    let t = std::time::Instant::now();
    let mut times = vec![];
    for _ in 0..steps {
        let r = trainer.step().unwrap();
        times.push(r.seconds);
        if r.step % 20 == 0 || r.step <= 3 {
            println!(
                "{:5} loss {:.4} norm {:.3} {:.0} ms  {:?}",
                r.step,
                r.loss,
                r.gradient_norm,
                r.seconds * 1e3,
                t.elapsed()
            );
        }
    }
    times.sort_by(f64::total_cmp);
    println!("median {:.1} ms", times[times.len() / 2] * 1e3);
    println!("end {:?}", trainer.evaluate().unwrap());
    trainer.save().unwrap();
}
