"""DroidSpeak: a fine-tune of the same base goes on from a sibling's context, in closed form and under load.

Time to the first token of an idle receiver (`jaxsim.analytic.context_reuse`), for a context of `TOKENS` tokens that a
sibling has computed and a question behind it: everything computed, or k of 32 layers recomputed while the KV of the
others comes over a link of `LINK_BYTES_PER_S`. Prefills are priced by the event engine's cost model. Under load the
event engine serves questions about many such contexts (`jaxsim.engine.context_reuse`), which siblings have computed
before the run. Agents that work on contexts in turn are instances of one run, and give each other what they have
computed and not dropped yet (`jaxsim.engine.siblings`).

Known gaps: how many layers each pair of models recomputes is not published, nor the lengths of contexts; which layers
matter, and what reuse does to answers, is measured and not simulated. Nor is it published how agents share contexts.
"""

import functools
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pandas as pd

from jaxsim.analytic.context_reuse import ContextReuse, context_reuse
from jaxsim.cost.roofline import roofline
from jaxsim.io.figure import FAINT, INK, drawn, heading
from jaxsim.reproduce.claim import FALLS, Claim, Reproduction
from jaxsim.reproduce.runs import means_in_order, simulated, study
from jaxsim.spec.device import load_device
from jaxsim.spec.model import load_model

DESCRIPTION = "DroidSpeak: KV and E cache of a sibling model, some layers recomputed, behind a link"

PAPER, REVIEW = "arXiv 2411.02820", "third-party review"

MODEL, DEVICE, LINK_BYTES_PER_S = "llama-3.1-8b", "a100_sxm_80", 25e9
"""A pair of 8B fine-tunes, one GPU each, and one HDR InfiniBand port of 200 Gb/s: ours."""

TOKENS, QUESTION, BUDGET = 8192, 64, 16_384
"""Of the context and behind it; an iteration takes both."""

FRACTIONS = (0.32, 0.59)
"""Of a prefill that are left at 3.1 and 1.7 times lower TTFT."""

GAINS = (1.7, 3.1)

CRITICAL_SHARE = 0.11
"""Of the layers, those that matter."""

TRANSFERS = ("serial", "pipelined", "E cache first")


@functools.cache
def receiver(tokens: int = TOKENS, bytes_per_s: float = LINK_BYTES_PER_S) -> ContextReuse:
    """An idle receiver of such a context, and its link."""
    model = load_model(MODEL)
    cost = roofline(model, load_device(DEVICE)).tabulate(BUDGET, 8)
    return context_reuse(model, cost, context_tokens=tokens, suffix_tokens=QUESTION, max_num_batched_tokens=BUDGET,
                         bytes_per_s=bytes_per_s)


def in_layer_order_s(reuse: ContextReuse, recomputed: int, first: int) -> float:
    """Time to the first token where layers come in their order: KV of those below the recomputed ones, the hidden
    states before these, then KV of those above, while they are recomputed."""
    layers = float(reuse.num_layers)
    kv_s = float(reuse.kv_bytes / reuse.bytes_per_s) / layers
    below, above = first * kv_s, (layers - recomputed - first) * kv_s
    computed = float(reuse.recompute_s(jnp.float32(recomputed)))
    return below + float(reuse.entry_s(jnp.float32(recomputed))) + max(computed, above) + float(reuse.suffix_s)


def layers_for(reuse: ContextReuse, gain: float) -> int:
    """The most layers that can be recomputed for TTFT to be so many times lower; 0 if none."""
    counts = np.arange(1, int(reuse.num_layers) + 1)
    gains = np.asarray(reuse.speedup(jnp.asarray(counts, jnp.float32)))
    return int(counts[gains >= gain].max(initial=0))


def context_gain(reuse: ContextReuse, recomputed: float) -> float:
    """Prefill of the context alone over that with reuse."""
    k = jnp.float32(recomputed)
    return float(reuse.prefill_s / (reuse.entry_s(k) + jnp.maximum(reuse.recompute_s(k), reuse.load_s(k))))


def reproduce(num_seeds: int | None = None) -> Reproduction:
    """All claims; num_seeds: runs of each point under load instead of the studies' own number."""
    rows, agents = under_load("droidspeak", num_seeds), under_load("droidspeak-agents", num_seeds)
    return Reproduction((*claims(receiver()), *load_claims(rows), *agents_claims(agents)),
                        functools.partial(_draw, rows, agents))


# ---- under load

RATE, LAYERS, TTFT = "workload.rate_rps", "recomputed", "median_ttft_ms"

ALL = 32
"""Layers that are computed where nothing is reused."""

ORDER = (ALL, 19, 10, 4)

SERVED_RATE = 1.0
"""Requests a second that full prefills keep up with."""

LIMIT_MS = 1000.0
"""Of the median TTFT, up to which a rate counts as served: ours."""


