"""A prefill and a decode engine of DistServe's public simulator as queues: one run, event by event.

A batch is formed whenever the first stage is free and somebody is there: prompts from the front of the queue within a
budget of tokens, decodes from the front of theirs within a limit of context. Who decoded goes to the back; who comes
at an instant stands before who comes back then. Stages behind the first take equally long.

Sequences that decoded together come back together, so what goes through the stages and through the queue is not
sequences but the batches that they make: how many, the sum of their contexts, the next of them to end. An iteration
changes three numbers. Batches become one where they are formed together, and are cut where the limit of context binds;
only then, and where somebody comes or ends, are sequences looked at. All is whole ticks of the clock (2^-30 s), the
seconds of a stage are float64.

Source: LLMServe/DistServe `simdistserve`, as `jaxsim.engine.free_stages` and `decode_queue` have it.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from jaxsim.kernels.clock import GRID_S

TICKS_A_SECOND = round(1 / GRID_S)

_NEVER = 1 << 62


class Engine(NamedTuple):
    """One engine.

    pieces: the least number of sequences from which it holds, and a, b, c, d, e of `a + b tokens + c context + d
    sequences + e squares`, seconds of a whole iteration. head: of the first stage alone `head[0] + head[1] context`,
    seconds. num_stages. limit: the most tokens of a batch of prompts, or tokens of context of a batch of decodes.
    """

    pieces: tuple[tuple[float, ...], ...]
    head: tuple[float, float]
    num_stages: int
    limit: int

    def parts(self, count: int, tokens: int, context: int, squares: float, before: int) -> tuple[int, int]:
        """Ticks of an iteration in the first stage, and in each of the others; before: tokens of context that the first
        stage pays for."""
        piece = self.pieces[0]
        for other in self.pieces[1:]:
            if count >= other[0]:
                piece = other
        _, a, b, c, d, e = piece
        head = self.head[0] + self.head[1] * before
        each = (a + b * tokens + c * context + d * count + e * squares - head) / self.num_stages
        return round((each + head) * TICKS_A_SECOND), round(each * TICKS_A_SECOND)


def prefill(engine: Engine, arrival: Sequence[int], prompt: Sequence[int]) -> tuple[list[int], list[int], int]:
    """When each prompt joins a batch, and when it is computed, ticks; and how many iterations that took.

    arrival: ticks, rising. No prompt is longer than the budget.
    """
    scheduled: list[int] = []
    computed: list[int] = []
    total = list(accumulate(prompt, initial=0))
    squares = list(accumulate((float(tokens) ** 2 for tokens in prompt), initial=0.0))
    free, at, iterations = [0] * engine.num_stages, 0, 0
    while at < len(arrival):
        now = max(free[0], arrival[at])
        upto = min(bisect_right(arrival, now, at), bisect_right(total, total[at] + engine.limit, at) - 1)
        tokens = total[upto] - total[at]
        out = _enter(free, now, *engine.parts(upto - at, tokens, 0, squares[upto] - squares[at], tokens))
        scheduled += [now] * (upto - at)
        computed += [out] * (upto - at)
        at, iterations = upto, iterations + 1
    return scheduled, computed, iterations


def decode(engine: Engine, ready: Sequence[int], prompt: Sequence[int], output: Sequence[int]
           ) -> tuple[list[int], int]:
    """When the last token of each is out, ticks, and how many iterations that took.

    ready: when its KV is there, rising. Outputs are of two tokens at least, the first of which is there. Nobody is
    longer than the limit.
    """
    sequences = _Sequences([tokens + 1 for tokens in prompt], [tokens - 1 for tokens in output], [0] * len(ready))
    comes = [*ready, _NEVER]
    queue: deque[tuple[int, _Batch]] = deque()
    free, at, iterations = [0] * engine.num_stages, 0, 0
    while queue or at < len(ready):
        now = queue[0][0] if queue and queue[0][0] < comes[at] else comes[at]
        if now < free[0]:
            now = free[0]
        room, parts = engine.limit, []
        while True:
            if queue and queue[0][0] < comes[at]:
                back, part = queue[0]
                if back > now:
                    break
                if part.context > room:
                    front, rest = sequences.cut(part, room)
                    if front is not None:
                        queue[0] = back, rest
                        parts.append(front)
                    break
                queue.popleft()
            else:
                if comes[at] > now or sequences.offset[at] > room:
                    break
                part = _Batch([at], sequences.offset[at], 0, sequences.end[at])
                at += 1
            room -= part.context
            parts.append(part)
        batch = parts[0] if len(parts) == 1 else sequences.as_one(parts)
        count, context = len(batch.order), batch.context
        out = _enter(free, now, *engine.parts(count, 0, context, 0.0, context - count))
        iterations += 1
        batch.done += 1
        batch.context += count
        if batch.done == batch.soonest:
            sequences.end_some(batch, out)
        if batch.order:
            queue.append((out, batch))
    return sequences.finish, iterations


class _Batch:
    """Sequences that were in an iteration together, in the order of the queue.

    context: of all, tokens. done: a counter of its iterations; soonest: what it is when the next of them ends.
    """

    __slots__ = ("context", "done", "order", "soonest")

    def __init__(self, order: list[int], context: int, done: int, soonest: int):
        self.order, self.context, self.done, self.soonest = order, context, done, soonest


class _Sequences(NamedTuple):
    """By sequence: its context less the counter of its batch, the counter at which it ends; ticks when it ended."""

    offset: list[int]
    end: list[int]
    finish: list[int]

    def as_one(self, parts: Sequence[_Batch]) -> _Batch:
        """These, one behind the other, under the counter of the largest."""
        largest = parts[0]
        for part in parts:
            if len(part.order) > len(largest.order):
                largest = part
        done, order, context, soonest = largest.done, [], 0, _NEVER
        for part in parts:
            shift = done - part.done
            if shift:
                for who in part.order:
                    self.offset[who] -= shift
                    self.end[who] += shift
            order += part.order
            context += part.context
            if part.soonest + shift < soonest:
                soonest = part.soonest + shift
        return _Batch(order, context, done, soonest)

    def cut(self, batch: _Batch, room: int) -> tuple[_Batch | None, _Batch]:
        """The front of it that fits so many tokens of context, None if nobody does, and the rest."""
        sums = list(accumulate([self.offset[who] + batch.done for who in batch.order]))
        size = bisect_right(sums, room)
        if not size:
            return None, batch
        front, rest = batch.order[:size], batch.order[size:]
        return (_Batch(front, sums[size - 1], batch.done, min(map(self.end.__getitem__, front))),
                _Batch(rest, batch.context - sums[size - 1], batch.done, min(map(self.end.__getitem__, rest))))

    def end_some(self, batch: _Batch, out: int) -> None:
        """Those leave who are through."""
        stay = []
        for who in batch.order:
            if self.end[who] == batch.done:
                self.finish[who] = out
                batch.context -= self.offset[who] + batch.done
            else:
                stay.append(who)
        batch.order, batch.soonest = stay, min(map(self.end.__getitem__, stay), default=_NEVER)


def _enter(free: list[int], now: int, first: int, each: int) -> int:
    """Send a batch through the stages, which are free from these ticks on; returns when it is out."""
    out = free[0] = now + first
    for stage in range(1, len(free)):
        before = free[stage]
        out = free[stage] = (out if out > before else before) + each
    return out
