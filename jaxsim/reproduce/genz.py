"""GenZ: layer and pass times, requirements of a 10T model, and what a platform is sensitive to.

Times are `jaxsim.cost.genz`, GenZ's own counting on jaxsim's models; sensitivities are elasticities of a pass by
`jax.grad`. Nothing is simulated, and no number is random.

Known gaps: the authors' measurements are not public, so their validation errors have no number here; batches and
lengths behind the choice of parallelism, and the TPOT of the 10T assistant, were not published.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from jaxsim._core.precision import enable_x64
from jaxsim.cost import genz
from jaxsim.cost.genz import EXPERTS, GIB, Machine, decode_work, pass_seconds, prefill_work
from jaxsim.io.figure import FAINT, INK, drawn, heading
from jaxsim.reproduce.claim import FALLS, RISES, Claim, Reproduction
from jaxsim.spec.device import load_device
from jaxsim.spec.model import ModelSpec, load_model
from jaxsim.spec.plan import Plan

DESCRIPTION = "GenZ: rooflines of layers and passes, platforms for models to come"

TESTS, NOTEBOOKS, NOTES = "GenZ, its tests", "GenZ, its notebooks", "arXiv 2406.01698, by notes"

EXACT, TIGHT = 1e-3, 0.1

# ---- times

SOURCES = (*((TESTS, EXACT),) * 4, (NOTEBOOKS, EXACT), (NOTEBOOKS, None), *((NOTEBOOKS, TIGHT),) * 3, (NOTEBOOKS, None))
"""Of `genz.CLAIMS` in order, and the tolerance of their class; None of those that a choice of ours was read off."""


def mixtral_22b(is_whole_pass: bool = True, **experts: Any) -> float:
    """Milliseconds of a decode of Mixtral-8x22B in fp8 on four H100 with expert parallelism, batch 32."""
    return 1e3 * float(genz.mixtral_22b("total" if is_whole_pass else "compute", **experts))


def time_reasons() -> tuple[str, ...]:
    """What was chosen for the passes of `genz.CLAIMS`, and what they are without it."""
    vocab, latency = load_model("llama-3.1-70b").vocab, genz.LINK_LATENCY_S
    with enable_x64(True):
        beams = {part: 1e3 * float(genz.beams(part, vocab)) for part in ("total", "communication")}
        router, link, prompt = (
            {part: 1e3 * float(genz.mixtral(part, *given)) for part in ("total", "communication")}
            for given in ((True, genz.A100_LATENCY_S, "hidden"), (True, latency), (False, latency)))
    llama, slow = (f"vocabulary of {genz.BEAMS_VOCAB:,}, Llama 2's", f"links of {1e6 * genz.A100_LATENCY_S:g} us")
    off, short = f"with {vocab:,} {{:.5g}}", f"with its default, {1e6 * latency:g} us, {{:.4g}}"
    sent = "router that sends a number an expert; with the hidden state of the released code {:.4g}, "
    found = (
        f"with a {llama}, read off the next row; " + off.format(beams["total"]),
        f"a {llama}, was read off this row; " + off.format(beams["communication"]),
        f"with {slow}, read off the prompt's collectives, and a " + (sent + short).format(
            router["total"], link["total"]),
        f"with {slow} as above, and a " + (sent + short).format(router["communication"], link["communication"])
        + "; the router's message was read off this row",
        f"with {slow}, read off the next row; " + short.format(prompt["total"]),
        f"{slow} were read off this row; " + short.format(prompt["communication"]))
    return ("in its binary GB/s",) * 4 + tuple(f"in its binary GB/s, {reason}" for reason in found)


def time_claims() -> list[Claim]:
    """Layers and passes with printed times."""
    found = [_claim(f"{claim.name}, ms", source, float(claim.published_ms), claim.found_ms(), tolerance, reason)
             for claim, (source, tolerance), reason in zip(
                 genz.CLAIMS[:len(SOURCES)], SOURCES, time_reasons(), strict=True)]
    found += [_claim(f"validation error, {name}, %", NOTES, paper, None, None,
                     "the authors' measurements are not public, and its efficiencies are fitted on them; jaxsim's own"
                     " errors on measured runs are in docs/accuracy.md")
              for name, paper in (("prefill", 2.73), ("decode", 1.85), ("chunked", 1.43),
                                  ("other architectures", 5.82))]
    return found


def expert_claims() -> list[Claim]:
    """Experts that a batch of 32 reads."""
    even, one = mixtral_22b(experts_per_rank=0.5), mixtral_22b(experts_per_rank=2)
    alone = [mixtral_22b(False, experts_per_rank=count) for count in (0.5, 2)]
    setting = "Mixtral-8x22B, fp8, 4 H100, EP, batch 32"
    return [
        _claim(f"{setting}: TPOT, ms, tokens spread evenly, all to the experts of one chip", NOTES, RISES, (even, one),
               None, "cannot fail: it follows from half an expert read a chip, or two; 2 experts a token, whatever the"
               " batch"),
        _claim("the same, times longer", NOTES, 3.5, one / even, TIGHT,
               f"of operators alone {alone[1] / alone[0]:.3g}; 169 collectives with 5 us to begin with are"
               f" {even - alone[0]:.2g} ms of both"),
        _claim("the same, ms", NOTES, (3.23, 11.33), (even, one), None, "class: shape; the context is not known"),
        _claim("the same as uniform routing has it, evenly spread, ms", NOTES, None,
               mixtral_22b(distinct_experts="expected"), None,
               "physical value: 32 tokens with 2 of 8 touch all experts, 2 on each chip; with topk, whole experts on a"
               f" chip, {mixtral_22b(distinct_experts='topk'):.3g} ms")]


# ---- the 10T assistant

CONTEXT, BEAMS, OUTPUT = 2_000_000, 4, 2000
"""Tokens; beams and output from what the notebook's caches hold (`FIRST_TOKENS`)."""

