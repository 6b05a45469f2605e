"""Goodput: the highest rate at which a system keeps its limits, for many systems at once.

A round simulates a few rates inside each open bracket, all systems, rates and seeds in one batch. The rate only
stretches the arrivals, so requests are the same at all rates, and later rounds run in the programs of the first: as
brackets close, those still open share fewer tiles of the same width, and get more rates each where a tile has room.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, Protocol

import msgspec
import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy.special import stdtrit

from jaxsim._core.errors import InputError
from jaxsim.spec.scenario import Scenario, SloSection
from jaxsim.spec.values import plain
from jaxsim.study import runner
from jaxsim.study.lanes import Shape
from jaxsim.study.plan import Tile, plan_of
from jaxsim.study.study import Study

RATES_A_ROUND = 8
MOST_ROUNDS = 12
WIDEN = 64.0
"""A bracket that holds no answer is moved on by this factor."""

LOWEST_RPS, HIGHEST_RPS = 1e-4, 1e6
"""Beyond these it is not moved: nobody is alone at a lower rate, and all come at once at a higher."""

Rule = Literal["joint", "separate"]
RULES: dict[str, tuple[Rule, ...]] = {"joint": ("joint",), "separate": ("separate",), "both": ("joint", "separate")}

SHOWN = ("window_s", "mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_tpot_ms", "mean_e2el_ms", "output_throughput",
         "num_devices", "usd_per_million_output_tokens", "energy_j_per_output_token")
"""Metrics of the runs at the rate found."""

_LIMITS = ("ttft", "tpot", "e2e")


def search(scenarios: Sequence[Scenario], *, slo: SloSection | None = None, attainment: float = 0.9,
           rule: Literal["joint", "separate", "both"] = "joint", rates: tuple[float, float] = (0.1, 100.0),
           tolerance: float = 0.02, workers: int | None = None,
           progress: Callable[[str, int, int], None] = lambda *_: None, batches: "Batches | None" = None,
           contests: Sequence[tuple[Hashable, float]] | None = None) -> pd.DataFrame:
    """The goodput of every scenario: a row each, or with `both` two.

    slo: limits, instead of each scenario's own. attainment: share of requests that must meet them, all of them at once
    (`joint`) or each by itself (`separate`, DistServe's rule). rates: requests/s to begin with; a bracket that they
    miss is moved on. tolerance: relative width of the bracket at the end. progress: told what, and how many brackets
    are closed of how many. batches: who runs scenarios, instead of the event engine. contests: of every scenario, the
    contest in which it stands and what its rate is divided by: only who has the highest quotient of a contest, and by
    what rate, is found as closely as `tolerance`; the bracket of another is left as it is once it can win no more.
    Rates are then powers of 1 + tolerance, tried from the highest down, since runs at low rates are long; so who wins
    does not depend on the order, as long as whoever meets the target does so at all lower rates as well. Where
    `batches` runs one at a time, a contest tries one rate of one system at a time: who leads is found as closely as
    `tolerance`, and anybody else is tried first at the lowest rate at which it would not be behind, and at no other if
    it misses that.

    Columns: scenario, the index; rule; rate_rps, the highest rate found to meet the target with all tried below it (0
    if none did down to the lowest, NaN if lower ones were not tried, or if the scenario cannot be simulated: `refused`
    says why); rate_rps.ci95, half of the 95 % interval
    over seeds of the rate at which the mean attainment crosses the target (jackknife; NaN from one seed); next_rps, the
    lowest found to miss it (infinite if none did), and limited_by, what it missed: the limit that fewest requests met,
    or `unstable`, requests piling up, which misses the target however few there are; rate_rps_per_device; attainment
    and `SHOWN` at rate_rps. Raises `InputError`.

    A warm-up and a cool-down are of the scenario's own rate, and are stretched with the arrivals: the same requests
    are measured at all rates. Outages that are drawn are not: none begins after `cluster.failures.until_s`, whatever
    the rate; given ones are refused.
    """
    wanted = [s if slo is None else msgspec.structs.replace(s, slo=slo) for s in scenarios]
    _check(wanted, attainment, rates, tolerance)
    brackets = [_Bracket(k, s, name, attainment) for k, s in enumerate(wanted) for name in RULES[rule]]
    tried = [_Tried() for _ in wanted]
    batches = batches or _Batches()
    in_turn = contests is not None and batches.is_one_at_a_time
    ask = _Bracket.asks if contests is None else _Bracket.falls
    most_rounds = MOST_ROUNDS if contests is None else 2 * MOST_ROUNDS
    for turn in range(most_rounds * len(brackets) if in_turn else most_rounds):
        if in_turn:
            open_ = asked = _next_in_turn(brackets, tried, contests, rates, tolerance)
        else:
            open_ = [b for b in brackets if ask(b, tried[b.scenario], rates, tolerance, 1)]
            if contests is not None:
                open_ = _may_win(open_, brackets, tried, contests)
        progress(f"round {turn + 1}", len(brackets) - len(open_), len(brackets))
        if not open_:
            break
        if not in_turn:
            room = batches.rates_each([b.scenario for b in open_], wanted)
            asked = dict.fromkeys((b.scenario, float(rate)) for b in open_
                                  for rate in ask(b, tried[b.scenario], rates, tolerance, room[b.scenario]))
        frame, refusals = batches.run([(k, scenario_at(wanted[k], rate)) for k, rate in asked], workers)
        for at, (k, rate) in enumerate(asked):
            tried[k].add(rate, frame[frame["point"] == at], refusals.get(at))
    return pd.DataFrame([b.row(tried[b.scenario]) for b in brackets])


def search_study(study: Study, **options: Any) -> pd.DataFrame:
    """The goodput of every point of a study whose axes are everything but the rate; options: those of `search`.

    The columns of the axes come first. Points that cannot be simulated are kept, `refused` says why. Raises
    `InputError`.
    """
    points, scenarios, refused = list(study.points()), {}, {}
    if not points:
        raise InputError("where", study.where, "leaves no point of the study", "loosen a condition")
    if "workload.rate_rps" in points[0]:
        raise InputError("axes.workload.rate_rps", "an axis", "is what is searched for", "leave it out")
    if options.get("slo") is not None and any(name.startswith("slo.") for name in points[0]):
        raise InputError("--slo", "given", "stands against an axis over limits", "leave one of them out")
    base = study.base_tree()
    for k, point in enumerate(points):
        try:
            scenarios[k] = study.scenario_at(point, base)
        except InputError as error:
            refused[k] = str(error)
    found = search(list(scenarios.values()), **options) if scenarios else pd.DataFrame({"scenario": []})
    found["scenario"] = [list(scenarios)[int(k)] for k in found["scenario"]]
    rules = RULES[options.get("rule", "joint")]
    lost = pd.DataFrame([{"scenario": k, "rule": rule, "refused": why} for k, why in refused.items() for rule in rules])
    found = pd.concat([part for part in (found, lost) if len(part)], ignore_index=True)
    found = found.sort_values("scenario", kind="stable", ignore_index=True)
    if study.feasible_only:
        found = found[found["refused"].isna()].reset_index(drop=True)
    parameters = pd.DataFrame([points[k] for k in found["scenario"]])
    return pd.concat([parameters, found.drop(columns="scenario")], axis=1)


def scenario_at(scenario: Scenario, rate_rps: float) -> Scenario:
    """The scenario at another rate; its window is stretched with the arrivals."""
    rate_rps = float(rate_rps)
    workload = msgspec.structs.replace(scenario.workload, rate_rps=rate_rps)
    scale = (scenario.workload.rate_rps or 0.0) / rate_rps
    return msgspec.structs.replace(scenario, workload=workload, warmup_s=scenario.warmup_s * scale,
                                   cooldown_s=scenario.cooldown_s * scale)


def _check(scenarios, attainment, rates, tolerance) -> None:
    for scenario in scenarios:
        if not _limited(scenario):
            raise InputError("--slo", None, "names no limit", "give e.g. --slo ttft:200 tpot:50, milliseconds")
    if not 0 < attainment <= 1:
        raise InputError("--attainment", attainment, "is not a share", "give e.g. 0.9")
    if not 0 < rates[0] < rates[1] < float("inf"):
        raise InputError("--rates", list(rates), "is no range of rates", "give the lower, then the higher")
    if not 1e-4 <= tolerance < 1:
        raise InputError("--tolerance", tolerance, "is not between 0.0001 and 1", "give e.g. 0.02")
    for scenario in scenarios:
        if scenario.workload.kind in ("closed-loop", "batch"):
            raise InputError("workload.kind", scenario.workload.kind, "has no rate to search over",
                             "use an open arrival process, or a trace")
        if scenario.workload.has_sessions:
            raise InputError("workload.sessions", scenario.workload.kind,
                             "begin at a rate, but their requests come as answers come out",
                             "sweep workload.rate_rps with `jaxsim sweep`, or use single requests")
        failures = scenario.cluster.failures
        if failures is not None and failures.outages:
            raise InputError("cluster.failures.outages", plain(failures.outages),
                             "are at given times, before which a run at a higher rate may be over",
                             "have them drawn, by mtbf_s, mttr_s and until_s")
        for field in ("warmup_s", "cooldown_s"):
            if getattr(scenario, field) and scenario.workload.rate_rps is None:
                raise InputError(field, getattr(scenario, field),
                                 "is of no rate: it is stretched with the arrivals, from workload.rate_rps",
                                 "give workload.rate_rps, or leave it out")


class _Tried:
    """What is known of a scenario: the runs at each rate, or why there are none."""

    def __init__(self):
        self._runs: dict[float, pd.DataFrame] = {}
        self.refusals: dict[float, str] = {}
        self.verdicts: dict[tuple[float, Rule], bool] = {}

    def add(self, rate_rps: float, runs: pd.DataFrame, refusal: str | None) -> None:
        """Remember the runs of all seeds at a rate."""
        self._runs[rate_rps] = runs
        if refusal is not None:
            self.refusals[rate_rps] = refusal

    @property
    def rates(self) -> list[float]:
        """All that were tried, rising."""
        return sorted(self._runs)

    def at(self, rate_rps: float) -> pd.DataFrame:
        """A row a seed; none where the rate was refused."""
        return self._runs[rate_rps]

    @property
    def refusal(self) -> str | None:
        """Why the scenario cannot be simulated at any rate."""
        return next(iter(self.refusals.values())) if self.rates and len(self.refusals) == len(self._runs) else None


@dataclasses.dataclass(frozen=True)
class _Bracket:
    """The search of one scenario under one rule; what is known is in `_Tried`."""

    scenario: int
    of: Scenario
    rule: Rule
    target: float

    def shares(self, runs: pd.DataFrame) -> Float[np.ndarray, " seeds"]:
        """By run: the share of requests that counts. A run that was stopped by a bound counts nothing."""
        names = ["slo.attainment"]
        if self.rule == "separate":
            names = [f"slo.{name}_attainment" for name in _limited(self.of)]
        return np.where(runs["fault"].notna(), 0.0, runs[names].min(axis=1).to_numpy(float))

    def ends(self, tried: _Tried) -> tuple[float, float]:
        """The highest rate that meets the target with all below, 0 if none; the lowest that misses it."""
        low = 0.0
        for rate in tried.rates:
            if (rate, self.rule) not in tried.verdicts:
                runs = tried.at(rate)
                tried.verdicts[rate, self.rule] = bool(len(runs)) and _is_met(self.shares(runs), _piles_up(runs),
                                                                              self.target)
            if not tried.verdicts[rate, self.rule]:
                return low, rate
            low = rate
        return low, math.inf

    def asks(self, tried: _Tried, rates: tuple[float, float], tolerance: float, most: int) -> list[float]:
        """Rates to try next; none once the bracket is closed."""
        if not tried.rates:
            return list(np.geomspace(*rates, RATES_A_ROUND))
        low, high = self.ends(tried)
        if tried.refusal is not None or (low == 0 and high <= LOWEST_RPS) or (high == math.inf and low >= HIGHEST_RPS):
            return []
        if low == 0:
            return list(np.geomspace(max(high / WIDEN, LOWEST_RPS), high, most + 1)[:-1])
        if high == math.inf:
            return list(np.geomspace(low, min(low * WIDEN, HIGHEST_RPS), most + 1)[1:])
        closing = math.ceil(math.log(high / low) / math.log1p(tolerance) - 1e-9) - 1
        return list(np.geomspace(low, high, min(most, closing) + 2)[1:-1])

    def falls(self, tried: _Tried, rates: tuple[float, float], tolerance: float, most: int) -> list[float]:
        """The same, of powers of 1 + tolerance: from the highest down, by halves, until one meets the target."""
        power, rate_of = _powers(tolerance)
        if not tried.rates:
            return [rate_of(power(rates[1]))]
        low, high = self.ends(tried)
        if tried.refusal is not None or (low == 0 and high <= LOWEST_RPS) or (high == math.inf and low >= HIGHEST_RPS):
            return []
        if high == math.inf:
            # Whoever keeps the limits at these may do so with all requests at once.
            return [rate_of(power(2 * low) + 1) if low < 8 * rates[1] else HIGHEST_RPS]
        if low == 0:
            # Whoever is too slow for these is so alone, more often than not.
            return [rate_of(min(power(high / 2), power(high) - 1)) if high > 2 * rates[0] else LOWEST_RPS]
        first, last = power(low), power(high)
        inner = np.linspace(first, last, min(most, last - first - 1) + 2)[1:-1] if last - first > 1 else []
        return [rate_of(round(number)) for number in inner]

    def challenges(self, tried: _Tried, rates: tuple[float, float], tolerance: float, lead: float) -> float | None:
        """The next rate alone, a power of 1 + tolerance: the lowest that is not below `lead`, 0 if nobody leads, then
        what finds its own end; None once that is known, or is below."""
        power, rate_of = _powers(tolerance)
        low, high = self.ends(tried)
        if tried.refusal is not None or (low == 0 and high <= LOWEST_RPS) or (high == math.inf and low >= HIGHEST_RPS):
            return None
        least = math.ceil(math.log(lead) / math.log1p(tolerance) - 1e-9) if lead else None
        if least is not None and (low == 0 or power(low) < least):
            return rate_of(least) if high == math.inf or least < power(high) else None
        if low == 0 and high == math.inf:
            return rate_of((power(rates[0]) + power(rates[1])) // 2)
        if low == 0 or high == math.inf:
            return self.falls(tried, rates, tolerance, 1)[0]
        return rate_of((power(low) + power(high)) // 2) if power(high) - power(low) > 1 else None

    def row(self, tried: _Tried) -> dict[str, Any]:
        """What was found."""
        row = dict.fromkeys(("scenario", "rule", "rate_rps", "rate_rps.ci95", "next_rps", "limited_by",
                             "rate_rps_per_device", "attainment", *SHOWN), math.nan)
        row |= {"scenario": self.scenario, "rule": self.rule, "limited_by": None, "refused": tried.refusal}
        if tried.refusal is not None:
            return row
        low, high = self.ends(tried)
        row |= {"rate_rps": low if low > 0 or high <= LOWEST_RPS else math.nan, "next_rps": high}
        if high < math.inf:
            row["limited_by"] = self._limiting(tried.at(high))
        if 0 < low and high < math.inf:
            row["rate_rps.ci95"] = self._half_width(tried)
        if low:
            here = tried.at(low)
            row |= {name: float(here[name].mean()) for name in SHOWN}
            row |= {"attainment": float(self.shares(here).mean()), "rate_rps_per_device": low / row["num_devices"]}
        return row

    def _limiting(self, runs: pd.DataFrame) -> str | None:
        """What a rate missed."""
        if not len(runs):
            return "refused"
        if runs["fault"].notna().any():
            return "fault"
        if self.shares(runs).mean() >= self.target:
            return "unstable"
        means = {name: float(runs[f"slo.{name}_attainment"].mean()) for name in _limited(self.of)}
        return min(means, key=means.__getitem__)

    def _half_width(self, tried: _Tried) -> float:
        """Jackknife over seeds: the crossing without each seed in turn.

        Seeds are left out one by one rather than looked at one by one: what is left crosses near the rate found, where
        rates were tried densely, and a single seed far from it. Source: Efron and Stein, The jackknife estimate of
        variance, Annals of Statistics 9 (1981).
        """
        rates = [rate for rate in tried.rates if len(tried.at(rate))]
        shares = np.array([self.shares(tried.at(rate)) for rate in rates])
        piles = np.array([_piles_up(tried.at(rate)) for rate in rates])
        seeds = shares.shape[1]
        if seeds < 2:
            return math.nan
        without = [_crossing(rates, np.delete(shares, s, axis=1), np.delete(piles, s, axis=1), self.target)
                   for s in range(seeds)]
        error = math.sqrt((seeds - 1) ** 2 / seeds) * np.std(without, ddof=1)
        return float(stdtrit(seeds - 1, 0.975) * error)


def _limited(scenario: Scenario) -> list[str]:
    """Kinds of limits that some requests have, of all or of a tenant."""
    tenants = scenario.workload.tenants
    own = {"ttft": [t.ttft_ms for t in tenants], "tpot": [t.tpot_ms for t in tenants],
           "e2e": [t.deadline_ms for t in tenants]}
    return [name for name in _LIMITS
            if any(limit is not None for limit in (getattr(scenario.slo, f"{name}_ms"), *own[name]))]


def _may_win(open_: Sequence[_Bracket], brackets: Sequence[_Bracket], tried: Sequence[_Tried],
             contests: Sequence[tuple[Hashable, float]]) -> list[_Bracket]:
    """Those whose upper end is not behind the lower end of another of their contest, under the same rule."""
    best: dict[Hashable, float] = defaultdict(float)

    def known(bracket: _Bracket) -> tuple[Hashable, float, float]:
        contest, divisor = contests[bracket.scenario]
        low, high = bracket.ends(tried[bracket.scenario])
        return (contest, bracket.rule), low / divisor, high / divisor

    for contest, low, _ in map(known, brackets):
        best[contest] = max(best[contest], low)
    return [bracket for bracket in open_ for contest, _, high in [known(bracket)] if high > best[contest]]


def _next_in_turn(brackets: Sequence[_Bracket], tried: Sequence[_Tried], contests: Sequence[tuple[Hashable, float]],
                  rates: tuple[float, float], tolerance: float) -> dict[tuple[int, float], None]:
    """Of each contest and rule whose turn it is, and at which rate: who leads; once that one is done, who was tried at
    the fewest rates, of these the one with the smallest divisor."""
    def known(bracket: _Bracket) -> tuple[tuple[Hashable, Rule], float, float]:
        contest, divisor = contests[bracket.scenario]
        return (contest, bracket.rule), divisor, bracket.ends(tried[bracket.scenario])[0] / divisor

    best: dict[tuple[Hashable, Rule], float] = defaultdict(float)
    for contest, _, low in map(known, brackets):
        best[contest] = max(best[contest], low)
    turns: dict[tuple[Hashable, Rule], tuple[tuple[float, int, float], tuple[int, float]]] = {}
    for bracket in brackets:
        contest, divisor, low = known(bracket)
        rate = bracket.challenges(tried[bracket.scenario], rates, tolerance, best[contest] * divisor)
        place = -low, len(tried[bracket.scenario].rates), divisor
        if rate is not None and (contest not in turns or place < turns[contest][0]):
            turns[contest] = place, (bracket.scenario, rate)
    return dict.fromkeys(asked for _, asked in turns.values())


def _powers(tolerance: float) -> tuple[Callable[[float], int], Callable[[int], float]]:
    """Of 1 + tolerance: the nearest to a rate, and the rate of one."""
    return (lambda rate: round(math.log(rate) / math.log1p(tolerance))), (lambda number: (1 + tolerance) ** number)


def _piles_up(runs: pd.DataFrame) -> Bool[np.ndarray, " seeds"]:
    return (runs["unstable"] > 0.5).to_numpy()


def _is_met(shares: Float[np.ndarray, " seeds"], piles_up: Bool[np.ndarray, " seeds"], target: float) -> bool:
    """Whether a rate meets the target in the mean over seeds, and most of them do not see requests pile up."""
    return bool(shares.mean() >= target and piles_up.mean() <= 0.5)


def _crossing(rates: Sequence[float], shares: Float[np.ndarray, "rates seeds"],
              piles_up: Bool[np.ndarray, "rates seeds"], target: float) -> float:
    """The rate at which the mean over seeds crosses the target, linear in the logarithm between those tried."""
    met = [_is_met(s, p, target) for s, p in zip(shares, piles_up, strict=True)]
    first = met.index(False) if False in met else len(met)
    if first in (0, len(met)):
        return float(rates[min(first, len(met) - 1)])
    above, below = shares[first - 1].mean(), shares[first].mean()
    # Where requests pile up before limits are missed, anywhere in between.
    part = (above - target) / (above - below) if below < target else 0.5
    return float(rates[first - 1] * (rates[first] / rates[first - 1]) ** part)


class Batches(Protocol):
    """Who runs scenarios for `search`.

    is_one_at_a_time: nothing is saved by many at once.
    """

    is_one_at_a_time: bool

    def rates_each(self, owners: Sequence[int], scenarios: Sequence[Scenario]) -> Mapping[int, int]:
        """How many rates each of these systems may try at once."""

    def run(self, asked: Sequence[tuple[int, Scenario]], workers: int | None) -> tuple[pd.DataFrame, dict[int, str]]:
        """Scenarios and whose they are: a row a run with `point`, the place here, and why some were refused."""


class _Batches:
    """Runs scenarios in tiles; what fits a tile that was run before takes its program."""

    is_one_at_a_time = False

    def __init__(self):
        self._tiles: dict[Hashable, list[Tile]] = defaultdict(list)
        self._tile_of: dict[int, Tile] = {}

    def rates_each(self, owners: Sequence[int], scenarios: Sequence[Scenario]) -> Mapping[int, int]:
        """How many rates each of these systems may try at once: what fills the tiles that they need."""
        sharing: dict[int, list[int]] = defaultdict(list)
        for k in owners:
            sharing[id(self._tile_of.get(k))].append(k)
        found = dict.fromkeys(owners, RATES_A_ROUND)
        for mine in sharing.values():
            tile = self._tile_of.get(mine[0])
            if tile is not None:
                runs = sum(scenarios[k].num_seeds for k in mine)
                num_tiles = -(-runs * RATES_A_ROUND // tile.width)
                found |= dict.fromkeys(mine, max(num_tiles * tile.width // runs, RATES_A_ROUND))
        return found

    def run(self, asked: Sequence[tuple[int, Scenario]], workers: int | None) -> tuple[pd.DataFrame, dict[int, str]]:
        """Scenarios and whose they are: a row a run with `point`, the place here, and why some were refused."""
        refusals: dict[int, str] = {}
        fitting: dict[int, list[int]] = defaultdict(list)
        known: dict[int, Tile] = {}
        new: list[int] = []
        for at, (_, scenario) in enumerate(asked):
            try:
                tile = self._like(runner.LANES.shape(scenario), scenario.num_seeds)
            except InputError as error:
                refusals[at] = str(error)
                continue
            if tile is None:
                new.append(at)
            else:
                known[id(tile)] = tile
                fitting[id(tile)].append(at)
        tiles = [tile for key, places in fitting.items() for tile in _filled(known[key], places, asked)]
        made = plan_of([lambda s=asked[at][1]: s for at in new], runner.LANES)
        runner.check_memory(runner.estimate(made), workers)
        for tile in made.tiles:
            first = runner.LANES.shape(tile.scenarios[0])
            self._tiles[first.key, first.num_requests].append(tile)
            places = tuple(new[point] for point in tile.points)
            self._tile_of |= {asked[at][0]: self._like(first, 1) or tile for at in places}
            tiles.append(dataclasses.replace(tile, points=places))
        frame = runner.rows_of(tiles, workers)
        return frame.sort_values(["point", *(["seed"] if tiles else [])], ignore_index=True), refusals

    def _like(self, shape: Shape, num_seeds: int) -> Tile | None:
        """The smallest tile with room for such a scenario."""
        fits = [tile for tile in self._tiles.get((shape.key, shape.num_requests), ())
                if shape.slots <= tile.slots and shape.longest <= tile.longest and num_seeds <= tile.width
                and max(s.most_tokens(tile.slots, tile.longest) for s in shape.schedulers) <= tile.tokens]
        return min(fits, key=lambda tile: tile.slots, default=None)


def _filled(like: Tile, places: Sequence[int], asked: Sequence[tuple[int, Scenario]]) -> list[Tile]:
    """Tiles of the same program, a scenario's seeds together."""
    filled, current, count = [], [], 0
    for at in places:
        seeds = asked[at][1].num_seeds
        if count + seeds > like.width:
            filled.append(current)
            current, count = [], 0
        current.append(at)
        count += seeds
    return [dataclasses.replace(like, points=tuple(part), scenarios=tuple(asked[at][1] for at in part))
            for part in [*filled, current]]
