"""DistServe's public simulator as two queues, one behind the other: prefill and decode engines, for many runs at once.

Where KV has no size and moving it takes no time (preset `distserve-sim` in a pool of each role), nothing goes back from
the decode engine to the prefill engine. So prompts are served first, all of them, and their ends are what arrives at
the other engine. A prefill engine serves its queue in order: a step of all runs is one batch of each. In a decode
engine everybody comes back until the last token is out: a step is one iteration of each run, over rows as wide as the
sequences that are in it. There are no other events, where the event engine has several for every request. What runs
share is worked out once: one prefill engine, under the same arrivals, for all decode engines behind it.

The rules are those of `jaxsim.engine.free_stages` and `decode_queue`: a batch is formed whenever the first stage is
free and somebody is there; prompts from the front of the queue within the token budget, decodes from the front of
theirs within the limit of context; who ran goes to the back; who comes at an instant stands before who comes back then.
Times are whole ticks of the clock (2^-30 s), seconds of a stage are computed in float64, where the engine keeps pairs
of float32: both agree within a microsecond (tests/planning/test_tandem.py).

Source: LLMServe/DistServe `simdistserve`; arXiv 2401.09670, section 4. Approximated as in `free_stages`.
"""

import concurrent.futures as futures
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from jaxsim._core.errors import InputError
from jaxsim.engine.lower.systems import Pool, of_one
from jaxsim.kernels import histogram
from jaxsim.kernels.clock import GRID_S
from jaxsim.spec.scenario import FittedCost, Scenario
from jaxsim.study import runner
from jaxsim.study.table import columns
from jaxsim.study.tile import Runs

RUNS_A_BATCH = 128
"""Enough to share the cost of a step, few enough that short runs do not wait for long ones."""

_FAR = np.int64(1) << 62

_RANK_BITS = 12
"""Of a place in the queue: below the time somebody came, and whether it came back."""

_MOST = 1 << _RANK_BITS


class Stages(NamedTuple):
    """The engines of one role, a row a run: coefficients of `a + b tokens + c context + d sequences + e squares` by
    the number of sequences from which they hold, of the first stage alone `head[0] + head[1] context`, seconds; the
    number of stages; the most tokens of a batch, or tokens of context."""

    pieces: Float[np.ndarray, "runs pieces 6"]
    head: Float[np.ndarray, "runs 2"]
    num_stages: Int[np.ndarray, " runs"]
    limit: Int[np.ndarray, " runs"]

    def of(self, rows: Int[np.ndarray, " rows"] | Bool[np.ndarray, " runs"]) -> "Stages":
        """Those of some runs."""
        return Stages(*(field[rows] for field in self))

    def parts(self, count, tokens, context, squares, before) -> tuple[Int[np.ndarray, " runs"], ...]:
        """Ticks of an iteration in the first stage, and in each of the others; before: tokens of context that the first
        stage pays for."""
        piece = np.maximum((self.pieces[:, :, 0] <= count[:, None]).sum(axis=1) - 1, 0)
        a, b, c, d, e = self.pieces[np.arange(len(piece)), piece, 1:].T
        head = self.head[:, 0] + self.head[:, 1] * before
        each = (a + b * tokens + c * context + d * count + e * squares - head) / self.num_stages
        return np.rint((each + head) / GRID_S).astype(np.int64), np.rint(each / GRID_S).astype(np.int64)


class _Pipeline:
    """When the stages of each run are free."""

    def __init__(self, engines: Stages):
        self.engines = engines
        self.free = np.zeros((len(engines.num_stages), int(engines.num_stages.max())), np.int64)
        self._stage = np.arange(self.free.shape[1])
        self._is_used = self._stage < engines.num_stages[:, None]

    def enter(self, is_any, now, first, each) -> Int[np.ndarray, " runs"]:
        """Send a batch through; returns when it is out."""
        # With equal parts behind the first, at[k] - k each = max(at[k - 1] - (k - 1) each, free[k] - (k - 1) each).
        shifts = self._stage * each[:, None]
        through = self.free - shifts
        through[:, 0] = np.maximum(now, self.free[:, 0]) + first
        through = np.maximum.accumulate(through + np.where(self._stage > 0, each[:, None], 0), axis=1)
        through = through + shifts
        self.free = np.where(self._is_used & is_any[:, None], through, self.free)
        return through[np.arange(len(through)), self.engines.num_stages - 1]

    def keep(self, rows) -> None:
        """Go on with some runs."""
        self.engines, self.free, self._is_used = self.engines.of(rows), self.free[rows], self._is_used[rows]


