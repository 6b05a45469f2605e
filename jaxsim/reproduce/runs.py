"""The studies behind claims: a row a run, and how sure an order over seeds is."""

from collections.abc import Sequence
from importlib import resources

import msgspec
import numpy as np
import pandas as pd
from scipy.special import stdtrit

from jaxsim._core.errors import InputError
from jaxsim.study import runner
from jaxsim.study.study import Study


def study(name: str, num_seeds: int | None = None) -> Study:
    """A study of `scenarios/reproduce` by name, with another number of seeds if given."""
    with resources.as_file(resources.files("jaxsim.scenarios").joinpath("reproduce", f"{name}.toml")) as path:
        found = Study.from_toml(path)
    return found if num_seeds is None else msgspec.structs.replace(found, num_seeds=num_seeds)


def simulated(made: Study) -> pd.DataFrame:
    """All runs of a study: a row a run, its axes beside the metrics of `summary.json`, by point and seed.

    Raises `InputError` for a point that cannot be simulated, or that a bound stopped: a claim stands on all of its
    study.
    """
    base, points = made.base_tree(), list(made.points())
    return _beside_axes(made, points, *runner.table([made.scenario_at(point, base) for point in points]))


def simulated_of(made: Study, most_tokens: int) -> pd.DataFrame:
    """The same, with the percentiles of requests of prompts up to so many tokens: `p50_of_ttft_ms` and so on, of
    ttft_ms and e2el_ms; `p50_over_ttft_ms` and so on of longer ones, NaN without any."""
    base, points = made.base_tree(), list(made.points())
    rows, requests, refused = runner.table_and_requests([made.scenario_at(point, base) for point in points])
    found = _beside_axes(made, points, rows, refused)
    mine = requests[requests["input_tokens"] <= most_tokens].groupby(["point", "seed"])
    more = {f"p{level}_of_{name}_ms": 1e3 * mine[column].quantile(level / 100)
            for name, column in (("ttft", "ttft_s"), ("e2el", "e2e_s")) for level in (50, 90, 99)}
    rest = requests[requests["input_tokens"] > most_tokens].groupby(["point", "seed"])["ttft_s"]
    over = {f"p{level}_over_ttft_ms": 1e3 * rest.quantile(level / 100) for level in (50, 90, 99)}
    found = found.merge(pd.DataFrame(more).reset_index(), on=["point", "seed"])
    return found.merge(pd.DataFrame(over).reset_index(), on=["point", "seed"], how="left")


def _beside_axes(made: Study, points: list, rows: pd.DataFrame, refused: dict[int, str]) -> pd.DataFrame:
    stopped = {} if refused else rows.set_index("point")["fault"].dropna()
    for point, reason in (*refused.items(), *stopped.items()):
        raise InputError(f"study {made.name}", f"point {point}", f"has no result ({reason})", "change the study")
    axes = pd.DataFrame(points).assign(point=np.arange(len(points)))
    rows = rows.drop(columns=[name for name in axes if name in rows and name != "point"])
    return axes.merge(rows, on="point").sort_values(["point", "seed"], ignore_index=True)


def means_in_order(rows: pd.DataFrame, by: str, values: Sequence[float], metric: str) -> tuple[tuple, tuple]:
    """Means of a metric over seeds at these values of an axis, and the margin of every step between them.

    All points have the same seeds, so a step is a mean of paired differences; its margin is half of that mean's 95 %
    Student-t interval. A step that exceeds it is not of the draws.
    """
    # A row a seed, a column a value.
    table = rows.pivot(index="seed", columns=by, values=metric)[list(values)].to_numpy(float)
    steps = np.diff(table, axis=1)
    return tuple(map(float, table.mean(axis=0))), tuple(map(float, half_width(steps)))


def half_width(values: np.ndarray) -> np.ndarray:
    """Half of the 95 % Student-t interval of means over the first axis."""
    count = len(values)
    return stdtrit(count - 1, 0.975) * values.std(axis=0, ddof=1) / np.sqrt(count)
