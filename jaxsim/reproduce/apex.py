"""APEX+ (arXiv 2411.17651): plans against the plans that engines' heuristics take, and the runs it was checked on.

    backlog     8 or 16 GPUs and more requests than they can serve: seconds under the heuristic over those of the best
                plan, from the closed forms of `jaxsim plan`, where pipelines have no bubbles; replicas also simulated
    measured    vLLM 0.6 and SGLang on eight H100: TTFT and TPOT, and what one plan gains over another
    example     three plans of two GPUs by APEX+'s own rules (`jaxsim.reproduce.apex_example`)

The heuristic is that of vLLM and SGLang: tensor-parallel inside a node, stages across nodes.

Known gaps: models, rates and operator tables behind the published gains are not public; there is no model of clocks.
"""

import functools
import time
from collections.abc import Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, Float

from jaxsim._core.errors import InputError
from jaxsim.analytic.steady import Executor, Steady, steady_states
from jaxsim.analytic.workload import Load
from jaxsim.cost.apex import MEASURED_MS, MIXTRAL_MS, WORKLOADS
from jaxsim.io.figure import FAINT, INK, drawn, heading
from jaxsim.planning.candidates import Candidate
from jaxsim.planning.search import executors
from jaxsim.reproduce import apex_example
from jaxsim.reproduce.apex_example import COPIED, PP2, PUBLISHED, TP2, Figures
from jaxsim.reproduce.claim import FALLS, RISES, Claim, Reproduction
from jaxsim.reproduce.runs import simulated, study
from jaxsim.spec.device import load_device
from jaxsim.spec.scenario import Scenario

DESCRIPTION = "APEX+: best plans against heuristic ones, measured runs of vLLM and SGLang, its own example"

PAPER, LOGS, README = "arXiv 2411.17651", "logs of apex_plus", "README of apex_plus"

TIGHT = 0.1
"""Of what was measured: the largest relative distance of ours."""


def reproduce(num_seeds: int | None = None) -> Reproduction:
    """All claims; num_seeds: runs of each point instead of the studies' own number, and traces of the example."""
    first, *others = SYSTEMS
    start = time.process_time()
    plans = gains([first])
    # Alone, so that it is nobody else's.
    search_s = time.process_time() - start
    with futures.ThreadPoolExecutor(1 + len(STUDIES)) as pool:
        rest = pool.submit(gains, others)
        measured, experts, backlog = pool.map(lambda name: simulated(study(name, num_seeds)), STUDIES)
        plans |= rest.result()
    cells, mistral = cells_of(measured, LLAMA), cells_of(measured, MISTRAL)
    example = apex_example.example(num_seeds or EXAMPLE_SEEDS)
    mixtral = experts_of(experts)
    claims = (*gain_claims(plans, backlog), *speedup_claims(cells, mixtral, mistral), *expert_claims(mixtral),
              *mistral_claims(mistral), *cell_claims(cells), *example_claims(example), *energy_claims(plans),
              *search_claims(plans, search_s))
    return Reproduction(claims, functools.partial(_draw, plans, cells, example))


STUDIES = ("apex-measured", "apex-experts", "apex-backlog")

EXAMPLE_SEEDS = 3


def _claim(name: str, paper: Any, ours: Any, tolerance: Any, reason: str = "", source: str = PAPER) -> Claim:
    return Claim(system="apex", claim=name, source=source, paper=paper, ours=ours, tolerance=tolerance, reason=reason)


# ---- plans against heuristics

LENGTHS = {"chat": (73, 149, 189, 174), "summarization": (2742, 944, 172, 73), "creation": (307, 81, 1128, 420)}
"""Mean and standard deviation of prompts, then of outputs, tokens. Source: the traces of the paper (secondary)."""

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Of what the heuristic plan can serve: rates at which latencies are compared."""

ENERGY_SHARE = 0.5


class System(NamedTuple):
    """Devices and a model; heuristic: label of its plan; gain: the published one, "up to"."""

    model: str
    device: str
    num_devices: int
    heuristic: str
    gain: float
    source: str


SYSTEMS = {
    "8 H100": System("llama-3.1-70b", "h100", 8, "TP8", 3.37, PAPER),
    "8 H200": System("llama-3.1-70b", "h200", 8, "TP8", 2.76, f"{PAPER} (secondary)"),
    "16 H100": System("llama-3.1-405b", "h100", 16, "TP8 PP2", 1.88, f"{PAPER} (secondary)"),
}
"""The paper's devices. Its model is known for the last; for the others that of its measured runs is taken."""

