"""Queues of batches against queues of sequences: ties, limits that bind, batches that meet, stages of any number."""

import numpy as np
import pytest

from jaxsim.planning.queues import Engine, decode, prefill

GRID_S = 2.0**-30


def seconds(engine, count, tokens, context, squares, before):
    """Of the first stage and of another, ticks, by the formula."""
    (_, a, b, c, d, e), = [piece for k, piece in enumerate(engine.pieces) if piece[0] <= count
                           and (k + 1 == len(engine.pieces) or count < engine.pieces[k + 1][0])]
    head = engine.head[0] + engine.head[1] * before
    each = (a + b * tokens + c * context + d * count + e * squares - head) / engine.num_stages
    return int(np.rint((each + head) / GRID_S)), int(np.rint(each / GRID_S))


def through(free, now, first, each):
    for stage in range(len(free)):
        free[stage] = now = max(now, free[stage]) + (each if stage else first)
    return now


def decode_by_sequence(engine, ready, prompt, output, seen):
    """A queue of sequences, sorted anew for every batch: who comes at an instant is before who comes back then."""
    queue = [(at, 0, who) for who, at in enumerate(ready)]
    context, left = [n + 1 for n in prompt], [n - 1 for n in output]
    free, finish, iterations, last_batch = [0] * engine.num_stages, [0] * len(ready), 0, {}
    while queue:
        queue.sort()
        now = max(free[0], queue[0][0])
        batch, room = [], engine.limit
        for at, has_run, who in queue:
            if at > now or context[who] > room:
                break
            room -= context[who]
            batch.append((at, has_run, who))
        here = [entry for entry in queue if entry[0] <= now]
        members, others = ([who for *_, who in part] for part in (batch, here[len(batch):]))
        seen["cut"] += len(others) > 0
        seen["split"] += any(last_batch.get(who) == last_batch.get(members[-1], -1) for who in others)
        seen["met"] += len({last_batch[who] for who in members if who in last_batch}) > 1
        seen["tied"] += len({has_run > 0 for at, has_run, _ in queue if at == now}) > 1
        queue = queue[len(batch):]
        total = sum(context[who] for who in members)
        out = through(free, now, *seconds(engine, len(batch), 0, total, 0.0, total - len(batch)))
        iterations += 1
        for place, who in enumerate(members):
            context[who] += 1
            left[who] -= 1
            last_batch[who] = iterations
            if left[who]:
                queue.append((out, 1 + place, who))
            else:
                finish[who] = out
    return finish, iterations


def prefill_by_prompt(engine, arrival, prompt, seen):
    waiting, free = list(range(len(arrival))), [0] * engine.num_stages
    scheduled, computed, iterations = [0] * len(arrival), [0] * len(arrival), 0
    while waiting:
        now = max(free[0], arrival[waiting[0]])
        batch, budget = [], engine.limit
        for who in waiting:
            if arrival[who] > now or prompt[who] > budget:
                seen["full"] += arrival[who] <= now
                break
            budget -= prompt[who]
            batch.append(who)
        tokens = sum(prompt[who] for who in batch)
        squares = float(sum(prompt[who] ** 2 for who in batch))
        out = through(free, now, *seconds(engine, len(batch), tokens, 0, squares, tokens))
        iterations, waiting = iterations + 1, waiting[len(batch):]
        seen["together"] += len(batch) > 1
        for who in batch:
            scheduled[who], computed[who] = now, out
    return scheduled, computed, iterations


def engines(rng, kind):
    """Dyadic seconds, so that ends and arrivals tie; coefficients that change at four sequences."""
    stages = int(rng.integers(1, 6))
    if kind == "prefill":
        return Engine(((0, 2.0**-5, 2.0**-14, 0.0, 0.0, 2.0**-24),), (2.0**-8, 2.0**-20), stages, 3000)
    pieces = ((0, 2.0**-5, 0.0, 2.0**-17, 2.0**-10, 0.0), (4, 2.0**-5 + 2.0**-7, 0.0, 2.0**-18, 2.0**-11, 0.0))
    flat = ((0, 2.0**-5 * stages, 0.0, 0.0, 0.0, 0.0),)
    return Engine(flat if rng.random() < 0.3 else pieces, (0.0, 0.0) if rng.random() < 0.5 else (2.0**-8, 2.0**-20),
                  stages, int(rng.choice([2100, 6000, 50_000])))


def test_batches_are_what_sequences_do():
    rng, seen = np.random.default_rng(0), dict(cut=0, split=0, met=0, tied=0)
    for _ in range(60):
        engine, count = engines(rng, "decode"), int(rng.integers(1, 60))
        ready = np.sort(rng.integers(0, 200, count)) << 25
        prompt, output = rng.integers(1, 2000, count), rng.integers(2, 40, count)
        case = [x.tolist() for x in (ready, prompt, output)]
        assert decode(engine, *case) == decode_by_sequence(engine, *case, seen)
    assert all(number > 20 for number in seen.values()), seen


def test_prompts_are_batched_from_the_front():
    rng, seen = np.random.default_rng(1), dict(full=0, together=0)
    for _ in range(30):
        engine, count = engines(rng, "prefill"), int(rng.integers(1, 80))
        arrival, prompt = np.sort(rng.integers(0, 200, count)) << 25, rng.integers(1, 2000, count)
        case = [x.tolist() for x in (arrival, prompt)]
        assert prefill(engine, *case) == prefill_by_prompt(engine, *case, seen)
    assert all(number > 20 for number in seen.values()), seen


@pytest.mark.parametrize("run", [lambda e: prefill(e, [], []), lambda e: decode(e, [], [], [])])
def test_nobody_takes_no_time(run):
    assert run(Engine(((0, 1.0, 0.0, 0.0, 0.0, 0.0),), (0.0, 0.0), 2, 100))[-1] == 0
