"""MoE-Lens: an MoE that streams to its GPU while the CPU attends, in closed form and in the event engine.

Mixtral-8x7B offline on an A40 behind 19.5 GB/s (`scenarios/reproduce/moe-lens.toml`). Stage 1 is closed form
(`jaxsim.analytic.streaming`), stage 2 the event engine with blocks, preemption and a token cap (`jaxsim.cost.hybrid`).
The baseline computes a batch and then decodes it, as MoE-Lightning does, in the share of memory that its plans use and
in all of it.

Known gaps: throughputs of the evaluation are published as bars, so there are no numbers to meet; the baseline has
neither micro-batches nor stalls of its link, and its CPU attends as fast; of what the published shares of memory are
shares is not known (`baseline_rooms_gb`).
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd

from jaxsim.analytic import streaming
from jaxsim.analytic.streaming import Streaming, which_resource_next
from jaxsim.cost.base import BatchStats
from jaxsim.cost.hybrid import HybridCost
from jaxsim.engine import lower
from jaxsim.io.figure import FAINT, INK, drawn, heading
from jaxsim.reproduce.claim import RISES, Claim, Reproduction
from jaxsim.reproduce.runs import simulated, study
from jaxsim.spec.scenario import Scenario

DESCRIPTION = "MoE-Lens: an MoE larger than the GPU, its weights streamed, attention on the CPU"

PAPER, SECONDARY = "arXiv 2504.09345", "notes on arXiv 2504.09345"

PROMPT, OUTPUT, ROOM = "workload.input", "workload.output", "engine.hybrid.kv_space_gb"

SEQUENCES = 5000

PAGE = 16
"""Tokens of a KV block."""

RAG = (926, 128)

ITERATIONS = "utilisation.num_iterations"

BASELINE_HOST_GB, BASELINE_SHARE, BASELINE_RAG_SHARE = 265.0, 0.52, 0.35
"""Host memory, and the share of it that plans of MoE-Lightning use at 98/32 and at 926/128 (Table 1)."""

THRESHOLD = 18_236
"""Tokens of an iteration on the A40, fitted by the paper to its own profile; the token cap of the scenarios."""

EXACT = 0.003
"""Three digits are printed."""

TIGHT, LOOSE = 0.1, 0.3


def reproduce(num_seeds: int | None = None) -> Reproduction:
    """All claims; num_seeds: nothing here is drawn, so one run of each point is all there is."""
    rows, serial, steady = (simulated(study(name, 1)) for name in ("moe-lens", "moe-lens-serial", "moe-lens-steady"))
    base = scenario()
    return Reproduction((*table_claims(), *baseline_claims(), *engine_claims(base, rows, steady),
                         *speedup_claims(rows, serial), *point_claims(rows), *resource_claims()),
                        functools.partial(_draw, rows, serial, steady))


def scenario(name: str = "moe-lens") -> Scenario:
    """The first point of a study."""
    made = study(name, 1)
    return made.scenario_at(next(iter(made.points())))


@functools.cache
def _system(room_gb: float) -> lower.System:
    return lower.resolve_system(scenario().with_values({ROOM: float(room_gb)}))


def closed_form(room_gb: float, shares_memory: bool = True) -> Streaming:
    """Stage 1 of the scenario; shares_memory: cores and link share host memory."""
    system = _system(room_gb)
    weights, host, _ = system.hybrid
    pass_s = weights.streamed / host.link_bytes_per_s
    more = dict(memory_bytes_per_s=host.memory_bytes_per_s, threads=float(host.threads)) if shares_memory else {}
    return Streaming(weights.streamed, host.link_bytes_per_s, system.scheduler.max_num_batched_tokens / pass_s,
                     system.memory.kv_bytes, system.memory.block_bytes / PAGE, **more)


@functools.cache
def _cost() -> HybridCost:
    """Lanes of the scenario, which are those of any room."""
    return lower.make_cost(scenario(), _system(70.0), 8192, 98 + 256)


def full_pass_s(room_gb: float, prompt: int, output: int) -> float:
    """Seconds in which weights cross the link while the CPU reads a room that is full of sequences of all ages."""
    count = int(closed_form(room_gb).admitted(prompt, output, PAGE) * output)
    stats = BatchStats.of(num_decode=count, decode_context=int(count * (prompt + (output + 1) / 2)))
    return float(_cost().lanes(stats)[2])


def gpu_busy(few: pd.Series, many: pd.Series, prompt: int = 98, output: int = 32) -> tuple[float, float]:
    """Share of the seconds between two jobs that the GPU computes; and were it as slow as the paper's threshold says.

    Of the mean iteration, its first tokens among the prompts; what is computed again after preemptions is not in it.
    """
    sequences, iterations = (many[name] - few[name] for name in ("num_requests", ITERATIONS))
    seconds, each = (many["duration"] - few["duration"]) / iterations, sequences / iterations
    stats = BatchStats.of(
        num_decode=int(each * (output - 1)), num_prefill=int(each), prefill_tokens=int(each * prompt),
        prefill_context=int(each * prompt), prefill_pairs=each * prompt**2)
    threshold, layers = _system(70.0).hybrid.threshold, scenario().model.spec().layers
    per_token = (threshold.layer_s - threshold.a_s) / THRESHOLD
    slow = layers * (threshold.a_s + per_token * each * (prompt + output - 1))
    return float(_cost().lanes(stats)[0]) / seconds, slow / seconds


def accuracy(predicted: np.ndarray, simulated_: np.ndarray) -> float:
    """Mean of the smaller over the larger."""
    ratio = predicted / simulated_
    return float(np.mean(np.minimum(ratio, 1 / ratio)))


def outputs_per_s(rows: pd.DataFrame, form: str) -> np.ndarray:
    """Output tokens/s of every point in closed form: the bound, "finite" or "greedy"."""
    found = []
    for _, row in rows.iterrows():
        prompt, output = float(row[PROMPT]), float(row[OUTPUT])
        model = closed_form(row[ROOM], shares_memory=form == "greedy")
        if form == "bound":
            total = model.throughput(prompt, output)
        elif form == "finite":
            total = model.finite_throughput(SEQUENCES, prompt, output, PAGE)
        else:
            total = model.greedy_throughput(SEQUENCES, prompt, output, PAGE)
        found.append(float(total) * output / (prompt + output))
    return np.array(found)


# ---- claims


def table_claims() -> list[Claim]:
    """Table 2, and what sequences of all ages gain."""
    peaks, link, token = (150e12, 181e12, 312e12), 31.25e9, 125e3
    tokens = tuple(float(streaming.saturating_tokens(peak, link, 8, 2)) for peak in peaks)
    why = "Mixtral-8x7B, 31.25 GB/s and 125 KB of KV a token, as its entries imply"
    sizes = {256: (614.0, 741.0, 1277.0), 512: (1228.0, 1482.0, 2554.0)}
    return [
        _claim("tokens of a pass that saturate an A40, L40, A100, thousands", (19.2, 23.2, 40.0),
               tuple(n / 1e3 for n in tokens), EXACT, why),
        *(_claim(f"KV of these, GB, sequences of {length} tokens", gb, tuple(n * length * token / 1e9 for n in tokens),
                 EXACT, why) for length, gb in sizes.items()),
        _claim("effective room of sequences of all ages, times, 98/256", 1.57, float(streaming.room_gain(98, 256)),
               EXACT, "(p + g) / (p + g / 2)", source=SECONDARY)]


def baseline_rooms_gb(share: float) -> tuple[float, float]:
    """Room for KV of a baseline that uses so much of its memory: if weights are part of that; if it is of what they
    leave, as `moe-lens-serial.toml` reads it."""
    weights = _system(70.0).hybrid.weights.streamed / 1e9
    return share * BASELINE_HOST_GB - weights, share * (BASELINE_HOST_GB - weights)


def baseline_claims() -> list[Claim]:
    """What the baseline keeps busy, in closed form, by both readings of the memory that it uses."""
    decoding, linking = [], []
    for room in baseline_rooms_gb(BASELINE_SHARE):
        model = closed_form(room)
        sequences = float(model.room_tokens / (98 + 32))
        decoding.append(sequences / float(model.token_cap))
        linking.append(float(model.pass_s) * float(model.gpu_tokens_per_s) / (sequences * 98))
    why = (f"{100 * BASELINE_SHARE:g} % of {BASELINE_HOST_GB:g} GB with weights among them, then"
           f" {100 * BASELINE_SHARE:g} % of what they leave; one batch in closed form. The first is nearer here, but"
           f" leaves {baseline_rooms_gb(BASELINE_RAG_SHARE)[0]:.1f} GB for KV at 926/128")
    return [
        _claim("baseline, 98/32: GPU busy while decoding", 0.165, tuple(decoding), None, why),
        _claim("baseline, 98/32: link busy while computing prompts", 0.239, tuple(linking), None,
               f"{why}. Weights cross once for the whole batch here; its micro-batches, of which no sizes are known,"
               " may want them more often")]


def engine_claims(base: Scenario, rows: pd.DataFrame, steady: pd.DataFrame) -> list[Claim]:
    """Utilisation, what the closed forms miss of the engine, the pass that the CPU's reads stretch, the threshold."""
    sim = rows["output_throughput"].to_numpy(float)
    few = rows[(rows[PROMPT] == 98) & (rows[OUTPUT] == 32) & (rows[ROOM] == 70)].iloc[0]
    many = steady[steady[ROOM] == 70].iloc[0]
    busy, slow = gpu_busy(few, many)
    plain = closed_form(70.0, shares_memory=False)
    greedy, finite = accuracy(outputs_per_s(rows, "greedy"), sim), accuracy(outputs_per_s(rows, "finite"), sim)
    pass_s = full_pass_s(210.0, 98, 256)
    host = _system(210.0).hybrid.host
    by_threads = [float(dataclasses.replace(closed_form(210.0), threads=float(n)).full_pass_s) for n in (10, 20, 40)]
    memory, link, kv = host.memory_bytes_per_s, host.link_bytes_per_s, 210e9
    share = memory / (memory + link)
    threshold = lower.resolve_system(base.with_values({"engine.max_num_batched_tokens": None})).hybrid.threshold
    return [
        _claim("GPU utilisation, 98/32, 70 GB", 0.9, busy, TIGHT,
               f"event engine, the GPU's lane between {int(few['num_requests']):,} and {int(many['num_requests']):,}"
               " sequences, which leaves filling and draining out; by kernel constants of another device. Were the A40"
               f" as slow as the published {THRESHOLD:,} tokens say: {slow:.2g}, which is how full that cap is",
               source=SECONDARY),
        _claim("closed form over engine, mean agreement of 8 points, within 6 % of 1 (0.94 published)", 1.0, greedy,
               0.06, "published is the paper's model against its own system. Greedy admission and the shared memory are"
               " derived, nothing is fitted; the paper's own forms for finite jobs could not be read"),
        _claim("the same of K / q + g iterations, memory not shared (0.94 published)", 1.0, finite, 0.06,
               "reconstruction of the published steady state, in which as many are admitted in every iteration: an"
               " engine admits whatever fits"),
        _claim("pass of the weights, s, 98/256, 210 GB", 6.0, pass_s, None,
               f"{float(plain.pass_s):.3g} s alone; fair shares of {memory / 1e9:g} GB/s among {host.threads} threads"
               " and the link while the CPU reads, a rule that was chosen with the 6 s known. It depends on the"
               f" threads: 10, 20, 40 give {', '.join(f'{s:.3g}' for s in by_threads)} s in a full"
               " room. Other rules: by mean demand"
               f" ({(kv / float(plain.pass_s) + link) / 1e9:.0f} GB/s) nothing is short; in proportion to demand"
               f" {float(plain.pass_s) + kv / memory / share * (1 - share):.3g} s; the link waits"
               f" {float(plain.pass_s) + kv / memory:.3g} s", source=SECONDARY),
        _claim("tokens of an iteration at which the A40 takes as long as the link", float(THRESHOLD),
               float(threshold.tokens), None,
               f"profiled by the paper, an input here; ours from kernel constants of another device, a +"
               f" b n = {1e3 * threshold.a_s:.2g} ms + {1e6 * threshold.b_s:.3g} us n a layer", source=SECONDARY)]