STUDIES = {"droidspeak": ("droidspeak-full", "droidspeak-reuse"),
           "droidspeak-agents": ("droidspeak-agents-full", "droidspeak-agents")}
"""Without reuse, and with it."""

AGENTS_RATE = 0.25
"""Sessions a second: half of those at which agents without reuse just keep up, and their median is in the noise."""


def under_load(name: str, num_seeds: int | None) -> pd.DataFrame:
    """A row a run: rate, layers computed of a sibling's context, metrics."""
    without, with_it = STUDIES[name]
    full = simulated(study(without, num_seeds)).assign(**{LAYERS: ALL})
    reuse = simulated(study(with_it, num_seeds))
    reuse = reuse.rename(columns={"engine.context_reuse.recomputed_layers": LAYERS})
    return pd.concat([full, reuse], ignore_index=True)


def served_rps(rows: pd.DataFrame, layers: int) -> float:
    """The rate at which the median TTFT reaches `LIMIT_MS`, between simulated ones; the largest if it never does."""
    means = rows[rows[LAYERS] == layers].groupby(RATE)[TTFT].mean()
    rates, ttft = means.index.to_numpy(float), np.maximum.accumulate(means.to_numpy(float))
    return float(np.interp(LIMIT_MS, ttft, rates))


def load_claims(rows: pd.DataFrame) -> list[Claim]:
    """The order of first tokens where all keep up, and throughput beside the published one."""
    mine = rows[rows[RATE] == SERVED_RATE]
    ours, margins = means_in_order(mine, LAYERS, ORDER, TTFT)
    rates = {layers: served_rps(rows, layers) for layers in ORDER}
    each = ", ".join(f"{layers}: {rate:.3g}" for layers, rate in rates.items())
    why = (f"models, workload and link are not published; here rates with a median TTFT of {LIMIT_MS:g} ms, by layers"
           f" computed: {each} requests/s, of up to {rows[RATE].max():g} simulated")
    gain = rates[ORDER[-1]] / rates[ALL]
    return [
        _claim(f"median TTFT, ms, {SERVED_RATE:g} req/s: full prefill, then {', '.join(map(str, ORDER[1:]))} layers",
               FALLS, ours, margins, "event engine, 200 contexts"),
        _claim("online throughput, times higher, at most", 4.0, gain, None, why),
        _claim("online throughput, times higher (second and third version)", 3.0, gain, None, "the same")]


def agents_claims(rows: pd.DataFrame) -> list[Claim]:
    """The order of first tokens where all keep up, how much lower they are, and throughput, beside published ones."""
    mine = rows[rows[RATE] == AGENTS_RATE]
    ours, margins = means_in_order(mine, LAYERS, ORDER, TTFT)
    rates = {layers: served_rps(rows, layers) for layers in ORDER}
    each = ", ".join(f"{layers}: {rate:.3g}" for layers, rate in rates.items())
    setting = "three agents on four instances, contexts of 8,192 tokens that grow in six turns"
    why = (f"how agents share contexts is not published; here rates with a median TTFT of {LIMIT_MS:g} ms, by layers"
           f" computed: {each} sessions/s, of up to {rows[RATE].max():g} simulated")
    return [
        _claim(f"agents: median TTFT, ms, {AGENTS_RATE:g} sessions/s: full prefill, then"
               f" {', '.join(map(str, ORDER[1:]))} layers", FALLS, ours, margins,
               f"event engine, siblings in the same run: {setting}; the rate was set when at twice it the first step"
               " had been within the noise of the seeds"),
        _claim(f"agents: TTFT, times lower, {ORDER[1]} and {ORDER[-1]} layers", GAINS,
               (ours[0] / ours[1], ours[0] / ours[-1]), None,
               "layers of a pair, lengths and how agents share contexts are not published; the first of three agents"
               " has nobody to take a context from, and every turn computes what is new"),
        _claim("agents: online throughput, times higher, at most", 4.0, rates[ORDER[-1]] / rates[ALL], None, why)]


# ---- alone


