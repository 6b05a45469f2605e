"""SKIP (arXiv 2504.11750, ISPASS 2025): a host that launches kernels and a device that runs them, coupled or over PCIe.

Prefills of BERT, XLM-RoBERTa, GPT-2 and Llama-3.2-1B in eager mode, kernel by kernel (`jaxsim.analytic.eager`), on an
A100, an H100 (PCIe) and a GH200. What is at hand of the paper says neither how many kernels a pass has, nor the host's
seconds to issue one, nor surely how long its prompts are. Kernels are counted from the operators; 512 tokens are taken,
and of the hosts:

    x86      30 us a kernel, what the cost model takes for launches (`jaxsim.cost.roofline.LAUNCHES`): a guess between
             the several us of this paper and 50 us of SGLang without graphs, so independent of neither
    Grace    2.5 times that, the middle of the two to three times that are expected of it

So no row that rests on these is a gate; it is said between which values the paper's batches come out. Beside it, apart
from the paper's claims, what such a lane is in an engine: one that runs without CUDA graphs (the SGLang of above), and
decodes of small batches with them, gated where no constant comes from the same runs.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from jaxsim.analytic import eager
from jaxsim.analytic import host_device as lanes
from jaxsim.cost.apex import MIXTRAL_MS
from jaxsim.cost.rank import Roofline
from jaxsim.cost.roofline import HOSTS, LAUNCHES, roofline
from jaxsim.io.figure import FAINT, INK, drawn, heading
from jaxsim.reproduce.claim import Claim, Reproduction
from jaxsim.reproduce.runs import simulated, study
from jaxsim.spec.device import load_device
from jaxsim.spec.model import ModelSpec, load_model
from jaxsim.spec.plan import Plan

DESCRIPTION = "SKIP: kernels that a host launches and a device runs, on coupled and PCIe systems"

PAPER, NOTES = "arXiv 2504.11750", "third-party notes on arXiv 2504.11750"
APEX = "microsoft/apex_plus, logs"
UNPUBLISHED = "not published"

ISSUE_S = LAUNCHES["launch_kernel_s"]
GRACE_FACTOR = 2.5


class Platform(NamedTuple):
    """A device, its host, and how many times the x86 hosts' seconds that takes to issue a kernel."""

    device: str
    host: str
    factor: float
    colour: str

    @property
    def issue_s(self) -> float:
        """Host seconds to issue a kernel."""
        return self.factor * ISSUE_S

    @property
    def launch_s(self) -> float:
        """From the call to the start."""
        return lanes.NULL_LAUNCH_S[self.host]


A100, H100, GH200 = "A100", "H100", "GH200"
PLATFORMS = {A100: Platform("a100_pcie_80", "epyc_7313", 1.0, "#009E73"),
             H100: Platform("h100_pcie_80", "xeon_8468v", 1.0, "#0072B2"),
             GH200: Platform("gh200_96", "grace", GRACE_FACTOR, "#D55E00")}

BATCHES = tuple(2.0**i for i in range(8))
LENGTH = 512
LENGTHS = (256, LENGTH, 1024)
"""Tokens over which a ratio of devices is to hold, as the paper's are unconfirmed."""

CHAINS = (2, 4, 8, 16, 32, 64, 128, 256)

ENCODERS = {"BERT": "bert-base", "XLM-R": "xlm-roberta-base"}
DECODERS = {"GPT-2": "openai-community/gpt2", "Llama-3.2-1B": "meta-llama/Llama-3.2-1B"}
LLAMA = "Llama-3.2-1B"

KNEES = {A100: 8.0, H100: 8.0, GH200: 32.0}

LOOSE, TIGHT = 0.3, 0.1
"""Of ratios of latencies; of measured seconds an iteration."""

ISSUES_S = np.geomspace(2e-6, 500e-6, 400)
"""Host seconds that are looked through for the paper's batches."""

UNCONFIRMED_FACTORS = {H100: 2.8, A100: 1.9}
"""Times by which BERT at batch 1 takes longer on the GH200 (unconfirmed): where hosts limit, ratios of their seconds.
"""