RUNNABLE_GAIN = 1.75


class Plan(NamedTuple):
    """Of a plan under a trace: requests/s that it serves at most, mean seconds of a request and watts at `SHARES`."""

    label: str
    is_runnable: bool
    capacity_rps: float
    e2e_s: np.ndarray
    watts: np.ndarray


Gains = dict[tuple[str, str], list[Plan]]
"""By system and trace."""


@eqx.filter_jit
def _states(executor: Executor, load: Load, rates: Float[Array, " rates"]) -> Steady:
    return steady_states(executor, load, rates)


def scenario_of(system: System) -> Scenario:
    """APEX+'s batching on our memory and kernels: whole prompts beside decodes, no host (`apex-backlog.toml`)."""
    made = study("apex-backlog")
    base = Scenario.from_builtins({**made.base_tree(), "num_seeds": 1})
    return base.with_values({"model.name": system.model, "device.name": system.device, "workload": {
        "kind": "poisson", "rate_rps": 1, "num_requests": 1, "input": 8, "output": 8}})


def gains(names: Sequence[str] = tuple(SYSTEMS)) -> Gains:
    """All plans of systems, in closed form."""
    found: Gains = {}
    for name in names:
        system = SYSTEMS[name]
        fits = executors(scenario_of(system), system.device, system.num_devices)
        for trace, lengths in LENGTHS.items():
            found[name, trace] = _plans(system, fits, lengths)
    return found


def _plans(system: System, fits: Sequence[tuple[Candidate, Executor]], lengths: tuple) -> list[Plan]:
    prompt, prompt_sd, output, output_sd = lengths
    load = Load.of(1.0, prompt, output, input_sd=prompt_sd, output_sd=output_sd)
    by_label = {candidate.label: executor for candidate, executor in fits}
    if system.heuristic not in by_label:
        raise InputError("plan", system.heuristic, f"the heuristic's, does not fit {system.num_devices} x"
                         f" {system.device} with {system.model}: {', '.join(by_label)} do",
                         "compare with one of these, or use larger devices")
    heuristic = by_label[system.heuristic]
    shares = jnp.asarray(SHARES)
    rates = float(_states(heuristic, load, shares).capacity_rps[0]) * shares
    power = load_device(system.device).power
    plans = []
    for candidate, executor in fits:
        state = jax.device_get(_states(executor, load, rates))
        watts = np.full(len(SHARES), np.nan) if power is None else system.num_devices * (
            power.idle_w + (power.busy_w - power.idle_w) * state.utilisation)
        plans.append(Plan(candidate.label, candidate.why_not_simulated is None, float(state.capacity_rps[0]),
                          state.e2e_s, watts))
    return plans


def gain(system: str, plans: Sequence[Plan], *, is_runnable: bool) -> tuple[float, str]:
    """Seconds of a backlog under the heuristic over those of the best plan, and which that is."""
    before = next(p.capacity_rps for p in plans if p.label == SYSTEMS[system].heuristic)
    best = max((p for p in plans if p.is_runnable or not is_runnable), key=lambda p: p.capacity_rps)
    return best.capacity_rps / before, best.label


def latency_gain(system: str, plans: Sequence[Plan], *, is_runnable: bool) -> float:
    """The same of the mean time of a request, the largest over `SHARES`."""
    before = next(p.e2e_s for p in plans if p.label == SYSTEMS[system].heuristic)
    best = np.min([p.e2e_s for p in plans if p.is_runnable or not is_runnable], axis=0)
    return float(np.max(before / best))


def backlog_gains(rows: pd.DataFrame) -> dict[str, tuple[float, int]]:
    """Of simulated backlogs by trace: the same among replicas of 8, 4 and 2 ranks, and the ranks of the best."""
    traces = {lengths[0]: name for name, lengths in LENGTHS.items()}
    means = rows.groupby(["workload.input.mean_tokens", TENSOR])["duration"].mean().unstack()
    return {traces[prompt]: (float(row[8] / row.min()), int(row.idxmin())) for prompt, row in means.iterrows()}


