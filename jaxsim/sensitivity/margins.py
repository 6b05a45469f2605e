"""How far a service is from missing its limits: the smallest change of its surroundings that takes it there.

Changes are of logarithms of fields (rate, lengths, bandwidth), u = log(field / now); a margin is the shortest u at
which fewer than a share of the requests (99 %) keep the limits. One field alone is rarely the shortest way: two that
get a little worse together are closer. The way is found as the most likely point of failure is in structural
reliability:

    go along the steepest fall of the relaxed attainment to where the hard one passes the share,
    take the slope there, at half the temperature, go along that from where things are, `ROUNDS` times

The slope is of relaxed attainment (`jaxsim.sensitivity.relaxed`), whose sigmoid sees near misses where none has missed
yet, by central differences with the same requests on both sides, of the event tier throughout. Everything is pooled
over the seeds: requests outside warm-up and cool-down, each by the limits of its tenant, as `jaxsim.metrics` counts
them. Then the claim is tested: each field alone, and random ways that make things worse, are followed too.

Source: Hasofer and Lind, Journal of the Engineering Mechanics Division 100 (1974), for the point and its iteration.

Approximated: changes are in percent of each field and count alike; attainment is of runs that begin empty; a margin is
read between radii that were simulated; fields that count are rounded. The shortest way that was found is an upper bound
of the margin. A way ends where a scenario cannot be simulated (a pool that a request no longer fits), and says so.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from jaxsim._core.errors import InputError
from jaxsim.metrics.window import measured_span_s
from jaxsim.sensitivity import relaxed
from jaxsim.sensitivity.fields import Field, field_of, with_value
from jaxsim.spec.scenario import Scenario
from jaxsim.study import runner

FIELDS = (("workload.rate_rps", "workload.concurrency"),
          ("workload.input.mean_tokens", "workload.input.tokens", "workload.input"),
          ("workload.output.mean_tokens", "workload.output.tokens", "workload.output"),
          ("cost.overrides.memory_bytes_per_s", "cost.decode.a", "cost.decode.0.a"))
"""What changes unless told: of each line the first that the scenario has."""

STEP = 0.05
"""Of differences, in logarithms."""

TEMPERATURE = 0.2
"""Of relaxed attainment: wide enough that requests well within a limit have a slope. It halves every round: nearer to
where the share is passed there are requests near their limits, and what they say is less blurred."""

RADII = np.linspace(0.0, 0.6, 13)[1:]
"""At which a way is simulated."""

NEAR_RADII = np.array([0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.4, 0.6])
"""The same where the share is passed before the first of them."""

ROUNDS, WAYS = 3, 6
"""Slopes that are taken, and random ways that are tried."""


@dataclasses.dataclass(frozen=True)
class Margins:
    """The shortest way to a share of the requests outside the limits.

    attainment: now; share: that is to be kept. slopes: by field, of relaxed attainment by the logarithm, where it is
    passed. table: a row a way: name (`steepest k`, a field alone, `random k`), radius (the length of u; NaN beyond the
    largest simulated), the change of each field in percent there, and `ends`: why it could not be followed further, or
    None.
    curves: attainment by way and radius, NaN where it ended. notes: what was left out, and why. radii: of the curves.
    """

    attainment: float
    share: float
    fields: tuple[str, ...]
    slopes: dict[str, float]
    table: pd.DataFrame
    curves: dict[str, np.ndarray]
    notes: tuple[str, ...] = ()
    radii: np.ndarray = dataclasses.field(default_factory=lambda: RADII)

    @property
    def worst(self) -> pd.Series:
        """The shortest way."""
        return self.table.loc[self.table["radius"].idxmin()]


def default_fields(scenario: Scenario) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The fields of `FIELDS` that a scenario has, and what it has none of, in words."""
    found, notes = [], []
    for names in FIELDS:
        for name in names:
            try:
                field_of(scenario, name)
            except InputError:
                continue
            found.append(name)
            break
        else:
            notes.append(f"{names[0]} is left out: this scenario has no such number")
    return tuple(found), tuple(notes)


