"""EPD (arXiv 2501.05460, ICML 2025): encode, prefill and decode on separate GPUs, for models that see.

Three systems of 8 GPUs serve requests of two images: six that encode, one that computes prompts and one that decodes;
seven that encode and compute prompts and one that decodes; eight that do it all. How long an image takes to encode was
published nowhere, so three times are assumed, and only the order of the systems is a claim. Memory ratios are the
arithmetic of `jaxsim.analytic.encoding`: weights, embeddings and the KV cache of image tokens. Offline, 100 requests of
one image begin on 1E1P4D, with roles that change and with roles that stay; that they end sooner is the claim.

Known gaps: preprocessing on the host, activations of the vision tower and the memory that it takes from the KV cache of
those that encode beside the model are left out; a change of role takes no time beside the drain.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from jaxsim._core.errors import InputError
from jaxsim.analytic.encoding import held, most_gain
from jaxsim.engine.simulate import simulate
from jaxsim.io.figure import INK, drawn, heading
from jaxsim.metrics import LaneResult
from jaxsim.policy.role_switching import ROLES
from jaxsim.reproduce.claim import FALLS, RISES, Claim, Reproduction
from jaxsim.reproduce.runs import half_width, simulated, study
from jaxsim.spec.vision import load_vision, vision_catalogue

DESCRIPTION = "EPD: images encoded on GPUs of their own (6E1P1D), beside the prompts (7P1D), or all in one (8)"

PAPER = "arXiv 2501.05460"

SYSTEMS = {"epd-aggregated": "8 aggregated", "epd-prefill": "7P1D", "epd-encode": "6E1P1D"}

MODEL = "minicpm-v-2.6"
"""Of the public scripts, which use half of the memory."""

MEMORY_BYTES = 0.5 * 80e9

RATIO_TOLERANCE, TOLERANCE = 0.2, 0.02

TILES, SPLIT_TILE_S = 10, 0.03
"""Of an image, and seconds of one, in `epd-split`."""

SAME = "the same claim at another rate or another assumed time: the gate is where encoding apart has least to gain"

SHOWN_TILE_MS = 60
"""At which the systems differ most of those assumed."""

TILE_MS, DECIDE_S, DEAL_ANEW = (f"cluster.{name}" for name in (
    "encode.tile_ms", "role_switching.decide_s", "role_switching.deal_anew"))

STAYS_S, SWITCHES_S = 3600, 5
"""Between decisions of the controller of roles: beyond the end of any run, and as the public code decides."""

DEMO_S = (68.0, 25.0)
"""Of the demonstration, without and with role switching."""

TOTALS = {"openbmb/MiniCPM-V-2_6": 8.10, "OpenGVLab/InternVL2-8B": 8.08, "OpenGVLab/InternVL2-26B": 25.5}
"""Billions of parameters, published with the checkpoints."""

_COLOURS = {"epd-aggregated": "#D55E00", "epd-prefill": "#0072B2", "epd-encode": "#009E73"}


_OF_ROLES = {"encode": "#009E73", "prefill": "#0072B2", "decode": "#CC79A7"}


def reproduce(num_seeds: int | None = None) -> Reproduction:
    """All claims of this system; num_seeds: runs of each point instead of the studies' own number."""
    online = pd.concat([simulated(study(name, num_seeds)).assign(system=name) for name in SYSTEMS], ignore_index=True)
    split = simulated(study("epd-split", num_seeds))
    demo, shown = switching()
    return Reproduction((*_total_claims(), *memory_claims(), *split_claims(split), *order_claims(online),
                         *switch_claims(demo), *_other_claims(online)), functools.partial(_draw, online, shown))


def _total_claims() -> list[Claim]:
    return [Claim(
        system="epd", claim=f"parameters of {name.split('/')[1]}, 1e9: vision tower + language model",
        source="model card", paper=TOTALS[name], tolerance=0.01,
        ours=(vision.num_parameters + vision.language.num_parameters) / 1e9)
        for name, vision in vision_catalogue().items()]