TENSOR = "engine.tensor_parallel_size"


def gain_claims(plans: Gains, backlog: pd.DataFrame) -> list[Claim]:
    """Orders that can be missed, then the published factors beside ours."""
    claims, most = [], {}
    for name, system in SYSTEMS.items():
        both = {is_runnable: {trace: gain(name, plans[name, trace], is_runnable=is_runnable) for trace in LENGTHS}
                for is_runnable in (True, False)}
        ours = tuple(max(g for g, _ in both[is_runnable].values()) for is_runnable in (True, False))
        most[name] = ours
        each = "; ".join(f"{trace} {both[False][trace][0]:.3g} ({both[False][trace][1]}), of what engines run"
                         f" {both[True][trace][0]:.3g} ({both[True][trace][1]})" for trace in LENGTHS)
        whole, label = max(gain(name, [p for p in plans[name, trace] if "PP" not in p.label or p.label ==
                                       system.heuristic], is_runnable=True) for trace in LENGTHS)
        claims.append(_claim(
            f"{name}, backlog: its seconds under {system.heuristic} over those under itself, the best plan that engines"
            " run (pipelines without bubbles), the best of all (largest of three traces)", RISES, (1.0, *ours), 0.0,
            f"closed forms, {system.model}: {each}; without {'other ' * ('PP' in system.heuristic)}pipelines, whose"
            f" bubbles are left out, {whole:.3g} ({label}); each is the best of more plans than the one before, so"
            " orders are missed by ties", system.source))
    simulated_gains = backlog_gains(backlog)
    each = "; ".join(f"{trace} {g:.3g} ({_label(ranks)})" for trace, (g, ranks) in simulated_gains.items())
    best = max(g for g, _ in simulated_gains.values())
    claims.append(_claim("8 H100, 1,024 requests at once: their seconds under TP8 over those under itself, the best of"
                         " replicas (largest of three traces)", RISES, (1.0, best), 0.0,
                         f"event engine: {each}; TP8 is among them, so a tie would miss the order"))
    claims.append(_claim("largest gain: 8 H100, then 8 H200", FALLS, (most["8 H100"][1], most["8 H200"][1]), 0.0,
                         "closed forms, the same model; that of the paper is not known for either"))
    why = ("models, rates and operator tables behind it are not public, and that a gain is of a backlog is taken; in"
           " mean time of a request, at rates up to {:.0%} of what the heuristic serves: {:.3g}")
    for name, system in SYSTEMS.items():
        late = max(latency_gain(name, plans[name, trace], is_runnable=False) for trace in LENGTHS)
        claims.append(_claim(f"{name}: gain of the best of all plans, at most", system.gain, most[name][1], None,
                             why.format(SHARES[-1], late), system.source))
    late = max(latency_gain("8 H100", plans["8 H100", trace], is_runnable=True) for trace in LENGTHS)
    claims.append(_claim("8 H100: gain of the best of plans that engines run, at most", RUNNABLE_GAIN,
                         most["8 H100"][0], None, why.format(SHARES[-1], late), f"{PAPER} (secondary)"))
    return claims


def energy_claims(plans: Gains) -> list[Claim]:
    """At one clock beside what two power states say; at another there is nothing to say."""
    at = SHARES.index(ENERGY_SHARE)
    saved = []
    for trace in LENGTHS:
        mine = [p for p in plans["8 H100", trace] if np.isfinite(p.e2e_s[at])]
        fastest = min(mine, key=lambda p: p.e2e_s[at])
        saved.append(1 - min(p.watts[at] for p in mine) / fastest.watts[at])
    return [
        _claim("8 H100, one clock: energy saved by the plan with the least, against the fastest, at most", 0.19,
               max(saved), None, "its energy tables are not public; here power has two states, idle and busy, at"
               f" {ENERGY_SHARE:.0%} of what the heuristic serves: a device that works saves nothing by working less",
               f"{PAPER} (split secondary)"),
        _claim("8 H100: least energy at 1,980 and at 810 MHz, up to 45 % lower, with higher TTFT and TPOT", FALLS, None,
               0.0, "devices have no clock here: neither power nor seconds depend on it")]


