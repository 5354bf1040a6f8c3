//! `report.html`: one self-contained page.

use std::fmt::Write;

use crate::arm::Kind;
use crate::findings::{ArmFinding, ClassFinding, Findings, Interval};
use crate::provenance::Provenance;
use engram_eval::figure::escape;

const STYLE: &str = "
body { font: 16px/1.55 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
figure { margin: 1rem 0 } svg { max-width: 100%; height: auto }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e4e4 }
th:first-child, td:first-child { text-align: left }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .85rem }
dt { font-weight: 600 } dd { margin: 0 0 .5rem }
";

/// The page of these findings. `figures` are SVG documents; `seconds` is the total time of all runs.
pub(crate) fn page(findings: &Findings, provenance: &Provenance, figures: &[String], seconds: f64) -> String {
    let title = title(findings.study);
    let mut page = String::new();
    let mut add = |text: std::fmt::Arguments<'_>| {
        // Writing to a string cannot fail.
        let _ = page.write_fmt(text);
    };
    add(format_args!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
    ));
    add(format_args!("<h2>What was found</h2>\n<ul>\n"));
    for statement in &findings.statements {
        add(format_args!("<li>{}</li>\n", with_code(statement)));
    }
    add(format_args!("</ul>\n"));
    for figure in figures {
        add(format_args!("<figure>\n{figure}</figure>\n"));
    }
    add(format_args!("<h2>Losses</h2>\n{}", table(&LOSSES, &findings.arms)));
    add(format_args!("{}<h2>Costs</h2>\n{}", classes(&findings.arms), table(&COSTS, &findings.arms)));
    let seeds: Vec<_> = findings.seeds.iter().map(ToString::to_string).collect();
    let documents = match findings.documents {
        1 => "one held-out document, so errors cover only seeds".to_owned(),
        several => format!(
            "{several} held-out documents, which give the precision of {:.1} of equal length",
            findings.equal_documents
        ),
    };
    add(format_args!(
        "<h2>How</h2>\n\
         <p>Losses are nats per token over {} tokens, the same for every run, of {}. Every arm was \
         trained on {} tokens with each of the seeds {}; runs of one seed saw the same data in the same order. Differences are paired over \
         seeds and documents. An error is the square root of the sum of two variances: over seeds, pooled over arms, \
         and over documents; ± is one standard error, and intervals of one kind hold together with probability \
         95 % (Student’s t, Bonferroni). “Within the noise” means that such an interval holds zero. Differences are \
         to the first arm.</p>\n\
         <p>The runs took {:.1} hours in total, each since it was last started or resumed.</p>\n",
        grouped(findings.tokens),
        documents,
        grouped(findings.training_tokens),
        seeds.join(", "),
        seconds / 3600.0
    ));
    add(format_args!(
        "<h2>Where it comes from</h2>\n<dl>\n<dt>Runs made with</dt><dd>{}</dd>\n\
         <dt>Last command</dt><dd>{}, {}</dd>\n</dl>\n<pre>{}</pre>\n<h2>Configuration</h2>\n<pre>{}</pre>\n</body>\n</html>\n",
        findings.origins.iter().map(|origin| escape(origin)).collect::<Vec<_>>().join("<br>"),
        escape(&provenance.program),
        escape(&provenance.workers),
        escape(&provenance.command),
        escape(&provenance.configuration)
    ));
    page
}

/// A row per arm.
fn table(columns: &[Column], arms: &[ArmFinding]) -> String {
    let heads: String = columns.iter().map(|(name, _)| format!("<th>{name}</th>")).collect();
    let row = |arm: &ArmFinding| {
        let cells: String =
            columns.iter().map(|(_, cell)| format!("<td>{}</td>", escape(&cell(arm)))).collect();
        format!("<tr>{cells}</tr>\n")
    };
    let rows: String = arms.iter().map(row).collect();
    format!("<div class=\"wide\"><table>\n<tr>{heads}</tr>\n{rows}</table></div>\n")
}

