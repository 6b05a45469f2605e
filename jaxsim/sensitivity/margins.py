"""How far a service is from missing its limits: the smallest change of its surroundings that takes it there.

Changes are of logarithms of fields (rate, lengths, bandwidth), u = log(field / now); a margin is the shortest u at
which fewer than a share of the requests (99 %) keep the limits. One field alone is rarely the shortest way: two that
get a little worse together are closer. The way is found as the most likely point of failure is in structural
reliability:

    go along the steepest fall of the relaxed attainment to where the hard one passes the share,
    take the slope there, at half the temperature, go along that from where things are, `ROUNDS` times

The slope is of relaxed attainment (`jaxsim.sensitivity.relaxed`), whose sigmoid sees near misses where none has missed
yet, by central differences with the same requests on both sides, of the event tier throughout. Everything is pooled
over the seeds. Then the claim is tested: each field alone, and random ways that make things worse, are followed too.

Source: Hasofer and Lind, Journal of the Engineering Mechanics Division 100 (1974), for the point and its iteration.

Approximated: changes are in percent of each field and count alike; attainment is of runs that begin empty; a margin is
read between radii that were simulated. The shortest way that was found is an upper bound of the margin.
"""

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from jaxsim._core.errors import InputError
from jaxsim.sensitivity import relaxed
from jaxsim.sensitivity.pathwise import number_of
from jaxsim.spec.scenario import Scenario
from jaxsim.study import runner
from jaxsim.study.plan import plan_of

FIELDS = ("workload.rate_rps", "workload.input.mean_tokens", "workload.output.mean_tokens",
          "cost.overrides.memory_bytes_per_s")

STEP = 0.05
"""Of differences, in logarithms."""

TEMPERATURE = 0.2
"""Of relaxed attainment: wide enough that requests well within a limit have a slope. It halves every round: nearer to
where the share is passed there are requests near their limits, and what they say is less blurred."""

RADII = np.linspace(0.0, 0.6, 13)[1:]
"""At which a way is simulated."""

ROUNDS, WAYS = 3, 6
"""Slopes that are taken, and random ways that are tried."""


@dataclasses.dataclass(frozen=True)
class Margins:
    """The shortest way to a share of the requests outside the limits.

    attainment: now; share: that is to be kept. slopes: by field, of relaxed attainment by the logarithm, where it is
    passed. table: a row a way: name (`worst`, a field alone, `random k`), radius (relative change, the length of u; NaN
    beyond the largest simulated), and the change of each field in percent there.
    curves: attainment by way and radius.
    """

    attainment: float
    share: float
    fields: tuple[str, ...]
    slopes: dict[str, float]
    table: pd.DataFrame
    curves: dict[str, np.ndarray]

    @property
    def worst(self) -> pd.Series:
        """The shortest way."""
        return self.table.loc[self.table["radius"].idxmin()]


def margins(scenario: Scenario, fields: Sequence[str] = FIELDS, *, share: float = 0.99, seed: int = 0,
            temperature: float = TEMPERATURE) -> Margins:
    """Margins of a scenario with limits by fields with numbers. Raises `InputError`, also where it misses them now."""
    limits = relaxed.limits_s(scenario.slo)
    if not 0 < share < 1:
        raise InputError("share", share, "is no share of the requests", "give one between 0 and 1")
    fields = tuple(fields)
    now = np.array([number_of(scenario, field) for field in fields])

    def attained(changes: Sequence[np.ndarray], warmth: float = temperature) -> tuple[np.ndarray, np.ndarray]:
        """Relaxed and hard attainment of scenarios with these changes, over all seeds."""
        made = [scenario.with_values(dict(zip(fields, map(float, now * np.exp(u)), strict=True))) for u in changes]
        frame, found = _requests(made), []
        for _, rows in frame.groupby("point", sort=True):
            seconds = {name: rows[f"{name}_s"].to_numpy() for name in relaxed.NAMES}
            found.append((float(relaxed.attainment(seconds, limits, warmth)),
                          float(relaxed.hard(seconds, limits))))
        return tuple(np.array(found).T)

    def slopes_at(u: np.ndarray, warmth: float) -> tuple[np.ndarray, float]:
        """Of relaxed attainment, and the hard one there."""
        steps = np.eye(len(fields)) * STEP
        smooth, there = attained([u, *(u + sign * step for step in steps for sign in (1, -1))], warmth)
        return (smooth[1::2] - smooth[2::2]) / (2 * STEP), float(there[0])

    at = np.zeros(len(fields))
    slope, attainment = slopes_at(at, temperature)
    if attainment < share:
        raise InputError("slo", share, f"is missed already: {attainment:.2%} of the requests keep the limits",
                         "raise a limit, lower the rate, or ask for a smaller share")
    ways: dict[str, np.ndarray] = {}
    curves: dict[str, np.ndarray] = {}

    def follow(named: Mapping[str, np.ndarray]) -> dict[str, float]:
        _, found = attained([radius * way for way in named.values() for radius in RADII])
        found = found.reshape(len(named), len(RADII))
        ways.update(named)
        curves.update(zip(named, found, strict=True))
        return {name: _passed(np.append(attainment, row), share) for name, row in zip(named, found, strict=True)}

    radii: dict[str, float] = {}
    for index in range(ROUNDS):
        name = f"steepest {index + 1}"
        radii |= follow({name: -slope / max(float(np.linalg.norm(slope)), 1e-12)})
        if math.isnan(radii[name]):
            break
        at = radii[name] * ways[name]
        slope, _ = slopes_at(at, temperature / 2 ** (index + 1))
    worse = -np.sign(slope) + (slope == 0)
    draws = np.abs(np.random.default_rng(seed).normal(size=(WAYS, len(fields)))) * worse
    radii |= follow({field: np.eye(len(fields))[i] * worse[i] for i, field in enumerate(fields)} | {
        f"random {i + 1}": way / np.linalg.norm(way) for i, way in enumerate(draws)})
    rows = [{"way": name, "radius": radii[name]} | {
        field: 100 * math.expm1(radii[name] * way[i]) for i, field in enumerate(fields)} for name, way in ways.items()]
    return Margins(attainment, share, fields, dict(zip(fields, map(float, slope), strict=True)), pd.DataFrame(rows),
                   curves)


def _passed(values: np.ndarray, share: float) -> float:
    """Where attainment first falls below a share, linear between radii; NaN if nowhere."""
    below = np.flatnonzero(values < share)
    if not len(below):
        return float("nan")
    radii, at = np.append(0.0, RADII), below[0]
    part = (values[at - 1] - share) / (values[at - 1] - values[at])
    return float(radii[at - 1] + part * (radii[at] - radii[at - 1]))


def _requests(scenarios: Sequence[Scenario]) -> pd.DataFrame:
    """A row a request of all runs, with its point. Raises `InputError` where one is refused."""
    made = plan_of([lambda s=s: s for s in scenarios], runner.LANES)
    for refusal in made.refusals:
        raise InputError("fields", refusal.point, refusal.reason, "ask for other fields, or change the scenario")
    parts = [pq.read_table(io.BytesIO(runner.run_tile(tile, True)[1])).to_pandas() for tile in made.tiles]
    return pd.concat(parts, ignore_index=True)