def search_claims(plans: Gains, search_s: float) -> list[Claim]:
    """No physics: what looking at all plans costs."""
    first = next(iter(SYSTEMS))
    number = len(plans[first, next(iter(LENGTHS))])
    name = f"search for the best plan, CPU seconds, at most; ours: {first}, three traces"
    return [_claim(name, 900.0, search_s, None,
                   f"a cost of searching, no physics: closed forms of {number} plans that fit, programs compiled on the"
                   " way; APEX+ simulates each")]


# ---- measured runs

LLAMA, MISTRAL = "llama-3.1-70b", "mistral-large-2407"

KINDS = {74: "chat", 3017: "summarization", 308: "creation"}
"""Workloads of `apex-measured.toml` by their mean prompt."""

Cells = dict[int, dict[str, tuple[float, float]]]
"""Ms of TTFT and TPOT by tensor ranks and workload, as `MEASURED_MS`."""


def cells_of(rows: pd.DataFrame, model: str) -> Cells:
    """What the event engine says of the measured cells. TPOT over tokens, as the engine counted them."""
    mine = rows[rows["model.name"] == model]
    whole_rps = mine["workload.rate_rps"] * 8 / mine[TENSOR]
    named = mine["workload.input.mean_tokens"].map(KINDS) + np.where(whole_rps > 0.35, " 0.5", " 0.25")
    means = mine.groupby([TENSOR, named])[["mean_ttft_ms", "mean_itl_ms"]].mean()
    return {ranks: {name: tuple(map(float, means.loc[(ranks, name)])) for name in WORKLOADS} for ranks in MEASURED_MS}


def _label(ranks: int) -> str:
    return f"{8 // ranks} x TP{ranks}" if ranks < 8 else "TP8"


FITTED = "chat 0.25"
"""Workload whose TPOT the seconds of vLLM V0's host were fitted to."""

MIDDLE = ("14 ms of it are outside the engine, the middle of what these twelve cells of chat and creation leave over:"
          " they cannot check it")


def _is_long(name: str) -> bool:
    """Whether prompts take longer than what is outside of the engine."""
    return name.startswith("summarization")


def cell_claims(cells: Cells) -> list[Claim]:
    """Every cell of the measured table, then how its columns are ordered."""
    claims = []
    for place, metric in enumerate(("TTFT", "TPOT")):
        for name in sorted(WORKLOADS, key=_is_long):
            reason = "the host's seconds an iteration were fitted to this column" if (
                metric == "TPOT" and name == FITTED) else MIDDLE if metric == "TTFT" and not _is_long(name) else ""
            claims += [_claim(f"{name} requests/s, {_label(ranks)}: {metric}, ms", float(mine[name][place]),
                              cells[ranks][name][place], None if reason else TIGHT, reason, LOGS)
                       for ranks, mine in MEASURED_MS.items()]
    ordered = sum(cells[8][name][1] < cells[4][name][1] < cells[2][name][1] for name in WORKLOADS)
    claims.append(_claim("workloads, of six, with TPOT of TP8 below 2 x TP4 below 4 x TP2", 6.0, float(ordered), None,
                         "follows from the bytes of weights that a device reads, an eighth, a quarter, a half", LOGS))
    return claims


def speedups(cells: Cells) -> dict[tuple[int, str], float]:
    """Times by which TP8 answers sooner than replicas, by their ranks and workload; below 1 it is slower.

    A request of the mean output takes TTFT + (output - 1) TPOT: the same output for all, as chat stopped early.
    """
    def e2e(ranks: int, name: str) -> float:
        ttft, tpot = cells[ranks][name]
        return ttft + (WORKLOADS[name].output_tokens - 1) * tpot

    return {(ranks, name): e2e(ranks, name) / e2e(8, name) for ranks in (4, 2) for name in WORKLOADS}


PUBLISHED_ERROR = 0.107
"""Mean relative error of APEX+'s predicted speed-ups."""


