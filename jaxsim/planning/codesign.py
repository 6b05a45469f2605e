"""What to have more of, and how to spend a budget: gradients of the analytic tier, confirmed by simulation.

A design is amounts x of resources (peaks, bandwidths, memory), each with costs c by budget (area, power, dollars):

    worth    d log R / d log x, and dR / dx / c: what one more unit, or one more mm^2, brings
    x(z)     x = least + t exp(z),  t = min over budgets b of (B_b - fixed_b - c_b least) / (c_b exp(z))
    best     max over z of log R(x(z)), by Adam from several starts

R are the requests/s up to which mean TTFT and TPOT keep their limits (`jaxsim.analytic.highest_rate`, a root with the
derivative of one). x(z) lies on the surface of the budgets, so that every step is of a design that can be paid. A start
is the best of random splits of the budget; the present amounts, scaled to it, are another.

`confirmed` asks the event tier for the same R of a design and of others beside it: every one is simulated at rates
around the closed form's, with the same requests, and R is where the mean over a run crosses a limit, by interpolation;
where none is crossed the rates go on, `WIDER` times at most. `polished` moves a design to a neighbour as long as
simulation says that one is better, beyond its interval, and looks at where it came to with other seeds.

Approximated: a design has the kernels of the scenario's device, whatever its amounts; costs are linear; memory is KV
room beside the weights, and a design without room for one mean sequence serves nothing. Costs are the user's.
"""

import dataclasses
import functools
import tomllib
from collections.abc import Callable, Mapping
from importlib import resources as files
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pandas as pd
from jaxtyping import Array, Float
from msgspec import Meta

from jaxsim._core.errors import InputError, suggest
from jaxsim._core.records import converted
from jaxsim.analytic.deployment import Deployment, Numbers, deployment
from jaxsim.analytic.steady import highest_rate
from jaxsim.engine import lower
from jaxsim.metrics.result import interval
from jaxsim.spec.messages import explain
from jaxsim.spec.scenario import RooflineCost, Scenario, anchored, read_tree
from jaxsim.study import runner

MEMORY = "memory_bytes"
"""The number that is no leaf of a deployment: it makes `executor.kv_tokens`."""

SPLITS, STARTS, STEPS, RATE = 48, 3, 60, 0.15
"""Random splits of the budget, how many of them are started from, steps of Adam, and its rate, which falls to 0."""

LEAST_RPS = 1e-6
"""Where no rate keeps the limits, so that logarithms stay finite."""

AROUND = np.geomspace(0.7, 1.3, 9)
"""Of the closed form's rate: where a design is simulated."""

WIDER = 3
"""Times that rates go on beyond these, in either direction, where no limit is crossed between them."""

FEWEST_SEEDS = 2
"""With which a gain has an interval."""

ROUNDS = 4
"""Moves of a design by simulation, at most."""

ASIDE = 0.1
"""Of neighbours, and of what is confirmed of one more unit."""

Positive = Annotated[float, Meta(gt=0)]


