//! A conversation as one text: the Jinja template that a tokenizer's configuration carries.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Error, ErrorKind, Value, context};
use serde::{Deserialize, Serialize};

/// A turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// Who speaks: `system`, `user` or `assistant`.
    pub role: String,
    /// What is said: a text, or a list of parts that are texts.
    #[serde(deserialize_with = "text_of_parts")]
    pub content: String,
    /// The speaker's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

fn text_of_parts<'de, D: serde::Deserializer<'de>>(content: D) -> Result<String, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "`content` must be a text, or a list of parts of type `text`")]
    enum Content {
        Text(String),
        Parts(Vec<Part>),
    }
    #[derive(Deserialize)]
    #[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
    enum Part {
        Text { text: String },
    }
    Ok(match Content::deserialize(content)? {
        Content::Text(text) => text,
        Content::Parts(parts) => parts.into_iter().map(|Part::Text { text }| text).collect(),
    })
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
    bos_token: Option<TokenField>,
    eos_token: Option<TokenField>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum TemplateField {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Debug, Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum TokenField {
    Name(String),
    Added { content: String },
}

impl TokenField {
    fn name(self) -> String {
        match self {
            Self::Name(name) | Self::Added { content: name } => name,
        }
    }
}

/// Turns conversations into text.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    begin: String,
    end: String,
}

const NAME: &str = "chat";

impl ChatTemplate {
    /// The template `source`, in which `bos_token` is `begin` and `eos_token` is `end`.
    ///
    /// # Errors
    /// When it is no template.
    pub fn new(source: String, begin: String, end: String) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        // As `transformers` sets them.
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |text: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, text))
        });
        environment.add_template_owned(NAME, source)?;
        Ok(Self { environment, begin, end })
    }

    /// The template of a `tokenizer_config.json`; none if it has no template.
    ///
    /// # Errors
    /// When the file is not such a configuration, or its template is none.
    pub fn from_tokenizer_config(json: &str) -> Result<Option<Self>, TemplateError> {
        let config: TokenizerConfig = serde_json::from_str(json)
            .map_err(|error| TemplateError(format!("tokenizer_config.json: {error}")))?;
        let source = match config.chat_template {
            None => return Ok(None),
            Some(TemplateField::One(source)) => source,
            Some(TemplateField::Named(named)) => {
                let default = named.into_iter().find(|template| template.name == "default");
                default.ok_or_else(|| TemplateError("no template is named `default`".into()))?.template
            }
        };
        let name = |token: Option<TokenField>| token.map(TokenField::name).unwrap_or_default();
        Self::new(source, name(config.bos_token), name(config.eos_token)).map(Some)
    }

    /// The text of `messages`, up to where the assistant speaks next.
    ///
    /// # Errors
    /// When the template refuses them.
    pub fn render(&self, messages: &[Message]) -> Result<String, TemplateError> {
        let values = context! {
            messages => Serde(messages), bos_token => &self.begin, eos_token => &self.end, add_generation_prompt => true,
        };
        Ok(self.environment.get_template(NAME)?.render(values)?)
    }

    /// Name of the token that ends a turn, if the configuration names one.
    pub fn end_token(&self) -> Option<&str> {
        Some(&self.end[..]).filter(|end| !end.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(role: &str, content: &str) -> Message {
        Message { role: role.into(), content: content.into(), name: None }
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

    #[test]
    fn content_may_come_in_parts() {
        let parts =
            r#"{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}"#;
        assert_eq!(serde_json::from_str::<Message>(parts).unwrap(), said("user", "ab"));
        let image = r#"{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}"#;
        assert!(serde_json::from_str::<Message>(image).unwrap_err().to_string().contains("parts of type"));
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
        let named = r#"{"chat_template": [{"name": "default", "template": "x"}]}"#;
        assert_eq!(ChatTemplate::from_tokenizer_config(named).unwrap().unwrap().render(&[]).unwrap(), "x");
    }
}
