"""Routers that know prompts: what instances have in their caches, what was sent where, whose session it is.

Each imitates one published router, with its defaults. Loads are those of the moment, where the real ones may be some
seconds old or only the router's own count.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsim.policy.routing import AbstractRouting, View

PREFIX_TOKENS = 256
"""Of a prompt, what `prefix_hash` hashes. Source: SGLang's router (`prefix_token_count`)."""


def _active(view: View, values: Int[Array, " instances"], otherwise: Int[Array, ""] | int) -> Int[Array, " instances"]:
    return values if view.is_active is None else jnp.where(view.is_active, values, otherwise)


class CacheAware(AbstractRouting):
    """Most of the prompt sent there before, if it is enough of it; the shortest queue where queues are uneven.

    Uneven: max - min > balance_abs and max > balance_rel * min, of outstanding requests. Enough: a share of the prompt
    above cache_threshold. Otherwise the shortest queue, or with `smallest_tree` = 1 the instance to which the fewest
    distinct tokens were sent. Ties of matches and of trees are broken at random.

    Source: SGLang's `cache_aware`, defaults of its command line (of its library: 0.5, 32, 1.1); the smallest tree is
    what its versions before chose. Its tree is of characters and forgets the longest unused beyond a size; here it is
    of the blocks that prompts share, and forgets nothing.
    """

    cache_threshold: Float[Array, ""] = np.float32(0.3)
    balance_abs: Float[Array, ""] = np.float32(64)
    balance_rel: Float[Array, ""] = np.float32(1.5)
    smallest_tree: Float[Array, ""] = np.float32(0)
    reads_sent = True
    reads_prompt = True

    def choose(self, view: View) -> Int[Array, ""]:
        """The gates, then the match, then the fallback."""
        load = view.outstanding
        most, least = jnp.max(_active(view, load, 0)), jnp.min(_active(view, load, jnp.iinfo(jnp.int32).max))
        is_uneven = (most - least > self.balance_abs) & (most > self.balance_rel * least)
        best = view.any_least(-view.matched_tokens)
        is_enough = view.matched_tokens[best] > self.cache_threshold * view.prompt_tokens
        shortest = view.least(load)
        fallback = jnp.where(self.smallest_tree > 0, view.any_least(view.tree_tokens), shortest)
        return jnp.where(is_uneven, shortest, jnp.where(is_enough, best, fallback))


class PrefixHash(AbstractRouting):
    """The home of the prompt's first 256 tokens on a hash ring, unless too much is outstanding there.

    Too much: more than load_factor x (outstanding of all + 1) / instances; then the instance with the fewest.

    Source: SGLang's `prefix_hash`. The ring is as theirs, the hash function is not, so single placements differ.
    """

    load_factor: Float[Array, ""] = np.float32(1.25)
    route_by = "prefix"

    def choose(self, view: View) -> Int[Array, ""]:
        """The home, or the least loaded."""
        total = jnp.sum(_active(view, view.outstanding, 0))
        bound = self.load_factor * ((total + 1) / view.count)
        is_fine = (view.outstanding[view.home] <= bound) | (total == 0)
        return jnp.where(is_fine, view.home, view.least(view.outstanding))


class SessionAffinity(AbstractRouting):
    """The home of the request's session on a hash ring, whatever the load.

    Source: the vLLM production stack's session router; its hash function is another one.
    """

    route_by = "session"

    def choose(self, view: View) -> Int[Array, ""]:
        """The home."""
        return view.home


class KvAware(AbstractRouting):
    """Most of the prompt cached, less beta times how far the load is above the mean.

    score = cached / prompt - beta * (outstanding - mean) / max(1, mean); ties to the lowest index.

    Source: the vLLM production stack's load-aware KV router. It asks a service that knows all caches, as this does.
    """

    beta: Float[Array, ""] = np.float32(1)
    reads_cache = True
    reads_prompt = True

    def choose(self, view: View) -> Int[Array, ""]:
        """Argmax of the score."""
        load = view.outstanding.astype(jnp.float32)
        mean = jnp.sum(_active(view, view.outstanding, 0)) / view.count
        matched = view.cached_tokens / view.prompt_tokens
        return view.least(self.beta * ((load - mean) / jnp.maximum(mean, 1.0)) - matched)


class DynamoKV(AbstractRouting):
    """Fewest blocks: to be computed before a first token, less those cached, and in use.

    cost = max(prefill blocks + blocks of the prompt - overlap_weight * cached blocks, 0) + blocks in use + blocks of
    the prompt, where prefill blocks are those of prompts sent there whose first token is not out. With a temperature
    an instance is drawn: softmax of -cost / temperature, costs scaled to 0 .. 1 first; as the argmin of scaled cost -
    temperature * noise, whose law is the same.

    Source: NVIDIA Dynamo's KV router (`--kv-overlap-score-weight`, `--router-temperature`). Its router counts blocks in
    use by the prompts it sent, here they are the engine's own, outputs included. Its queue (threshold 2.0) in front of
    busy engines is not simulated, and ties go to the lowest index.
    """

    overlap_weight: Float[Array, ""] = np.float32(1)
    temperature: Float[Array, ""] = np.float32(0)
    reads_cache = True
    reads_kv = True
    reads_prefill = True
    reads_prompt = True
    reads_noise = True

    def cost(self, view: View) -> Float[Array, " instances"]:
        """Blocks."""
        def blocks(tokens):
            return (tokens + (view.block_size - 1)) // view.block_size

        own = blocks(view.prompt_tokens)
        prefill = blocks(view.prefill_tokens) + own - self.overlap_weight * (view.cached_tokens // view.block_size)
        return jnp.maximum(prefill, 0.0) + (view.used_blocks + own)

    def choose(self, view: View) -> Int[Array, ""]:
        """Argmin of the cost, or a draw."""
        cost = self.cost(view)
        known = cost if view.is_active is None else jnp.where(view.is_active, cost, cost[view.least(cost)])
        least = jnp.min(known)
        scaled = (cost - least) / jnp.maximum(jnp.max(known) - least, 1e-6)
        return view.least(scaled - self.temperature * view.noise)


class WeightedScorers(AbstractRouting):
    """Highest sum of scores between 0 and 1: the share of the prompt cached, a short queue, free KV blocks.

    prefix_weight * cached / prompt + queue_weight * (longest - waiting) / (longest - shortest), 1 where all are equal,
    + kv_weight * (1 - used share); ties at random.

    Source: llm-d's scheduler (`prefix-cache-scorer`, `queue-scorer`, `kv-cache-utilization-scorer`,
    `max-score-picker`), weights of one published example. Its optional scorer that sends cold requests to the least
    recently used instance is not there.
    """

    prefix_weight: Float[Array, ""] = np.float32(3)
    queue_weight: Float[Array, ""] = np.float32(2)
    kv_weight: Float[Array, ""] = np.float32(2)
    reads_cache = True
    reads_kv = True
    reads_prompt = True
    reads_waiting = True

    def choose(self, view: View) -> Int[Array, ""]:
        """Argmax of the sum."""
        queue = view.waiting
        longest = jnp.max(_active(view, queue, 0))
        shortest = jnp.min(_active(view, queue, jnp.iinfo(jnp.int32).max))
        short = jnp.where(longest == shortest, 1.0, (longest - queue) / jnp.maximum(longest - shortest, 1))
        free = 1.0 - view.used_blocks / jnp.maximum(view.num_blocks, 1)
        score = self.prefix_weight * (view.cached_tokens / view.prompt_tokens) + self.queue_weight * short
        return view.any_least(-(score + self.kv_weight * free))
