"""What `jaxsim list` prints: short columns as a table, long texts as a paragraph below each name."""

from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxsim.io.table import printed

_LONG = 44

Records = Sequence[Mapping[str, Any]]


def print_groups(groups: Mapping[str, Records], file: TextIO | None = None) -> None:
    """Prints groups of records. Of several other names (`also`) a table shows the shortest."""
    def draw(out: Console) -> None:
        for number, (title, rows) in enumerate(groups.items()):
            out.print(Text(("\n" if number else "") + title, style="bold"))
            columns = list(rows[0]) if rows else []
            long = [c for c in columns[1:] if c != "also" and max(len(_text(row[c])) for row in rows) > _LONG]
            if not rows:
                continue
            if len(columns) > 2 and long:
                _draw_paragraphs(out, rows)
            else:
                _draw_table(out, rows)

    printed(draw, file)


def _draw_table(out: Console, rows: Records) -> None:
    table = Table(box=box.SIMPLE_HEAD if out.is_terminal else None, show_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(rows[0]):
        is_number = all(row[column] is None or isinstance(row[column], (int, float)) for row in rows)
        table.add_column(column, justify="right" if is_number else "left", no_wrap=index == 0,
                         overflow="fold")
    for row in rows:
        table.add_row(*(Text(_text([min(v, key=len)] if c == "also" and v else v)) for c, v in row.items()))
    out.print(table)


def _draw_paragraphs(out: Console, rows: Records) -> None:
    for row in rows:
        (_, name), *rest = row.items()
        out.print(Text(f"\n{name}", style="bold"))
        lines = Table(box=None, show_header=False, padding=(0, 2, 0, 2), pad_edge=True)
        lines.add_column(no_wrap=True)
        lines.add_column()
        for label, value in rest:
            if _text(value) != "-":
                text = "\n".join(f"- {v}" for v in value) if label == "leaves out" else _text(value)
                lines.add_row(Text(label), Text(text))
        out.print(lines)


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else f"{value:,}" if isinstance(value, (int, float)) else str(value)