class Study(NamedTuple):
    """Passes: lists by model, and device seconds of kernels by model and platform, over `BATCHES`."""

    passes: dict[str, eager.Pass]
    seconds: dict[tuple[str, str], Any]

    def lanes(self, model: str, platform: str) -> lanes.Lanes:
        """Measures over the batches."""
        p = PLATFORMS[platform]
        return lanes.measures(self.seconds[model, platform], p.issue_s, p.launch_s)

    def latency_s(self, model: str, platform: str, batch: float) -> float:
        """Of one batch."""
        return float(self.lanes(model, platform).latency_s[BATCHES.index(batch)])

    def knees(self, model: str, platform: str, issue_s: Any) -> np.ndarray:
        """Batches at which TKLQT leaves its floor, for host seconds a kernel."""
        return lanes.knee(BATCHES, self.seconds[model, platform], issue_s, PLATFORMS[platform].launch_s)


def specs() -> dict[str, ModelSpec]:
    """Dimensions of the four models."""
    return ({label: eager.ENCODERS[name] for label, name in ENCODERS.items()}
            | {label: load_model(name) for label, name in DECODERS.items()})


def passes() -> Study:
    """Kernels of the four models and their seconds on the three devices, in 16 bits."""
    made = {label: eager.eager_pass(model, np.array(BATCHES), LENGTH) for label, model in specs().items()}
    return Study(made, {(label, name): lanes.pass_seconds(_cost(model, p), made[label])
                        for label, model in specs().items() for name, p in PLATFORMS.items()})


def _cost(model: ModelSpec, platform: Platform) -> Roofline:
    return roofline(model, load_device(platform.device), dtype="float16", host="none")


def reproduce(num_seeds: int | None = None) -> Reproduction:
    """All claims of this system; num_seeds: runs of each point of the one study that is simulated."""
    found, decodes = passes(), decode_rows(simulated(study("skip-host-lane", num_seeds)))
    claims = (*knee_claims(found), *latency_claims(found), *fusion_claims(found), *launch_claims(found),
              *eager_engine_claims(eager_engine()), *host_lane_claims(decodes), *synchronous_claims())
    return Reproduction(claims, functools.partial(_draw, found, decodes))


def _claim(claim: str, source: str, paper: Any, ours: Any, tolerance: float | None, reason: str = "") -> Claim:
    return Claim(system="skip", claim=claim, source=source, paper=paper, ours=ours, tolerance=tolerance, reason=reason)


# Knees


def interval(issue_s: np.ndarray, is_met: np.ndarray) -> tuple[float, float]:
    """Between which of these values something holds; NaN where it never does."""
    held = issue_s[is_met]
    return (float(held[0]), float(held[-1])) if len(held) else (float("nan"), float("nan"))


def knee_claims(found: Study) -> list[Claim]:
    """From which batch on the device limits, at the stated host seconds; and host seconds of the paper's batches."""
    claims = []
    for label in ENCODERS:
        knees = {name: float(found.knees(label, name, p.issue_s)) for name, p in PLATFORMS.items()}
        low, high = interval(ISSUES_S, found.knees(label, GH200, ISSUES_S) == KNEES[GH200])
        claims += [
            _claim(f"{label}: batch at which TKLQT leaves its floor, A100 and H100", NOTES, (KNEES[A100], KNEES[H100]),
                   (knees[A100], knees[H100]), None, _stated()),
            _claim(f"{label}: the same, GH200", NOTES, KNEES[GH200], knees[GH200], None,
                   f"the same input; Grace at {GRACE_FACTOR} x {1e6 * ISSUE_S:g} us; it is {KNEES[GH200]:.0f} from"
                   f" {1e6 * low:.0f} to {1e6 * high:.0f} us a kernel, {low / ISSUE_S:.1f} to {high / ISSUE_S:.1f}"
                   " times x86")]
    bert = {name: float(found.knees("BERT", name, p.issue_s)) for name, p in PLATFORMS.items()}
    speed = device_ratio(found, "BERT", H100)
    claims += [
        _claim("GH200 is CPU-bound up to so many times the batch of PCIe systems (BERT)", f"{PAPER}, abstract", 4.0,
               bert[GH200] / max(bert[A100], bert[H100]), None,
               f"the same input; closed form: {GRACE_FACTOR} (host) x {speed:.1f} (device, of the H100) ="
               f" {GRACE_FACTOR * speed:.1f}, rounded to powers of two; 4.0 at {4 / speed:.1f} x x86"),
        _claim("us a kernel on x86 for 8 on A100 and H100, BERT; least and most", UNPUBLISHED, None,
               tuple(1e6 * x for x in interval(ISSUES_S, _is_pcie(found, ISSUES_S, ISSUES_S))), None,
               "not published where it could be read; one number for both hosts"),
        _claim("us a kernel on the H100's host for 8, 8 and 32 with batch-1 ratios of 2.8 and 1.9", UNPUBLISHED, None,
               tuple(1e6 * x for x in interval(ISSUES_S, _is_all(found))), None,
               "the ratios are unconfirmed; then hosts differ, and one number gives all three batches"),
        _floor_claim(found)]
    return claims