/// Losses after rare and frequent text.
fn classes(arms: &[ArmFinding]) -> String {
    let Some(first) = arms.first().filter(|arm| !arm.by_occurrences.is_empty()) else { return String::new() };
    let head = |class: &ClassFinding| {
        let name = match class.occurrences {
            (fewest, Some(most)) if fewest == most => grouped(fewest),
            (fewest, None) => format!("{} and more", grouped(fewest)),
            (fewest, Some(most)) => format!("{}–{}", grouped(fewest), grouped(most)),
        };
        format!("<th>{name}<br>({} tokens)</th>", grouped(class.tokens))
    };
    let cell = |class: &ClassFinding| match class.difference {
        None => format!("<td>{:.4}</td>", class.nats_per_token),
        Some(Interval { estimate, .. }) => {
            let mark = if class.difference.is_some_and(|found| found.is_beyond_noise()) { "*" } else { "" };
            format!(
                "<td>{:.4}<br>{:+.4} ± {:.4}{mark}</td>",
                class.nats_per_token, estimate.value, estimate.error
            )
        }
    };
    let row = |arm: &ArmFinding| {
        let cells: String = arm.by_occurrences.iter().map(cell).collect();
        format!("<tr><td>{}</td>{cells}</tr>\n", escape(&arm.name))
    };
    let heads: String = first.by_occurrences.iter().map(head).collect();
    let rows: String = arms.iter().map(row).collect();
    format!(
        "<h2>After rare and frequent text</h2>\n<p>Losses in nats per token, apart by how often the three tokens before \
         the predicted one occur in the training text; below each the difference to the first arm, with a star where \
         it is beyond the noise.</p>\n<div class=\"wide\"><table>\n<tr><th>arm</th>{heads}</tr>\n{rows}</table></div>\n"
    )
}

fn title(kind: Kind) -> &'static str {
    match kind {
        Kind::Allocation => "Experts or memory: how to spend a budget of parameters",
        Kind::Memory => "The size of the memory over one backbone",
        Kind::Placement => "The layers that read the memory",
        Kind::Ablation => "The memory without one of its parts",
        Kind::Baselines => "Memory, its alternatives, and negative controls",
    }
}

type Column = (&'static str, fn(&ArmFinding) -> String);

const LOSSES: [Column; 5] = [
    ("arm", |arm| arm.name.clone()),
    ("loss, nats/token", |arm| format!("{:.4}", arm.nats_per_token)),
    ("bits/byte", |arm| format!("{:.4}", arm.bits_per_byte)),
    ("difference", |arm| arm.difference.map_or("–".into(), |difference| difference.to_string())),
    ("losses by seed", |arm| {
        let losses: Vec<String> = arm.by_seed.iter().map(|loss| format!("{loss:.4}")).collect();
        losses.join(" ")
    }),
];

const COSTS: [Column; 7] = [
    ("arm", |arm| arm.name.clone()),
    ("rates", |arm| format!("×{}", arm.factor)),
    ("parameters", |arm| grouped(arm.costs.total_parameters)),
    ("active", |arm| grouped(arm.costs.active_parameters)),
    ("FLOPs/token", |arm| grouped(arm.costs.forward_flops_per_token)),
    ("routed experts", |arm| arm.costs.routed_experts.to_string()),
    ("memory rows", |arm| grouped(arm.costs.memory_rows)),
];

/// A number with digits in groups of three.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A statement; names of arms stand between backticks.
fn with_code(text: &str) -> String {
    let part = |(index, part): (usize, &str)| match index % 2 {
        0 => part.to_owned(),
        _ => format!("<code>{part}</code>"),
    };
    escape(text).split('`').enumerate().map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_apart() {
        for (number, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (12_345_678, "12,345,678")] {
            assert_eq!(grouped(number), text);
        }
    }
}
