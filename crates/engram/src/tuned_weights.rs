//! The model's own weights trained on the facts, to compare with rows.

use std::path::Path;
use std::time::Instant;

use clap::ValueEnum;
use engram_config::TeachConfig;
use engram_import::Model;
use engram_infer::{Decoder, Dtype};
use engram_train::{Facts, Tuner, Tuning};

use crate::failure::Interrupted;
use crate::files::write_file;
use crate::interrupt;
use crate::number::duration;
use crate::progress::Progress;
use crate::taught_memory::offline;
use crate::teaching_report::{Compared, Examination};

/// What is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Method {
    /// An adapter of low rank on all matrices of the blocks.
    Lora,
    /// All weights of the blocks.
    Full,
}

/// A method at one rate, with one weight of the divergence from the base.
#[derive(Debug)]
pub(crate) struct Arm {
    what: Tuning,
    config: TeachConfig,
}

/// Every method at every of its rates with every weight of the divergence.
pub(crate) fn arms(methods: &[Method], config: &TeachConfig) -> Vec<Arm> {
    let compare = &config.compare;
    let mut arms = Vec::new();
    for method in methods {
        let (what, rates) = match method {
            Method::Lora => (Tuning::LowRank(compare.rank), &compare.lora_rates),
            Method::Full => (Tuning::Full, &compare.full_rates),
        };
        for (&rate, &weight) in
            rates.iter().flat_map(|rate| compare.kl_weights.iter().map(move |w| (rate, w)))
        {
            let config = TeachConfig { rate, kl_weight: weight, negative_weight: weight, ..config.clone() };
            arms.push(Arm { what, config });
        }
    }
    arms
}

impl Arm {
    /// Trains, and asks for the result. It is kept in `folder`, and read from there when it is asked for again.
    pub(crate) fn reached(
        &self,
        model: &Model,
        facts: &Facts,
        examination: &mut Examination<'_>,
        folder: &Path,
    ) -> anyhow::Result<Compared> {
        let name = self.name();
        let path = folder.join(format!("{}.json", name.replace([' ', ','], "-")));
        if let Ok(text) = std::fs::read_to_string(&path)
            && let Ok(known) = serde_json::from_str(&text)
        {
            return Ok(known);
        }
        let mut tuner = Tuner::new(model, facts, self.config.clone(), self.what)?;
        let parameters = tuner.parameters();
        let mut progress = Progress::new(self.config.steps as u64);
        let begun = Instant::now();
        for step in 1..=self.config.steps {
            if interrupt::asked() {
                return Err(Interrupted(format!(" in {name}")).into());
            }
            let answers = tuner.step()?;
            progress.show(step as u64, || {
                let each = begun.elapsed() / step as u32;
                let left = duration(each * (self.config.steps - step) as u32);
                format!(
                    "{name}, step {step}: answers {answers:.3} nats, {:.2} s a step, {left} left",
                    each.as_secs_f64()
                )
            });
        }
        let seconds = begun.elapsed().as_secs_f64();
        drop(progress);
        let decoder = Decoder::new(&model.config().model, &tuner.into_weights(), Dtype::F32)?;
        examination.taught = offline(decoder, None)?;
        let compared = examination.compared(name, parameters, seconds)?;
        std::fs::create_dir_all(folder)?;
        write_file(&path, &crate::json::pretty(&compared)?)?;
        Ok(compared)
    }

    fn name(&self) -> String {
        let what = match self.what {
            Tuning::LowRank(rank) => format!("LoRA {rank}"),
            Tuning::Full => "all weights".to_owned(),
        };
        let TeachConfig { rate, kl_weight, .. } = self.config;
        format!("{what}, {rate:e}, KL {kl_weight}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rate_is_tried_with_every_weight() {
        let config: TeachConfig = toml::from_str(
            "[compare]\nlora_rates = [1e-3, 1e-4]\nfull_rates = [1e-5]\nkl_weights = [0.0, 0.5]",
        )
        .unwrap();
        let names: Vec<String> = arms(&[Method::Lora, Method::Full], &config).iter().map(Arm::name).collect();
        assert_eq!(
            names,
            [
                "LoRA 16, 1e-3, KL 0",
                "LoRA 16, 1e-3, KL 0.5",
                "LoRA 16, 1e-4, KL 0",
                "LoRA 16, 1e-4, KL 0.5",
                "all weights, 1e-5, KL 0",
                "all weights, 1e-5, KL 0.5",
            ]
        );
        assert!(arms(&[], &config).is_empty());
    }
}
