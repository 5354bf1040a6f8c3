//! A conversation as one text: the Jinja template that a tokenizer's configuration carries.

use std::collections::BTreeMap;

use chrono::{DateTime, FixedOffset};
use minijinja::{Environment, Error, Value};
use serde::Deserialize;

use crate::jinja;

/// A turn of a conversation: its fields as a template sees them, in their order.
#[derive(Debug, Clone, PartialEq)]
pub struct Message(Value);

impl Message {
    /// What `role` (`system`, `user`, `assistant`, …) says.
    pub fn new(role: &str, content: &str) -> Self {
        Self::from_fields([("role".to_owned(), role.into()), ("content".to_owned(), content.into())])
    }

    /// A turn of these fields; `role` and `content` should be among them.
    pub fn from_fields(fields: impl IntoIterator<Item = (String, Value)>) -> Self {
        Self(Value::from_pairs(fields))
    }

    /// About how long it is.
    fn letters(&self) -> usize {
        self.0.get_attr("content").ok().and_then(|content| content.as_str().map(str::len)).unwrap_or(0)
    }
}

/// A template that cannot be used, or that refuses a conversation.
#[derive(Debug, thiserror::Error)]
#[error("chat template: {0}")]
pub struct TemplateError(String);

impl From<Error> for TemplateError {
    fn from(error: Error) -> Self {
        Self(format!("{error:#}"))
    }
}

/// What of a `tokenizer_config.json` a template needs.
#[derive(Debug, Default, Deserialize)]
struct TokenizerConfig {
    chat_template: Option<TemplateField>,
    #[serde(flatten)]
    fields: BTreeMap<String, serde_json::Value>,
}

#[derive(Debug, Deserialize)]
#[serde(
    untagged,
    expecting = "`chat_template` must be a text, or a list of objects with `name` and `template`"
)]
enum TemplateField {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Debug, Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

/// Special tokens that a template may name.
const SPECIAL: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

impl TokenizerConfig {
    /// The name of a special token: a text, or an object that has it as `content`.
    fn special(&self, field: &str) -> Option<String> {
        let value = self.fields.get(field)?;
        value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
    }
}

/// Turns conversations into text.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    /// The template of its own for conversations with tools, if there is one.
    with_tools: Option<String>,
    special: BTreeMap<String, String>,
}

/// A conversation, and what a template may know besides it.
#[derive(Debug, Clone, Default)]
pub struct Conversation<'a> {
    /// Its turns.
    pub messages: &'a [Message],
    /// Descriptions of functions that the assistant may call.
    pub tools: Option<Value>,
    /// Texts that the assistant may read.
    pub documents: Option<Value>,
    /// More variables of the template, such as `enable_thinking`.
    pub variables: BTreeMap<String, Value>,
    /// Whether the text ends where the assistant's next turn begins.
    pub add_generation_prompt: bool,
}

const NAME: &str = "chat";
const WITH_TOOLS: &str = "tool_use";

impl ChatTemplate {
    /// The template `source`, in which `bos_token` is `begin` and `eos_token` is `end`, where they are not empty.
    ///
    /// # Errors
    /// When it is not a template.
    pub fn new(source: String, begin: String, end: String) -> Result<Self, TemplateError> {
        let special = [("bos_token", begin), ("eos_token", end)];
        let special = special.into_iter().filter(|(_, name)| !name.is_empty());
        let special = special.map(|(field, name)| (field.to_owned(), name)).collect();
        Self::with(source, None, special, None)
    }

    fn with(
        source: String,
        with_tools: Option<String>,
        special: BTreeMap<String, String>,
        now: Option<DateTime<FixedOffset>>,
    ) -> Result<Self, TemplateError> {
        let mut environment = jinja::environment(now)?;
        jinja::add_template(&mut environment, NAME, &source)?;
        if let Some(source) = &with_tools {
            jinja::add_template(&mut environment, WITH_TOOLS, source)?;
        }
        Ok(Self { environment, source, with_tools, special })
    }

    /// The template of a `tokenizer_config.json`; none if it has no template.
    ///
    /// # Errors
    /// When the file is not such a configuration, or its template is not one.
    pub fn from_tokenizer_config(json: &str) -> Result<Option<Self>, TemplateError> {
        Self::at(json, None)
    }

