//! Text tables: aligned columns, names on the left, numbers on the right.

use std::fmt;

use unicode_width::UnicodeWidthStr;

/// Rows of cells below a header. The first column is aligned left, the others right.
#[derive(Debug)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with this header.
    pub(crate) fn new<S: Into<String>>(header: impl IntoIterator<Item = S>) -> Self {
        Self { rows: vec![header.into_iter().map(Into::into).collect()] }
    }

    /// Adds a row.
    pub(crate) fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }

    fn widths(&self) -> Vec<usize> {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |row: &Vec<String>, column| row.get(column).map_or(0, |cell: &String| cell.width());
        (0..columns).map(|column| self.rows.iter().map(|row| width(row, column)).max().unwrap_or(0)).collect()
    }
}

impl fmt::Display for Table {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widths = self.widths();
        for (index, row) in self.rows.iter().enumerate() {
            let mut line = String::new();
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                let blank = " ".repeat(width - cell.width());
                match column {
                    0 => line.push_str(&format!("{cell}{blank}")),
                    _ => line.push_str(&format!("  {blank}{cell}")),
                }
            }
            writeln!(out, "{}", line.trim_end())?;
            if index == 0 {
                writeln!(out, "{}", "─".repeat(widths.iter().sum::<usize>() + 2 * (widths.len() - 1)))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Table;

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new(["", "memory", "b"]);
        table.row(["total", "8.39M", "10.5M"]);
        table.row(["größer", "1"]);
        let expected = "        memory      b\n\
                        ─────────────────────\n\
                        total    8.39M  10.5M\n\
                        größer       1\n";
        assert_eq!(table.to_string(), expected);
    }
}
