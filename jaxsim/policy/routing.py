"""Routers: which instance gets an arriving request.

A router sees a `View` of the cluster and the request's own two uniforms, never true output lengths. It computes
O(instances) in a step.
"""

import abc
import importlib
import re

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxsim._core.errors import InputError, suggest
from jaxsim.policy.loads import Loads, freeness, remaining_steps


class View(eqx.Module):
    """What a router may see when a request arrives.

    outstanding: waiting and running requests of each instance; waiting: those waiting; used_blocks and num_blocks:
    the KV pool, present only for routers with `reads_kv`; num_routed: requests routed before; uniforms: the
    request's own random numbers; prompt_tokens: of the request, only for routers with `reads_prompt`; is_active: which
    instances take requests, None if all do; loads: only for routers with `reads_loads`.

    Of caches, each only for routers that read it: cached_tokens, of the prompt at each instance; matched_tokens, of it
    sent to each before, and tree_tokens, of all that was; prefill_tokens, of prompts sent to each whose first token is
    not out, less what was cached of them when they were sent; home, the instance that a hash of the request falls to;
    noise, the request's own draws from Gumbel's law. block_size: tokens of a KV block.

    A router that picks with `count`, `nth` and `least` keeps to the active ones; the choice of another that does not
    moves on to the next active one.
    """

    outstanding: Int[Array, " instances"]
    waiting: Int[Array, " instances"] | None
    used_blocks: Int[Array, " instances"] | None
    num_blocks: Int[Array, " instances"] | None
    num_routed: Int[Array, ""]
    uniforms: Float[Array, " 2"]
    prompt_tokens: Int[Array, ""] | None = None
    is_active: Bool[Array, " instances"] | None = None
    loads: Loads | None = None
    cached_tokens: Int[Array, " instances"] | None = None
    matched_tokens: Int[Array, " instances"] | None = None
    tree_tokens: Int[Array, " instances"] | None = None
    prefill_tokens: Int[Array, " instances"] | None = None
    home: Int[Array, ""] | None = None
    noise: Float[Array, " instances"] | None = None
    block_size: int = eqx.field(static=True, default=1)

    @property
    def count(self) -> Int[Array, ""] | int:
        """Instances that take requests."""
        return self.outstanding.shape[0] if self.is_active is None else jnp.sum(self.is_active, dtype=jnp.int32)

    def nth(self, index: Int[Array, ""]) -> Int[Array, ""]:
        """The instance with so many others that take requests before it."""
        if self.is_active is None:
            return index
        return jnp.argmax(jnp.cumsum(self.is_active) > index).astype(jnp.int32)

    def least(self, score: Shaped[Array, " instances"]) -> Int[Array, ""]:
        """That with the lowest score among those that take requests; ties to the lowest index."""
        if self.is_active is not None:
            highest = jnp.inf if jnp.issubdtype(score.dtype, jnp.floating) else jnp.iinfo(score.dtype).max
            score = jnp.where(self.is_active, score, highest)
        return jnp.argmin(score).astype(jnp.int32)

    def any_least(self, score: Shaped[Array, " instances"]) -> Int[Array, ""]:
        """The same with ties broken by the request's first uniform."""
        is_least = score == score[self.least(score)]
        if self.is_active is not None:
            is_least = is_least & self.is_active
        index = _draw(self.uniforms[0], jnp.sum(is_least, dtype=jnp.int32))
        return jnp.argmax(jnp.cumsum(is_least) > index).astype(jnp.int32)


class AbstractRouting(eqx.Module):
    """Chooses an instance. `reads_kv` and the others say which parts of the view it wants.

    reads_loads: loads. reads_cache, reads_sent, reads_prefill, reads_noise: cached_tokens; matched_tokens and
    tree_tokens; prefill_tokens; noise. route_by: what `home` is a hash of, the first 256 tokens of the prompt
    ("prefix") or the session ("session").
    """

    reads_kv = False
    reads_waiting = False
    reads_prompt = False
    reads_loads = False
    reads_cache = False
    reads_sent = False
    reads_prefill = False
    reads_noise = False
    route_by = ""

    @abc.abstractmethod
    def choose(self, view: View) -> Int[Array, ""]:
        """Index of the instance."""


def _draw(uniform: Float[Array, ""], count: Int[Array, ""] | int) -> Int[Array, ""]:
    return jnp.minimum((uniform * count).astype(jnp.int32), count - 1)


