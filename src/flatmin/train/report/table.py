"""The results table in the terminal."""

from rich.table import Table

from flatmin.train.report.results import Comparison, column_titles, table_note, table_rows


def render_table(comparison: Comparison) -> Table:
    """Return the results as a table for ``rich``, with its footnote as the caption."""
    table = Table(title=comparison.task, caption=table_note(comparison), caption_justify="left", title_justify="left")
    for index, title in enumerate(column_titles(comparison)):
        table.add_column(title, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in table_rows(comparison):
        table.add_row(*row)
    return table