def prefill(engines: Stages, arrival: Int[np.ndarray, "runs requests"], prompt: Int[np.ndarray, "runs requests"],
            max_num_seqs: int) -> tuple[Int[np.ndarray, "runs requests"], ...]:
    """When each prompt joins a batch, and when it is computed, ticks; arrivals rise, prompts of padding have no tokens
    and come behind all others at `_FAR`. Also how many iterations that took. engines.limit: tokens of a batch."""
    runs, count = arrival.shape
    scheduled, end = np.full((2, runs, count), _FAR)
    total = np.cumsum(np.pad(prompt, ((0, 0), (1, 0))), axis=1)
    squares = np.cumsum(np.pad(prompt.astype(np.float64) ** 2, ((0, 0), (1, 0))), axis=1)
    pipeline, at, row, iterations = _Pipeline(engines), np.zeros(runs, np.int64), np.arange(runs), np.zeros(runs, int)
    last = (arrival < _FAR).sum(axis=1)
    place = np.arange(count)
    while (at < last).any():
        is_any = at < last
        here = np.minimum(at, count - 1)
        now = np.where(is_any, np.maximum(pipeline.free[:, 0], arrival[row, here]), 0)
        most = max_num_seqs - ((end > now[:, None]) & (end < _FAR)).sum(axis=1)
        taken = ((place >= at[:, None]) & (arrival <= now[:, None]) & (place < (at + most)[:, None])
                 & (total[:, 1:] - total[row, here][:, None] <= engines.limit[:, None]))
        size = np.where(is_any, taken.sum(axis=1), 0)
        # Where nobody has a place, until somebody leaves.
        is_full = is_any & (most <= 0)
        leaves = np.where(end > now[:, None], end, _FAR).min(axis=1)
        pipeline.free[:, 0] = np.where(is_full, leaves, pipeline.free[:, 0])
        is_any = is_any & ~is_full
        upto = np.minimum(at + size, count)
        tokens = total[row, upto] - total[row, here]
        first, each = engines.parts(size, tokens, 0, squares[row, upto] - squares[row, here], tokens)
        out = pipeline.enter(is_any, now, first, each)
        taken &= is_any[:, None]
        scheduled[taken] = np.broadcast_to(now[:, None], taken.shape)[taken]
        end[taken] = np.broadcast_to(out[:, None], taken.shape)[taken]
        at, iterations = np.where(is_any, upto, at), iterations + is_any
    return scheduled, end, iterations


def decode(engines: Stages, ready: Int[np.ndarray, "runs requests"], prompt: Int[np.ndarray, "runs requests"],
           output: Int[np.ndarray, "runs requests"]
           ) -> tuple[Int[np.ndarray, "runs requests"], Int[np.ndarray, " runs"]]:
    """When the last token of each is out, ticks, and how many iterations that took. ready: when its KV is there, rising
    but for those of one token, which never come. engines.limit: tokens of context of a batch.
    """
    runs, count = ready.shape
    comes = (output > 1) & (ready < _FAR)
    finish, iterations = np.where(output > 1, _FAR, ready), np.zeros(runs, np.int64)
    # In the order in which they come; who never does stands behind.
    order = np.argsort(np.where(comes, ready, _FAR), axis=1, kind="stable")
    number = comes.sum(axis=1)
    ready = np.pad(np.take_along_axis(np.where(comes, ready, _FAR), order, 1), ((0, 0), (0, 1)), constant_values=_FAR)
    prompt, left = (np.take_along_axis(x, order, 1) for x in (prompt, output - 1))
    last = np.full((runs, count), _FAR)

    lanes = np.flatnonzero(number > 0)
    pipeline, at = _Pipeline(engines), np.zeros(runs, np.int64)
    pipeline.keep(lanes)
    at = at[lanes]
    # Of a place: its key in the queue (when, whether it comes back, rank; `_FAR`: nobody), context, tokens to go, who.
    width = 16
    keys = np.full((len(lanes), width), _FAR)
    context, to_go, who = np.zeros((3, len(lanes), width), np.int64)
    while len(lanes):
        row = np.arange(len(lanes))
        coming = ready[lanes, at]
        first_key = keys.min(axis=1)
        now = np.maximum(pipeline.free[:, 0], np.minimum(first_key >> (_RANK_BITS + 1), coming))
        joins = np.flatnonzero(coming <= now)
        while len(joins):
            free = (keys[joins] == _FAR).argmax(axis=1)
            if (keys[joins, free] != _FAR).any():
                more = ((0, 0), (0, 16))
                keys = np.pad(keys, more, constant_values=_FAR)
                context, to_go, who = (np.pad(x, more) for x in (context, to_go, who))
                continue
            lane, index = lanes[joins], at[joins]
            keys[joins, free] = (ready[lane, index] << (_RANK_BITS + 1)) | (index & (_MOST - 1))
            context[joins, free], to_go[joins, free] = prompt[lane, index] + 1, left[lane, index]
            who[joins, free] = index
            at[joins] += 1
            joins = joins[ready[lane, at[joins]] <= now[joins]]

        # The front of the queue, within the limit of context.
        is_here = keys < ((now + 1) << (_RANK_BITS + 1))[:, None]
        placed = np.argsort(np.where(is_here, keys, _FAR), axis=1)
        in_order = np.take_along_axis(np.where(is_here, context, 0), placed, 1)
        fits = np.take_along_axis(is_here, placed, 1) & (np.cumsum(in_order, axis=1) <= pipeline.engines.limit[:, None])
        size, sums = fits.sum(axis=1), np.where(fits, in_order, 0).sum(axis=1)
        first, each = pipeline.engines.parts(size, 0, sums, 0.0, sums - size)
        out = pipeline.enter(np.ones(len(lanes), bool), now, first, each)
        # Behind everybody who has come until then, as they stood.
        r, c = row[:, None], placed
        back = (out << (_RANK_BITS + 1))[:, None] | _MOST | np.arange(keys.shape[1])
        going = np.where(fits, to_go[r, c] - 1, 1)
        is_over = fits & (going == 0)
        keys[r, c] = np.where(is_over, _FAR, np.where(fits, back, keys[r, c]))
        context[r, c] += fits
        to_go[r, c] -= fits
        done = np.nonzero(is_over)
        if len(done[0]):
            last[lanes[done[0]], who[done[0], placed[done]]] = out[done[0]]
        iterations[lanes] += 1
        if len(done[0]):
            goes_on = (at < number[lanes]) | (keys != _FAR).any(axis=1)
            if not goes_on.all():
                lanes, at, keys = lanes[goes_on], at[goes_on], keys[goes_on]
                context, to_go, who = context[goes_on], to_go[goes_on], who[goes_on]
                pipeline.keep(goes_on)
    by_request = np.full((runs, count), _FAR)
    np.put_along_axis(by_request, order, last, 1)
    return np.where(comes, by_request, finish), iterations


