//! Templates and expressions over a record, in the Jinja language.

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, UndefinedBehavior, Value};

/// Renders the templates of one task.
#[derive(Debug)]
pub(crate) struct Templates {
    environment: Environment<'static>,
}

impl Templates {
    pub(crate) fn new() -> Self {
        let mut environment = Environment::new();
        // A misspelt field must not become an empty prompt.
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        // A prompt may end with a line end.
        let syntax = SyntaxConfig::builder().keep_trailing_newline(true).build();
        environment.set_syntax(syntax.expect("the usual syntax"));
        Self { environment }
    }

    /// Refuses an invalid template, with the line in it, from 0, and the reason.
    pub(crate) fn check(&self, source: &str) -> Result<(), (usize, String)> {
        let error = self.environment.template_from_str(source).err();
        error.map_or(Ok(()), |error| Err((error.line().unwrap_or(1) - 1, reason(&error))))
    }

    /// Refuses an invalid expression.
    pub(crate) fn check_expression(&self, source: &str) -> Result<(), String> {
        self.environment.compile_expression(source).map(|_| ()).map_err(|error| reason(&error))
    }

    /// Renders a template with `fields`.
    pub(crate) fn render(&self, source: &str, fields: &Value) -> Result<String, String> {
        self.environment.render_str(source, fields).map_err(|error| reason(&error))
    }

    /// The value of an expression.
    pub(crate) fn value(&self, source: &str, fields: &Value) -> Result<Value, String> {
        let expression = self.environment.compile_expression(source).map_err(|error| reason(&error))?;
        let value = expression.eval(fields).map_err(|error| reason(&error))?;
        if value.is_undefined() {
            return Err(format!("`{source}` is not in the record"));
        }
        Ok(value)
    }

    /// The texts of an expression that is a list; a single text becomes a list of one.
    pub(crate) fn texts(&self, source: &str, fields: &Value) -> Result<Vec<String>, String> {
        let value = self.value(source, fields)?;
        if let Some(text) = value.as_str() {
            return Ok(vec![text.to_owned()]);
        }
        let items = value.try_iter().map_err(|_| format!("`{source}` is not a list of texts: {value}"))?;
        Ok(items.map(|item| item.to_string()).collect())
    }
}

fn reason(error: &minijinja::Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use minijinja::context;

    use super::Templates;

    #[test]
    fn texts_and_values_of_a_record() {
        let (templates, fields) = (Templates::new(), context! { a => "x", list => ["1", "2"] });
        assert_eq!(templates.render("{{ a }}:\n", &fields).unwrap(), "x:\n");
        assert_eq!(templates.texts("list", &fields).unwrap(), ["1", "2"]);
        assert_eq!(templates.texts("[a, a ~ 'y']", &fields).unwrap(), ["x", "xy"]);
        assert_eq!(templates.texts("a", &fields).unwrap(), ["x"]);
    }

    #[test]
    fn what_is_not_there_is_refused() {
        let (templates, fields) = (Templates::new(), context! { a => 1 });
        assert!(templates.render("{{ b }}", &fields).unwrap_err().contains("undefined"));
        assert!(templates.value("b", &fields).unwrap_err().contains("`b`"));
        assert!(templates.texts("a", &fields).unwrap_err().contains("is not a list"));
        assert_eq!(templates.check("x\n{{ a").unwrap_err().0, 1);
        assert!(templates.check_expression("a +").is_err());
    }
}
