"""When instances are down, and how often a request that one of them loses is sent on to another."""

from typing import NamedTuple

import equinox as eqx
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxsim.kernels import clock

FAILED, ON_ITS_WAY = 4, 5
"""How a sending ended that an outage took, in `World.clients`, as `jaxsim.metrics` numbers it; and that it has not
ended: the router is about to send it on."""


class Outage(NamedTuple):
    """An instance is down from `start_s` up to `end_s`, when it takes requests again."""

    instance: int
    start_s: float
    end_s: float


class Failures(eqx.Module):
    """Outages as the loop meets them: instances that go down or come back, a row each, in the order of time.

    times: (epoch, hi, lo) as arrivals have them, infinite behind the last. At one instant those that come back go
    first, and each of the two kinds by instance. is_back: whether it comes back. most_restarts: how often a request is
    sent on to another instance, 0 if what an instance loses fails.
    """

    times: Float[Array, "changes 3"]
    instance: Int[Array, " changes"]
    is_back: Bool[Array, " changes"]
    most_restarts: Int[Array, ""]


def failures(outages: list[Outage], rows: int, most_restarts: int) -> Failures:
    """Of outages on the grid of arrivals that do not overlap on any instance; rows: room for two each and one more."""
    changes = sorted([(one.start_s, 1, one.instance) for one in outages]
                     + [(one.end_s, 0, one.instance) for one in outages])
    if len(changes) >= rows:
        raise ValueError(f"{len(outages)} outages do not fit {rows} rows")
    times = np.zeros((rows, 3), np.float32)
    times[:, 1] = np.inf
    instance, is_back = np.zeros(rows, np.int32), np.zeros(rows, bool)
    if changes:
        seconds, goes_down, index = map(np.array, zip(*changes, strict=True))
        times[:len(changes)] = np.stack(clock.split_reference(seconds), axis=1)
        instance[:len(changes)], is_back[:len(changes)] = index, goes_down == 0
    return Failures(times, instance, is_back, np.int32(most_restarts))


def merged(outages: list[Outage]) -> list[Outage]:
    """The same on the grid of arrivals, where those of an instance that overlap or meet are one."""
    found: list[Outage] = []
    for instance, *span in sorted(outages):
        start_s, end_s = clock.round_arrivals_reference(np.array(span)).tolist()
        end_s = max(end_s, start_s + clock.ARRIVAL_GRID_S)
        if found and found[-1].instance == instance and start_s <= found[-1].end_s:
            found[-1] = found[-1]._replace(end_s=max(found[-1].end_s, end_s))
        else:
            found.append(Outage(instance, start_s, end_s))
    return found


def down_seconds(outages: list[Outage], num_instances: int, until_s: float) -> Float[np.ndarray, " instances"]:
    """For how long each instance was down up to then."""
    found = np.zeros(num_instances)
    for one in outages:
        found[one.instance] += max(min(one.end_s, until_s) - one.start_s, 0.0)
    return found


def outages_of(given: Failures) -> list[Outage]:
    """The outages of a host table again."""
    down: dict[int, float] = {}
    found = []
    for time, instance, is_back in zip(clock.join_reference(*np.asarray(given.times).T), given.instance, given.is_back,
                                       strict=True):
        if not np.isfinite(time):
            break
        if is_back:
            found.append(Outage(int(instance), down.pop(int(instance)), float(time)))
        else:
            down[int(instance)] = float(time)
    return sorted(found)
