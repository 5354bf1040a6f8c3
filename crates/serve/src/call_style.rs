//! How a model writes calls of functions: what its chat template shows it, and a grammar that its answers follow.

use engram_infer::{ChatTemplate, GrammarError, TemplateValue, TextCodec, json_rule};
use serde_json::Value;

use crate::tools::Tools;

/// Calls in an answer at most.
const MOST_CALLS: usize = 32;

/// How calls are written. A call itself is always `{"name": "f", "arguments": {…}}`, or with another key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CallStyle {
    /// Text that only begins calls; empty where a call itself does, at the beginning of an answer.
    pub(crate) trigger: &'static str,
    /// What stands between it and the first call.
    pub(crate) opening: &'static str,
    /// What stands between two calls.
    pub(crate) between: &'static str,
    /// What stands after the last.
    pub(crate) closing: &'static str,
    /// The key of the arguments.
    pub(crate) arguments: &'static str,
    /// The trigger's token, if that stands for no text.
    pub(crate) token: Option<u32>,
}

/// Hermes, Qwen 2.5 and 3, SmolLM 3.
const TAGGED: CallStyle = CallStyle {
    trigger: "<tool_call>",
    opening: "\n",
    between: "\n</tool_call>\n<tool_call>\n",
    closing: "\n</tool_call>",
    arguments: "arguments",
    token: None,
};

/// Mistral.
const LISTED: CallStyle = CallStyle {
    trigger: "[TOOL_CALLS]",
    opening: " [",
    between: ", ",
    closing: "]",
    arguments: "arguments",
    token: None,
};

/// Llama 3.
const BARE: CallStyle =
    CallStyle { trigger: "", opening: "", between: "; ", closing: "", arguments: "parameters", token: None };

impl CallStyle {
    /// The style that a template shows.
    pub(crate) fn of(template: &ChatTemplate, codec: &TextCodec) -> Self {
        let style = if template.mentions("[TOOL_CALLS]") && !template.mentions("[ARGS]") {
            LISTED
        } else if !template.mentions("<tool_call>")
            && (template.mentions("<|python_tag|>") || template.mentions("\"parameters\": "))
        {
            BARE
        } else {
            TAGGED
        };
        Self { token: codec.special(style.trigger), ..style }
    }

    /// What begins every call, up to the function's name.
    pub(crate) const HEAD: &'static str = "{\"name\": \"";

    /// What stands between the name and the arguments.
    pub(crate) fn middle(&self) -> String {
        format!("\", \"{}\": ", self.arguments)
    }

    /// A grammar, in Lark's notation, of answers with calls of `tools`, or without: those follow `schema`, or are any text.
    pub(crate) fn grammar(&self, tools: &Tools, schema: Option<&Value>) -> Result<String, GrammarError> {
        let more = match tools.parallel {
            true => format!("({} call){{0,{}}}", quoted(self.between), MOST_CALLS - 1),
            false => String::new(),
        };
        let optional = |text: &str| if text.is_empty() { String::new() } else { quoted(text) };
        let calls = format!("{} call {more} {}", optional(self.opening), optional(self.closing));
        let trigger = self.token.map_or_else(|| optional(self.trigger), |token| format!("<[{token}]>"));
        let mut rules = match (tools.required, schema) {
            (true, _) => format!("start: {trigger} {calls}\n"),
            (false, Some(schema)) => {
                format!("start: answer | {trigger} {calls}\nanswer: {}\n", json_rule(schema, false)?)
            }
            (false, None) if self.token.is_some() => {
                format!("start: TEXT? ({trigger} {calls})?\nTEXT: /(.|\\n)+/\n")
            }
            (false, None) if self.trigger.is_empty() => {
                format!("start: (TEXT | {calls})?\nTEXT: /[^{{](.|\\n)*/\n")
            }
            (false, None) => format!(
                "start: (TEXT | opened {calls})?\nopened[lazy]: BEFORE {trigger}\nBEFORE: /(.|\\n)*/\nTEXT: /(.|\\n)+/\n"
            ),
        };
        let names: Vec<String> = (0..tools.callable.len()).map(|index| format!("call{index}")).collect();
        rules += &format!("call: {}\n", names.join(" | "));
        for (index, tool) in tools.callable.iter().enumerate() {
            let head = quoted(&format!("{}{}{}", Self::HEAD, tool.name, self.middle()));
            let arguments = json_rule(&tool.parameters, !tool.strict)?;
            rules += &format!("call{index}: {head} arguments{index} \"}}\"\narguments{index}: {arguments}\n");
        }
        Ok(rules)
    }
}

/// A text as Lark's notation has it.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

/// What a model is told of functions where its template does not tell it: the words of Qwen 2.5's.
pub(crate) fn told(tools: &TemplateValue) -> String {
    let lines = tools.try_iter().into_iter().flatten().filter_map(|tool| serde_json::to_string(&tool).ok());
    let lines: String = lines.map(|line| line + "\n").collect();
    format!(
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function \
         signatures within <tools></tools> XML tags:\n<tools>\n{lines}</tools>\n\nFor each function call, return a json \
         object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n\
         {{\"name\": <function-name>, \"arguments\": <args-json-object>}}\n</tool_call>"
    )
}

/// A call as a model writes it, for templates that do not know of calls.
pub(crate) fn written(name: &str, arguments: &str) -> String {
    format!(
        "{}{}{name}{}{arguments}}}{}",
        TAGGED.trigger.to_owned() + TAGGED.opening,
        CallStyle::HEAD,
        TAGGED.middle(),
        TAGGED.closing
    )
}

#[cfg(test)]
pub(crate) const STYLES: [CallStyle; 3] = [TAGGED, LISTED, BARE];