def claims(reuse: ContextReuse) -> list[Claim]:
    """Those with a gate, then those without."""
    layers = int(reuse.num_layers)
    critical = round(CRITICAL_SHARE * layers)
    setting = f"{MODEL}, {TOKENS:,} tokens + {QUESTION}, {LINK_BYTES_PER_S / 1e9:g} GB/s"
    counts = tuple(round(share * layers) for share in FRACTIONS)
    left = tuple(float(1 / reuse.speedup(jnp.float32(k))) for k in counts)
    middle = (layers - critical) // 2
    k = jnp.float32(critical)
    timeline = (float(reuse.serial_s(k)), in_layer_order_s(reuse, critical, middle), float(reuse.pipelined_s(k)))
    most = tuple(layers_for(reuse, gain) for gain in GAINS)
    return [
        _claim(f"TTFT over that of a full prefill, {counts[0]} and {counts[1]} of {layers} layers recomputed",
               FRACTIONS, left, None,
               f"{setting}; layers of a pair are not published, so these are the bounds' own: 1/3.1 and 1/1.7, and with"
               " so fast a link little else can come out"),
        _claim(f"TTFT, s: {', '.join(TRANSFERS)}; {critical} of {layers} layers", FALLS, timeline, None,
               f"{setting}; without contention. The closed forms are in this order whatever is put in", source=REVIEW),
        _claim("toy timeline, units: 47, 30, 17", (47.0, 30.0, 17.0), None, 0.0,
               "its parts are not published, and do not follow the equations of one group of layers: E + V + R = 47"
               " and E + max(R, V) = 17 would want E = -13 or less", source=REVIEW),
        _claim("TTFT, times lower, least and most", GAINS,
               tuple(float(reuse.speedup(jnp.float32(count))) for count in (layers // 2, critical)), None,
               f"layers of a pair are not published: here {layers // 2} and {critical} of {layers}; {most[0]} layers"
               f" or fewer give {GAINS[0]}, {most[1]} give {GAINS[1]}"),
        _claim(f"prefill of the context, times faster, {critical} of {layers} layers (first version)", 2.78,
               context_gain(reuse, critical), None, f"{setting}; layers, lengths and link are not published"),
        _claim("prefill, times faster (second and third version)", 2.6, context_gain(reuse, critical), None,
               "the same; layers, lengths and link are not published"),
        _claim("bound on the gain of the context, layers and link", None,
               (layers / critical, float(reuse.bound(jnp.float32(critical)))), None,
               f"nobody published one; {critical} of {layers} layers alone, and with the link: which of both limits")]


def _claim(name: str, paper: Any, ours: Any, tolerance: float | None, reason: str, source: str = PAPER) -> Claim:
    return Claim(system="droidspeak", claim=name, source=source, paper=paper, ours=ours, tolerance=tolerance,
                 reason=reason)


def _draw(rows: pd.DataFrame, agents: pd.DataFrame, path: Path) -> None:
    with drawn(path, figsize=(17, 4.6)) as figure:
        left, middle, right, last = figure.subplots(1, 4)
        counts = jnp.arange(0.0, 33.0)
        for tokens, colour in ((2048, "#56B4E9"), (TOKENS, "#0072B2"), (32_768, "#D55E00")):
            left.plot(counts, receiver(tokens).speedup(counts), color=colour, label=f"{tokens:,} tokens")
        left.axhspan(*GAINS, color="#EEEEEE", zorder=0)
        left.annotate("published", (31.5, GAINS[1]), ha="right", va="top", fontsize=9, color=FAINT)
        left.set_ylim(0, 8)
        left.set_title(f"TTFT, times lower, at {LINK_BYTES_PER_S / 1e9:g} GB/s")
        left.set_xlabel("layers recomputed, of 32")
        left.legend(loc="upper right")
        rates = np.geomspace(1, 100, 60)
        for layers, colour in zip(ORDER[:0:-1], ("#0072B2", "#56B4E9", "#D55E00"), strict=True):
            middle.plot(rates, gains_at(layers, 1e9 * rates), color=colour, label=f"{layers} layers")
        middle.axvline(LINK_BYTES_PER_S / 1e9, color=INK, linewidth=0.8, linestyle=":")
        middle.axhline(1, color=FAINT, linewidth=0.8)
        middle.set_xscale("log")
        middle.set_ylim(bottom=0)
        middle.set_title(f"TTFT, times lower, {TOKENS:,} tokens")
        middle.set_xlabel("link, GB/s")
        middle.legend(loc="upper left")
        for axes, table, title, unit in ((right, rows, "Median TTFT under load, ms", "requests/s"),
                                         (last, agents, "Median TTFT of agents, ms", "sessions/s")):
            for layers, colour in zip(ORDER, (INK, "#D55E00", "#56B4E9", "#0072B2"), strict=True):
                means = table[table[LAYERS] == layers].groupby(RATE)[TTFT].mean()
                axes.plot(means.index, means, "o-", markersize=3.5, color=colour,
                          label="full prefill" if layers == ALL else f"{layers} layers")
            axes.set_yscale("log")
            axes.set_ylim(top=3e5)
            axes.set_title(title)
            axes.set_xlabel(unit)
            axes.legend(loc="upper left")
        heading(figure, f"DroidSpeak: {MODEL} on {DEVICE}; alone in closed form, under load in the event engine")


def gains_at(recomputed: int, bytes_per_s: np.ndarray) -> np.ndarray:
    """Times by which TTFT is lower on links of these rates."""
    reuse = eqx.tree_at(lambda r: r.bytes_per_s, receiver(), jnp.asarray(bytes_per_s, jnp.float32))
    return np.asarray(reuse.speedup(jnp.float32(recomputed)))
