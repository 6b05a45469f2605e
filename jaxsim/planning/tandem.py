"""DistServe's public simulator as two queues, one behind the other: prefill and decode engines, for many runs at once.

Where KV has no size and moving it takes no time (preset `distserve-sim` in a pool of each role), nothing goes back from
the decode engine to the prefill engine. So prompts are served first, all of them, and their ends are what arrives at
the other engine (`jaxsim.planning.queues`). There are no other events, and an iteration of a batch takes microseconds
of the host whoever is in it, so nothing is compiled. What runs share is worked out once: one prefill engine, under the
same arrivals, for all decode engines behind it.

The rules are those of `jaxsim.engine.free_stages` and `decode_queue`. Times are whole ticks of the clock (2^-30 s),
seconds of a stage are computed in float64, where the engine keeps pairs of float32: both agree within a microsecond
(tests/planning/test_tandem.py).

Source: LLMServe/DistServe `simdistserve`; arXiv 2401.09670, section 4. Approximated as in `free_stages`.
"""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Int

from jaxsim._core.errors import InputError
from jaxsim.engine.lower.systems import Pool
from jaxsim.kernels import histogram
from jaxsim.kernels.clock import GRID_S
from jaxsim.planning import queues
from jaxsim.spec.scenario import FittedCost, Scenario
from jaxsim.study import runner
from jaxsim.study.table import columns
from jaxsim.study.tile import Runs
from jaxsim.workload.workload import Workload


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
            and count <= most)


Prompts = tuple[list[int], list[int], int, Workload]
"""Of a prefill engine: when each joins a batch and when it is computed, ticks; iterations; whose prompts they are."""


class Tandem:
    """Runs of `jaxsim.study.goodput.search`, instead of its own: one after the other.

    target: share of requests that must meet the limits. Where fewer meet them with all answers out with their first
    token, nobody is decoded: what a decode engine adds can only be worse, and the row says what it is without.
    """

    is_one_at_a_time = True

    def __init__(self, target: float):
        self._target = target
        self._prompts: dict[Hashable, Prompts] = {}

    def rates_each(self, owners: Sequence[int], scenarios: Sequence[Scenario]) -> Mapping[int, int]:
        """How many rates each system may try at once: nothing is saved by more."""
        return dict.fromkeys(owners, 1)

    def run(self, asked: Sequence[tuple[int, Scenario]], workers: int | None) -> tuple[pd.DataFrame, dict[int, str]]:
        """Scenarios and whose they are: a row a run with `point`, the place here, and why some were refused."""
        refusals, fine = {}, []
        for at, (_, scenario) in enumerate(asked):
            try:
                runner.LANES.shape(scenario)
                fine.append(at)
            except InputError as error:
                refusals[at] = str(error)
        if not fine:
            return pd.DataFrame({"point": pd.Series(dtype=np.int64)}), refusals
        scenarios = [asked[at][1] for at in fine]
        frame = simulate(scenarios, fine, self._prompts, is_decoded=False)
        shares = frame.groupby("point")["slo.attainment"].mean()
        open_ = [k for k, at in enumerate(fine) if shares[at] >= self._target]
        if open_:
            points = [fine[k] for k in open_]
            frame = pd.concat([frame[~frame["point"].isin(points)],
                               simulate([scenarios[k] for k in open_], points, self._prompts)])
        return frame.sort_values(["point", "seed"], ignore_index=True), refusals


def simulate(scenarios: Sequence[Scenario], points: Sequence[int], prompts: dict[Hashable, Prompts] | None = None,
             is_decoded: bool = True) -> pd.DataFrame:
    """A row a run, of all seeds: the columns of a study's table that are known here; NaN for the others. prompts,
    is_decoded: as of `run`."""
    out, owners = run(scenarios, prompts, is_decoded)
    slos = [scenarios[k].slo for k in owners]
    found = columns(out, slos, *(np.array([getattr(scenarios[k], name) for k in owners])
                                 for name in ("warmup_s", "cooldown_s")))
    devices = [sum(pool.replicas * pool.system.plan.num_devices for pool in runner.LANES.system(s).pools)
               for s in scenarios]
    unknown = dict.fromkeys(("usd_per_million_output_tokens", "energy_j_per_output_token"), np.nan)
    seeds = np.concatenate([s.seeds for s in scenarios])
    return pd.DataFrame({"point": np.array(points)[owners], "seed": seeds, **found,
                         "num_devices": np.array(devices)[owners], **unknown})


