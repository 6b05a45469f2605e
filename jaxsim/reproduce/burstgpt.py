"""BurstGPT (arXiv 2401.17644, KDD 2025): a trace of LLM services, and what its bursts do at equal mean load.

Its generator draws Gamma gaps of shape alpha (scale beta): CV = 1 / sqrt(alpha), so alpha = 1 is Poisson and smaller
is burstier. Its parameters change every 60 s, from lists that are not at hand. Its demonstration draws prompt and
output lengths from Zipf's law of exponent 1.1, rejected above 1,024.

Requests fail where their clients give up: after a wait for the first token that is ours, since what made those of the
trace fail is not published.

Known gaps: the trace itself is not at hand.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from jaxsim.io.figure import FAINT, INK, drawn, heading
from jaxsim.reproduce.claim import RISES, Claim, Reproduction
from jaxsim.reproduce.runs import half_width, means_in_order, simulated, study
from jaxsim.workload import MMPP2, Gamma, Modulated, Quantiles, arrival_times

DESCRIPTION = "BurstGPT: its generator, and what bursts do to TTFT and KV memory at equal mean load"

PAPER = "arXiv 2401.17644"
GENERATOR, SERVING = f"{PAPER}, generator", f"{PAPER}, serving"

ALPHAS = (4.0, 1.0, 0.5, 0.25)
"""Shapes of the gaps, from even to bursty; 0.5 and 0.25 are those of the generator's demonstration."""

PUBLISHED_CV = {0.5: 1.41, 0.25: 2.0}

FAILED_SHARE = (0.0178, 0.0192, 0.0726)
"""Of releases 1, 2 and 3: rows with and without failures, 1,429.7k and 1,404.3k, 3,858.4k and 3,784.2k, 5,344.0k and
4,956.1k."""

ZIPF_EXPONENT, LONGEST_TOKENS = 1.1, 1024
ZIPF = {"mean": 102.0, "median": 12.0, "p90": 355.0, "share of 1 to 3 tokens": 0.32}
"""What that law, cut there, comes to."""

HOURLY = {0: 50, 3: 5, 7: 5, 10: 160, 11: 160, 12: 70, 16: 190, 18: 80, 20: 120, 23: 75}
"""Median conversations an hour with ChatGPT by hour of the day, read off the paper's figure."""

GENERATOR_TOLERANCE = 0.03
NUM_GAPS, NUM_DRAWS = 100_000, 16
WINDOWS_GAPS = (1, 2, 5, 10, 20, 50, 100)
"""Windows in which arrivals are counted, in mean gaps; the last is where the index of dispersion is read."""

PERIOD_S = 60
FAILED = "outcomes.failed_share"
METRICS = {"p99_ttft_ms": "P99 TTFT, ms", "kv.peak_share": "peak share of KV memory"}
ONLY_DIRECTION = "only the direction is a gate: the sizes in the paper are not at hand"
DEADLINE = "clients give up after {:g} s without a first token, which is ours"

_SHOWN = {"p99_ttft_ms": ("Tail of the time to first token", "P99 TTFT, s", 1e-3),
          "kv.peak_share": ("Peak of KV memory", "% of the blocks", 100.0)}
"""Title, unit and scale of a metric in the plot."""

_COLOURS = ("#56B4E9", "#0072B2", "#E69F00", "#D55E00")


def reproduce(num_seeds: int | None = None) -> Reproduction:
    """All claims of this system; num_seeds: runs of each point instead of the studies' own number."""
    gaps = {alpha: _draws(alpha) for alpha in ALPHAS}
    dispersion = {alpha: dispersion_of(times) for alpha, times in gaps.items()}
    gamma = simulated(study("burstgpt-gamma", num_seeds))
    gamma["alpha"] = (1 / gamma["workload.cv"] ** 2).round(9)
    minutes = simulated(study("burstgpt-minutes", num_seeds))
    made = study("burstgpt-deadlines", num_seeds)
    deadline_s = made.base_tree()["workload"]["client"]["first_token_deadline_s"]
    failures = simulated(made)
    failures["alpha"] = (1 / failures["workload.cv"] ** 2).round(9)
    claims = (*_gap_claims(gaps, dispersion), *_length_claims(), *_burst_claims(gamma), *_minute_claims(minutes),
              *_failure_claims(failures, deadline_s), *_release_claims())
    return Reproduction(claims, functools.partial(_draw, dispersion, gamma, minutes))


