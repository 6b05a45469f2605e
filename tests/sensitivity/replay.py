"""A schedule played again by hand: one iteration after the other, in float64, with costs that are others.

It reads the columns of a tape and knows nothing of how the package makes derivatives of them.
"""

from typing import NamedTuple

import numpy as np

from jaxsim.sensitivity.schedule import FIRST, Latencies, Schedule

GRID_S = 2.0**-28


class Iteration(NamedTuple):
    """Of one iteration: the coefficients' amounts (prefill or decode row, then a vector of five), when it ran."""

    kind: int
    amounts: np.ndarray
    start_s: float
    end_s: float


class Played(NamedTuple):
    """Latencies of every request under some coefficients, and what the cases were."""

    queue: np.ndarray
    ttft: np.ndarray
    e2e: np.ndarray
    busy: np.ndarray
    cases: dict[str, int]


PREFILL, DECODE, MIXED = range(3)


def iterations(tape, coefficients) -> dict[int, list[tuple[int, list[Iteration]]]]:
    """By instance, in order: the row of a record and its iterations."""
    found: dict[int, list] = {}
    for row in range(int(tape.count)):
        stats, following = tape.stats, tape.following
        chunks, decodes = int(stats.num_prefill[row]), int(stats.num_decode[row])
        kind = DECODE if chunks == 0 else PREFILL if decodes == 0 else MIXED
        amounts = [(kind, np.array([1.0, stats.prefill_tokens[row], stats.decode_context[row], decodes + chunks,
                                    stats.prefill_pairs[row]], float))]
        sequences = int(following.num_sequences[row])
        for j in range(int(tape.iterations[row]) - 1):
            amounts.append((DECODE, np.array([1.0, 0.0, following.context[row] + j * sequences, sequences, 0.0])))
        epoch, high, low = (float(x) for x in tape.start[row])
        now, run = epoch * 65536.0 + high + low, []
        for kind, amount in amounts:
            seconds = float(coefficients[kind] @ amount)
            run.append(Iteration(kind, amount, now, now + seconds))
            now += seconds
        found.setdefault(int(tape.instance[row]), []).append((row, run))
    for records in found.values():
        records.sort(key=lambda record: record[1][0].start_s)
    return found


def play(tape, arrival_s, base, changed) -> Played:
    """Latencies with `changed` coefficients, every arrival as far into the iteration it met as with `base`."""
    chains = {instance: [(row, k, one) for row, run in records for k, one in enumerate(run)]
              for instance, records in iterations(tape, base).items()}
    count = len(arrival_s)
    times = np.full((3, count), np.nan)
    cases = dict.fromkeys(("idle", "first", "jump", "queued", "boundary"), 0)
    for request in range(count):
        joined, first, last = (int(x[request]) for x in (tape.joined, tape.first_token, tape.last))
        if joined < 0:
            continue
        chain, now = chains[int(tape.instance[joined])], arrival_s[request]
        passed, is_waiting = 0.0, True
        for row, k, one in chain:
            if one.end_s <= now + GRID_S:
                cases["boundary"] += abs(one.end_s - now) <= GRID_S
                continue
            share = 1.0
            if one.start_s < now - GRID_S:
                # Under way when the request came.
                share = (one.end_s - now) / (one.end_s - one.start_s)
                cases["first" if k == 0 else "jump"] += 1
            elif row == joined and passed == 0.0 and k == 0:
                cases["idle"] += 1
            if row == joined and is_waiting and share == 1.0:
                times[0, request], is_waiting = passed, False
            cases["queued"] += is_waiting and share == 1.0
            passed += share * float(changed[one.kind] @ one.amounts)
            if row == first and k == 0:
                times[1, request] = passed
            if row == last and k == int(tape.iterations[row]) - 1:
                times[2, request] = passed
                break
    busy = np.array([sum(float(changed[one.kind] @ one.amounts) for _, _, one in chains[instance])
                     for instance in sorted(chains)])
    return Played(*times, busy, cases)


def latencies(own: Schedule, atoms: np.ndarray) -> Latencies:
    """Those that atoms (..., records, 3) make at a schedule, as its text says, without pauses; NaN where there is none.

    Linear: of changes of the atoms it gives changes of the latencies. `Schedule.transposed` is its transpose.
    """
    sums = np.cumsum(np.sum(atoms * own.whole, axis=-1), axis=-1)
    sums = np.concatenate([np.zeros((*sums.shape[:-1], 1)), sums], axis=-1)
    begin = sums[..., own.behind] - np.sum(atoms[..., own.met, :] * own.rest, axis=-1)
    first, has_joined = sums[..., own.first_token] + atoms[..., own.first_token, FIRST], own.joined >= 0
    return Latencies(*(np.where(has_joined & is_there, end - begin, np.nan) for is_there, end in (
        (True, sums[..., own.joined]), (own.first_token >= 0, first), (own.last >= 0, sums[..., own.last + 1]))))