def run(scenarios: Sequence[Scenario], prompts: dict[Hashable, Prompts] | None = None, is_decoded: bool = True
        ) -> tuple[Runs, Int[np.ndarray, " runs"]]:
    """What happens in all seeds of scenarios that `follows` holds for, and whose run each is.

    prompts: what is known of prefill engines, and what is found here. is_decoded: else answers are out with their first
    token.
    """
    prompts = {} if prompts is None else prompts
    owners = np.repeat(np.arange(len(scenarios)), [s.num_seeds for s in scenarios])
    workloads = [runner.LANES.workload(s, seed) for s in scenarios for seed in s.seeds]
    pools = [{pool.role: pool for pool in runner.LANES.system(s).pools} for s in scenarios]
    runs, count = len(owners), max(map(len, workloads))
    is_real = np.arange(count) < np.array([len(w) for w in workloads])[:, None]
    arrival_s, scheduled, computed, finish = np.zeros((4, runs, count))
    prompt, output = np.zeros((2, runs, count), np.int64)
    num_iterations = np.zeros(runs, np.int64)
    for at, (k, workload) in enumerate(zip(owners, workloads, strict=True)):
        mine = slice(len(workload))
        arrival_s[at, mine] = runner.LANES.arrivals(scenarios[k], workload)
        prompt[at, mine], output[at, mine] = workload.input_tokens, workload.output_tokens
        first, second = (_engine(pools[k][role]) for role in ("prefill", "decode"))
        # One prefill engine before several decode engines is one.
        key = first, id(workload), scenarios[k].workload.rate_rps
        if key not in prompts:
            ticks = np.rint(arrival_s[at, mine] / GRID_S).astype(np.int64)
            # With the workload, whose place in memory stays its own as long as it is kept.
            prompts[key] = *queues.prefill(first, ticks.tolist(), prompt[at, mine].tolist()), workload
        scheduled[at, mine], computed[at, mine], num_iterations[at], _ = prompts[key]
        # An output of one token is over with its prompt.
        finish[at] = computed[at]
        comes = np.flatnonzero(output[at] > 1) if is_decoded else []
        ready = [prompts[key][1][who] for who in comes]
        finish[at, comes], iterations = queues.decode(second, ready, prompt[at, comes].tolist(),
                                                      output[at, comes].tolist())
        num_iterations[at] += iterations

    def seconds(ticks):
        return np.where(is_real, ticks * GRID_S, np.nan)

    def none(*shape):
        return np.zeros((runs, *shape))

    out = Runs(
        is_real=is_real, is_finished=is_real, arrival_s=arrival_s, input_tokens=prompt,
        output_tokens=output, scheduled_s=seconds(scheduled), first_token_s=seconds(computed), finish_s=seconds(finish),
        stall_s=none(count), preemptions=none(count).astype(int),
        itl_counts=none(len(histogram.edges()) - 1).astype(int),
        **{name: none(2) for name in ("busy_s", "device_busy_s", "kv_block_s", "running_s")},
        kv_peak_blocks=none(2).astype(int), num_iterations=num_iterations,
        **dict.fromkeys(("cached_tokens", "accepted_s", "delivered_s", "decode_instance", "migrations", "downtime_s",
                         "last_instance", "aborted_migrations", "instance_s", "starts", "drains", "session", "turn",
                         "role_switches", "drain_s")),
        num_context_limited=np.array([w.num_context_limited for w in workloads]),
        num_blocks=np.ones((runs, 2), int), front_end_s=none(), fault=("",) * runs)
    return out, owners


def _engine(pool: Pool) -> queues.Engine:
    """The one engine of a pool."""
    cost, s = pool.scenario.cost, pool.system.scheduler
    kind, limit = ("prefill", s.max_num_batched_tokens) if pool.role == "prefill" else (
        "decode", s.decode_context_limit)
    head = (cost.head.a, cost.head.c) if cost.head else (0.0, 0.0)
    return queues.Engine(tuple(map(tuple, np.asarray(cost.rows(kind), np.float64).tolist())), head, s.num_stages, limit)