FIRST_TOKENS = round(242.578125 * GIB / (2 * 96 * 12_288))
"""In the caches of its first context. Source: GPT-3's there, 242.578125 GB, with 96 layers of 12,288 in 8 bits:
110,400, which are 102,400 and the 2,000 of each of four beams."""

STACK_GB, STACKS = 36.0, 400
"""HBM3e. Source: the notebook's lines at 4.608 and 14.4 TB, of 128 and 400 stacks."""


def assistant() -> ModelSpec:
    """The 10T model as the paper's notebook had it: every head with keys and values of its own."""
    model = load_model("hypothetical/super-llm-10t-moe")
    return msgspec.structs.replace(model, kv_heads=model.heads)


def weight_bytes(model: ModelSpec) -> int:
    """Of layers in 8 bits, as GenZ counts memory: projections and experts, no router, norms or embedding."""
    layer = model.layer_parameters()
    return round(model.layers * (layer.attention + layer.experts))


def held_bytes(model: ModelSpec, context: float) -> float:
    """Weights and 8-bit cache of one request: the prompt once, the output of every beam."""
    return weight_bytes(model) + model.kv_bytes_per_token(1) * (context + BEAMS * OUTPUT)


def read_bytes(model: ModelSpec, context: float) -> float:
    """Of a token: active weights and the cache."""
    layer = model.layer_parameters()
    experts = layer.experts * model.experts_per_token / model.experts
    return model.layers * (layer.attention + experts) + held_bytes(model, context) - weight_bytes(model)