def speedup_errors(cells: Cells) -> dict[tuple[int, str], float]:
    """Signed and relative, of `speedups`."""
    measured, ours = speedups(MEASURED_MS), speedups(cells)
    return {key: ours[key] / measured[key] - 1 for key in measured}


def speedup_claims(cells: Cells, mixtral: dict[bool, dict[str, tuple[float, ...]]], mistral: Cells) -> list[Claim]:
    """How far predicted speed-ups are from measured ones, against APEX+'s own distance: of all runs that were measured,
    but for the fitted workload."""
    llama = [error for (_, name), error in speedup_errors(cells).items() if name != FITTED]
    # Times of EP8 over TP8: the speed-up of TP8.
    experts = np.divide(*(np.divide(_flat(table[True]), _flat(table[False])) for table in (mixtral, EXPERT_MS))) - 1
    found = mistral_range(mistral)
    fp8 = [found[ranks][end] / found[8][end] / (MISTRAL_MS[ranks][end] / MISTRAL_MS[8][end]) - 1
           for ranks in (4, 2) for end in (0, 1)]
    parts = {"Llama-3.1-70B, TP8 over 2 x TP4 and 4 x TP2, five workloads": llama,
             "Mixtral-8x22B, TP8 over EP8, six": experts,
             "Mistral-Large-2, least and largest TPOT of TP8 over 2 x TP4 and 4 x TP2": fp8}
    mean = float(np.mean(np.abs(np.concatenate(list(parts.values())))))
    each = "; ".join(f"{name}: {np.mean(np.abs(errors)):.1%} of {len(errors)}" for name, errors in parts.items())
    return [_claim("mean relative error of predicted speed-ups: ours, then APEX+'s", RISES, (mean, PUBLISHED_ERROR),
                   0.0, f"{each}. {FITTED}, to which the host's seconds were fitted, is left out. Which speed-ups the"
                   " published mean is of is not fully known")]


EXPERT_MS = {spread: {kind: (table[f"{kind} 0.25"], table[f"{kind} 0.5"])
                      for kind in ("chat", "summarization", "creation")} for spread, table in MIXTRAL_MS.items()}
"""`MIXTRAL_MS` by kind of workload: at 0.25 and 0.5 requests/s."""

OLDER = "measured with SGLang 0.4.5, simulated with the preset of 0.5"

EXPERT_KINDS = {86: "chat", 3017: "summarization", 308: "creation"}

EXPERTS = "engine.enable_expert_parallel"


def experts_of(rows: pd.DataFrame) -> dict[bool, dict[str, tuple[float, ...]]]:
    """What the event engine says of `EXPERT_MS`."""
    rows = rows.assign(kind=rows["workload.input.mean_tokens"].map(EXPERT_KINDS),
                       ms=rows["mean_e2el_ms"] * rows["completed"] / rows["total_output_tokens"])
    means = rows.groupby([EXPERTS, "kind", "workload.rate_rps"])["ms"].mean()
    return {spread: {kind: tuple(map(float, means.loc[spread, kind].sort_index())) for kind in EXPERT_MS[spread]}
            for spread in EXPERT_MS}


