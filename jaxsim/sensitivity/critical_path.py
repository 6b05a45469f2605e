"""The critical path of a request: where each second between its arrival and its answer went.

An instance does one iteration after the other, so a request's time is a chain of iterations: the one in flight when it
arrived, those that others had before it, those that computed its prompt, those that made its tokens. Each is cut into
what its decodes would take alone, and what its prompts add to that, which is said to be their time; and each of both by
resource, by what it would change by with it (`jaxsim.sensitivity.costs`). Parts add up to the time of the request.

Approximated: where several prompts share the iterations in which a request's prompt is computed, their seconds are
divided by tokens. Of a preempted request the iterations in which it waited again are among those of its prompt and its
decodes, as a tape does not say which; `Paths.stall_s` is how long it was.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from jaxsim._core.errors import InputError
from jaxsim.metrics.lane import request_frame
from jaxsim.sensitivity import costs, schedule
from jaxsim.sensitivity.attribution import FRONT_END, check_parameters
from jaxsim.sensitivity.recorded import Recorded
from jaxsim.spec.scenario import Scenario

PAUSE = "pause"

IN_FLIGHT, WAITING_PROMPTS, WAITING_DECODES, OWN_PROMPT, BESIDE_PROMPTS, BESIDE_DECODES, OWN_DECODES, MEANWHILE = (
    "iteration in flight", "queue: prompts of others", "queue: decodes of others", "own prompt",
    "own prompt: prompts beside it", "own prompt: decodes beside it", "own decodes", "own decodes: prompts beside them")
PARTS = (FRONT_END, IN_FLIGHT, WAITING_PROMPTS, WAITING_DECODES, PAUSE, OWN_PROMPT, BESIDE_PROMPTS, BESIDE_DECODES,
         OWN_DECODES, MEANWHILE)
"""In the order in which they come, but for the last two, and for three of the prompt, which share their iterations.
Pause: the instance rested while the request waited."""

ROUNDING_S = 1e-6

LATENCIES = {"ttft": PARTS[:8], "e2e": PARTS}
"""Parts of the time to first token, and of all the time."""


class Paths(NamedTuple):
    """Of one run. seconds: of every request, part and resource (those of the cost model, then `FRONT_END` and `PAUSE`);
    NaN where it has no such time. latency_s: of `ttft`, `e2e`: what the parts add up to. stall_s: of preempted
    requests, seconds in which they waited again, which are among the parts."""

    seconds: Float[np.ndarray, "requests parts resources"]
    resources: tuple[str, ...]
    latency_s: dict[str, Float[np.ndarray, " requests"]]
    stall_s: Float[np.ndarray, " requests"]

    def table(self, latency: str = "ttft", requests: Sequence[int] | None = None) -> pd.DataFrame:
        """Seconds by part and resource, mean over some requests, all that have such a time unless given.

        latency: "ttft" or "e2e". Raises `InputError` for one that is not there.
        """
        parts = [PARTS.index(part) for part in LATENCIES[latency]]
        known = np.flatnonzero(~np.isnan(self.latency_s[latency]))
        rows = known if requests is None else np.asarray(requests)
        if not len(rows) or not np.isin(rows, known).all():
            raise InputError("--request", list(rows)[:5], f"has no {latency}",
                             "choose one that was answered" if len(known) else "no request was answered")
        mean = np.mean(self.seconds[np.ix_(rows, parts)], axis=0)
        return pd.DataFrame(mean, index=list(LATENCIES[latency]), columns=list(self.resources))

    def at(self, percentile: float, latency: str = "ttft") -> int:
        """The request at a percentile of a latency: the smallest that so many are not above."""
        values = self.latency_s[latency]
        rows = np.flatnonzero(~np.isnan(values))
        if not len(rows):
            raise InputError("--percentile", percentile, f"of {latency}: no request was answered",
                             "simulate more requests")
        order = rows[np.argsort(values[rows], kind="stable")]
        return int(order[min(int(np.ceil(percentile / 100 * len(order))), len(order)) - 1 if percentile > 0 else 0])


def critical_paths(scenario: Scenario, run: Recorded) -> Paths:
    """Of every request of a recorded run. Raises `InputError` for a kind of cost without parameters."""
    model = costs.cost_model(run.made, scenario)
    check_parameters(model, scenario)
    own, lane = schedule.of_run(run), run.result
    first, decodes_s, whole_s, pace, growth = _cut(model, run, own)

    def sums(vectors):
        return np.concatenate([np.zeros((1, vectors.shape[1])), np.cumsum(vectors, axis=0)])

    prompts_s = first - decodes_s
    prompts, decodes = sums(prompts_s), sums(whole_s - prompts_s)
    f, j = own.first_token, own.joined
    is_first = (own.number == 0)[:, None]
    left = np.where(own.met >= 0, 1 - own.phase, 0.0)[:, None]
    iteration = np.where(is_first, first[own.met], pace[own.met] + (own.number[:, None] - 1) * growth[own.met])
    rest = (own.rest[:, :1] * first[own.met] + own.rest[:, 1:2] * pace[own.met] + own.rest[:, 2:] * growth[own.met])
    in_flight = left * iteration
    share = _own_share(run, own)[:, None]
    prompt = prompts[f + 1] - prompts[j]
    parts = {IN_FLIGHT: in_flight, WAITING_PROMPTS: prompts[j] - prompts[own.behind],
             WAITING_DECODES: decodes[j] - decodes[own.behind] + np.where(own.met[:, None] >= 0, rest - in_flight, 0.0),
             OWN_PROMPT: share * prompt, BESIDE_PROMPTS: (1 - share) * prompt,
             BESIDE_DECODES: decodes[f] - decodes[j] + decodes_s[f],
             OWN_DECODES: decodes[own.last + 1] - decodes[f] - decodes_s[f],
             MEANWHILE: prompts[own.last + 1] - prompts[f + 1]}
    frame = request_frame(lane)
    latency_s = {name: frame[f"{name}_s"].to_numpy() for name in LATENCIES}
    resources = (*model.resources, FRONT_END, PAUSE)
    seconds = np.zeros((lane.num_requests, len(PARTS), len(resources)))
    for part, vectors in parts.items():
        seconds[:, PARTS.index(part), :-2] = vectors
    seconds[:, 0, -2] = run.made.front_end_s
    # What is left of the time to first token; behind that an instance with a sequence does not rest.
    before = [PARTS.index(part) for part in LATENCIES["ttft"]]
    pause_s = latency_s["ttft"] - seconds[:, before].sum(axis=(1, 2))
    # Less is what the loop rounded: some ticks of its clock, which the prompt and the decodes take with them.
    is_pause = pause_s > ROUNDING_S
    seconds[:, PARTS.index(PAUSE), -1] = np.where(is_pause, pause_s, 0.0)
    own_prompt = PARTS.index(OWN_PROMPT)
    for part, latency, done in ((own_prompt, "ttft", before), (PARTS.index(OWN_DECODES), "e2e", range(len(PARTS)))):
        left_s, mine = (latency_s[latency] - seconds[:, list(done)].sum(axis=(1, 2)), seconds[:, part].sum(axis=1))
        seconds[:, part] *= 1 + np.divide(left_s, mine, out=np.zeros_like(mine), where=mine > 0)[:, None]
    seconds[np.isnan(latency_s["ttft"])] = np.nan
    seconds[np.isnan(latency_s["e2e"]), -2:] = np.nan
    return Paths(seconds, resources, latency_s, np.asarray(lane.stall_s, np.float64))


def _cut(model: costs.CostModel, run: Recorded, own: schedule.Schedule) -> tuple[np.ndarray, ...]:
    """Seconds of records by resource: of the first iteration, of its decodes alone, of the record, of its pace and
    growth. They add up to what was recorded."""
    stats, following = costs.asked_of([run.tape], own.record)
    zeros = np.zeros_like(stats.num_prefill)
    alone = replace(stats, num_decode=np.maximum(stats.num_decode, 1), num_prefill=zeros, prefill_tokens=zeros,
                    prefill_context=zeros, prefill_pairs=np.zeros_like(stats.prefill_pairs),
                    num_sampled=np.maximum(stats.num_decode, 1),
                    prefill_tiled=None if stats.prefill_tiled is None else np.zeros_like(stats.prefill_tiled),
                    prefill_longest=None if stats.prefill_longest is None else zeros)
    asked, _ = costs.joined([(stats, following), (alone, following)])
    count = len(own.record)
    vectors = np.moveaxis(costs.forward(model.tables, asked, model.tangents(model.directions())), 0, -1)
    # As recorded: the loop has float32 and the grid of its clock.
    total = vectors[:count].sum(axis=-1)
    scale = np.divide(own.atoms, total, out=np.zeros_like(total), where=total > 0)
    # Nothing of one that a bound stopped on its way.
    priced = vectors[:count] * (scale * (own.whole[:, :1] > 0))[:, :, None]
    first, pace, growth = np.moveaxis(priced, 1, 0)
    decodes = np.where((stats.num_decode > 0)[:, None], vectors[count:2 * count, schedule.FIRST] * scale[:, :1], 0.0)
    # Captured decodes may be all there is, and never more than that.
    ratio = np.divide(first.sum(axis=1), decodes.sum(axis=1), out=np.full(count, np.inf),
                      where=decodes.sum(axis=1) > 0)
    decodes = np.where((ratio <= 1)[:, None] | (stats.num_prefill == 0)[:, None], first, decodes)
    whole = np.sum(priced * own.whole[:, :, None], axis=1)
    return first, decodes, whole, pace, growth


def _own_share(run: Recorded, own: schedule.Schedule) -> Float[np.ndarray, " requests"]:
    """Of the prompt tokens of the iterations in which a prompt was computed, its own."""
    tokens: Int[np.ndarray, " records"] = run.tape.stats.prefill_tokens[own.record]
    sums = np.concatenate([[0], np.cumsum(tokens)])
    lane = run.result
    cached = 0 if lane.cached_tokens is None else np.asarray(lane.cached_tokens)
    computed = sums[own.first_token + 1] - sums[own.joined]
    mine = np.maximum(np.asarray(lane.input_tokens) - cached, 1)
    return np.where(computed > 0, np.minimum(mine / np.maximum(computed, 1), 1.0), 1.0)