def memory_claims() -> list[Claim]:
    """Capacity of the 10T model."""
    model = assistant()
    total = held_bytes(model, CONTEXT)
    device = load_device("h200")
    # As much bandwidth a byte of capacity as an H200 has, whose memory is HBM3e.
    tpot_s = read_bytes(model, CONTEXT) / (total * device.memory_bytes_per_s / device.memory_bytes)
    later = held_bytes(load_model("hypothetical/super-llm-10t-moe"), CONTEXT)
    return [
        _claim("10T model: weights in 8 bits, GB", NOTEBOOKS, 8839.125, weight_bytes(model) / GIB, EXACT,
               "dimensions from its repository, in binary GB"),
        _claim("10T model: KV cache where contexts begin, GB", NOTEBOOKS, 363.8671875,
               model.kv_bytes_per_token(1) * FIRST_TOKENS / GIB, EXACT,
               f"{FIRST_TOKENS:,} tokens, read off GPT-3's cache there"),
        _claim("10T model at 2M tokens: memory, TB", NOTES, 15.0, total / 1e12, TIGHT,
               f"TB of 10^12 bytes; of 2^40 {total / 2**40:.1f}, of a million of 2^20 {total / 2**20 / 1e6:.1f}: GenZ"
               " counts memory in binary units (GenZ/unit.py, binary_dicts), but lines of its chart have 1,000 GB in a"
               " TB, so which one is meant is not known. With the 12 KV heads that the model has in later versions"
               f" {later / 1e12:.3g} TB"),
        _claim("the same, stacks of HBM3e", NOTES, float(STACKS), total / (STACK_GB * 1e9), None,
               f"of {STACK_GB:g} GB of 10^9 bytes, {total / (STACK_GB * GIB):.0f} of 2^30; 400 are a line of the chart,"
               " at 14.4 TB, and hold less than the 15 TB that are asked for"),
        _claim("the same, TPOT from which on capacity binds before bandwidth, ms", NOTES, None, 1e3 * tpot_s, None,
               "said to bind; the TPOT was not published. With the bandwidth that an H200 has for each byte, at its"
               " peak: at a longer TPOT memory for capacity is fast enough")]


# ---- sensitivities

BY = {"bytes_per_s": "memory bandwidth", "flops": "FLOP/s", "link_bytes_per_s": "link bandwidth",
      "link_latency_s": "link latency"}


@functools.cache
def elasticities() -> dict[str, dict[str, float]]:
    """Percent of a pass by a percent of a number: Llama-3.1-70B on four H100 at 0.75."""
    model, plan, machine = load_model("llama-3.1-70b"), Plan(tensor_parallel_size=4), Machine.named("H100", 0.75)
    passes = {"decode": decode_work(model, plan, context=2000), "prefill": prefill_work(model, plan, tokens=4000)}
    found = {}
    for name, works in passes.items():
        def log_seconds(logs, works=works):
            return jnp.log(pass_seconds(works, jax.tree.map(jnp.exp, logs)).total)

        slopes = jax.grad(log_seconds)(jax.tree.map(jnp.log, machine))
        found[name] = {number: float(getattr(slopes, number)) for number in BY}
    return found


def layouts(is_decode: bool, distinct_experts: str = "topk") -> dict[str, float]:
    """Milliseconds of Mixtral-8x22B on four H100, experts cut over them or whole on them; of a decode, with as many
    experts read."""
    model, machine, found = load_model("mixtral-8x22b"), Machine.named("H100", 0.75), {}
    for name, plan in (("TP", Plan(tensor_parallel_size=4)), ("EP", EXPERTS)):
        works = (decode_work(model, plan, context=4096, batch=BATCH, distinct_experts=distinct_experts) if is_decode
                 else prefill_work(model, plan, tokens=4096))
        found[name] = 1e3 * float(pass_seconds(works, machine).total)
    return found


BATCH = 32
"""Of the decodes: ours."""


def sensitivity_claims() -> list[Claim]:
    """What binds, and which parallelism."""
    by, setting = elasticities(), "Llama-3.1-70B, 4 H100"
    decode, prefill = (tuple(abs(by[name][number]) for number in order) for name, order in (
        ("decode", ("bytes_per_s", "link_latency_s", "link_bytes_per_s", "flops")),
        ("prefill", ("flops", "link_bytes_per_s", "link_latency_s", "bytes_per_s"))))
    prompt, decodes = layouts(False), {mode: layouts(True, mode) for mode in ("topk", "expected")}
    setting_is_ours = "the setting is ours"
    ours = f"{setting_is_ours}: Mixtral-8x22B, 4 H100"
    return [
        _claim(f"{setting}, decode: elasticity by memory bandwidth, link latency, link bandwidth", NOTES, FALLS,
               decode[:3], 0.0, f"{setting_is_ours}; by jax.grad; by FLOP/s {decode[3]:.2g}"),
        _claim(f"{setting}, prefill: elasticity by FLOP/s, link bandwidth, link latency", NOTES, FALLS, prefill[:3],
               0.0, f"{setting_is_ours}; by jax.grad; by memory bandwidth {prefill[3]:.2g}"),
        _claim("experts of a prefill: TP, then EP, ms", NOTES, FALLS, (prompt["TP"], prompt["EP"]), 0.0,
               f"{ours}, one prompt of 4,096; two exchanges of the 2 copies of every token send twice what an"
               " all-reduce does"),
        *(_claim(f"experts of a decode, {read}: EP, then TP, ms", NOTES, FALLS,
                 (decodes[mode]["EP"], decodes[mode]["TP"]), None,
                 f"no setting was published, and the order turns with the experts that a batch reads; {ours}, batch"
                 f" {BATCH}, {why}")
          for mode, read, why in (("topk", "2 of them read", "whole experts on each rank, as GenZ counts them"),
                                  ("expected", "as uniform routing reads them", "physical value: all 8")))]