class Resource(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What can be had more of.

    numbers: of a deployment, which it is, or "memory_bytes"; the amount is of the first of them, and the others keep
    their proportion to it; unit: of the amount, in SI; label: of the unit; costs of a unit, by budget; least: units
    that are always there; start: at first, the scenario's own if left out.
    """

    name: str
    numbers: Annotated[list[str], Meta(min_length=1)]
    unit: Positive = 1.0
    label: str = ""
    costs: dict[str, Positive]
    least: Annotated[float, Meta(ge=0)] = 0.0
    start: Positive | None = None


class Design(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A file of designs: a scenario with limits, resources, budgets, and what of these is spent anyway."""

    schema_version: Literal[1]
    name: str = ""
    description: str = ""
    scenario: str | dict[str, Any]
    resources: Annotated[list[Resource], Meta(min_length=1)]
    budgets: dict[str, Positive]
    fixed: dict[str, float] = {}

    @classmethod
    def from_toml(cls, path: str | Path) -> "Design":
        """From a file, or a shipped design by name. Raises `InputError`."""
        shipped = shipped_designs()
        try:
            text = (shipped[str(path)] if not Path(path).exists() and str(path) in shipped else Path(path)).read_text(
                encoding="utf-8")
            tree = tomllib.loads(text)
        except OSError as error:
            raise InputError("design", str(path), error.strerror or "cannot be read",
                             suggest(str(path), shipped, "give a file (docs/gradients.md)")) from None
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InputError("design", str(path), f"is no TOML: {error}", "mend the file") from None
        given, folder = tree.get("scenario"), Path(path).parent
        # Relative paths count from the file's folder.
        if isinstance(given, dict):
            tree["scenario"] = anchored(given, folder)
        elif isinstance(given, str) and given.endswith(".toml"):
            tree["scenario"] = str(folder / given)
        return cls.from_dict(tree)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> "Design":
        """From nested dictionaries. Raises `InputError`."""
        try:
            found = converted(tree, cls)
        except msgspec.ValidationError as error:
            raise explain(str(error), dict(tree), cls) from None
        names = [r.name for r in found.resources]
        if len(set(names)) < len(names):
            raise InputError("resources", names, "are named twice", "give each another name")
        taken: dict[str, str] = {}
        for index, one in enumerate(found.resources):
            for number in one.numbers:
                if number in taken:
                    raise InputError(f"resources[{index}].numbers", number, f"is of resource {taken[number]!r} already",
                                     "give each number to one resource, once")
                taken[number] = one.name
        for budget, spent in found.fixed.items():
            if budget not in found.budgets:
                raise InputError("fixed", budget, "is no budget", suggest(budget, found.budgets))
            if not 0 <= spent < np.inf:
                raise InputError(f"fixed.{budget}", spent, "is nothing that can be spent", "give 0 or more")
        for index, one in enumerate(found.resources):
            for budget in one.costs:
                if budget not in found.budgets:
                    raise InputError(f"resources[{index}].costs", budget, "is no budget",
                                     suggest(budget, found.budgets))
            if not one.costs:
                raise InputError(f"resources[{index}].costs", {}, "costs nothing", "give what a unit costs")
        for budget, limit in found.budgets.items():
            spent = found.fixed.get(budget, 0.0) + sum(r.costs.get(budget, 0.0) * r.least for r in found.resources)
            if spent >= limit:
                raise InputError(f"budgets.{budget}", limit, f"is spent by what is always there ({spent:g})",
                                 "raise it, or lower fixed or least")
        return found

    def made(self) -> Scenario:
        """The scenario, which has both limits. Raises `InputError`."""
        tree = read_tree(self.scenario) if isinstance(self.scenario, str) else self.scenario
        scenario = Scenario.from_dict(tree)
        for field in ("ttft_ms", "tpot_ms"):
            if getattr(scenario.slo, field) is None:
                raise InputError(f"slo.{field}", None, "is missing", "give the limit of its mean, in milliseconds")
        if scenario.slo.e2e_ms is not None:
            raise InputError("slo.e2e_ms", scenario.slo.e2e_ms, "is no limit that designs are asked to keep",
                             "leave it out: limits are of mean TTFT and TPOT")
        if scenario.workload.tenants:
            raise InputError("workload.tenants", [t.name for t in scenario.workload.tenants],
                             "are not told apart by limits of means", "leave them out")
        if not isinstance(scenario.cost, RooflineCost):
            raise InputError("cost.kind", scenario.cost.__struct_config__.tag, "has no peaks", "use 'roofline'")
        return scenario


def shipped_designs() -> dict[str, Any]:
    """Files of designs that come with the package, by name."""
    folder = files.files("jaxsim.scenarios").joinpath("designs")
    return {f.name.removesuffix(".toml"): f for f in sorted(folder.iterdir(), key=lambda f: f.name)
            if f.name.endswith(".toml")}


class Space:
    """The designs of a file: amounts, what they cost, and what they serve in closed form.

    simulated: whether designs are to be simulated too; what cannot be is then refused at once. Raises `InputError`.
    """

    def __init__(self, design: Design, *, simulated: bool = True):
        self.design, self.scenario = design, design.made()
        if simulated and self.scenario.num_seeds < FEWEST_SEEDS:
            raise InputError("num_seeds", self.scenario.num_seeds, "gives a gain no interval",
                             f"give at least {FEWEST_SEEDS}, or do not simulate (--no-confirm)")
        self.deployed: Deployment = deployment(self.scenario)
        system = lower.resolve_system(self.scenario)
        known = self.deployed.numbers
        self.tokens_per_byte = 0.0
        start = []
        for index, one in enumerate(design.resources):
            for name in one.numbers:
                if name != MEMORY and (name not in known or jnp.ndim(known[name])):
                    raise InputError(f"resources[{index}].numbers", name, "is no number of the scenario in closed form",
                                     suggest(name, (*known, MEMORY)))
                if simulated and name != MEMORY and not name.startswith("kernels."):
                    raise InputError(f"resources[{index}].numbers", name, "is not simulated by that name",
                                     "use numbers of kernels or memory, or do not simulate (--no-confirm)")
                if name != MEMORY and not 0 < float(known[name]) < np.inf:
                    raise InputError(f"resources[{index}].numbers", name, f"is {float(known[name]):g} in the scenario,"
                                     " which nothing is in proportion to", "leave it out")
            if MEMORY in one.numbers and self.scenario.engine.hybrid is not None:
                raise InputError(f"resources[{index}].numbers", MEMORY, "also says which weights stay on the host"
                                 " (engine.hybrid), which closed forms do not follow", "leave one of them out")
            if MEMORY in one.numbers:
                if system.memory is None or not hasattr(system.memory, "block_bytes"):
                    raise InputError("engine.num_gpu_blocks_override", system.num_blocks, "says the KV room already",
                                     "leave it out, so that memory makes it")
                m = system.memory
                # Of what admissions may use; the engine keeps its watermark of what it has.
                self.usable = 1 - system.scheduler.watermark
                self.tokens_per_byte = self.usable * m.gpu_memory_utilization * m.block_size / m.block_bytes
                self.memory_bytes = float(m.visible_bytes)
            start.append(one.start or self._own(one.numbers[0]) / one.unit)
        self.start = np.array(start)
        self.least = np.array([one.least for one in design.resources])
        self.names = [one.name for one in design.resources]
        budgets = list(design.budgets)
        self.costs = np.array([[one.costs.get(b, 0.0) for one in design.resources] for b in budgets])
        self.room = np.array([design.budgets[b] - design.fixed.get(b, 0.0) for b in budgets]) - self.costs @ self.least
        if np.any(self.start <= self.least):
            index = int(np.argmax(self.start <= self.least))
            raise InputError(f"resources[{index}].least", self.least[index], f"is not below what there is,"
                             f" {self.start[index]:g}", "lower it")
        if simulated:
            # Numbers that a simulation has no name for are told now, not after the search.
            deployment(self.scenario_of(self.start, 1.0))

    def _own(self, name: str) -> float:
        return self.memory_bytes if name == MEMORY else float(self.deployed.numbers[name])

    def room_tokens(self, memory_bytes: Array | float) -> Array | float:
        """KV tokens that admissions may use beside the weights; negative where these do not fit."""
        return self.deployed.numbers["executor.kv_tokens"] + (memory_bytes - self.memory_bytes) * self.tokens_per_byte

    def numbers(self, amounts: Float[Array, " resources"]) -> Numbers:
        """Of the deployment, with these amounts in units."""
        found: Numbers = {}
        for index, one in enumerate(self.design.resources):
            first = self._own(one.numbers[0])
            for name in one.numbers:
                if name == MEMORY:
                    room = self.room_tokens(amounts[index] * one.unit * (self.memory_bytes / first))
                    # So that tables have no sequences of nothing; `log_rate` says what that serves.
                    found["executor.kv_tokens"] = jnp.maximum(room, self.deployed.numbers["executor.block_size"])
                else:
                    # The first is the amount, to the last bit.
                    found[name] = amounts[index] * one.unit * (self._own(name) / first)
        return found

    def on_surface(self, z: Float[Array, " resources"]) -> Float[Array, " resources"]:
        """Amounts in these proportions, exp(z) beyond `least`, as much as the tightest budget allows."""
        share = jnp.exp(z - jax.lax.stop_gradient(jnp.max(z)))
        return self.least + share * jnp.min(self.room / (self.costs @ share))

    def proportions(self, amounts: np.ndarray) -> np.ndarray:
        """z of amounts; on the surface they are scaled to the budgets."""
        return np.log(np.asarray(amounts) - self.least)

    def log_rate(self, amounts: Float[Array, " resources"]) -> Float[Array, ""]:
        """log of the requests/s within both limits.

        Without KV room for one mean sequence it is of none, `LEAST_RPS`, and the lower the more is missing, so that
        memory is what is worth something there.
        """
        executor, load, _ = self.deployed.system(self.numbers(amounts))
        limits = self.scenario.slo
        rate = highest_rate(executor, load, ttft_s=limits.ttft_ms / 1e3, tpot_s=limits.tpot_ms / 1e3)
        value, none = jnp.log(jnp.maximum(rate, LEAST_RPS)), jnp.log(LEAST_RPS)
        for index, one in enumerate(self.design.resources):
            if MEMORY in one.numbers:
                share = self.memory_bytes / self._own(one.numbers[0])
                room = self.room_tokens(amounts[index] * one.unit * share)
                held = executor.held_tokens(load)
                value = jnp.where(room < held, none + jnp.minimum(room / held - 1, 0.0), value)
        return value

    @functools.cached_property
    def asked(self) -> Callable[[Array], tuple[Array, Array]]:
        """log R and its slopes by log amounts, compiled, of designs along an axis."""
        def one(amounts):
            return jax.value_and_grad(lambda logs: self.log_rate(jnp.exp(logs)))(jnp.log(amounts))

        return jax.jit(lambda many: jax.lax.map(one, many))

    def scenario_of(self, amounts: np.ndarray, rate_rps: float) -> Scenario:
        """For the event tier: the same kernels at these peaks and KV tokens, at a rate."""
        values: dict[str, Any] = {"workload.rate_rps": float(rate_rps)}
        for name, value in self.numbers(np.asarray(amounts, float)).items():
            kind, _, leaf = name.partition(".")
            if name == "executor.kv_tokens":
                # The engine takes its watermark off these.
                values["engine.num_gpu_blocks_override"] = int(float(value) / self.usable / float(
                    self.deployed.numbers["executor.block_size"]))
            elif kind == "kernels":
                values[f"cost.overrides.{leaf.replace('.', '_')}"] = float(value)
            else:
                raise InputError("resources", name, "is not simulated by that name",
                                 "use numbers of kernels or memory")
        return self.scenario.with_values(values)


@dataclasses.dataclass(frozen=True)
class Found:
    """A search: amounts of the best design, requests/s of it, and of every start (log R by step).

    has_own: whether the first start is the scenario's own amounts; they are none where they serve nothing.
    worth: a row a resource (`worth_of`) at the scenario's own amounts; best_worth: at the best.
    """

    amounts: np.ndarray
    rate_rps: float
    history: np.ndarray
    worth: pd.DataFrame
    best_worth: pd.DataFrame
    has_own: bool = True


def worth_of(space: Space, amounts: np.ndarray) -> pd.DataFrame:
    """What each resource is worth at a design: a row each.

    amount, elasticity (percent of R for a percent), more_rps (a unit more), and for each budget the percent of R that
    one percent of the budget spent on it brings.
    """
    value, slopes = (np.asarray(x[0], np.float64) for x in space.asked(jnp.asarray([amounts], float)))
    rate = float(np.exp(value))
    rows = []
    for index, one in enumerate(space.design.resources):
        row = {"resource": one.name, "unit": one.label, "amount": amounts[index], "elasticity": slopes[index],
               "more_rps": rate * slopes[index] / amounts[index]}
        for budget, limit in space.design.budgets.items():
            cost = one.costs.get(budget)
            row[f"percent_a_percent_of_{budget}"] = (
                np.nan if cost is None else slopes[index] * 0.01 * limit / (cost * amounts[index]) * 100)
        rows.append(row)
    return pd.DataFrame(rows)


def search(space: Space, *, seed: int = 0, steps: int = STEPS) -> Found:
    """The best design on the surface of the budgets. Raises `InputError` where no start serves anything."""
    try:
        import optax
    except ImportError:
        raise InputError("optax", None, "is not installed", "pip install 'jaxsim-serving[design]'") from None

    own = space.proportions(space.start)
    splits = own + np.random.default_rng(seed).normal(0.0, 0.8, (SPLITS, len(own)))
    tried = np.vstack([own, splits])
    surface = jax.jit(jax.vmap(space.on_surface))

    def values_and_slopes(z):
        amounts = surface(z)
        value, slopes = space.asked(amounts)
        return value, amounts, slopes

    # Slopes by log amounts, carried to z by the rule of the chain.
    back = jax.jit(jax.vmap(lambda z, slope: jax.vjp(lambda z: jnp.log(space.on_surface(z)), z)[1](slope)[0]))
    value, *_ = values_and_slopes(jnp.asarray(tried, float))
    value = np.asarray(value)
    if not np.any(value > np.log(10 * LEAST_RPS)):
        raise InputError("budgets", dict(space.design.budgets), "no design that was tried keeps the limits at any rate",
                         "raise a budget, or a limit")
    best = [0, *(1 + np.argsort(-value[1:])[:STARTS])]
    is_able = value > np.log(10 * LEAST_RPS)
    z = jnp.asarray(tried[[i for i in best if is_able[i]]], float)
    adam = optax.adam(optax.cosine_decay_schedule(RATE, steps))
    state, history = adam.init(z), []
    step = jax.jit(adam.update)
    for _ in range(steps):
        value, _, slopes = values_and_slopes(z)
        history.append(np.asarray(value))
        updates, state = step(-back(z, slopes), state)
        z = optax.apply_updates(z, updates)
    value, amounts, _ = values_and_slopes(z)
    history.append(np.asarray(value))
    index = int(np.argmax(history[-1]))
    chosen = np.asarray(amounts[index], np.float64)
    return Found(chosen, float(np.exp(history[-1][index])), np.array(history), worth_of(space, space.start),
                 worth_of(space, chosen), bool(is_able[0]))


def neighbours(space: Space, amounts: np.ndarray) -> dict[str, np.ndarray]:
    """Designs beside one: a tenth more, or less, of a resource, scaled back to the surface of the budgets."""
    found, z = {}, space.proportions(amounts)
    for index, name in enumerate(space.names):
        for sign in (1, -1):
            moved = z.copy()
            moved[index] = np.log(max(amounts[index] * (1 + sign * ASIDE) - space.least[index], 1e-9))
            found[f"{name} {sign * ASIDE:+.0%}"] = np.asarray(space.on_surface(jnp.asarray(moved, float)), np.float64)
    return found


def confirmed(space: Space, designs: Mapping[str, np.ndarray], *, seeds_from: int = 0) -> pd.DataFrame:
    """Requests/s within both limits of designs by simulation, the first of them being what others are compared with.

    seeds_from: how many seeds after the scenario's first these begin. Rows: design, closed_form_rps, rate_rps (mean
    over seeds), gain (relative to the first) with low and high (95 %, the same requests in both); NaN where a limit is
    crossed at none of the rates that were simulated, or the design cannot be simulated. Raises `InputError` where the
    first cannot be, or where there are fewer than two seeds.
    """
    if space.scenario.num_seeds < FEWEST_SEEDS:
        raise InputError("num_seeds", space.scenario.num_seeds, "gives a gain no interval",
                         f"give at least {FEWEST_SEEDS}")
    logs, _ = space.asked(jnp.asarray(list(designs.values()), float))
    closed = np.exp(np.asarray(logs, np.float64))
    rates = _crossings(space, list(designs.values()), closed, seeds_from)
    rows = []
    for at, name in enumerate(designs):
        gains = rates[at] / rates[0] - 1
        low, high = interval(gains) or (np.nan, np.nan)
        rows.append({"design": name, "closed_form_rps": closed[at], "rate_rps": rates[at].mean(), "gain": gains.mean(),
                     "low": low, "high": high})
    return pd.DataFrame(rows)


def _crossings(space: Space, designs: list[np.ndarray], closed: np.ndarray, seeds_from: int) -> np.ndarray:
    """Rates by design and seed at which the first limit is crossed; NaN where none is."""
    limits, seeds = space.scenario.slo, space.scenario.num_seeds
    first_seed = space.scenario.workload.seed + seeds_from
    # By design: rates that were simulated, and what was over the limits there, by seed.
    seen = [np.empty((0, 1 + seeds)) for _ in designs]
    asked = [list(rate * AROUND) if rate > 10 * LEAST_RPS else [] for rate in closed]
    found = np.full((len(designs), seeds), np.nan)
    for _ in range(1 + WIDER):
        pairs = [(at, rate) for at, rates in enumerate(asked) for rate in rates]
        if not pairs:
            break
        frame, refused = runner.table([
            space.scenario_of(designs[at], rate).with_values({"workload.seed": first_seed}) for at, rate in pairs])
        if any(pairs[point][0] == 0 for point in refused):
            raise InputError("resources", space.names, next(iter(refused.values())), "change the design")
        frame = frame.sort_values(["point", "seed"])
        for point, mine in frame.groupby("point"):
            at, rate = pairs[point]
            over = np.fmax(mine["mean_ttft_ms"] / limits.ttft_ms, mine["mean_tpot_ms"] / limits.tpot_ms)
            seen[at] = np.vstack([seen[at], [rate, *over]])
        for at, rows in enumerate(seen):
            rows = rows[np.argsort(rows[:, 0])]
            asked[at] = []
            if not len(rows):
                continue
            for seed in range(seeds):
                found[at, seed] = _crossing(rows[:, 0], rows[:, 1 + seed])
            is_open = np.isnan(found[at])
            step = AROUND[1] / AROUND[0]
            if np.any(is_open & (rows[0, 1:] > 1)):
                asked[at] += list(rows[0, 0] / step ** np.arange(1, len(AROUND)))
            if np.any(is_open & (rows[0, 1:] <= 1)):
                asked[at] += list(rows[-1, 0] * step ** np.arange(1, len(AROUND)))
    return found


def polished(space: Space, amounts: np.ndarray, rounds: int = ROUNDS) -> tuple[np.ndarray, pd.DataFrame]:
    """A design, moved by simulation to the best of its neighbours as long as one is better beyond its interval.

    What the closed form leaves out (requests that are preempted, above all) shifts its best; this mends that within a
    tenth of a resource a round. Every round is of seeds of its own, so that where it came to is judged by requests that
    did not choose it, beside the closed form's best (`closed form`) from the first move on. Returns amounts, and the
    last `confirmed`, with the number of moves as `round`.
    """
    first = amounts
    for index in range(rounds + 1):
        beside = {"best": amounts} | ({"closed form": first} if index else {}) | neighbours(space, amounts)
        rows = confirmed(space, beside, seeds_from=index * space.scenario.num_seeds).assign(round=index)
        better = rows.iloc[1:]["low"].fillna(-np.inf)
        if index == rounds or better.max() <= 0:
            break
        amounts = beside[rows.loc[better.idxmax(), "design"]]
    return amounts, rows


def _crossing(rates: np.ndarray, over: np.ndarray) -> float:
    """The rate at which what is over a limit passes 1, by interpolation of logarithms; NaN if it does not."""
    beyond = np.flatnonzero(over > 1)
    if not len(beyond) or beyond[0] == 0:
        return float("nan")
    at = beyond[0]
    (x0, x1), (y0, y1) = np.log(rates[at - 1:at + 1]), np.log(over[at - 1:at + 1])
    return float(np.exp(x0 + (x1 - x0) * (0 - y0) / (y1 - y0)))


def more_of_each(space: Space, amounts: np.ndarray) -> dict[str, np.ndarray]:
    """A design, and those with a tenth more of one resource, whatever the budgets."""
    return {"as it is": amounts} | {f"{name} +{ASIDE:.0%}": amounts * (1 + ASIDE * (np.arange(len(amounts)) == index))
                                    for index, name in enumerate(space.names)}
