//! Tables and lists of fields for people: plain columns, as wide as their widest cell.

use peer_proto::text::escape;
use unicode_width::UnicodeWidthStr;

/// Lays `rows` out under `header`. Cells are escaped here.
pub(super) fn table<const N: usize>(header: [&str; N], rows: &[[String; N]]) -> String {
    let mut lines = vec![header.map(str::to_owned)];
    lines.extend(rows.iter().map(|row| row.each_ref().map(|cell| escape(cell))));
    let widths: [usize; N] =
        std::array::from_fn(|column| lines.iter().map(|line| line[column].width()).max().unwrap_or_default());
    lines.iter().map(|line| lay_out(line, &widths)).collect()
}

/// What does not fit into a column: a sentence for each name, in a paragraph below the table. Empty without sentences.
pub(super) fn remarks<'a>(remarks: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let lines = remarks.into_iter().map(|(name, remark)| format!("{}: {}\n", escape(name), escape(remark)));
    let text: String = lines.collect();
    if text.is_empty() { text } else { format!("\n{text}") }
}

/// Lays out names and values, one pair a line. Values are escaped here; empty ones are left out.
pub(super) fn fields(pairs: &[(&str, String)]) -> String {
    let pairs: Vec<[String; 2]> = pairs
        .iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(name, value)| [format!("{name}:"), escape(value)])
        .collect();
    let width = pairs.iter().map(|pair| pair[0].width()).max().unwrap_or_default();
    pairs.iter().map(|pair| lay_out(pair, &[width, 0])).collect()
}

fn lay_out(cells: &[String], widths: &[usize]) -> String {
    let mut line = String::new();
    for (cell, width) in cells.iter().zip(widths) {
        line.push_str(cell);
        line.push_str(&" ".repeat(width.saturating_sub(cell.width()) + 2));
    }
    line.truncate(line.trim_end().len());
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_remote_text_is_escaped() {
        let row = |name: &str, peer: &str, url: &str| [name.to_owned(), peer.to_owned(), url.to_owned()];
        let rows = [row("web", "語-bob", "https://a.peer.localhost/"), row("a\u{1b}[2J", "carol", "")];
        let expected = "\
NAME        PEER    URL
web         語-bob  https://a.peer.localhost/
a\\u{1b}[2J  carol
";
        assert_eq!(table(["NAME", "PEER", "URL"], &rows), expected);
    }

    #[test]
    fn remarks_stand_below_in_a_paragraph_of_their_own() {
        assert_eq!(remarks([("bob", "no route\u{1b}")]), "\nbob: no route\\u{1b}\n");
        assert_eq!(remarks([]), "");
    }

    #[test]
    fn fields_without_a_value_are_left_out() {
        let pairs = [("name", "web".to_owned()), ("url", String::new()), ("state", "running".to_owned())];
        assert_eq!(fields(&pairs), "name:   web\nstate:  running\n");
    }
}