def memory_ratios(model: str, memory_bytes: float = MEMORY_BYTES) -> dict[str, float]:
    """Of a model, by what they are ratios of: GPUs of a role against aggregated ones, a request of 2 images.

    memory: aggregated over encode with one such request; batch: encode over aggregated; images: the largest request
    that its encode and its prefill GPU both hold, over that of an aggregated one; kv: prefill over aggregated.
    """
    vision = load_vision(model)
    encode, prefill, aggregated = (held(vision, role) for role in ("encode", "prefill", "aggregated"))

    def over(a: float, b: float) -> float:
        return a / b if b else float("nan")

    return {
        "memory": over(aggregated.peak_bytes(1, 2), encode.peak_bytes(1, 2)),
        "batch": over(encode.largest_batch(memory_bytes, 2), aggregated.largest_batch(memory_bytes, 2)),
        "images": over(min(encode.most_images(memory_bytes), prefill.most_images(memory_bytes)),
                       aggregated.most_images(memory_bytes)),
        "kv": over(prefill.left_bytes(memory_bytes), aggregated.left_bytes(memory_bytes))}


def memory_claims() -> list[Claim]:
    """The ratios of the abstract."""
    texts = {"memory": ("peak memory of an encode GPU, times smaller than aggregated", 15.0),
             "batch": ("batch of an encode GPU, times larger", 22.0),
             "images": ("images of a request, times more", 10.0),
             "kv": ("KV cache of a prefill GPU, times larger", 2.2)}
    others = {name: memory_ratios(name) for name in vision_catalogue() if name != load_vision(MODEL).model}
    claims = []
    ours = memory_ratios(MODEL)
    for name, (text, paper) in texts.items():
        beside = ", ".join(f"{model.split('/')[1]} {ratios[name]:.3g}" for model, ratios in others.items()
                           if ratios[name] == ratios[name])
        claims.append(Claim(
            system="epd", claim=f"up to: {text}", source=f"{PAPER}, abstract", paper=paper, ours=ours[name],
            tolerance=RATIO_TOLERANCE,
            reason=f"of {load_vision(MODEL).model.split('/')[1]}, half of 80 GB, from weights and tiles without"
                   f" activations; whose ratio it is was not published (here: {beside})"))
    return claims


def split_claims(rows: pd.DataFrame) -> list[Claim]:
    """The bound of what dealing images saves, where nobody else is served."""
    claims = []
    for images, mine in rows.groupby("workload.images.number"):
        ttft_s = mine.groupby("cluster.encode.split_images")["mean_ttft_ms"].mean() / 1e3
        encode_s = int(images) * TILES * SPLIT_TILE_S
        claims.append(Claim(
            system="epd", claim=f"share of TTFT saved, {images} images dealt to {images} engines: closed form, engine",
            source=f"{PAPER}, from its mechanism", paper=most_gain(encode_s, ttft_s[False] - encode_s, int(images)),
            ours=float(1 - ttft_s[True] / ttft_s[False]), tolerance=None,
            reason="the closed form is of the encode times assumed here: it checks the engine, nothing published"))
    return claims


def order_claims(rows: pd.DataFrame) -> list[Claim]:
    """Encoding apart against the two others: TTFT at both ends of the rates and at every assumed time, attainment."""
    rates = sorted(rows["workload.rate_rps"].unique())
    claims = []
    for other in ("epd-aggregated", "epd-prefill"):
        for tile_ms in sorted(rows["cluster.encode.tile_ms"].unique()):
            for rate in (rates[0], rates[-1]):
                ours, margin = _pair(rows, "mean_ttft_ms", other, rate, tile_ms)
                is_gate = tile_ms == rows["cluster.encode.tile_ms"].min() and rate == rates[-1]
                claims.append(Claim(
                    system="epd", claim=f"mean TTFT, ms, {SYSTEMS[other]} then 6E1P1D, {rate:g} req/s, {tile_ms:g} ms a"
                                        " tile",
                    source=f"{PAPER}, abstract; public script", paper=FALLS, ours=ours,
                    tolerance=margin if is_gate else None, reason="" if is_gate else SAME))
    for other in ("epd-aggregated", "epd-prefill"):
        claims.append(Claim(
            system="epd", claim=f"share within both limits, {SYSTEMS[other]} then 6E1P1D, {rates[-1]:g} req/s,"
                                f" {SHOWN_TILE_MS} ms a tile", source=f"{PAPER}, abstract; public script", paper=RISES,
            ours=_pair(rows, "slo.attainment", other, rates[-1], SHOWN_TILE_MS)[0], tolerance=None,
            reason="whether the limits bind follows from the encode time, which was not published"))
    return claims


