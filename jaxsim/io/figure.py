"""What all figures look like. Drawn without a display; matplotlib is imported when the first is drawn, so that nothing
else waits for it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxsim._core.errors import InputError

INK, FAINT, LINE, LIMIT = "#222222", "#777777", "#0072B2", "#D55E00"
_STYLE = {
    "figure.facecolor": "white", "axes.facecolor": "white", "axes.edgecolor": "#999999",
    "axes.linewidth": 0.8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#E6E6E6",
    "grid.linewidth": 0.7, "axes.axisbelow": True, "font.size": 10, "axes.titlesize": 11,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "legend.frameon": False, "legend.fontsize": 9,
}
_DPI = 130
SUFFIXES = (".png", ".svg", ".pdf")


def check_name(name: str | None) -> None:
    """Refuse what --plot names that is no file for a figure. Raises `InputError`."""
    if name is not None and (Path(name).suffix not in SUFFIXES or not Path(name).parent.is_dir()):
        raise InputError("--plot", name, "is no figure in a folder that is there",
                         f"give a name that ends in {', '.join(SUFFIXES)}")


@contextlib.contextmanager
def drawn(path: Path, *args: Any, **kwargs: Any) -> Iterator[Any]:
    """A figure, saved to `path` when the block ends."""
    # Agg and not pyplot's default: a window system may be absent, and pyplot would keep every figure alive.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(*args, layout="constrained", **kwargs)
        FigureCanvasAgg(figure)
        yield figure
        figure.savefig(path, dpi=_DPI)


def heading(figure: Any, text: str) -> None:
    """The line above all panels."""
    figure.suptitle(text, x=0.008, ha="left", fontsize=10, color=FAINT)