class RoundRobin(AbstractRouting):
    """Instances in turn: the number of requests routed before, modulo the instances."""

    def choose(self, view: View) -> Int[Array, ""]:
        """Next in turn."""
        return view.nth(view.num_routed % view.count)


class Random(AbstractRouting):
    """Uniform over instances."""

    def choose(self, view: View) -> Int[Array, ""]:
        """Drawn from the request's first uniform."""
        return view.nth(_draw(view.uniforms[0], view.count))


class LeastOutstanding(AbstractRouting):
    """Fewest waiting and running requests; ties to the lowest index."""

    def choose(self, view: View) -> Int[Array, ""]:
        """Argmin of outstanding requests."""
        return view.least(view.outstanding)


class PowerOfTwo(AbstractRouting):
    """Two distinct instances at random, the less loaded of them; ties to the first drawn.

    Source: SGLang's `power_of_two` router; Mitzenmacher's two choices.
    """

    def choose(self, view: View) -> Int[Array, ""]:
        """The better of two draws."""
        count = view.count
        if view.outstanding.shape[0] == 1:
            return jnp.int32(0)
        first = _draw(view.uniforms[0], count)
        second = jnp.maximum(_draw(view.uniforms[1], count - 1), 0)
        second = jnp.minimum(second + (second >= first), count - 1)
        first, second = view.nth(first), view.nth(second)
        return jnp.where(view.outstanding[second] < view.outstanding[first], second, first)


class LeastKV(AbstractRouting):
    """Fewest KV blocks in use at the instant of arrival; ties to the lowest index."""

    reads_kv = True

    def choose(self, view: View) -> Int[Array, ""]:
        """Argmin of used blocks."""
        return view.least(view.used_blocks)


class DataParallel(AbstractRouting):
    """Least of 4 x waiting + running; ties to the lowest index.

    Source: vllm-project/vllm, `vllm/v1/engine/core_client.py` (`DPLBAsyncMPClient.get_core_engine_for_request`), whose
    counts are up to 100 ms old, its own requests since added; here they are those of the moment.
    """

    reads_waiting = True

    def choose(self, view: View) -> Int[Array, ""]:
        """Argmin of outstanding + 3 x waiting."""
        return view.least(view.outstanding + 3 * view.waiting)


class Score(AbstractRouting):
    """Lowest weighted load, the parametric score that covers most published routers.

    score = load_weight * outstanding / mean(outstanding) + queue_weight * waiting + kv_weight * used share. A
    prefix-match term joins with prefix caching. Where the spread of outstanding requests exceeds both gates
    (`max - min > balance_abs` and `max > balance_rel * min`), the shortest queue wins instead. Mean, most and least
    are of the instances that take requests.

    Source: SGLang's cache-aware router (the gates), the vLLM production stack's load-aware router and llm-d's
    weighted scorers (the terms).
    """

    load_weight: Float[Array, ""] = np.float32(1)
    queue_weight: Float[Array, ""] = np.float32(0)
    kv_weight: Float[Array, ""] = np.float32(1)
    balance_abs: Float[Array, ""] = np.float32(np.inf)
    balance_rel: Float[Array, ""] = np.float32(1)
    reads_kv = True
    reads_waiting = True

    def choose(self, view: View) -> Int[Array, ""]:
        """Argmin of the score; ties to the lowest index."""
        load = view.outstanding.astype(jnp.float32)
        counted = load if view.is_active is None else jnp.where(view.is_active, load, 0.0)
        mean = jnp.sum(counted) / view.count
        score = (self.load_weight * load / jnp.maximum(mean, 1.0)
                 + self.queue_weight * view.waiting
                 + self.kv_weight * view.used_blocks / jnp.maximum(view.num_blocks, 1))
        most = jnp.max(counted)
        least = jnp.min(load if view.is_active is None else jnp.where(view.is_active, load, most))
        is_unbalanced = (most - least > self.balance_abs) & (most > self.balance_rel * least)
        return view.least(jnp.where(is_unbalanced, load, score))


