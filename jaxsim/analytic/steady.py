"""The steady state of a serving system: a queue whose speed depends on how many it serves.

An executor with n sequences makes a token for each in s(n) seconds, prompts of other requests included:

    s(n) = d(n) + x(n, lambda s(n))          d: a decode iteration; x: what the prompts that arrive meanwhile add
    v(n) = s(min(n, B)) / min(n, B)          seconds of the executor for one token
    p(n) = p(0) prod_{j=1..n} lambda (o - 1) v(j)       probability of n sequences; B of them run, others wait

so the mean batch is Little's law at every n, TPOT = E[min(n, B)] / (lambda (o - 1)), and the wait for a slot is
E[max(n - B, 0)] / lambda. s(n) is a fixed point (`implicit.fixed_point`), p(n) is closed.

Source: product form of a queue with processor sharing at state-dependent speed, for any law of the work (J. W. Cohen,
"The multiple phase service network with generalized processor sharing", Acta Informatica 12, 1979); Pollaczek-Khinchine
for prompts that wait for others; arrivals see time averages. jaxsim's own: s(n), and B from the mean context.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsim.analytic.implicit import fixed_point, root
from jaxsim.analytic.steps import Steps, steps
from jaxsim.analytic.workload import Load
from jaxsim.cost.base import AbstractIterationCost

FULLEST = 1 - 1e-4
"""Share of the capacity at which a system with more arrivals than it can serve is evaluated."""

FEWEST_TOKENS = 1e-3
"""Decoded tokens of requests that have none, so that quotients stay finite."""

LOWEST_SHARE = 1e-4
"""Of the capacity: whoever misses a limit there, misses it alone."""

LEAST_RATE = 1e-6
"""Share of the capacity at which a system without arrivals is evaluated, so that quotients by the rate stay finite."""

LONGEST_ITERATION = 1e3
"""In iterations of decodes alone: bound of s(n), beyond any stable system."""


class Executor(eqx.Module):
    """What serves: the cost of its iterations, and the limits of its scheduler.

    cost: as the event engine has it. max_num_seqs, max_num_batched_tokens, kv_tokens (of a rank's pool), block_size
    (tokens), max_model_len; num_executors: alike, that share the arrivals evenly; front_end_s: outside the engine;
    num_in_flight: batches of a pipeline that its sequences are spread over. All of these are traced.

    Static. num_batches: grid of batch sizes, at least max_num_seqs + 1. num_ranks: that iterate together, each with its
    own sequences. is_mixed: prompts share iterations with decodes. held: which tokens a sequence keeps room for: its
    "context", "all" of prompt and output, or "max_model_len". is_async: arrivals are seen one iteration later.

    ranks: their number where it is traced; num_ranks is then the most there can be.
    """

    cost: AbstractIterationCost
    max_num_seqs: Float[Array, ""]
    max_num_batched_tokens: Float[Array, ""]
    kv_tokens: Float[Array, ""]
    block_size: Float[Array, ""]
    max_model_len: Float[Array, ""]
    num_executors: Float[Array, ""]
    front_end_s: Float[Array, ""]
    num_in_flight: Float[Array, ""]
    num_batches: int = eqx.field(static=True)
    num_ranks: int = eqx.field(static=True, default=1)
    is_mixed: bool = eqx.field(static=True, default=True)
    held: str = eqx.field(static=True, default="context")
    is_async: bool = eqx.field(static=True, default=False)
    ranks: Float[Array, ""] | None = None

    @property
    def rank_count(self) -> Float[Array, ""] | int:
        """Ranks that iterate together."""
        return self.num_ranks if self.ranks is None else self.ranks

    @property
    def counts(self) -> Int[np.ndarray, " counts"]:
        """Sequences of an executor, from none to as many as the grid has."""
        return np.arange(self.num_ranks * (self.num_batches - 1) + 1)

    def of_counts(self, rows: Float[Array, "*rows batches"]) -> Float[Array, "*rows counts"]:
        """What rows say of the fullest rank, by sequences of all."""
        if self.ranks is not None:
            fullest = jnp.minimum(jnp.ceil(self.counts / self.ranks).astype(jnp.int32), self.num_batches - 1)
            return rows[..., fullest]
        return rows if self.num_ranks == 1 else rows[..., -(-self.counts // self.num_ranks)]

    def held_tokens(self, load: Load) -> Float[Array, ""]:
        """KV tokens that a running sequence takes on average, half a block of rounding included."""
        tokens = {"context": load.decode_context, "all": load.longest_held, "max_model_len": self.max_model_len}
        return tokens[self.held] + 0.5 * self.block_size

    def most_running(self, load: Load) -> Float[Array, ""]:
        """Sequences that an executor runs at once: by the limit of a rank, and by its KV pool at their mean length."""
        each = jnp.minimum(self.max_num_seqs, self.kv_tokens / self.held_tokens(load))
        return self.rank_count * jnp.maximum(each, 1.0)

    def steps(self, load: Load) -> Steps:
        """Seconds of iterations at every number of sequences of the fullest rank, 0 to `num_batches` - 1.

        Ranks are as full as can be alike. In a pipeline the sequences are spread over `num_in_flight` batches: an
        iteration is the way of one batch through all stages, and what a prompt adds is added to each stage's part only.
        """
        made = steps(self.cost, load, self.num_batches, self.max_num_batched_tokens, num_ranks=self.rank_count,
                     is_mixed=self.is_mixed)
        fullest = np.arange(self.num_batches)
        at = jnp.maximum(jnp.asarray(fullest, float) / self.num_in_flight, np.minimum(fullest, 1))
        spread = jax.tree.map(lambda table: _between(table.T, at[:, None] if table.ndim == 2 else at).T, made)
        return eqx.tree_at(lambda s: (s.prompt_s, s.token_s), spread,
                           (spread.prompt_s / self.num_in_flight, spread.token_s / self.num_in_flight))


class Steady(eqx.Module):
    """Means over requests, seconds. Where arrivals are more than `capacity_rps` nothing is steady: `is_stable` is
    false, TTFT and what contains it infinite, the rest that of a system that is just full.

    tpot_s, ttft_s, e2e_s: as measured, the time outside the engine in TTFT. Parts of TTFT inside it: slot_s, waiting
    for a place among the running; boundary_s, for the iteration in flight; queue_s, for prompts ahead; prefill_s, its
    own iterations. running: sequences that decode, all executors; waiting: for a place. utilisation: share of time
    that an executor works. kv_share: of the pool that is in use. capacity_rps: requests/s that can be served at most;
    output_tokens_per_s: that are made.
    """

    tpot_s: Float[Array, ""]
    ttft_s: Float[Array, ""]
    e2e_s: Float[Array, ""]
    slot_s: Float[Array, ""]
    boundary_s: Float[Array, ""]
    queue_s: Float[Array, ""]
    prefill_s: Float[Array, ""]
    running: Float[Array, ""]
    waiting: Float[Array, ""]
    utilisation: Float[Array, ""]
    kv_share: Float[Array, ""]
    capacity_rps: Float[Array, ""]
    output_tokens_per_s: Float[Array, ""]
    is_stable: Bool[Array, ""]


def _between(row: Float[Array, " batches"], at: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Linear between whole numbers of sequences; of a table, its rows."""
    low = jnp.clip(lax.stop_gradient(at).astype(jnp.int32), 0, row.shape[0] - 2)
    below, above = (row[k.reshape(k.shape[:1])] if row.ndim > 1 else row[k] for k in (low, low + 1))
    return below + (above - below) * (at - low)


def _decoded(load: Load) -> Float[Array, ""]:
    """Tokens of a request after the first, which its prompt makes."""
    return jnp.maximum(load.output_tokens - 1, FEWEST_TOKENS)


def capacity_rps(executor: Executor, load: Load) -> Float[Array, ""]:
    """Requests/s at which all executors run as many sequences as they can, whatever the rate of `load`.

    lambda = a / s(B), s(B) = d(B) + x(B, a), with a = B / (o - 1) prompts an iteration: those that replace what ends.
    """
    return _capacity(executor, load, executor.steps(load)) * executor.num_executors


def _capacity(executor: Executor, load: Load, made: Steps) -> Float[Array, ""]:
    """Of one executor."""
    most = executor.most_running(load)
    prompts = most / _decoded(load)
    full_s = _between(executor.of_counts(
        made.decode_s + made.added_s(jnp.broadcast_to(prompts, made.decode_s.shape))), most)
    return prompts / full_s


def steady_state(executor: Executor, load: Load) -> Steady:
    """Mean latencies and batches of a system under a load.

    Known gaps: arrivals are Poisson at each executor; lengths enter through two moments; KV pools fill to their mean,
    nobody is preempted; ranks that iterate together are equally full; nothing is cached.
    """
    return _steady(executor, load, executor.steps(load))


def steady_states(executor: Executor, load: Load, rates_rps: Float[Array, " rates"]) -> Steady:
    """The same at many rates, along a leading axis: the seconds of iterations are asked for once."""
    made = executor.steps(load)
    return jax.vmap(lambda rate: _steady(executor, load.at_rate(rate), made))(rates_rps)


def _steady(executor: Executor, load: Load, made: Steps) -> Steady:
    """The same from the seconds of iterations, which depend on everything but the rate."""
    capacity = _capacity(executor, load, made)
    asked = load.rate_rps / executor.num_executors
    is_stable = asked < capacity
    # Nearly without arrivals it is that of few of them; the derivative by the rate is still one.
    few = lax.stop_gradient(LEAST_RATE * capacity)
    rate = jnp.minimum(asked + lax.stop_gradient(jnp.maximum(few - asked, 0.0)), FULLEST * capacity)
    decoded, most = _decoded(load), executor.most_running(load)

    start = made.decode_s
    token_s = fixed_point(lambda s: made.decode_s + made.added_s(rate * s), start, LONGEST_ITERATION * start)
    prompts = rate * token_s
    by_rank_s, token_s = token_s, executor.of_counts(token_s)
    # Sequences 0, 1, ... of an executor, and behind the last a geometric tail.
    counts = jnp.arange(len(token_s), dtype=token_s.dtype)
    running = jnp.minimum(counts, most)
    each_s = _between(token_s, running)[1:] / running[1:]
    log_weight = jnp.concatenate([jnp.zeros(1), jnp.cumsum(jnp.log(rate * decoded * each_s))])
    ratio = jnp.minimum(rate * decoded * _between(token_s, most) / most, FULLEST)
    weight = jnp.exp(log_weight - lax.stop_gradient(jnp.max(log_weight)))
    tail = weight[-1] * ratio / (1 - ratio)
    total = jnp.sum(weight) + tail
    mean_running = (jnp.sum(weight * running) + tail * most) / total
    behind = counts[-1] - most + 1 / (1 - ratio)
    mean_waiting = (jnp.sum(weight * (counts - running)) + tail * behind) / total
    # mean_running / (rate decoded), term by term: a quotient of both would lose its derivative where nobody arrives.
    next_s = jnp.concatenate([_between(token_s, running)[1:], _between(token_s, most)[None]])
    tpot_s = (jnp.sum(weight * next_s) + tail * next_s[-1]) / total

    def seen(values):
        """What an arrival finds on average."""
        values = executor.of_counts(values)
        return (jnp.sum(weight * _between(values, running)) + tail * _between(values, most)) / total

    # An executor without decodes works only while prompts of others are computed.
    is_idle = jnp.arange(len(by_rank_s)) == 0
    alone = jnp.minimum(rate * made.own_s, 1.0)
    busy = jnp.where(is_idle, alone, 1.0)
    own_iteration_s = made.own_s / made.iterations
    left_s = jnp.where(is_idle, 0.5 * own_iteration_s, made.residual_s(prompts))
    if executor.is_async:
        left_s = left_s + jnp.where(is_idle, own_iteration_s, by_rank_s)
    boundary_s = seen(busy * left_s)
    # Pollaczek-Khinchine in tokens; what is in service is part of the iteration in flight.
    filled = jnp.minimum(rate / executor.rank_count * load.input_tokens * made.token_s, FULLEST)
    left_tokens = 0.5 * load.input_square / load.input_tokens
    queue_s = seen(jnp.square(filled) / (1 - filled) * left_tokens * made.token_s)
    lost = (made.iterations - jnp.maximum(load.input_tokens / executor.max_num_batched_tokens, 1.0)) * made.decode_s
    others = jnp.where(is_idle, rate * made.own_s, prompts)
    own_s = made.own_s + others * made.more_s + (lost if executor.is_mixed else 0.0)
    prefill_s = seen(own_s)
    slot_s = mean_waiting / rate
    inside_s = slot_s + boundary_s + queue_s + prefill_s
    ttft_s = jnp.where(is_stable, executor.front_end_s + inside_s, jnp.inf)
    return Steady(
        tpot_s=tpot_s, ttft_s=ttft_s, e2e_s=ttft_s + (load.output_tokens - 1) * tpot_s,
        slot_s=jnp.where(is_stable, slot_s, jnp.inf), boundary_s=boundary_s, queue_s=queue_s, prefill_s=prefill_s,
        running=mean_running * executor.num_executors,
        waiting=jnp.where(is_stable, mean_waiting * executor.num_executors, jnp.inf),
        utilisation=seen(busy),
        kv_share=mean_running / executor.rank_count * executor.held_tokens(load) / executor.kv_tokens,
        capacity_rps=capacity * executor.num_executors,
        output_tokens_per_s=rate * executor.num_executors * load.output_tokens, is_stable=is_stable)


def highest_rate(executor: Executor, load: Load, *, ttft_s: Float[Array, ""] | float | None = None,
                 tpot_s: Float[Array, ""] | float | None = None) -> Float[Array, ""]:
    """Requests/s up to which mean latencies keep these limits; 0 where they never do, the capacity without limits.

    A root of the steady state, with the derivative of one.
    """
    made = executor.steps(load)
    capacity = _capacity(executor, load, made) * executor.num_executors
    limits = {name: limit for name, limit in (("ttft_s", ttft_s), ("tpot_s", tpot_s)) if limit is not None}
    if not limits:
        return capacity

    def room(rate):
        state = _steady(executor, load.at_rate(rate), made)
        left = [1 - getattr(state, name) / limit for name, limit in limits.items()]
        return left[0] if len(left) == 1 else jnp.minimum(*left)

    ends = jnp.stack([LOWEST_SHARE * capacity, FULLEST * capacity])
    first, last = jax.vmap(room)(lax.stop_gradient(ends))
    # At an end there is no root, so no derivative of one.
    rate = jnp.where(last > 0, capacity, root(room, *ends))
    return jnp.where(first < 0, 0.0, rate)
