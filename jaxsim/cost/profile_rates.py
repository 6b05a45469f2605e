"""What the roofline says of the calls in measured operator tables: how a profile goes on where it was not measured."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsim.cost import attention, operators
from jaxsim.cost.gemm import expected_blocks
from jaxsim.cost.profile import OPERATORS, Rate
from jaxsim.cost.rank import Roofline
from jaxsim.spec.efficiency import EXPERT_ROWS


class TableRates(NamedTuple):
    """Seconds of one call by the roofline, for the axes of each table."""

    base: Roofline

    def _seconds(self, work: operators.Work) -> jax.Array:
        return self.base.call_seconds(work)

    def _work(self, name: str, counts) -> operators.Work | None:
        base, counts = self.base, jnp.asarray(counts, float)
        works = (operators.token_work(base.model, base.plan, base.weights, counts, base.distinct_experts,
                                      base.expert_skew)
                 + operators.head_work(base.model, base.plan, base.weights, counts))
        return next((w for w in works if w.name == name), None)

    def of(self, name: str) -> Rate:
        """The rate of a table by its name."""
        def in_blocks(*axes):
            # Ragged tables ask for many sizes: few of them are compiled.
            axes = np.broadcast_arrays(*(np.asarray(axis, np.float64) for axis in axes))
            size = axes[0].size
            flat = [np.pad(axis.reshape(-1), (0, max(1 << max(size - 1, 0).bit_length(), 64) - size), mode="edge")
                    for axis in axes]
            return np.broadcast_to(np.asarray(_price(name, self.base, *flat), np.float64),
                                   flat[0].shape)[:size].reshape(axes[0].shape)

        return in_blocks

    def _of(self, name: str) -> Rate:
        if name.startswith(("attention_", "latent_")) and name in _ATTENTION:
            return getattr(self, _ATTENTION[name])
        if name == "host_step":
            return lambda n: 1.0 + 0.0 * n
        covered = (*OPERATORS[name].covers, "norms")[0]
        if OPERATORS[name].axes == ("message_bytes",):
            work = self._work(covered, 1.0)
            if work is None:
                return lambda x: 1.0 + 0.0 * x
            return lambda x: self._seconds(work._replace(message_bytes=jnp.asarray(x, float)))
        if name == "experts_touched":
            return self._experts()
        if self._work(covered, 1.0) is None:
            return lambda x: 1.0 + x
        return lambda x: self._seconds(self._work(covered, x)) + 0.0 * x

    def _experts(self) -> Rate:
        """An expert block of `tokens` tokens on this rank's experts, `experts` of them touched."""
        model, template = self.base.model, self._work("experts", 1.0)
        weights = self._expert_size() * self.base.weights.expert_bytes

        def seconds(tokens, experts):
            pairs = tokens * model.experts_per_token
            touched = jnp.minimum(experts, pairs)
            load = template.load._replace(
                tokens=tokens, pairs=pairs, weight_bytes=weights * touched,
                blocks={rows: expected_blocks(pairs, touched, rows) for rows in EXPERT_ROWS})
            return self._seconds(template._replace(load=load))

        return seconds

    def expert_load(self, tokens) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of this rank's experts and distinct ones touched, in an iteration of `tokens`."""
        model, work, size = self.base.model, self._work("experts", tokens), self._expert_size()
        pairs = np.asarray(work.flops, np.float64) / (2.0 * size)
        return (pairs / model.experts_per_token,
                np.asarray(work.weight_bytes, np.float64) / (size * self.base.weights.expert_bytes))

    def _expert_size(self) -> int:
        """Weights of this rank's part of an expert."""
        model = self.base.model
        return (3 if model.gated else 2) * model.hidden * self.base.plan.expert_shape(model).moe_ffn

    def decode(self, sequences, context) -> jax.Array:
        """Decode attention of one layer."""
        base, shape = self.base, self.base.attention_shape()
        kernel, counts = base.latent or base.decode, jnp.asarray(sequences, float)
        return (kernel.fixed_seconds(shape, counts, base.rates())
                + kernel.slope(shape, counts, base.rates()) * counts * context)

    def prefill(self, tokens, keys) -> jax.Array:
        """Prefill attention of one layer: one chunk with its history, or chunks of `keys` without."""
        return self.mixed(tokens, keys, 0.0, 0.0)

    def mixed(self, tokens, keys, sequences, context) -> jax.Array:
        """Both in one call."""
        base, shape = self.base, self.base.attention_shape()
        kernel = base.latent or base.prefill
        coefficients = kernel.coefficients(shape, base.rates())
        tokens, keys, sequences, context = (jnp.asarray(x, float) for x in (tokens, keys, sequences, context))
        chunks = jnp.maximum(tokens / jnp.maximum(keys, 1.0), 1.0)
        both = attention.chunk_seconds(coefficients, tokens, chunks, tokens * keys,
                                       jnp.maximum((keys + tokens) / 2, tokens), sequences, sequences * context)
        floor = kernel.chunk_floor(shape)
        apart = jnp.where(sequences > 0, jnp.maximum(self.decode(sequences, context) - floor, 0.0), 0.0)
        return floor + both + coefficients[attention.APART] * apart

    def _projections(self, tokens):
        names = OPERATORS["latent_decode"].covers
        works = [w for name in names if (w := self._work(name, tokens)) is not None]
        return sum((self._seconds(w) for w in works), np.zeros(()))

    def latent_decode(self, sequences, context) -> jax.Array:
        """Decode attention with its projections."""
        return self.decode(sequences, context) + self._projections(sequences)

    def latent_prefill(self, tokens, keys) -> jax.Array:
        """Prefill attention with its projections."""
        return self.prefill(tokens, keys) + self._projections(tokens)


@functools.partial(jax.jit, static_argnums=0)
def _price(name: str, base: Roofline, *axes: Float[Array, " block"]) -> Float[Array, "*block"]:
    """The rate of a table at a block of points: one program for all rooflines of a structure."""
    return TableRates(base)._of(name)(*axes)


_ATTENTION = {"attention_decode": "decode", "attention_decode_windowed": "decode",
              "attention_prefill": "prefill", "attention_prefill_windowed": "prefill", "attention_mixed": "mixed",
              "latent_decode": "latent_decode", "latent_prefill": "latent_prefill"}