def _floor_claim(found: Study) -> Claim:
    """How far TKLQT has left its floor at the paper's batches."""
    number, factors = len(found.passes["BERT"].order), []
    for name, p in PLATFORMS.items():
        over = np.asarray(found.lanes("BERT", name).launch_and_queue_s) / (number * p.launch_s)
        at = BATCHES.index(KNEES[name])
        factors += [float(over[at - 1]), float(over[at])]
    before, after = factors[::2], factors[1::2]
    one = sorted(1 + p.issue_s / p.launch_s for p in PLATFORMS.values())
    return _claim("TKLQT over its floor at half the paper's batch and at it: A100, H100, GH200 (BERT)", UNPUBLISHED,
                  None, tuple(factors), None,
                  f"what leaving the floor means is not published: one kernel that waits, as here, is {one[0]:.0f} to"
                  f" {one[-1]:.0f} floors; {max(before):.1f} to {min(after):.0f} floors would give 8, 8 and 32")


def _stated() -> str:
    return (f"{1e6 * ISSUE_S:g} us a kernel on x86, a guess between this paper's several us and SGLang's 50, so not"
            f" independent; {LENGTH} tokens (unconfirmed), 16 bits, attention as separate products")


def _is_pcie(found: Study, a100_s: np.ndarray, h100_s: np.ndarray) -> np.ndarray:
    return ((found.knees("BERT", A100, a100_s) == KNEES[A100]) & (found.knees("BERT", H100, h100_s) == KNEES[H100]))


def _is_all(found: Study) -> np.ndarray:
    """By seconds of the H100's host: whether all knees are the paper's, the other hosts in the unconfirmed ratios."""
    grace_s = UNCONFIRMED_FACTORS[H100] * ISSUES_S
    return (_is_pcie(found, grace_s / UNCONFIRMED_FACTORS[A100], ISSUES_S)
            & (found.knees("BERT", GH200, grace_s) == KNEES[GH200]))


def device_ratio(found: Study, model: str, over: str) -> float:
    """Device seconds over those of the GH200 at the largest batch."""
    return float(found.seconds[model, over][:, -1].sum() / found.seconds[model, GH200][:, -1].sum())


# Latencies, fusion, launches


def latency_claims(found: Study) -> list[Claim]:
    """GH200 against the others, at large batch and at 1."""
    def ratios(model: str, batch: float) -> tuple[float, float]:
        gh200 = found.latency_s(model, GH200, batch)
        return tuple(sorted(found.latency_s(model, name, batch) / gh200 for name in (H100, A100)))

    large = tuple(ratio for length in LENGTHS for ratio in large_batch_ratios(found, length))
    slower = tuple(found.latency_s("BERT", GH200, 1.0) / found.latency_s("BERT", name, 1.0) for name in (H100, A100))
    return [
        _claim("prefill of Llama-3.2-1B, times faster on GH200, batch 128: least and most;"
               f" at {', '.join(f'{n:,}' for n in LENGTHS)} tokens", f"{PAPER}, abstract", (1.9, 2.7) * len(LENGTHS),
               large, LOOSE, "of the H100 and of the A100; the device limits, so the host's seconds are not in it; must"
               " hold at all of these lengths, as the paper's is unconfirmed"),
        _claim(f"the same, batch 16, {LENGTH} tokens", NOTES, (1.9, 2.7), ratios(LLAMA, 16.0), None,
               "that it is batch 16 is unconfirmed"),
        _claim("BERT at batch 1, times slower on GH200 than on H100, A100", NOTES, (2.8, 1.9), slower, None,
               f"unconfirmed; here it is the {GRACE_FACTOR} that is put in")]