def _claim(claim: str, source: str, paper: Any, ours: Any, tolerance: Any, reason: str = "") -> Claim:
    return Claim(system="burstgpt", claim=claim, source=source, paper=paper, ours=ours, tolerance=tolerance,
                 reason=reason)


# ---- the generator


def _draws(alpha: float) -> list[Float[np.ndarray, " requests"]]:
    """Arrival times at one request a second, some independent draws."""
    return [arrival_times(Gamma(alpha ** -0.5), seed, NUM_GAPS, 1.0) for seed in range(NUM_DRAWS)]


def dispersion_of(draws: list[np.ndarray]) -> Float[np.ndarray, " windows"]:
    """Index of dispersion of counts (variance over mean) in windows of `WINDOWS_GAPS`, mean over draws."""
    def index(times: np.ndarray, window: int) -> float:
        counts = np.histogram(times, np.arange(0.0, times[-1], window))[0]
        return counts.var(ddof=1) / counts.mean()

    return np.array([np.mean([index(times, window) for times in draws]) for window in WINDOWS_GAPS])


def _gap_claims(gaps: dict[float, list[np.ndarray]], dispersion: dict[float, np.ndarray]) -> list[Claim]:
    def cv(times: np.ndarray) -> float:
        steps = np.diff(times)
        return steps.std() / steps.mean()

    claims = []
    for alpha, published in PUBLISHED_CV.items():
        claims += [
            _claim(f"CV of {NUM_GAPS:,} gaps at alpha = {alpha:g}", GENERATOR, published,
                   float(np.mean([cv(times) for times in gaps[alpha]])), GENERATOR_TOLERANCE),
            _claim(f"index of dispersion at alpha = {alpha:g}, {WINDOWS_GAPS[-1]} gaps a window: CV^2", GENERATOR,
                   1 / alpha, float(dispersion[alpha][-1]), GENERATOR_TOLERANCE)]
    return claims


def zipf(exponent: float = ZIPF_EXPONENT, longest: int = LONGEST_TOKENS) -> Quantiles:
    """Zipf's law over 1 to `longest` tokens, exactly: whole numbers k are the values from k - 1/2 to k + 1/2."""
    weights = np.arange(1, longest + 1) ** -exponent
    levels = np.concatenate([[0.0], np.cumsum(weights) / weights.sum()])
    levels[-1] = 1.0
    return Quantiles(levels, np.concatenate([[1.0], np.arange(1, longest + 1) + 0.5]))


def _length_claims() -> list[Claim]:
    law = zipf()
    tokens = np.sort(law.quantile((np.arange(NUM_GAPS) + 0.5) / NUM_GAPS))
    ours = {"mean": tokens.mean(), "median": np.median(tokens), "p90": np.percentile(tokens, 90),
            "share of 1 to 3 tokens": np.mean(tokens <= 3)}
    return [_claim(f"Zipf({ZIPF_EXPONENT:g}) lengths up to {LONGEST_TOKENS:,}: {name}", GENERATOR, published,
                   float(ours[name]), GENERATOR_TOLERANCE) for name, published in ZIPF.items()]


# ---- serving


def _alphas() -> str:
    return f"as alpha goes {', '.join(f'{a:g}' for a in ALPHAS)}"


def _burst_claims(rows: pd.DataFrame) -> list[Claim]:
    claims = []
    for metric, label in METRICS.items():
        for rate, mine in rows.groupby("workload.rate_rps"):
            means, margins = means_in_order(mine, "alpha", ALPHAS, metric)
            claims.append(_claim(f"{label}, {_alphas()}, {rate:g} requests/s", SERVING, RISES, means, margins,
                                 ONLY_DIRECTION))
    return claims


