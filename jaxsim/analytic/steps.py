"""Seconds of iterations on a grid of batch sizes: the cost model as steady states read it.

An iteration of an executor decodes n sequences a rank and takes k waiting prompts along, as its scheduler mixes them.
The cost model is asked for whole numbers of tokens, and read linearly between.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsim.analytic.workload import Load
from jaxsim.cost.base import AbstractIterationCost, BatchStats
from jaxsim.kernels import octaves

MOST_PROMPTS = 6
"""Prompts that one iteration is priced with; more take seconds in proportion."""

LENGTHS = (0, 3)
"""Grid of token counts between which seconds are linear (`octaves`): eight an octave."""

MOST_CHUNKS = 64
"""Iterations of one prompt that are counted; a longer one takes tokens over budget."""


class Steps(eqx.Module):
    """Seconds at every batch size n of a rank.

    decode_s: an iteration of decodes only (of one, where there are none). prompt_s: what k = 0, 1, ... prompts add to
    the decodes' own iterations, over all iterations of theirs. own_s: iterations of one prompt, less what is lost where
    the last is not full; more_s: what a second prompt adds to them. iterations: of a prompt, on average. token_s: a
    prompt token where prompts fill every iteration.
    """

    decode_s: Float[Array, " batches"]
    prompt_s: Float[Array, "prompts batches"]
    own_s: Float[Array, " batches"]
    more_s: Float[Array, " batches"]
    iterations: Float[Array, " batches"]
    token_s: Float[Array, " batches"]

    def added_s(self, prompts: Float[Array, " batches"]) -> Float[Array, " batches"]:
        """Mean seconds that a Poisson number of prompts with this mean add to an iteration."""
        most = self.prompt_s.shape[0] - 1
        counts = np.arange(most + 1)
        weights = _poisson(prompts, most)
        known = jnp.sum(weights * self.prompt_s, axis=0)
        beyond = jnp.maximum(prompts - jnp.sum(weights * counts[:, None], axis=0), 0.0) / most
        return known + beyond * self.prompt_s[-1]

    def residual_s(self, prompts: Float[Array, " batches"]) -> Float[Array, " batches"]:
        """Mean seconds left of the iteration that an arrival meets: E[t^2] / (2 E[t]), t an iteration."""
        weights = _poisson(prompts, self.prompt_s.shape[0] - 1)
        counts = jnp.maximum(np.arange(self.prompt_s.shape[0])[:, None] * self.iterations, 1.0)
        # As many iterations as the prompts take, equally long.
        each = self.decode_s + self.prompt_s / counts
        return 0.5 * jnp.sum(weights * counts * each**2, axis=0) / jnp.sum(weights * counts * each, axis=0)


def _poisson(mean: Float[Array, " batches"], most: int) -> Float[Array, "prompts batches"]:
    """Probabilities of 0..most."""
    counts = np.arange(most + 1)[:, None]
    factorials = np.cumsum(np.log(np.maximum(np.arange(most + 1), 1)))[:, None]
    return jnp.exp(counts * jnp.log(jnp.maximum(mean, 1e-12)) - mean - factorials)


def _corners(value: Float[Array, " counts"]) -> tuple[Int[Array, "2 counts"], Float[Array, " counts"]]:
    """Whole numbers around a count, and how far between them it is."""
    _, low, octave = octaves.rung(LENGTHS, lax.stop_gradient(value).astype(jnp.int32), 1 << 20)
    width = jnp.int32(1) << octave
    return jnp.stack([low, low + width]), (value - low) / width


def iteration_seconds(cost: AbstractIterationCost, num_ranks: int | Float[Array, ""], decodes: Int[Array, "*shape"],
                      context: Float[Array, "*shape"], tokens: Float[Array, "*shape"], chunks: Int[Array, "*shape"],
                      end: Float[Array, "*shape"], pairs: Float[Array, "*shape"], filled: Int[Array, "*shape"]
                      ) -> Float[Array, "*shape"]:
    """Seconds of one iteration of `num_ranks` ranks, each with `decodes` sequences at a mean `context`.

    tokens: of the prompt chunks of a rank, of which there are `chunks`; end, pairs: for each of these tokens,
    `prefill_context` and `prefill_pairs` of `BatchStats`. filled: ranks that have chunks.
    """
    given = jnp.broadcast_arrays(decodes, context, tokens, chunks, end, pairs, filled)
    shape = given[0].shape
    decodes, context, tokens, chunks, end, pairs, filled = (x.reshape(-1) for x in given)
    contexts, share = _corners(context)
    sizes, part = _corners(tokens)
    # All four corners are one evaluation of the cost model, so that it is compiled once.
    context, tokens = (x.reshape(-1) for x in jnp.broadcast_arrays(contexts[:, None], sizes[None]))
    decodes, chunks, end, pairs, filled = (jnp.tile(x, 4) for x in (decodes, chunks, end, pairs, filled))
    stats = BatchStats(decodes, decodes * context, chunks, tokens, end * tokens, pairs * tokens, decodes + chunks,
                       jnp.zeros_like(decodes), context)
    seconds = jax.vmap(lambda s, total: _priced(cost, s, total, num_ranks))(
        stats, _whole(num_ranks) * decodes + filled * tokens).reshape(2, 2, -1)
    near, far = seconds[:, 0] + (seconds[:, 1] - seconds[:, 0]) * part
    return (near + (far - near) * share).reshape(shape)


def _whole(num_ranks: int | Float[Array, ""]) -> int | Int[Array, ""]:
    return num_ranks if isinstance(num_ranks, int) else num_ranks.astype(jnp.int32)


def _priced(cost: AbstractIterationCost, stats: BatchStats, tokens: Int[Array, ""],
            num_ranks: int | Float[Array, ""]) -> Float[Array, ""]:
    seconds = cost.iteration(stats)
    if isinstance(num_ranks, int) and num_ranks == 1:
        return seconds
    is_decode = stats.num_prefill == 0
    seconds = seconds + cost.together_seconds(is_decode, tokens, stats.num_decode + stats.prefill_tokens)
    return jnp.maximum(seconds, cost.host_seconds(is_decode, stats.num_decode + stats.num_prefill))


def steps(cost: AbstractIterationCost, load: Load, num_batches: int, max_batched_tokens: Float[Array, ""], *,
          num_ranks: int | Float[Array, ""] = 1, is_mixed: bool = True) -> Steps:
    """Seconds at 0, 1, ..., `num_batches` - 1 decodes a rank.

    max_batched_tokens: of an iteration, decodes included where prompts share it with them (`is_mixed`). What is beyond
    goes to further iterations. Prompts are taken at their mean length, their attention at the mean square.
    """
    counts = jnp.arange(num_batches, dtype=jnp.int32)
    beside = counts if is_mixed else jnp.zeros_like(counts)
    budget = jnp.maximum(max_batched_tokens - beside, 1.0)
    prompt = load.input_tokens
    # Chunks of one prompt end halfway on average, and with all of it where there is one.
    end = jnp.where(prompt > budget, 0.5 * (prompt / jnp.minimum(prompt, budget) + 1), 1.0)
    prompts = np.arange(1, MOST_PROMPTS + 1)[:, None]
    xp = np if isinstance(num_ranks, int) else jnp
    ranks = xp.minimum(prompts, _whole(num_ranks))
    asked = prompt * prompts / ranks
    # Rows: decodes alone, of 1 where there are none; 1, 2, ... prompts; as many tokens as fit.
    tokens = jnp.concatenate([jnp.zeros((1, num_batches)), jnp.minimum(asked, budget), budget[None]])
    chunks = jnp.clip(jnp.round(lax.stop_gradient(tokens / prompt)), 1, MOST_PROMPTS).astype(jnp.int32)
    chunks = chunks.at[0].set(0)
    seconds = iteration_seconds(
        cost, num_ranks, jnp.concatenate([jnp.maximum(counts, 1)[None], jnp.tile(beside, (MOST_PROMPTS + 1, 1))]),
        load.decode_context, tokens, chunks, end, load.input_square / prompt,
        jnp.asarray(xp.concatenate([xp.array([[0]]), ranks, xp.array([[_whole(num_ranks)]])])))
    decode_s, totals = seconds[0], jnp.maximum(asked / budget, 1.0) * seconds[1:-1]
    # What decodes would have taken anyway; an empty batch takes nothing.
    instead = jnp.maximum(asked / budget, 1.0) * decode_s * (counts > 0) if is_mixed else 0.0
    prompt_s = jnp.concatenate([jnp.zeros((1, num_batches)), totals - instead])
    return Steps(decode_s, prompt_s, totals[0], totals[1] - totals[0], _iterations(load, budget),
                 seconds[-1] / budget)


def _iterations(load: Load, budget: Float[Array, " batches"]) -> Float[Array, " batches"]:
    """Mean number of iterations of a prompt: the sum over j of P(prompt > j budget), prompts taken as normal."""
    edges = np.arange(1, MOST_CHUNKS + 1)[:, None] * budget
    beyond = jnp.sum(jax.scipy.stats.norm.sf((edges - load.input_tokens) / load.input_sd), axis=0)
    return 1.0 + beyond