def large_batch_ratios(found: Study, length: int) -> tuple[float, float]:
    """Seconds of the largest batch of Llama-3.2-1B on the others over those on GH200, prompts of `length`: least, most.
    """
    if length == LENGTH:
        seconds = {name: found.seconds[LLAMA, name] for name in PLATFORMS}
    else:
        model = specs()[LLAMA]
        made = eager.eager_pass(model, np.array(BATCHES), length)
        seconds = {name: lanes.pass_seconds(_cost(model, p), made) for name, p in PLATFORMS.items()}
    latency = {name: float(lanes.measures(seconds[name], p.issue_s, p.launch_s).latency_s[-1])
               for name, p in PLATFORMS.items()}
    return tuple(sorted(latency[name] / latency[GH200] for name in (H100, A100)))


def speedups(made: eager.Pass) -> np.ndarray:
    """Launches over those left, by chain length: the ideal speed-up where the host limits."""
    return np.array([len(made.order) / len(lanes.chained(made, length).order) for length in CHAINS])


def fusion_claims(found: Study) -> list[Claim]:
    """Ideal speed-ups over chain lengths."""
    best = {label: speedups(made) for label, made in found.passes.items()}
    counts = {label: len(made.order) for label, made in found.passes.items()}
    needed = [round((CHAINS[-1] - 1) / (1 - 1 / speed)) for speed in (2.7, 6.8)]
    return [
        _claim("ideal speed-up of fused chains, CPU-bound: least and most of four models, best length", NOTES,
               (2.7, 6.8), (float(min(map(max, best.values()))), float(max(map(max, best.values())))), LOOSE,
               f"kernels a pass here: {', '.join(f'{label} {n}' for label, n in counts.items())}; beyond a layer a sure"
               f" chain begins with a kernel that occurs once, so there is one of them, and n / (n - {CHAINS[-1] - 1})"
               f" has no bound where n is just above {CHAINS[-1]} (XLM-R)"),
        _claim(f"the same at length {CHAINS[-1]}: {', '.join(counts)}", NOTES, None,
               tuple(float(speed[-1]) for speed in best.values()), None,
               f"the length is unconfirmed; with one chain of it 2.7 and 6.8 would be passes of {needed[0]} and"
               f" {needed[1]} kernels")]


def launch_claims(found: Study) -> list[Claim]:
    """The launch overheads, which are an input."""
    floor = tuple(1e9 * float(found.lanes("BERT", name).launch_and_queue_s[0]) / len(found.passes["BERT"].order)
                  for name in PLATFORMS)
    return [_claim("launch of an empty kernel, ns: A100, H100, GH200", NOTES,
                   tuple(1e9 * p.launch_s for p in PLATFORMS.values()), floor, None,
                   "an input: what comes back is TKLQT a kernel at batch 1 (BERT)")]


# An engine without graphs

MIXTRAL = "mixtral-8x22b"

CELLS = {"creation 0.25": (14, 880), "creation 0.5": (27, 880), "chat 0.25": (2, 150), "chat 0.5": (4, 150),
         "summarization 0.25": (2, 3090), "summarization 0.5": (4, 3090)}
"""Of the cells of `MIXTRAL_MS`, sequences at once (rate x output tokens x seconds a token) and their mean context."""


def measured_ms(spread: bool) -> tuple[float, ...]:
    """Of `CELLS`, measured ms an output token with experts cut (TP 8), or spread whole (EP 8)."""
    return tuple(MIXTRAL_MS[spread][cell] for cell in CELLS)


MIXED_LAUNCH_S = HOSTS["tensorrt-llm"]["launch_kernel_s"]
"""Of iterations that TensorRT-LLM does not capture."""


def eager_engine(expert_parallel: bool = False, **overrides: float) -> lanes.DecodeLanes:
    """Decode iterations of `CELLS`, every kernel launched."""
    plan = Plan(tensor_parallel_size=8, enable_expert_parallel=expert_parallel)
    cost = roofline(load_model(MIXTRAL), load_device("h100"), plan, "bfloat16", **overrides)
    batches, contexts = zip(*CELLS.values(), strict=True)
    return lanes.decode_lanes(cost, batches, contexts, cuda_graphs=False)