def _minute_claims(rows: pd.DataFrame) -> list[Claim]:
    ratios = sorted(rows["workload.rate_ratio"].unique())
    reason = (f"alpha and beta by the minute are not at hand; two Poisson rates in turn, {PERIOD_S} s each on average,"
              f" the high one {', '.join(f'{r:g}' for r in ratios)} times the low one, stand in")
    return [_claim(f"{label}, as parameters change every {PERIOD_S} s", SERVING, None,
                   means_in_order(rows, "workload.rate_ratio", ratios, metric)[0], None, reason)
            for metric, label in METRICS.items()]


def _failure_claims(rows: pd.DataFrame, deadline_s: float) -> list[Claim]:
    reason = DEADLINE.format(deadline_s) + "; beyond what a server completes, some fail whatever the gaps"
    claims = []
    for rate, mine in rows.groupby("workload.rate_rps"):
        means, margins = means_in_order(mine, "alpha", ALPHAS, FAILED)
        claims.append(_claim(f"failed share, {_alphas()}, {rate:g} requests/s", SERVING, RISES, means, margins, reason))
    poisson = rows[rows["alpha"] == 1.0]
    by_load = poisson.groupby("workload.rate_rps")[FAILED].mean()
    loads = ", ".join(f"{rate:g}" for rate in by_load.index)
    return [
        *claims,
        _claim(f"failed shares of releases 1, 2, 3, beside Poisson at {loads} requests/s",
               f"{PAPER}, repository", FAILED_SHARE, tuple(map(float, by_load)), None,
               f"{bracketed(by_load)}; {reason}, so a load is no prediction"),
        _claim("failed share, releases 1, 2, 3, by replay", f"{PAPER}, repository", FAILED_SHARE, None, 0.0,
               "the trace, whose replay would have them, is not at hand")]


def bracketed(shares: pd.Series) -> str:
    """Between which loads, of those in order, each of the releases' failed shares lies."""
    found = []
    for published in FAILED_SHARE:
        below, above = shares[shares < published], shares[shares >= published]
        between = f"{below.index.max():g} and {above.index.min():g} requests/s"
        found.append(f"{100 * published:.2f} % lies " + (
            f"between {between}" if len(below) and len(above) and below.index.max() < above.index.min()
            else "outside of these loads"))
    return ", ".join(found)


# ---- the releases


def _release_claims() -> list[Claim]:
    read_off = "read off a figure"
    return [
        _claim(f"conversations an hour at {', '.join(map(str, HOURLY))} h", f"{PAPER}, figure",
               tuple(map(float, HOURLY.values())), hourly_medians(), None,
               f"{read_off}, and the generator is given them: this says that it draws the rate it is given"),
        _claim("response tokens a request token, from 350 to 2,000 request tokens", f"{PAPER}, figure", 0.17, None,
               None, f"{read_off}; lengths here are tied by a rank correlation, which has no such line")]


def hourly_medians(num_days: int = 60) -> tuple[float, ...]:
    """Median arrivals in the hours of `HOURLY`, of days drawn around a curve through them."""
    knots = np.interp(np.arange(25), list(HOURLY), list(HOURLY.values()), period=24)
    a_day = np.sum((knots[1:] + knots[:-1]) / 2)
    count = int(num_days * a_day)
    arrivals = Modulated(Gamma(1.0), knots / (a_day / 24), a_day)
    # In hours: the rate is that of an hour.
    times = arrival_times(arrivals, 0, count, a_day / 24)
    # An hour around each of the curve's own.
    counts = np.histogram(times, np.arange(0, 24 * num_days) - 0.5)[0]
    return tuple(float(np.median(counts[hour::24])) for hour in HOURLY)


# ---- the plot


def _draw(dispersion: dict[float, np.ndarray], gamma: pd.DataFrame, minutes: pd.DataFrame, path: Path) -> None:
    with drawn(path, figsize=(12, 7)) as figure:
        axes = figure.subplots(2, 3)
        _draw_dispersion(axes[0, 0], dispersion)
        _draw_arrivals(axes[1, 0])
        for column, metric in enumerate(METRICS, start=1):
            _draw_bursts(axes[0, column], gamma, metric)
            _draw_minutes(axes[1, column], minutes, metric)
        heading(figure, "BurstGPT: bursts at equal mean load. Llama-3.1-8B on one A100 behind vLLM V1, lengths of the"
                        f" Azure 2023 conversations, {gamma['seed'].nunique()} seeds; bands: 95 % intervals")