def speedups(rows: pd.DataFrame, serial: pd.DataFrame) -> pd.DataFrame:
    """Overlapped over serial at 70 GB: the baseline in its share of the room, then in all of it."""
    found = []
    for _, row in serial.iterrows():
        ours = rows[(rows[PROMPT] == row[PROMPT]) & (rows[OUTPUT] == row[OUTPUT]) & (rows[ROOM] == 70)].iloc[0]
        found.append({PROMPT: row[PROMPT], OUTPUT: row[OUTPUT], ROOM: row[ROOM], "is_full": row[ROOM] == 70,
                      "serial": row["output_throughput"], "overlapped": ours["output_throughput"],
                      "speedup": ours["output_throughput"] / row["output_throughput"]})
    return pd.DataFrame(found)


def speedup_claims(rows: pd.DataFrame, serial: pd.DataFrame) -> list[Claim]:
    """Orders where both have the same memory; where the baseline has the published share, and factors, for information.
    """
    table = speedups(rows, serial)
    own, full = table[~table["is_full"]], table[table["is_full"]]
    is_rag = (own[PROMPT] == RAG[0]) & (own[OUTPUT] == RAG[1])
    by_point = ", ".join(f"{int(r[PROMPT])}/{int(r[OUTPUT])} {r['speedup']:.3g}" for _, r in own.iterrows())
    in_full = ", ".join(f"{r['speedup']:.3g}" for _, r in full.iterrows())
    is_full_rag = (full[PROMPT] == RAG[0]) & (full[OUTPUT] == RAG[1])
    shares = ", ".join(f"{100 * room / 70:.1f}" for room in own[ROOM])
    put_in = (f"the baseline in {shares} % of the room: the order follows from these shares, to which two"
              " readings give different rooms (rows 5, 6)")
    return [
        *(_claim(f"output tokens/s, {int(r[PROMPT])}/{int(r[OUTPUT])}, both in all of 70 GB: serial, overlapped", RISES,
                 (float(r["serial"]), float(r["overlapped"])), 0.0, f"event engine, {SEQUENCES:,} sequences")
          for _, r in full.iterrows()),
        _claim("speed-up: most of MTBench, RAG; both in all of 70 GB", RISES,
               (float(full[~is_full_rag]["speedup"].max()), float(full[is_full_rag]["speedup"].iloc[0])), 0.0,
               "the largest one is published for RAG", source=SECONDARY),
        *(_claim(f"output tokens/s, {int(r[PROMPT])}/{int(r[OUTPUT])}, the baseline in its share of 70 GB: serial,"
                 " overlapped", RISES, (float(r["serial"]), float(r["overlapped"])), None, put_in)
          for _, r in own.iterrows()),
        _claim("speed-up: most of MTBench, RAG; the baseline in its share", RISES,
               (float(own[~is_rag]["speedup"].max()), float(own[is_rag]["speedup"].iloc[0])), None, put_in,
               source=SECONDARY),
        _claim("speed-up, mean and most", (4.6, 25.5), (float(own["speedup"].mean()), float(own["speedup"].max())),
               None, f"an abstract gives no settings; ours: {by_point}; were all of the room used by the baseline:"
               f" {in_full}. Stalls of its link and slower attention are not in it")]