def follows(scenario: Scenario) -> bool:
    """Whether a scenario of `jaxsim.cost.simdistserve.pair` is all that is simulated here: independent requests, no
    more of them than an engine may have running. What is refused is, here as there."""
    w = scenario.workload
    if w.images or w.client or w.tenants or w.has_sessions or w.kind in ("closed-loop", "batch"):
        return False
    try:
        pools = runner.LANES.system(scenario).pools
        count = max(len(runner.LANES.workload(scenario, seed)) for seed in scenario.seeds)
    except InputError:
        return True
    most = min(pool.system.scheduler.max_num_seqs for pool in pools)
    return (sorted(pool.role for pool in pools) == ["decode", "prefill"] and scenario.cluster.transfer is None
            and not scenario.cluster.links
            and all(isinstance(pool.scenario.cost, FittedCost) and pool.replicas == 1 for pool in pools)
            and count <= min(most, _MOST))


class Tandem:
    """Runs of `jaxsim.study.goodput.search`, instead of its own."""

    def rates_each(self, owners: Sequence[int], scenarios: Sequence[Scenario]) -> Mapping[int, int]:
        """How many rates each system may try at once."""
        return dict.fromkeys(owners, RATES_A_ROUND)

    def run(self, asked: Sequence[tuple[int, Scenario]], workers: int | None) -> tuple[pd.DataFrame, dict[int, str]]:
        """Scenarios and whose they are: a row a run with `point`, the place here, and why some were refused."""
        refusals, fine = {}, []
        for at, (_, scenario) in enumerate(asked):
            try:
                runner.LANES.shape(scenario)
                fine.append(at)
            except InputError as error:
                refusals[at] = str(error)
        # Alike in length: low rates take the most iterations.
        fine.sort(key=lambda at: asked[at][1].workload.rate_rps or 0.0)
        parts, batch = [], []
        for at in fine:
            if batch and sum(asked[k][1].num_seeds for k in [*batch, at]) > RUNS_A_BATCH:
                parts.append(batch)
                batch = []
            batch.append(at)
        parts += [batch] if batch else []
        with futures.ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            frames = list(pool.map(lambda part: simulate([asked[at][1] for at in part], part), parts))
        empty = pd.DataFrame({"point": pd.Series(dtype=np.int64)})
        return (pd.concat(frames, ignore_index=True).sort_values(["point", "seed"], ignore_index=True) if frames
                else empty), refusals


RATES_A_ROUND = 4
"""Of each system: two rounds of as many close a bracket to a 25th."""