def reproduce(num_seeds: int | None = None) -> Reproduction:
    """All claims; num_seeds: not read, nothing is drawn."""
    return Reproduction((*time_claims(), *expert_claims(), *memory_claims(), *sensitivity_claims()), _draw)


def _claim(name: str, source: str, paper: Any, ours: Any, tolerance: float | None, reason: str) -> Claim:
    return Claim(system="genz", claim=name, source=source, paper=paper, ours=ours, tolerance=tolerance, reason=reason)


# ---- plot


def _draw(path: Path) -> None:
    with drawn(path, figsize=(14, 4.4)) as figure:
        left, middle, right = figure.subplots(1, 3)
        _draw_memory(left)
        _draw_experts(middle)
        _draw_elasticities(right)
        heading(figure, "GenZ: a 10T model's memory, experts that a batch reads, and what passes are sensitive to")


def _draw_memory(axis: Any) -> None:
    contexts = np.linspace(1e5, 2e6, 40)
    for name, model, colour in (("all heads cached", assistant(), "#D55E00"),
                                ("12 KV heads", load_model("hypothetical/super-llm-10t-moe"), "#0072B2")):
        axis.plot(contexts / 1e6, [held_bytes(model, c) / 1e12 for c in contexts], color=colour, label=name)
    for stacks in (128, STACKS):
        axis.axhline(stacks * STACK_GB / 1e3, color=FAINT, linewidth=0.8, linestyle="--")
        axis.annotate(f"{stacks} stacks of HBM3e", (0.1, stacks * STACK_GB / 1e3), va="bottom", fontsize=9, color=FAINT)
    axis.plot([CONTEXT / 1e6], [15.0], "o", color=INK, label="published")
    axis.set_ylim(0, 18)
    axis.set_title("Memory of the 10T model, TB")
    axis.set_xlabel("context, million tokens")
    axis.legend(loc="lower right")


def _draw_experts(axis: Any) -> None:
    batches = np.array([1, 2, 4, 8, 16, 32, 64])
    model, machine = load_model("mixtral-8x22b"), Machine.named("H100")
    for mode, colour in (("topk", "#0072B2"), ("expected", "#D55E00"), ("all", FAINT)):
        works = (decode_work(model, EXPERTS, context=0, generated=1, batch=int(b), dtype="fp8", distinct_experts=mode)
                 for b in batches)
        values = [1e3 * float(pass_seconds(work, machine).total) for work in works]
        axis.plot(batches, values, "o-", markersize=3.5, color=colour, label=mode)
    for value in (3.23, 11.33):
        axis.axhline(value, color=INK, linewidth=0.8, linestyle=":")
    axis.annotate("published: evenly, one chip", (1, 3.23), va="bottom", fontsize=9, color=FAINT)
    axis.set_xscale("log", base=2)
    axis.set_ylim(0, 13)
    axis.set_title("Mixtral-8x22B, 4 H100, EP: TPOT, ms")
    axis.set_xlabel("batch")
    axis.legend(loc="lower right", title="distinct experts")


def _draw_elasticities(axis: Any) -> None:
    by, places = elasticities(), np.arange(len(BY))
    for shift, (name, colour) in zip((-0.2, 0.2), (("decode", "#D55E00"), ("prefill", "#0072B2")), strict=True):
        axis.bar(places + shift, [abs(by[name][number]) for number in BY], 0.36, color=colour, label=name)
    axis.set_xticks(places, [name.replace(" ", "\n") for name in BY.values()])
    axis.set_title("Llama-3.1-70B, 4 H100: elasticity of a pass")
    axis.legend(loc="upper right")