def point_claims(rows: pd.DataFrame) -> list[Claim]:
    """Every point: bound, closed form, engine."""
    bound, greedy = outputs_per_s(rows, "bound"), outputs_per_s(rows, "greedy")
    return [
        _claim(f"output tokens/s, {int(row[PROMPT])}/{int(row[OUTPUT])}, {row[ROOM]:g} GB: bound, closed form, engine",
               None, (float(bound[i]), float(greedy[i]), float(row["output_throughput"])), None,
               f"published as bars only; the bound is of endlessly many sequences, the others of {SEQUENCES:,}")
        for i, row in rows.reset_index(drop=True).iterrows()]


def resource_claims() -> list[Claim]:
    """Which resource next, of endlessly many sequences."""
    found = []
    for prompt, output, room in ((98, 32, 70.0), (98, 128, 70.0), (98, 256, 210.0), (926, 128, 210.0)):
        each = which_resource_next(closed_form(room), prompt, output, page=PAGE)
        found.append(_claim(
            f"% more for 1 % more KV room, link, host memory, GPU; {prompt}/{output}, {room:g} GB", None,
            tuple(each.values()), None, "nobody published it; gradients of the bound in whole pages, memory shared"))
    return found


def _claim(name: str, paper: Any, ours: Any, tolerance: float | None, reason: str, source: str = PAPER) -> Claim:
    return Claim(system="moe-lens", claim=name, source=source, paper=paper, ours=ours, tolerance=tolerance,
                 reason=reason)