def simulate(scenarios: Sequence[Scenario], points: Sequence[int]) -> pd.DataFrame:
    """A row a run, of all seeds: the columns of a study's table that are known here; NaN for the others."""
    out, owners = run(scenarios)
    slos = [scenarios[k].slo for k in owners]
    found = columns(out, slos, *(np.array([getattr(scenarios[k], name) for k in owners])
                                 for name in ("warmup_s", "cooldown_s")))
    devices = [sum(pool.replicas * pool.system.plan.num_devices for pool in runner.LANES.system(s).pools)
               for s in scenarios]
    unknown = dict.fromkeys(("usd_per_million_output_tokens", "energy_j_per_output_token"), np.nan)
    seeds = np.concatenate([s.seeds for s in scenarios])
    return pd.DataFrame({"point": np.array(points)[owners], "seed": seeds, **found,
                         "num_devices": np.array(devices)[owners], **unknown})


def run(scenarios: Sequence[Scenario]) -> tuple[Runs, Int[np.ndarray, " runs"]]:
    """What happens in all seeds of scenarios that `follows` holds for, and whose run each is."""
    owners = np.repeat(np.arange(len(scenarios)), [s.num_seeds for s in scenarios])
    workloads = [runner.LANES.workload(s, seed) for s in scenarios for seed in s.seeds]
    pools = [{pool.role: pool for pool in runner.LANES.system(s).pools} for s in scenarios]
    runs, count = len(owners), max(map(len, workloads))
    arrival_s = np.full((runs, count), np.inf)
    prompt, output = np.zeros((2, runs, count), np.int64)
    for at, (k, workload) in enumerate(zip(owners, workloads, strict=True)):
        size = len(workload)
        arrival_s[at, :size] = runner.LANES.arrivals(scenarios[k], workload)
        prompt[at, :size], output[at, :size] = workload.input_tokens, workload.output_tokens
    is_real = np.isfinite(arrival_s)
    arrival = np.where(is_real, np.rint(np.where(is_real, arrival_s, 0.0) / GRID_S), _FAR).astype(np.int64)

    # One prefill engine before several decode engines is one.
    first, alike = _distinct([(of_one(pools[k]["prefill"]), id(workload), scenarios[k].workload.rate_rps)
                              for k, workload in zip(owners, workloads, strict=True)])
    most = min(pool.system.scheduler.max_num_seqs for by_role in pools for pool in by_role.values())
    scheduled, computed, batches = prefill(
        _stages([pools[owners[at]]["prefill"] for at in first]), arrival[first], prompt[first], most)
    scheduled, computed, batches = scheduled[alike], computed[alike], batches[alike]
    finish, iterations = decode(_stages([pools[k]["decode"] for k in owners]), computed, prompt, output)

    def seconds(ticks):
        return np.where(is_real, ticks * GRID_S, np.nan)

    def none(*shape):
        return np.zeros((runs, *shape))

    out = Runs(
        is_real=is_real, is_finished=is_real, arrival_s=np.where(is_real, arrival_s, 0.0), input_tokens=prompt,
        output_tokens=output, scheduled_s=seconds(scheduled), first_token_s=seconds(computed), finish_s=seconds(finish),
        stall_s=none(count), preemptions=none(count).astype(int),
        itl_counts=none(len(histogram.edges()) - 1).astype(int),
        **{name: none(2) for name in ("busy_s", "device_busy_s", "kv_block_s", "running_s")},
        kv_peak_blocks=none(2).astype(int), num_iterations=batches + iterations,
        **dict.fromkeys(("cached_tokens", "delivered_s", "decode_instance", "migrations", "downtime_s", "last_instance",
                         "aborted_migrations", "instance_s", "starts", "drains", "session", "turn",
                             "role_switches", "drain_s")),
        num_context_limited=np.array([w.num_context_limited for w in workloads]),
        num_blocks=np.ones((runs, 2), int), front_end_s=none(), fault=("",) * runs)
    return out, owners


def _distinct(keys: Sequence) -> tuple[list[int], Int[np.ndarray, " keys"]]:
    """Where each key is first, and which of these every one is."""
    places: list[int] = []
    known: list = []
    index = []
    for at, key in enumerate(keys):
        if key not in known:
            known.append(key)
            places.append(at)
        index.append(known.index(key))
    return places, np.array(index)


def _stages(pools: Sequence[Pool]) -> Stages:
    rows = []
    for pool in pools:
        cost, s = pool.scenario.cost, pool.system.scheduler
        kind, limit = ("prefill", s.max_num_batched_tokens) if pool.role == "prefill" else (
            "decode", s.decode_context_limit)
        given = np.asarray(cost.rows(kind), np.float64)
        head = (cost.head.a, cost.head.c) if cost.head else (0.0, 0.0)
        rows.append((given, head, s.num_stages, limit))
    width = max(len(given) for given, *_ in rows)
    pieces = np.stack([np.vstack([given, np.repeat(given[-1:], width - len(given), 0)]) for given, *_ in rows])
    head, stages, limit = (np.array(column) for column in list(zip(*rows, strict=True))[1:])
    return Stages(pieces, head, stages, limit)