class Linear(AbstractRouting):
    """Lowest linear score, in which every number may be one for all instances or one for each: the router to learn.

    score = bias + load_weight * outstanding + queue_weight * waiting + kv_weight * used share of the KV blocks
    + prompt_weight * prompt tokens / 1024. With the same numbers everywhere `bias` and `prompt_weight` decide nothing;
    with one a replica they prefer some, and send long prompts elsewhere than short ones.
    """

    load_weight: Float[Array, "#instances"] | Float[Array, ""] = np.float32(1)
    queue_weight: Float[Array, "#instances"] | Float[Array, ""] = np.float32(0)
    kv_weight: Float[Array, "#instances"] | Float[Array, ""] = np.float32(0)
    prompt_weight: Float[Array, "#instances"] | Float[Array, ""] = np.float32(0)
    bias: Float[Array, "#instances"] | Float[Array, ""] = np.float32(0)
    reads_kv = True
    reads_waiting = True
    reads_prompt = True

    def choose(self, view: View) -> Int[Array, ""]:
        """Argmin of the score."""
        share = view.used_blocks / jnp.maximum(view.num_blocks, 1)
        return view.least(self.bias + self.load_weight * view.outstanding + self.queue_weight * view.waiting
                          + self.kv_weight * share + self.prompt_weight * (view.prompt_tokens / 1024))


def _freest(view: View, free: Float[Array, " instances"], top_k: int) -> Int[Array, ""]:
    """The freest instance; of several, any of the `top_k` freest by the request's first uniform."""
    if top_k == 1:
        return view.least(-free)
    if view.is_active is not None:
        free = jnp.where(view.is_active, free, -jnp.inf)
    index = jnp.arange(free.shape[0])
    is_before = (free[None, :] > free[:, None]) | ((free[None, :] == free[:, None]) & (index[None, :] < index[:, None]))
    place = jnp.sum(is_before, axis=1)
    return jnp.argmax(place == _draw(view.uniforms[0], jnp.minimum(top_k, view.count))).astype(jnp.int32)


class LlumnixLoad(AbstractRouting):
    """The instance with the highest freeness, as Llumnix's paper defines it; ties to the lowest index.

    top_k (static): one of so many freest, at random.

    Source: Llumnix (arXiv 2406.03243); `jaxsim.policy.loads.freeness`.
    """

    top_k: int = eqx.field(static=True, default=1)
    reads_loads = True

    def choose(self, view: View) -> Int[Array, ""]:
        """Argmax of freeness."""
        return _freest(view, freeness(view.loads), self.top_k)


class RemainingSteps(AbstractRouting):
    """The instance with the most remaining steps, Llumnix's load in its public code; ties to the lowest index.

    top_k (static): one of so many freest, at random.

    Source: AlibabaPAI/llumnix, dispatch policy `load`; `jaxsim.policy.loads.remaining_steps`.
    """

    top_k: int = eqx.field(static=True, default=1)
    reads_loads = True

    def choose(self, view: View) -> Int[Array, ""]:
        """Argmax of remaining steps."""
        return _freest(view, remaining_steps(view.loads), self.top_k)


def routers() -> dict[str, type[AbstractRouting]]:
    """Routers by name: the final classes of this package, in snake case."""
    return {re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower(): cls
            for cls in AbstractRouting.__subclasses__() if cls.__module__.startswith(__package__ + ".")}


def router(name: str, numbers: dict[str, float] | None = None) -> AbstractRouting:
    """A router by name, or by the dotted path of a class, with its numbers. Raises `InputError`."""
    known = routers()
    cls = known.get(name)
    if cls is None and "." in name:
        module, _, attribute = name.rpartition(".")
        try:
            cls = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise InputError("cluster.router", name, f"cannot be imported ({error})",
                             "give the dotted path of a subclass of AbstractRouting") from None
        if not (isinstance(cls, type) and issubclass(cls, AbstractRouting)):
            raise InputError("cluster.router", name, "is not a router",
                             "give the dotted path of a subclass of AbstractRouting")
    if cls is None:
        raise InputError("cluster.router", name, "no such router", suggest(name, known))
    fields = set(cls.__dataclass_fields__)
    for field in numbers or {}:
        if field not in fields:
            raise InputError(f"cluster.router_weights.{field}", numbers[field], f"is not a number of {name}",
                             suggest(field, fields) if fields else "leave it out")
    if (numbers or {}).get("top_k", 1) < 1 or (numbers or {}).get("top_k", 1) % 1:
        raise InputError("cluster.router_weights.top_k", numbers["top_k"], "is not a number of instances",
                         "give a whole number from 1")
    return cls(**{field: int(value) if field == "top_k" else np.float32(value)
                  for field, value in (numbers or {}).items()})