def _draw(rows: pd.DataFrame, serial: pd.DataFrame, steady: pd.DataFrame, path: Path) -> None:
    with drawn(path, figsize=(16, 4.8)) as figure:
        left, middle, right = figure.subplots(1, 3, width_ratios=(1.4, 1, 1))
        at = np.arange(len(rows))
        bars = [("bound", outputs_per_s(rows, "bound"), "#DDDDDD"), ("closed form", outputs_per_s(rows, "greedy"),
                                                                     "#56B4E9"),
                ("engine", rows["output_throughput"].to_numpy(float), "#0072B2")]
        for i, (label, values, colour) in enumerate(bars):
            left.bar(at + 0.27 * (i - 1), values, 0.26, color=colour, label=label)
        table = speedups(rows, serial)
        own = table[~table["is_full"]].set_index([PROMPT, OUTPUT])["serial"]
        points = [(i, own.get((row[PROMPT], row[OUTPUT]))) for i, (_, row) in enumerate(rows.iterrows())
                  if row[ROOM] == 70]
        points = [(i, y) for i, y in points if y is not None]
        left.plot(*zip(*points, strict=True), "o", color="#D55E00", markersize=5, label="serial baseline, engine")
        left.set_yscale("log")
        left.set_xticks(at, [f"{int(r[PROMPT])}/{int(r[OUTPUT])}\n{r[ROOM]:g} GB" for _, r in rows.iterrows()],
                        fontsize=8)
        left.set_title(f"Output tokens/s, {SEQUENCES:,} sequences, by prompt/output and room")
        left.legend(loc="upper right", fontsize=8)
        rooms = np.linspace(5, 110, 80)
        model = closed_form(70.0)
        forms = [Streaming(model.weight_bytes, model.link_bytes_per_s, model.gpu_tokens_per_s, jnp.asarray(1e9 * rooms),
                           model.token_bytes, *more) for more in ((), (model.memory_bytes_per_s, model.threads))]
        for label, values, style in (("bound", forms[0].throughput(98.0, 32.0), ":"),
                                     ("in pages, memory shared", forms[1].shared_throughput(98.0, 32.0, PAGE), "-"),
                                     ("20,000 sequences", forms[1].greedy_throughput(20_000.0, 98.0, 32.0, PAGE),
                                      "--")):
            middle.plot(rooms, np.asarray(values) * 32 / 130, style, color=INK, label=label)
        middle.plot(steady[ROOM], steady["output_throughput"], "o", color="#0072B2", label="engine, 20,000 sequences")
        middle.set_ylim(bottom=0)
        middle.set_title("Output tokens/s, 98/32, by room for KV, GB")
        middle.legend(loc="lower right", fontsize=8)
        rooms = np.linspace(20, 400, 60)
        each = [which_resource_next(closed_form_at(model, room), 98.0, 128.0, page=PAGE) for room in rooms]
        for name, label, colour in zip(streaming.RESOURCES, ("KV room", "link", "host memory", "GPU"),
                                       ("#0072B2", "#56B4E9", "#009E73", "#D55E00"), strict=True):
            right.plot(rooms, [one[name] for one in each], color=colour, label=label)
        right.axhline(0, color=FAINT, linewidth=0.8)
        right.set_title("% more for 1 % more, 98/128, by room, GB")
        right.legend(loc="center right", fontsize=8)
        heading(figure, "MoE-Lens: Mixtral-8x7B on an A40 whose weights stream at 19.5 GB/s")


def closed_form_at(model: Streaming, room_gb: float) -> Streaming:
    """The same with another room."""
    return Streaming(model.weight_bytes, model.link_bytes_per_s, model.gpu_tokens_per_s, 1e9 * room_gb,
                     model.token_bytes, model.memory_bytes_per_s, model.threads)