def eager_engine_claims(found: lanes.DecodeLanes) -> list[Claim]:
    """The launch-bound decode of SGLang."""
    tensor, expert = measured_ms(False), measured_ms(True)
    ours = 1e3 * found.seconds
    slow = 1e3 * eager_engine(launch_kernel_s=MIXED_LAUNCH_S).seconds
    spread = eager_engine(expert_parallel=True).seconds / found.seconds
    implied = 1e3 * (np.array(tensor) - 1e3 * found.serial_s) / found.num_kernels
    ratios = np.divide(expert, tensor)
    return [
        _claim("Mixtral-8x22B, SGLang without graphs, TP 8: ms a token, six cells", APEX, tuple(map(float, tensor)),
               tuple(map(float, ours)), None,
               f"{found.num_kernels:,} kernels of {1e6 * ISSUE_S:g} us, a guess whose upper end is from this source;"
               f" with {1e6 * MIXED_LAUNCH_S:g} us, those of TensorRT-LLM's uncaptured iterations, {slow.min():.0f} to"
               f" {slow.max():.0f} ms"),
        _claim("the same, largest over smallest cell: regardless of workload and rate", APEX,
               max(tensor) / min(tensor), float(ours.max() / ours.min()), TIGHT,
               f"the device alone takes {1e3 * found.device_s.min():.0f} to {1e3 * found.device_s.max():.0f} ms"),
        _claim("the same, EP 8 over TP 8: least and most", APEX, (float(ratios.min()), float(ratios.max())),
               (float(spread.min()), float(spread.max())), TIGHT,
               "launch-bound both, and whole experts are taken to have as many kernels as sliced ones"),
        _claim("us a kernel that these cells imply, least and most", UNPUBLISHED, None,
               (float(implied.min()), float(implied.max())), None,
               "measured less serial work, over the kernels counted")]


# The host lane of captured decodes

BATCH, HOST, IS_EAGER, TPOT = "engine.max_num_seqs", "cost.host", "engine.enforce_eager", "mean_tpot_ms"

GRAPHS, NO_GRAPHS, NO_HOST = "CUDA graphs", "without graphs", "graphs, no host work"

MEASURED = {"llama-2-7b": (9, 715, 7.23, True, "inference-sim, vLLM 0.15"),
            "llama-3.1-8b": (8, 430, 7.316, False, "ML.ENERGY, vLLM 0.11"),
            "qwen3-8b": (8, 560, 8.204, False, "ML.ENERGY, vLLM 0.11")}
"""Measured on one H100: sequences, mean context, ms a token, asynchronous scheduling, where."""