def switching() -> tuple[pd.DataFrame, LaneResult]:
    """Seconds of the demonstration (`duration`), a row a point, and the run that is drawn. Nothing is left to chance:
    one run of each. Raises `InputError` for a run that a bound stopped."""
    made = study("epd-switch")
    points, base = list(made.points()), made.base_tree()
    lanes = [lane for (lane,) in simulate([made.scenario_at(point, base) for point in points]).lanes]
    for point, lane in zip(points, lanes, strict=True):
        if lane.fault:
            raise InputError("study epd-switch", point, f"has no result ({lane.fault})", "change the study")
    rows = pd.DataFrame([{**point, "duration": lane.duration_s} for point, lane in zip(points, lanes, strict=True)])
    short = min(rows["workload.output"])
    shown = {DECIDE_S: SWITCHES_S, DEAL_ANEW: True, TILE_MS: SHOWN_TILE_MS, "workload.output": short}
    return rows, lanes[points.index(shown)]


def switch_claims(rows: pd.DataFrame) -> list[Claim]:
    """100 requests from 1E1P4D: whether they end sooner where roles change than where they stay, at every assumed time
    of a tile, and how many times sooner."""
    source, told = "repository of EPD, readme", "100 requests from 1E1P4D, s, roles stay then change"
    spans = rows.pivot(index=["workload.output", TILE_MS], columns=[DECIDE_S, DEAL_ANEW], values="duration")
    stays, stuck, anew = (spans[column] for column in ((STAYS_S, False), (SWITCHES_S, False), (SWITCHES_S, True)))
    short, long = min(spans.index.get_level_values(0)), max(spans.index.get_level_values(0))

    def claim(what: str, changes: pd.Series, at: tuple[int, int], tolerance: float | None, reason: str = "") -> Claim:
        return Claim(system="epd", claim=f"{told}, {at[1]:g} ms a tile{what}", source=source, paper=FALLS,
                     ours=(float(stays[at]), float(changes[at])), tolerance=tolerance, reason=reason)

    gains = (stays / anew)[short]
    named = ", ".join(f"{gain:.2f} at {tile_ms:g} ms" for tile_ms, gain in gains.items())
    return [
        *(claim(", waiting images dealt anew", anew, (short, tile_ms), 0.0) for tile_ms in gains.index),
        claim(", waiting images stay", stuck, (short, SHOWN_TILE_MS), 0.0,
              "all images are with the only encode engine when others join it; whether those that wait move then was"
              " not published"),
        claim(f", dealt anew, output {long:g}", anew, (long, SHOWN_TILE_MS), None,
              f"published for no such outputs, the script's are {short:g} tokens"),
        Claim(system="epd", claim="100 requests from 1E1P4D, times sooner with role switching, up to", source=source,
              paper=DEMO_S[0] / DEMO_S[1], ours=float(gains.max()), tolerance=None,
              reason=f"about {DEMO_S[0]:.0f} s and {DEMO_S[1]:.0f} s; encode times were not published: {named} a tile,"
                     " all assumed")]