def margins(scenario: Scenario, fields: Sequence[str] | None = None, *, share: float = 0.99, seed: int = 0,
            temperature: float = TEMPERATURE) -> Margins:
    """Margins of a scenario with limits by fields with numbers, those of `default_fields` unless given. Raises
    `InputError`, also where it misses the limits now."""
    scenario = scenario.checked()
    relaxed.check_limits(scenario.slo, scenario.workload.tenants)
    if not 0 < share < 1:
        raise InputError("share", share, "is no share of the requests", "give one between 0 and 1")
    fields, notes = default_fields(scenario) if fields is None else (tuple(fields), ())
    numbers = [field_of(scenario, name) for name in fields]
    if not numbers:
        raise InputError("fields", fields, "are none that this scenario has", "name some with --fields")

    def attained(changes: Sequence[np.ndarray], warmth: float = temperature) -> tuple[np.ndarray, np.ndarray, list]:
        """Relaxed and hard attainment of scenarios with these changes, over all seeds; NaN and why of those that cannot
        be simulated."""
        made, told = [], [None] * len(changes)
        for index, u in enumerate(changes):
            try:
                made.append((index, _moved(scenario, numbers, u)))
            except InputError as error:
                told[index] = str(error)
        found = np.full((2, len(changes)), np.nan)
        _, frame, refused = runner.table_and_requests([one for _, one in made])
        for point, (index, one) in enumerate(made):
            if point in refused:
                told[index] = refused[point]
                continue
            seconds, limits = _measured(one, frame[frame["point"] == point])
            found[:, index] = relaxed.attainment(seconds, limits, warmth), relaxed.hard(seconds, limits)
        return found[0], found[1], told

    def slopes_at(u: np.ndarray, warmth: float) -> tuple[np.ndarray, float]:
        """Of relaxed attainment, and the hard one there."""
        steps = np.eye(len(fields)) * STEP
        smooth, there, told = attained([u, *(u + sign * step for step in steps for sign in (1, -1))], warmth)
        if told[0] is not None:
            raise InputError("scenario", scenario.name, told[0], "change it as that says")
        above, below = smooth[1::2], smooth[2::2]
        # One-sided where a side cannot be simulated.
        sides = np.isfinite(above).astype(int) + np.isfinite(below)
        if not sides.all():
            index = int(np.argmin(sides))
            raise InputError("fields", fields[index], f"cannot be moved: {told[1 + 2 * index]}",
                             "ask for other fields, or change the scenario")
        rise = np.where(np.isfinite(above), above, smooth[0]) - np.where(np.isfinite(below), below, smooth[0])
        return rise / (sides * STEP), float(there[0])

    at = np.zeros(len(fields))
    slope, attainment = slopes_at(at, temperature)
    if attainment < share:
        raise InputError("slo", share, f"is missed already: {attainment:.2%} of the requests keep the limits",
                         "raise a limit, lower the rate, or ask for a smaller share")
    ways: dict[str, np.ndarray] = {}
    curves: dict[str, np.ndarray] = {}
    ends: dict[str, str | None] = {}
    reach = RADII

    def follow(named: Mapping[str, np.ndarray]) -> dict[str, float]:
        _, found, told = attained([radius * way for way in named.values() for radius in reach])
        found = found.reshape(len(named), len(reach))
        # Who cannot be simulated at one radius is not followed beyond it.
        found[np.isnan(found).cumsum(axis=1) > 0] = np.nan
        ways.update(named)
        ends.update({name: next((why for why in told[i * len(reach):(i + 1) * len(reach)] if why is not None), None)
                     for i, name in enumerate(named)})
        curves.update(zip(named, found, strict=True))
        return {name: _passed(np.append(attainment, row), share, reach)
                for name, row in zip(named, found, strict=True)}

    radii: dict[str, float] = {}
    for index in range(ROUNDS):
        name = f"steepest {index + 1}"
        steepest = {name: -slope / max(float(np.linalg.norm(slope)), 1e-12)}
        radii |= follow(steepest)
        if index == 0 and radii[name] < reach[0]:
            reach = NEAR_RADII
            radii |= follow(steepest)
        if math.isnan(radii[name]):
            break
        at = radii[name] * ways[name]
        slope, _ = slopes_at(at, temperature / 2 ** (index + 1))
    worse = -np.sign(slope) + (slope == 0)
    draws = np.abs(np.random.default_rng(seed).normal(size=(WAYS, len(fields)))) * worse
    radii |= follow({field: np.eye(len(fields))[i] * worse[i] for i, field in enumerate(fields)} | {
        f"random {i + 1}": way / np.linalg.norm(way) for i, way in enumerate(draws)})
    rows = [{"way": name, "radius": radii[name]} | {
        field: 100 * math.expm1(radii[name] * way[i]) for i, field in enumerate(fields)} | {
        # Where the limits are missed before it ends, the end does not matter.
        "ends": ends[name] if math.isnan(radii[name]) else None} for name, way in ways.items()]
    return Margins(attainment, share, fields, dict(zip(fields, map(float, slope), strict=True)), pd.DataFrame(rows),
                   curves, notes, reach)


def _passed(values: np.ndarray, share: float, reach: np.ndarray = RADII) -> float:
    """Where attainment first falls below a share, linear between radii; NaN if nowhere before it ends."""
    below = np.flatnonzero(values < share)
    if not len(below):
        return float("nan")
    radii, at = np.append(0.0, reach), below[0]
    part = (values[at - 1] - share) / (values[at - 1] - values[at])
    return float(radii[at - 1] + part * (radii[at] - radii[at - 1]))


def _moved(scenario: Scenario, numbers: Sequence[Field], u: np.ndarray) -> Scenario:
    """With these changes of logarithms; what counts is rounded, to one at least. Raises `InputError`."""
    for field, change in zip(numbers, u, strict=True):
        value = field.value * math.exp(change)
        scenario = with_value(scenario, field.name, max(round(value), 1) if field.is_whole else float(value))
    return scenario


def _measured(scenario: Scenario, frame: pd.DataFrame) -> tuple[dict[str, np.ndarray], relaxed.Limits]:
    """Seconds of the requests that metrics are made of, all seeds in a row, and the limits of each."""
    parts, limits = [], []
    for seed, rows in frame.groupby("seed", sort=True):
        rows = rows.sort_values("request_id")
        arrival_s = rows["arrival_s"].to_numpy()
        _, end_s = measured_span_s(arrival_s, scenario.warmup_s, scenario.cooldown_s)
        is_in = (arrival_s - arrival_s[:1] >= scenario.warmup_s) & (arrival_s <= end_s)
        parts.append(rows[is_in])
        tenants = scenario.workload.tenants
        drawn = runner.LANES.workload(scenario, int(seed)) if tenants else None
        limits.append({name: np.broadcast_to(limit, len(rows))[is_in]
                       for name, limit in relaxed.limits_s(scenario.slo, tenants, drawn).items()})
    rows = pd.concat(parts)
    return ({name: rows[f"{name}_s"].to_numpy() for name in relaxed.NAMES},
            {name: np.concatenate([one[name] for one in limits]) for name in limits[0]})