def decode_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Simulated ms a token by batch, a column a kind of host."""
    kind = np.where(rows[IS_EAGER].astype(bool), NO_GRAPHS, np.where(rows[HOST] == "none", NO_HOST, GRAPHS))
    return rows.assign(kind=kind).pivot_table(index=BATCH, columns="kind", values=TPOT)


def host_lane_claims(decodes: pd.DataFrame) -> list[Claim]:
    """Small-batch decodes with and without the host lane."""
    model = "llama-2-7b"
    batch, _, measured, _, source = MEASURED[model]
    weights = 1e3 * 2 * load_model(model).num_parameters / load_device("h100").memory_bytes_per_s
    eager_bound = decodes.index[decodes[NO_GRAPHS] > 1.05 * decodes[GRAPHS]]
    return [
        _claim(f"Llama-2-7B on H100, batch {batch}: ms a token, event engine", source, measured,
               float(decodes.loc[batch, GRAPHS]), None, "async_step_s and elementwise_floor_s of the cost model come"
               f" from runs of this source; weights alone: {weights:.1f} ms"),
        _claim("the same without the host lane", source, measured, float(decodes.loc[batch, NO_HOST]), None,
               "no claim of the source: of what the weights leave, nearly all is the device's (bandwidth below the"
               " datasheet's, KV, attention, floors of kernels)"),
        _claim("the same without CUDA graphs", UNPUBLISHED, None, float(decodes.loc[batch, NO_GRAPHS]), None,
               f"not measured; launches limit up to batch {max(eager_bound, default=0)} of those simulated")]


def synchronous_claims() -> list[Claim]:
    """Decodes of an engine whose host works between iterations."""
    claims = []
    for name in ("llama-3.1-8b", "qwen3-8b"):
        batch, context, measured, is_async, source = MEASURED[name]
        with_host, without = (1e3 * float(lanes.decode_lanes(
            roofline(load_model(name), load_device("h100"), host=host), (batch,), context,
            async_scheduling=is_async).seconds[0]) for host in ("vllm-v1", "none"))
        is_fitted = name == "qwen3-8b"
        fitted = ("; host seconds of V1 were fitted on these runs" if is_fitted else
                  "; host seconds of V1 were fitted on another model of this source")
        label = load_model(name).name.split("/")[-1]
        claims.append(_claim(f"{label} on H100, batch {batch}: ms a token", source, measured, with_host,
                             None if is_fitted else TIGHT, f"without host work {without:.2f} ms{fitted}"))
    return claims


# Drawing


def _draw(found: Study, decodes: pd.DataFrame, path: Path) -> None:
    with drawn(path, figsize=(17, 4.6)) as figure:
        latency, queue, fusion, engine = figure.subplots(1, 4)
        made = lanes.compiled(found.passes["BERT"])
        compiled = {name: lanes.pass_seconds(_cost(specs()["BERT"], p), made) for name, p in PLATFORMS.items()}
        for name, p in PLATFORMS.items():
            measures = found.lanes("BERT", name)
            latency.plot(BATCHES, 1e3 * np.asarray(measures.latency_s), "o-", markersize=3.5, color=p.colour,
                         label=name)
            for mode, style in (("compiled", "--"), ("cuda_graph", ":")):
                again = lanes.measures(compiled[name], p.issue_s, p.launch_s, mode=mode)
                latency.plot(BATCHES, 1e3 * np.asarray(again.latency_s), style, linewidth=1, color=p.colour)
            waited = 1e3 * np.asarray(measures.launch_and_queue_s)
            queue.plot(BATCHES, waited, "o-", markersize=3.5, color=p.colour, label=name)
            knee = float(found.knees("BERT", name, p.issue_s))
            if np.isfinite(knee):
                queue.plot(knee, waited[BATCHES.index(knee)], "*", markersize=14, color=p.colour)
        for axes, title in ((latency, "BERT: latency, ms"), (queue, "TKLQT, ms; stars: it leaves its floor")):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_title(title)
            axes.set_xlabel("batch")
            axes.legend(loc="upper left")
        latency.annotate("dashed: compiled; dotted: that in a graph", (128, 0.7), ha="right", fontsize=9, color=FAINT)
        fusion.axhspan(2.7, 6.8, color="#EEEEEE", zorder=0)
        fusion.annotate("published", (256, 6.6), ha="right", va="top", fontsize=9, color=FAINT)
        colours = ("#0072B2", "#56B4E9", "#009E73", "#D55E00")
        for (label, one), colour in zip(found.passes.items(), colours, strict=True):
            fusion.plot(CHAINS, speedups(one), "o-", markersize=3.5, color=colour, label=label)
        fusion.set_xscale("log", base=2)
        fusion.set_ylim(0.8, 8)
        fusion.set_title("Ideal speed-up of fused chains")
        fusion.set_xlabel("kernels a chain")
        fusion.legend(loc="upper left")
        for kind, colour in ((GRAPHS, "#0072B2"), (NO_GRAPHS, "#D55E00"), (NO_HOST, "#56B4E9")):
            engine.plot(decodes.index, decodes[kind], "o-", markersize=3.5, color=colour, label=kind)
        batch, _, measured, *_ = MEASURED["llama-2-7b"]
        engine.plot(batch, measured, "D", markersize=9, markerfacecolor="none", markeredgecolor=INK, linestyle="none",
                    label="measured")
        engine.set_xscale("log", base=2)
        engine.set_ylim(bottom=0)
        engine.set_title("Llama-2-7B on H100, decode, ms a token")
        engine.set_xlabel("sequences")
        engine.legend(loc="lower right")
        heading(figure, "SKIP: prefills kernel by kernel on three systems (closed form); decodes in the event engine")