    /// The same at a fixed time: what `strftime_now` tells does not change.
    ///
    /// # Errors
    /// As [`from_tokenizer_config`](Self::from_tokenizer_config).
    pub fn at(json: &str, now: Option<DateTime<FixedOffset>>) -> Result<Option<Self>, TemplateError> {
        let mut config: TokenizerConfig = serde_json::from_str(json)
            .map_err(|error| TemplateError(format!("tokenizer_config.json: {error}")))?;
        let (source, with_tools) = match config.chat_template.take() {
            None => return Ok(None),
            Some(TemplateField::One(source)) => (source, None),
            Some(TemplateField::Named(named)) => {
                let mut named: BTreeMap<String, String> =
                    named.into_iter().map(|template| (template.name, template.template)).collect();
                let names: Vec<String> = named.keys().cloned().collect();
                let default = named.remove("default").ok_or_else(|| {
                    TemplateError(format!("no template is named `default`, only: {}", names.join(", ")))
                })?;
                (default, named.remove(WITH_TOOLS))
            }
        };
        let special = SPECIAL.iter().filter_map(|&field| Some((field.to_owned(), config.special(field)?)));
        Self::with(source, with_tools, special.collect(), now).map(Some)
    }

    /// The text of `messages`, up to where the assistant speaks next.
    ///
    /// # Errors
    /// When the template refuses them.
    pub fn render(&self, messages: &[Message]) -> Result<String, TemplateError> {
        self.render_all(&Conversation { messages, add_generation_prompt: true, ..Conversation::default() })
    }

