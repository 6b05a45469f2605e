"""When the engines of a run are down: as given, and drawn by its seed."""

import dataclasses
import functools

import jax
import numpy as np

from jaxsim.engine.common import Params
from jaxsim.policy.failures import Outage, failures, merged
from jaxsim.spec.cluster import FailuresSection
from jaxsim.spec.dims import Dims
from jaxsim.spec.scenario import Scenario
from jaxsim.workload.streams import Stream, stream_key, uniforms

ALWAYS = 2**31 - 1
"""More often than any request is sent on."""


@functools.lru_cache(maxsize=1024)
def outages_of_run(given: FailuresSection, num_instances: int, seed: int) -> tuple[Outage, ...]:
    """The outages of a run on the grid of arrivals, by instance; those of one that overlap or meet are one."""
    found = [Outage(one.instance, one.at_s, one.at_s + one.down_s) for one in given.outages]
    if given.mtbf_s is not None:
        for instance in range(num_instances):
            found += _drawn(given, instance, seed)
    return tuple(merged(found))


def _drawn(given: FailuresSection, instance: int, seed: int) -> list[Outage]:
    """Up for a while, down for a while, both exponential, from the start of the run on."""
    key, count = jax.random.fold_in(stream_key(seed, Stream.FAILURES), instance), 64
    while True:
        up, down = -np.log(uniforms(key, count, 2)).T * np.array([[given.mtbf_s], [given.mttr_s]])
        end = np.cumsum(up + down)
        start = end - down
        if start[-1] >= given.until_s:
            break
        count *= 2
    is_begun = start < given.until_s
    return [Outage(instance, *span) for span in zip(start[is_begun].tolist(), end[is_begun].tolist(), strict=True)]


def outage_rows(scenario: Scenario, num_instances: int) -> int:
    """Rows of the tables of outages of all seeds, a power of two so that scenarios share programs; 0 without any."""
    given = scenario.cluster.failures
    if given is None:
        return 0
    most = max(len(outages_of_run(given, num_instances, seed)) for seed in scenario.seeds)
    return 1 << (2 * most).bit_length()


def with_failures(params: Params, scenario: Scenario, dims: Dims, seed: int) -> Params:
    """With the outages of one seed, where instances fail."""
    given = scenario.cluster.failures
    if given is None:
        return params
    most = (given.max_restarts or ALWAYS) if given.on_failure == "reroute" else 0
    found = list(outages_of_run(given, dims.num_executors, seed))
    return dataclasses.replace(params, failures=failures(found, dims.num_outages, most))
