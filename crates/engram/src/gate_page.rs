//! Heat maps of gates as one self-contained HTML page.

use std::fmt::Write;

use engram_eval::figure::escape;
use serde_json::json;

use crate::gate_text::{GateText, Scale};

const TEMPLATE: &str = include_str!("../assets/gates.html");

/// The page for texts of one model. `title` and `lead` are plain text.
pub(crate) fn page(title: &str, lead: &str, texts: &[GateText]) -> String {
    let means: Vec<Vec<f32>> =
        texts.iter().map(|text| text.layers.first().map(|layer| layer.means()).unwrap_or_default()).collect();
    let scale = Scale::of(means.iter().flatten());
    let mut spans = String::new();
    for (text, means) in texts.iter().zip(&means) {
        spans.push_str("<p class=\"text\">");
        for (token, mean) in text.tokens.iter().zip(means) {
            let _ = write!(spans, "<span style=\"--h:{:.3}\">{}</span>", scale.heat(*mean), escape(token));
        }
        spans.push_str("</p>\n");
    }
    // One pass over the template, so that a text that looks like a placeholder stays a text.
    let fill = |name: &str| match name {
        "title" => escape(title),
        "lead" => escape(lead),
        "low" => format!("{:.2}", scale.low),
        "high" => format!("{:.2}", scale.high),
        "texts" => spans.clone(),
        "data" => data(texts),
        other => format!("{{{{{other}}}}}"),
    };
    let mut parts = TEMPLATE.split("{{");
    let mut page = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part.split_once("}}") {
            Some((name, rest)) => page.extend([fill(name).as_str(), rest]),
            None => page.extend(["{{", part]),
        }
    }
    page
}

/// The texts as JSON for a `script` element; `<` is escaped because it could end the element.
fn data(texts: &[GateText]) -> String {
    let texts = texts.iter().map(|text| {
        let layers = text.layers.iter().map(|layer| {
            let rounded = |gate: &f32| (f64::from(*gate) * 1e4).round() / 1e4;
            let gates: Vec<Vec<f64>> =
                layer.gates.iter().map(|streams| streams.iter().map(rounded).collect()).collect();
            json!({ "layer": layer.layer, "gates": gates })
        });
        let layers: Vec<_> = layers.collect();
        json!({ "tokens": text.tokens, "max_order": text.max_order, "layers": layers })
    });
    serde_json::Value::from(texts.collect::<Vec<_>>()).to_string().replace('<', "\\u003c")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gate_text::GateLayer;

    #[test]
    fn texts_cannot_become_markup() {
        let tokens = ["<b>", "</script>", "{{data}}", " \"&'"].map(String::from).to_vec();
        let gates = vec![vec![0.25, 0.5]; 4];
        let text = GateText { tokens, max_order: 3, layers: vec![GateLayer { layer: 1, gates }] };
        let page = page("<title>", "{{low}}", &[text]);
        assert!(page.contains("<title>&lt;title&gt;</title>"));
        assert!(page.contains("<span style=\"--h:0.000\">&lt;b&gt;</span>"));
        assert!(page.contains("<span style=\"--h:0.000\">{{data}}</span>"));
        assert!(page.contains("<p class=\"lead\">{{low}}</p>"));
        assert!(page.contains(r#""\u003c/script>""#));
        assert_eq!(page.matches("</script>").count(), TEMPLATE.matches("</script>").count());
        assert!(page.contains(r#""gates":[[0.25,0.5],"#));
    }

    #[test]
    fn every_placeholder_of_the_template_is_known() {
        let page = page("title", "lead", &[]);
        assert!(!page.contains("{{"), "{page}");
    }
}