    /// The text of a conversation.
    ///
    /// # Errors
    /// When the template refuses it, or does not end.
    pub fn render_all(&self, conversation: &Conversation<'_>) -> Result<String, TemplateError> {
        let messages: Value = conversation.messages.iter().map(|message| message.0.clone()).collect();
        let own = [
            ("messages", messages),
            ("tools", conversation.tools.clone().unwrap_or(Value::from(()))),
            ("documents", conversation.documents.clone().unwrap_or(Value::from(()))),
            ("add_generation_prompt", conversation.add_generation_prompt.into()),
        ];
        let special = self.special.iter().map(|(field, name)| (field.clone(), Value::from(name.as_str())));
        let own = own.into_iter().map(|(name, value)| (name.to_owned(), value));
        let variables = conversation.variables.iter().map(|(name, value)| (name.clone(), value.clone()));
        let values: BTreeMap<String, Value> = special.chain(own).chain(variables).collect();
        let name = if self.with_tools.is_some() && conversation.tools.is_some() { WITH_TOOLS } else { NAME };
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(jinja::fuel(conversation.messages.iter().map(Message::letters).sum())));
        Ok(environment.get_template(name)?.render(Value::from(values))?)
    }

    /// Name of the token that ends a turn, if the configuration names one.
    pub fn end_token(&self) -> Option<&str> {
        self.special.get("eos_token").map(String::as_str)
    }

    /// The template itself, in Jinja.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether `word` stands in the template.
    pub fn mentions(&self, word: &str) -> bool {
        self.source.contains(word) || self.with_tools.as_ref().is_some_and(|source| source.contains(word))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(role: &str, content: &str) -> Message {
        Message::new(role, content)
    }

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::new(source.into(), String::new(), String::new()).unwrap()
    }

    #[track_caller]
    fn rendered(source: &str) -> String {
        template(source).render(&[said("user", "a")]).unwrap()
    }

    #[test]
    fn a_published_template_gives_the_published_text() {
        let source = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
            {{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + \
            message['content'].strip() + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}\
            {{ '<|im_start|>assistant\n' }}{% endif %}";
        let config = serde_json::json!({
            "chat_template": source, "bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>", "special": true},
            "model_max_length": 2048,
        });
        let template = ChatTemplate::from_tokenizer_config(&config.to_string()).unwrap().unwrap();
        assert_eq!(
            template.render(&[said("user", " Hi! ")]).unwrap(),
            "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n"
        );
        assert_eq!(template.end_token(), Some("<|im_end|>"));
    }

    /// Expectations of this and the next tests are those of Jinja2 3.1 and Python 3.11.
    #[test]
    fn operators_and_values_are_those_of_python() {
        for (source, expected) in [
            ("{{ '%s: %d' % (messages[0].role, 3) }}", "user: 3"),
            ("{{ '%s' % none }}{{ '%s' % [1, 'a'] }}", "None[1, 'a']"),
            ("{{ '%(a)s-%(b)02d' % {'a': 'x', 'b': 5} }}", "x-05"),
            ("{{ 7 % 3 }} {{ -7 % 3 }} {{ 7.5 % 2 }}", "1 2 1.5"),
            (
                "{{ true }} {{ none }} {{ 1.0 }} {{ [1, 'a'] }} {{ {'b': 1, 'a': none} }}",
                "True None 1.0 [1, 'a'] {'b': 1, 'a': None}",
            ),
            ("{{ 'a' ~ true ~ none ~ 1 ~ [messages[0].role] }}", "aTrueNone1['user']"),
            ("{{ missing }}|{{ 'x' ~ missing }}", "|x"),
            ("{{ [true, none, 'a']|join('-') }}", "True-None-a"),
            ("{{ messages[0]|string }}", "{'role': 'user', 'content': 'a'}"),
            ("{{ {'role': 'user', 'content': 'a'}|tojson }}", "{\"role\": \"user\", \"content\": \"a\"}"),
            ("{{ [1, {'a': 'é<'}]|tojson(indent=2) }}", "[\n  1,\n  {\n    \"a\": \"é<\"\n  }\n]"),
            ("{{ {'a': 1}|tojson(separators=(',', ':')) }}", "{\"a\":1}"),
            ("{{ 'é'|tojson(ensure_ascii=true) }}", "\"\\u00e9\""),
            ("{% if tools is not none %}tools{% else %}plain{% endif %}", "plain"),
            ("{{ 'abc'[::-1] }}{{ messages[::-1][0].role }}{{ 'abc'[-2:] }}", "cbauserbc"),
        ] {
            assert_eq!(rendered(source), expected, "{source}");
        }
    }

    #[test]
    fn methods_are_those_of_python() {
        for (call, expected) in [
            ("'a</think>b'.rsplit('</think>', 1)[1]", "b"),
            ("'a b c'.rsplit(None, 1)", "['a b', 'c']"),
            ("' a  b '.split()", "['a', 'b']"),
            ("' a  b  c '.split(maxsplit=1)", "['a', 'b  c ']"),
            ("'a,b,c'.split(',', maxsplit=1)", "['a', 'b,c']"),
            ("'a,b,c'.split(sep=',')", "['a', 'b', 'c']"),
            ("\"o'neil 4th\".title()", "O'Neil 4Th"),
            ("'aBc dE'.swapcase() ~ 'aBC'.capitalize()", "AbC DeAbc"),
            ("'a-b-c'.partition('-')", "('a', '-', 'b-c')"),
            ("'a-b-c'.rpartition('-')", "('a-b', '-', 'c')"),
            ("'abc'.partition('x')", "('abc', '', '')"),
            ("'éab'.find('b')", "2"),
            ("'éab'.find('x')", "-1"),
            ("'abab'.rfind('a')", "2"),
            ("'abab'.index('b', 2)", "3"),
            ("'aaa'.count('a') ~ 'aaa'.count('a', 1)", "32"),
            ("'aXbX'.replace('X', '-', 1)", "a-bX"),
            ("'prefix-a'.removeprefix('prefix-') ~ 'a.txt'.removesuffix('.txt')", "aa"),
            ("'ab'.center(5, '*') ~ 'a'.ljust(3) ~ 'a'.rjust(3, '.')", "**ab*a  ..a"),
            ("'-5'.zfill(4) ~ '5'.zfill(3)", "-005005"),
            ("'a\\tb'.expandtabs(4)", "a   b"),
            ("'a\\nb\\r\\nc'.splitlines()", "['a', 'b', 'c']"),
            ("'a\\nb'.splitlines(true)", "['a\\n', 'b']"),
            ("'x'.startswith(('a', 'x')) ~ 'x'.endswith('y')", "TrueFalse"),
            ("'Straße'.casefold() ~ ' a '.strip() ~ 'xxa'.lstrip('x')", "strasseaa"),
            ("'{} {b}'.format(1, b='c')", "1 c"),
            ("messages[0].get('name', 'none') ~ messages[0].keys()|list", "none['role', 'content']"),
            ("[1, 2, 1].count(1) ~ [1, 2].index(2)", "21"),
            ("'Hi There'.istitle() ~ 'a1'.isidentifier() ~ '12'.isdecimal()", "TrueTrueTrue"),
        ] {
            assert_eq!(rendered(&format!("{{{{ {call} }}}}")), expected, "{call}");
        }
    }

    #[test]
    fn statements_are_those_of_transformers() {
        let found = template(
            "{% for m in messages %}{% generation %}{{ m.content }};{% endgeneration %}{% endfor %}",
        )
        .render(&[said("user", "a"), said("user", "b")]);
        assert_eq!(found.unwrap(), "a;b;");
        // What is set while the assistant speaks ends with its turn, as in a macro's call.
        assert_eq!(
            rendered("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"),
            "21"
        );
        assert_eq!(
            rendered("{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}"),
            "13"
        );
        assert_eq!(
            rendered(
                "{% set ns = namespace(a=1) %}{% for i in [1, 2] %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}"
            ),
            "4"
        );
        assert_eq!(rendered("  {% if true %}\n  a\n  {% endif %}\n"), "  a\n");
        let now = DateTime::parse_from_rfc3339("2024-07-06T15:04:05+02:00").unwrap();
        let config = serde_json::json!({"chat_template": "{{ strftime_now('%d %b %Y, %-d %B, %H:%M %p') }}"})
            .to_string();
        let template = ChatTemplate::at(&config, Some(now)).unwrap().unwrap();
        assert_eq!(template.render(&[]).unwrap(), "06 Jul 2024, 6 July, 15:04 PM");
    }

    #[test]
    fn a_template_of_its_own_is_taken_where_there_are_tools() {
        let config = serde_json::json!({"chat_template": [
            {"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools[0].name }}"},
        ]});
        let template = ChatTemplate::from_tokenizer_config(&config.to_string()).unwrap().unwrap();
        assert_eq!(template.render(&[]).unwrap(), "plain");
        let tools = serde_json::from_str(r#"[{"name": "clock"}]"#).unwrap();
        let with = Conversation { tools: Some(tools), ..Conversation::default() };
        assert_eq!(template.render_all(&with).unwrap(), "clock");
    }

    #[test]
    fn work_has_a_limit() {
        for endless in [
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "{% set ns = namespace(x='aaaaaaaa') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "{% set ns = namespace(x='aaaaaaaa') %}{% for a in range(60) %}{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}",
            "{% set ns = namespace(x='aaaaaaaa') %}{% for a in range(60) %}{% set ns.x = [ns.x, ns.x]|join(ns.x) %}{% endfor %}",
            "{% set ns = namespace(x='aaaaaaaa') %}{% for a in range(60) %}{% set ns.x = ns.x.replace('a', ns.x) %}{% endfor %}",
            "{% set ns = namespace(x='aaaaaaaa') %}{% for a in range(60) %}{% set ns.x = [ns.x, ns.x]|tojson %}{% endfor %}",
            "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        ] {
            let began = std::time::Instant::now();
            assert!(template(endless).render(&[]).is_err(), "{endless}");
            assert!(began.elapsed() < std::time::Duration::from_secs(20), "{endless}");
        }
    }

    #[test]
    fn what_cannot_be_used_says_why() {
        assert!(ChatTemplate::from_tokenizer_config("{}").unwrap().is_none());
        assert!(
            ChatTemplate::from_tokenizer_config("[")
                .unwrap_err()
                .to_string()
                .contains("tokenizer_config.json")
        );
        let new = |source: &str| ChatTemplate::new(source.into(), String::new(), String::new());
        assert!(new("{% for %}").is_err());
        let refusing = new("{{ raise_exception('no system role') }}").unwrap();
        assert!(refusing.render(&[]).unwrap_err().to_string().contains("no system role"));
        assert!(new("{{ strftime_now('%Q') }}").unwrap().render(&[]).is_err());
        let named = r#"{"chat_template": [{"name": "default", "template": "x"}]}"#;
        assert_eq!(ChatTemplate::from_tokenizer_config(named).unwrap().unwrap().render(&[]).unwrap(), "x");
    }
}