def _flat(table: dict[str, tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(ms for pair in table.values() for ms in pair)


def expert_claims(ours: dict[bool, dict[str, tuple[float, ...]]]) -> list[Claim]:
    """Experts cut over all ranks, and spread whole over them."""
    what = "Mixtral-8x22B, chat, summarization, creation at 0.25 and 0.5:"
    measured = {spread: np.array(_flat(table)) for spread, table in EXPERT_MS.items()}
    found = {spread: np.array(_flat(table)) for spread, table in ours.items()}
    ratios = [tuple(map(float, table[True] / table[False])) for table in (measured, found)]
    # A speed-up of EP8 over TP8 is the inverse of the ratio of times.
    errors = np.abs(np.divide(*ratios) - 1).reshape(-1, 2).mean(axis=1)
    why = ("bound by launches, both take as long; what spreading costs in SGLang beyond kernels and exchange is not"
           f" modelled, nor was it by APEX+; {OLDER}")
    return [
        *(_claim(f"{what} {name}, ms a token", tuple(map(float, measured[spread])), tuple(map(float, found[spread])),
                 None, "time of a whole request over its output; without graphs iterations are bound by launches here,"
                 " of 30 us each, a guess whose upper end is from these runs (row 15 of skip has them, too);"
                 f" {OLDER}", LOGS)
          for spread, name in ((False, "TP8"), (True, "EP8"))),
        _claim(f"{what} EP8 over TP8", *ratios, TIGHT, why, LOGS),
        _claim("Mixtral-8x22B: error of the predicted speed-up of EP8 over TP8, by trace, largest first",
               (0.28, 0.17, 0.15), tuple(sorted(map(float, errors), reverse=True)), None,
               "APEX+'s errors beside ours; which of its traces is which is not known", f"{PAPER} (secondary)")]


MISTRAL_MS = {8: (16.8, 22.2), 4: (21.1, 24.8), 2: (30.4, 33.1)}
"""Least and largest TPOT of six workloads, Mistral-Large-2 in fp8, by tensor ranks. Source: logs of apex_plus."""


def mistral_range(cells: Cells) -> dict[int, tuple[float, float]]:
    """What the event engine says of `MISTRAL_MS`."""
    found = {ranks: [tpot for _, tpot in cells[ranks].values()] for ranks in MISTRAL_MS}
    return {ranks: (min(tpot), max(tpot)) for ranks, tpot in found.items()}


def mistral_claims(cells: Cells) -> list[Claim]:
    """Least and largest TPOT."""
    found = mistral_range(cells)
    return [_claim(f"Mistral-Large-2 fp8, {_label(ranks)}: least and largest TPOT of six workloads, ms",
                   MISTRAL_MS[ranks], found[ranks], TIGHT,
                   "lengths and rates are those of the Llama runs", LOGS) for ranks in MISTRAL_MS]


# ---- its example

ORDERS = {"tpot_ms": ("TPOT, ms", RISES, (TP2, COPIED, PP2)), "tokens_per_s": ("tokens/s", FALLS, (TP2, COPIED, PP2)),
          "ttft_ms": ("TTFT, ms", RISES, (TP2, PP2, COPIED))}


def example_claims(example: dict[str, Figures]) -> list[Claim]:
    """Memory and orders with a gate; times without, as the trace is not public."""
    what = "Llama-3-70B, 2 H100"
    why = "its trace is not public: 100 requests with the means that its figures imply, on jaxsim's kernels"
    claims = [
        _claim(f"{what}: plans that fit", 3.0, float(apex_example.num_fits()), 0.0, source=README),
        _claim(f"{what}: parameters a device, GiB (the README: GB): {', '.join(apex_example.PLANS)}",
               tuple(apex_example.PARAMETER_GIB.values()), tuple(map(apex_example.parameter_gib, apex_example.PLANS)),
               1e-3, source=README)]
    claims += [_claim(f"{what}, its rules: {name}, {', '.join(plans)}", order,
                      tuple(getattr(example[plan], field) for plan in plans), 0.0, source=README)
               for field, (name, order, plans) in ORDERS.items()]
    claims += [_claim(f"{what}, its rules: {name}, {', '.join(plans)}",
                      tuple(getattr(PUBLISHED[plan], field) for plan in plans),
                      tuple(getattr(example[plan], field) for plan in plans), None, why, README)
               for field, (name, plans) in {**{field: (name, plans) for field, (name, _, plans) in ORDERS.items()},
                                            "requests": ("requests an iteration", tuple(PUBLISHED))}.items()]
    power = load_device(apex_example.DEVICE).power
    kj = {plan: 2e-3 * (power.busy_w * (f.total_s - f.idle_s) + power.idle_w * f.idle_s) for plan, f in example.items()}
    published = apex_example.PUBLISHED_KJ
    claims += [
        _claim(f"{what}, its rules: tokens/s of TP2 over PP2",
               PUBLISHED[TP2].tokens_per_s / PUBLISHED[PP2].tokens_per_s,
               example[TP2].tokens_per_s / example[PP2].tokens_per_s, None,
               f"{why}. The factor is its accounting: the clock of a batch runs by the seconds of one stage, so half as"
               " many requests arrive for each token that a pipeline of two makes", README),
        _claim(f"{what}, its rules: energy of PP2 over TP2", published[PP2] / published[TP2], kj[PP2] / kj[TP2], None,
               "its energy tables are not public; here a device draws what a busy one does whatever it works on, so"
               " energy follows seconds", README)]
    return claims


# ---- the figure

_COLOURS = {8: "#0072B2", 4: "#009E73", 2: "#D55E00"}


def _draw(plans: Gains, cells: Cells, example: dict[str, Figures], path: Path) -> None:
    with drawn(path, figsize=(16, 4.6)) as figure:
        axes = figure.subplots(1, 4, width_ratios=(1.2, 1.2, 1, 1))
        _draw_cells(axes[:2], cells)
        _draw_speedups(axes[2], cells)
        _draw_gains(axes[3], plans)
        heading(figure, "APEX+: Llama-3.1-70B in vLLM 0.6 on eight H100, and plans against the heuristic")


def _draw_cells(axes: Sequence[Any], cells: Cells) -> None:
    for axis, place, name in zip(axes, (0, 1), ("TTFT", "TPOT"), strict=True):
        for ranks, colour in _COLOURS.items():
            pairs = np.array([(MEASURED_MS[ranks][w][place], cells[ranks][w][place]) for w in WORKLOADS])
            axis.plot(*pairs.T, "o", color=colour, markersize=5, label=_label(ranks))
        ends = np.array(axis.get_xlim())
        axis.plot(ends, ends, color=INK, linewidth=0.9)
        axis.fill_between(ends, 0.9 * ends, 1.1 * ends, color="#EEEEEE", zorder=0)
        axis.set_title(f"{name}, ms")
        axis.set_xlabel("measured")
        axis.set_ylabel("simulated")
    for scale, each in ((axes[0].set_xscale, axes[0].xaxis), (axes[0].set_yscale, axes[0].yaxis)):
        scale("log")
        each.set_ticks([30, 50, 100, 200, 400], labels=["30", "50", "100", "200", "400"])
        each.set_ticks([], minor=True)
    axes[1].legend(loc="upper left")


def _draw_speedups(axis: Any, cells: Cells) -> None:
    measured, ours = speedups(MEASURED_MS), speedups(cells)
    for ranks in (4, 2):
        pairs = np.array([(measured[key], ours[key]) for key in measured if key[0] == ranks])
        axis.plot(*pairs.T, "o", color=_COLOURS[ranks], markersize=5, label=f"TP8 over {_label(ranks)}")
    ends = np.array([1.0, 2.6])
    axis.plot(ends, ends, color=INK, linewidth=0.9)
    axis.fill_between(ends, (1 - PUBLISHED_ERROR) * ends, (1 + PUBLISHED_ERROR) * ends, color="#EEEEEE", zorder=0)
    axis.annotate("APEX+'s mean error", (2.55, 1.05), ha="right", fontsize=9, color=FAINT)
    axis.set_title("Speed-up")
    axis.set_xlabel("measured")
    axis.set_ylabel("simulated")
    axis.legend(loc="upper left")


def _draw_gains(axis: Any, plans: Gains) -> None:
    for place, name in enumerate(SYSTEMS):
        for shift, trace, colour in zip((-0.25, 0, 0.25), LENGTHS, ("#0072B2", "#56B4E9", "#CC79A7"), strict=True):
            values = [gain(name, plans[name, trace], is_runnable=is_runnable)[0] for is_runnable in (True, False)]
            axis.plot([place + shift] * 2, values, color=colour, linewidth=1.2)
            axis.plot(place + shift, values[0], "s", color=colour, markersize=5, label=None if place else trace)
            axis.plot(place + shift, values[1], "o", color=colour, markersize=9, markerfacecolor="none")
        axis.plot(place, SYSTEMS[name].gain, "D", color=INK, markersize=7, markerfacecolor="none",
                  label=None if place else "published, at most")
    axis.axhline(1, color=FAINT, linewidth=0.8)
    axis.set_xticks(range(len(SYSTEMS)), SYSTEMS)
    axis.set_title("Gain over the heuristic, backlog")
    axis.set_xlabel("squares: plans that engines run; rings: all")
    axis.legend(loc="upper right")