def _draw_dispersion(axis: Any, dispersion: dict[float, np.ndarray]) -> None:
    for (alpha, index), colour in zip(dispersion.items(), _COLOURS, strict=True):
        axis.axhline(1 / alpha, color=colour, linestyle=(0, (4, 3)), linewidth=1)
        axis.plot(WINDOWS_GAPS, index, "o-", color=colour, markersize=4, label=f"alpha = {alpha:g}")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(WINDOWS_GAPS, [f"{w:g}" for w in WINDOWS_GAPS])
    axis.set_yticks([0.25, 0.5, 1, 2, 4], ["0.25", "0.5", "1", "2", "4"])
    axis.minorticks_off()
    axis.set_title("Counts of arrivals")
    axis.set_xlabel("window, mean gaps (dashed: CV$^2$ = 1 / alpha)")
    axis.set_ylabel("index of dispersion")
    axis.legend(loc="lower right", bbox_to_anchor=(1.0, 0.14))


def _draw_arrivals(axis: Any, window_s: float = 10.0, until_s: float = 600.0) -> None:
    """One draw each of what the right of the figure is about."""
    scenario = study("burstgpt-minutes").base_tree()["workload"]
    rate_rps, highest = scenario["rate_rps"], max(study("burstgpt-minutes").axes["workload.rate_ratio"])
    processes = {
        "Poisson": Gamma(1.0), f"alpha = {ALPHAS[-1]:g}": Gamma(ALPHAS[-1] ** -0.5),
        f"high rate {highest:g} x low rate": MMPP2.from_seconds(
            rate_rps, highest, scenario["high_dwell_s"], scenario["low_dwell_s"])}
    edges = np.arange(0, until_s + window_s, window_s)
    for (label, process), colour in zip(processes.items(), (FAINT, _COLOURS[3], INK), strict=True):
        times = arrival_times(process, 0, int(3 * rate_rps * until_s), rate_rps)
        axis.stairs(np.histogram(times, edges)[0] / window_s, edges, color=colour, linewidth=1.2, label=label)
    axis.set_xlim(0, until_s)
    axis.set_ylim(0, 3.5 * rate_rps)
    axis.set_title("Arrivals, one draw each")
    axis.set_xlabel("seconds")
    axis.set_ylabel(f"requests/s in {window_s:g} s")
    axis.legend(loc="upper left")


def _draw_bursts(axis: Any, rows: pd.DataFrame, metric: str) -> None:
    for (rate, mine), colour in zip(rows.groupby("workload.rate_rps"), _COLOURS[1:], strict=True):
        _draw_means(axis, mine, "alpha", ALPHAS, metric, colour, f"{rate:g} requests/s")
    axis.set_xlabel("alpha of the gaps, from even to bursty")
    axis.set_ylim(bottom=0)
    axis.legend(loc="upper left")


def _draw_minutes(axis: Any, rows: pd.DataFrame, metric: str) -> None:
    rate = study("burstgpt-minutes").base_tree()["workload"]["rate_rps"]
    _draw_means(axis, rows, "workload.rate_ratio", sorted(rows["workload.rate_ratio"].unique()), metric, _COLOURS[1],
                f"{rate:g} requests/s")
    axis.set_xlabel(f"high rate / low rate, in turn for {PERIOD_S} s")
    axis.set_ylim(bottom=0)
    axis.legend(loc="upper left")


def _draw_means(axis: Any, rows: pd.DataFrame, by: str, values: Sequence[float], metric: str, colour: str, label: str
                ) -> None:
    """A metric's means over seeds and their intervals, at values of an axis."""
    title, unit, scale = _SHOWN[metric]
    table = scale * rows.pivot(index="seed", columns=by, values=metric)[list(values)].to_numpy(float)
    place, mean, half = np.arange(len(values)), table.mean(axis=0), half_width(table)
    axis.fill_between(place, mean - half, mean + half, color=colour, alpha=0.18, linewidth=0)
    axis.plot(place, mean, "o-", color=colour, markersize=5, label=label)
    axis.set_xticks(place, [f"{v:g}" for v in values])
    axis.set_title(title)
    axis.set_ylabel(unit)