def engines_over_time(lane: LaneResult, initial: Sequence[int], end_s: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each role the times, s, from which on so many engines have it; those on the way count for none.

    initial: engines of each role at the beginning.
    """
    curves = []
    for role, count in enumerate(initial):
        steps = [(stopped_s, -1) for _, own, _, _, stopped_s, _, _ in lane.role_changes if own == role]
        steps += [(changed_s, 1) for _, _, new, _, _, _, changed_s in lane.role_changes if new == role]
        steps = sorted((time_s, step) for time_s, step in steps if time_s <= end_s)
        times = np.array([0.0, *(time_s for time_s, _ in steps), end_s])
        counts = count + np.concatenate([[0], np.cumsum([step for _, step in steps])])
        curves.append((times, np.append(counts, counts[-1]).astype(int)))
    return curves


def _pair(rows: pd.DataFrame, metric: str, other: str, rate: float, tile_ms: float) -> tuple[tuple, float]:
    """Means over seeds of another system and of encoding apart, and the margin of the step between them."""
    chosen = rows[(rows["workload.rate_rps"] == rate) & (rows["cluster.encode.tile_ms"] == tile_ms)]
    values = chosen.pivot(index="seed", columns="system", values=metric)[[other, "epd-encode"]].to_numpy(float)
    return tuple(map(float, values.mean(axis=0))), float(half_width(values[:, 1:] - values[:, :1])[0])


def _other_claims(rows: pd.DataFrame) -> list[Claim]:
    means = rows.groupby(["cluster.encode.tile_ms", "workload.rate_rps", "system"])["mean_ttft_ms"].mean().unstack()
    saved = 100 * (1 - means["epd-encode"] / means[["epd-aggregated", "epd-prefill"]].max(axis=1))
    return [
        Claim(system="epd", claim="up to: TTFT lower by, %", source=f"{PAPER}, abstract", paper=71.0,
              ours=float(saved.max()), tolerance=None,
              reason="encode times were not published; the largest of those assumed here"),
        Claim(system="epd", claim="end-to-end throughput better by, %", source=f"{PAPER}, first version", paper=57.0,
              ours=None, tolerance=None, reason="setup not published")]


def _draw(rows: pd.DataFrame, shown: LaneResult, path: Path) -> None:
    with drawn(path, figsize=(15, 4.6)) as figure:
        left, right, demo = figure.subplots(1, 3)
        _draw_switching(demo, shown)
        _draw_metric(left, rows, "mean_ttft_ms", "Mean TTFT, ms")
        _draw_metric(right, rows, "slo.attainment", "Share within both limits")
        left.set_ylim(0, 1600)
        left.axhline(1400, color=INK, linewidth=0.8, linestyle=":", label="limit")
        left.legend(loc="lower left", ncols=2)
        right.set_ylim(-0.02, 1.05)
        heading(figure, f"EPD: two images a request, 10 ms + {SHOWN_TILE_MS} ms a tile to encode (assumed)")


def _draw_switching(axis: Any, lane: LaneResult) -> None:
    """Engines of each role in the demonstration."""
    made = study("epd-switch")
    pools = made.scenario_at(next(iter(made.points()))).cluster.pools
    replicas = {pool.role: pool.replicas for pool in pools}
    end_s = float(np.nanmax(lane.finish_s))
    # Thinner and thinner, so that equal counts stay visible.
    for role, width, (times, counts) in zip(ROLES, (4.0, 2.4, 1.2),
                                            engines_over_time(lane, [replicas[r] for r in ROLES], end_s), strict=True):
        axis.step(times, counts, where="post", color=_OF_ROLES[role], linewidth=width, label=role)
    axis.set_title("Engines of each role: 100 requests from 1E1P4D")
    axis.set_xlabel("s")
    axis.set_yticks(range(sum(replicas.values())))
    axis.set_ylim(-0.1, sum(replicas.values()) - 1.4)
    axis.legend(loc="upper right")


def _draw_metric(axis: Any, rows: pd.DataFrame, metric: str, title: str) -> None:
    rows = rows[rows["cluster.encode.tile_ms"] == SHOWN_TILE_MS]
    for name, shown in SYSTEMS.items():
        curve = rows[rows["system"] == name].groupby("workload.rate_rps")[metric].mean()
        axis.plot(curve.index, curve, "o-", color=_COLOURS[name], markersize=5, label=shown)
    axis.set_title(title)
    axis.set_xlabel("requests/s")
