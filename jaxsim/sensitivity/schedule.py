"""Latencies of a run as functions of what its iterations take, the schedule as it was.

A record of the tape is one iteration of `first_s` seconds and `extra` behind it, number j of which takes
`pace_s + j growth_s`. These three numbers of every record, its *atoms*, are all there is to differentiate: a latency is
a sum of them. With C the running sum of records on an instance,

    latency = C(event) - C(behind the arrival) + (1 - phase) x iteration in flight + the rest of its record

where `phase` is the share of the iteration in flight that had passed when the request arrived. It is held fixed: an
arrival is as far into its iteration as it was, however long that takes. A request that met nobody starts its own
iteration, so its latency is of records alone. Where an instance rested while a request waited, that time is an
arrival's and is held fixed too; so is who joined which iteration.

`Schedule.transposed` is the transpose of that map: one running sum over records, and no loop over requests. Host arrays
of float64.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxsim.kernels import clock
from jaxsim.sensitivity.recorded import Recorded

FIRST, PACE, GROWTH = range(3)
"""Atoms of a record."""

SAME_S = 4 * clock.GRID_S
"""An arrival closer to a boundary than this is at it: the atoms of a record are rounded apart from its times."""


class Latencies(NamedTuple):
    """Of requests, seconds (or what they change by): from arrival to the start of the first iteration with the request,
    to its first token, to its last."""

    queue: Float[np.ndarray, "*rows requests"]
    ttft: Float[np.ndarray, "*rows requests"]
    e2e: Float[np.ndarray, "*rows requests"]


class Schedule(NamedTuple):
    """Records by position: by instance, then in the order of their starts; requests by index.

    record: of a position, its row on the tape, of several runs on their tapes one after the other. instance; start_s;
    atoms: as recorded. whole: how often each atom is in the seconds of a record.

    Of requests, positions, -1 where there is none: met: the record in flight at the arrival. behind: the first that
    starts after it. joined, first_token, last: as of `Tape`. rest: how often each atom of `met` comes behind the
    arrival; phase and number of the iteration in flight.
    """

    record: Int[np.ndarray, " records"]
    instance: Int[np.ndarray, " records"]
    start_s: Float[np.ndarray, " records"]
    atoms: Float[np.ndarray, "records 3"]
    whole: Float[np.ndarray, "records 3"]
    met: Int[np.ndarray, " requests"]
    behind: Int[np.ndarray, " requests"]
    joined: Int[np.ndarray, " requests"]
    first_token: Int[np.ndarray, " requests"]
    last: Int[np.ndarray, " requests"]
    rest: Float[np.ndarray, "requests 3"]
    phase: Float[np.ndarray, " requests"]
    number: Int[np.ndarray, " requests"]

    def transposed(self, weights: Latencies) -> Float[np.ndarray, "rows records 3"]:
        """What the atoms weigh in sums over latencies; weights: of every request in each of these sums, 0 where it has
        no such latency."""
        queue, ttft, e2e = (np.atleast_2d(w) for w in weights)
        every, count, size = queue + ttft + e2e, len(self.record), len(self.record) + 1

        def gathered(places, values):
            """Sums of the values of requests at the same place."""
            return np.stack([np.bincount(places[row != 0], row[row != 0], size) for row in values])

        at_sums = (gathered(self.joined, queue) + gathered(self.first_token, ttft) + gathered(self.last + 1, e2e)
                   - gathered(self.behind, every))
        # A record is in all running sums behind it.
        later = np.cumsum(at_sums[:, ::-1], axis=1)[:, ::-1][:, 1:]
        found = later[:, :, None] * self.whole
        found[:, :, FIRST] += gathered(self.first_token, ttft)[:, :count]
        meets = np.where(self.met >= 0, every, 0.0)
        for atom in (FIRST, PACE, GROWTH):
            found[:, :, atom] += gathered(self.met, meets * self.rest[:, atom])[:, :count]
        return found

    def busy(self, weights: Float[np.ndarray, "rows instances"]) -> Float[np.ndarray, "rows records 3"]:
        """What the atoms weigh in sums over the seconds that instances have an iteration in flight."""
        return weights[:, self.instance, None] * self.whole


def of_run(run: Recorded) -> Schedule:
    """The schedule of a recorded run."""
    return of_runs([run])


def of_runs(runs: Sequence[Recorded]) -> Schedule:
    """The schedule of recorded runs as of one: their instances, the rows of their tapes, their requests one run after
    the other."""
    tapes, counts = [run.tape for run in runs], [int(run.tape.count) for run in runs]
    arrival_s = np.concatenate([np.asarray(run.result.arrival_s, np.float64) for run in runs])

    def together(name: str) -> np.ndarray:
        return np.concatenate([getattr(tape, name)[:count] for tape, count in zip(tapes, counts, strict=True)])

    # Tapes are in the order of starts.
    instance = together("instance") + np.repeat(_before([len(run.result.busy_s) for run in runs]), counts)
    record, count = np.argsort(instance, kind="stable"), sum(counts)
    position = np.append(np.empty(count, int), -1)
    position[record] = np.arange(count)
    instance, iterations = instance[record], together("iterations")[record]
    start_s = clock.join_reference(*together("start")[record].T)
    atoms = np.stack([together(name)[record] for name in ("first_s", "pace_s", "growth_s")], axis=1, dtype=np.float64)
    extra = np.maximum(iterations.astype(np.float64) - 1, 0)
    # One that a bound stopped on its way has no end.
    whole = np.stack([np.ones(count), extra, extra * (extra - 1) / 2], axis=1) * (iterations > 0)[:, None]
    # Behind the first iteration there may be none, and what it would take is no matter.
    atoms[:, PACE:][extra == 0] = 0.0

    def positions(name: str) -> np.ndarray:
        rows = [getattr(run.tape, name)[:len(run.result.arrival_s)] for run in runs]
        return position[np.concatenate([np.where(row >= 0, row + low, -1)
                                        for row, low in zip(rows, _before(counts), strict=True)])]

    met, joined, first_token, last = (positions(name) for name in ("met", "joined", "first_token", "last"))
    behind, alone = met + 1, np.flatnonzero((met < 0) & (joined >= 0))
    own = instance[joined[alone]]
    for one in np.unique(own):
        low, high = np.searchsorted(instance, (one, one + 1))
        mine = alone[own == one]
        behind[mine] = low + np.searchsorted(start_s[low:high], arrival_s[mine] - SAME_S)
    behind = np.where(joined >= 0, np.minimum(behind, joined), 0)
    rest, phase, number = _rests(atoms[met], extra[met], arrival_s - start_s[met])
    rest = np.where(((met >= 0) & (joined >= 0))[:, None], rest, 0.0)
    return Schedule(record, instance, start_s, atoms, whole, met, behind, joined, first_token, last, rest, phase,
                    number)


def _before(counts: Sequence[int]) -> Int[np.ndarray, " runs"]:
    """How many there are in the runs before each."""
    return np.cumsum([0, *counts[:-1]])


def _rests(atoms: Float[np.ndarray, "requests 3"], extra: Float[np.ndarray, " requests"],
           passed_s: Float[np.ndarray, " requests"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How often each atom of a record is in what is left of it after some time; the share of the iteration in flight
    that has passed then, and which it is (0 the first). At a boundary it is the iteration that ends there."""
    first_s, pace_s, growth_s = atoms.T

    def span(k):
        return k * pace_s + growth_s * k * (k - 1) / 2

    ahead = np.maximum(passed_s - first_s, 0.0)
    linear = pace_s - 0.5 * growth_s
    root = np.sqrt(linear**2 + 2 * growth_s * ahead)
    guess = np.ceil(2 * ahead / np.maximum(linear + root, 1e-30))
    k = np.clip(guess, 1, np.maximum(extra, 1))
    for _ in range(2):
        k = np.where((k > 1) & (span(k - 1) >= ahead - SAME_S), k - 1, k)
        k = np.where((k < extra) & (span(k) < ahead - SAME_S), k + 1, k)
    is_first = (passed_s <= first_s + SAME_S) | (extra == 0)
    begun = np.where(is_first, passed_s, ahead - span(k - 1))
    lasts = np.where(is_first, first_s, pace_s + (k - 1) * growth_s)
    phase = np.clip(begun / np.maximum(lasts, 1e-30), 0.0, 1.0)
    pairs = extra * (extra - 1) / 2
    left = 1 - phase
    in_first = np.stack([left, extra, pairs], axis=1)
    in_jump = np.stack([np.zeros_like(left), left + extra - k, left * (k - 1) + pairs - k * (k - 1) / 2], axis=1)
    return np.where(is_first[:, None], in_first, in_jump), phase, np.where(is_first, 0, k).astype(int)
