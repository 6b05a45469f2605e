"""SLO attainment with a slope: each limit as a sigmoid, a request's limits multiplied.

    s(latency) = 1 / (1 + exp((latency - limit) / (temperature limit)))
    attainment = mean over requests of prod over limits of s

A temperature is a share of the limit: at `TEMPERATURE` a request that is a tenth over its limit counts 0.27, one at it
a half. As it falls the relaxed attainment goes to the hard one, wherever no request is just at its limit, and its slope
to that of fewer and fewer requests: low temperatures are noisy, high ones of another question. Both attainments are to
be shown together.

What the slope is of is whatever the latencies' tangents are of: `attainment` is plain JAX, and `slope` takes tangents
that `jaxsim.sensitivity.pathwise` or a fixed schedule gives.

Known gaps: requests that end without an answer count as missed whatever their limits, with no slope.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsim._core.errors import InputError
from jaxsim.spec.sections import SloSection

TEMPERATURE = 0.1
"""Of a sigmoid, as a share of the limit."""

NAMES = ("ttft", "tpot", "e2e")

Latencies = Mapping[str, Float[Array, "*runs requests"]]
"""Seconds by "ttft", "tpot" and "e2e"; NaN where a request has none."""


def limits_s(slo: SloSection) -> dict[str, float]:
    """The limits that are given, in seconds. Raises `InputError` where there is none."""
    found = {name: limit_ms / 1e3 for name in NAMES if (limit_ms := getattr(slo, f"{name}_ms")) is not None}
    if not found:
        raise InputError("slo", None, "has no limits", "give slo.ttft_ms, slo.tpot_ms or slo.e2e_ms")
    return found


def attainment(latencies: Latencies, limits: Mapping[str, float], temperature: Array | float = TEMPERATURE
               ) -> Float[Array, "*runs"]:
    """Relaxed share of requests within all limits.

    latencies: "e2e" is NaN where there was no answer, and "tpot" where there is nothing to miss: outputs of one token.
    Raises `InputError` for a temperature that is not positive.
    """
    if not isinstance(temperature, jax.core.Tracer) and not temperature > 0:
        raise InputError("temperature", temperature, "is not positive", "give a share of the limit, or use `hard`")
    is_answered = jnp.isfinite(latencies["e2e"])
    met = jnp.where(is_answered, 1.0, 0.0)
    for name, limit in limits.items():
        # The inner choice keeps NaN out of derivatives.
        is_known = jnp.isfinite(latencies[name])
        seconds = jnp.where(is_known, latencies[name], limit)
        met = met * jnp.where(is_known, jax.nn.sigmoid((1 - seconds / limit) / temperature), 1.0)
    return met.mean(axis=-1)


def hard(latencies: Latencies, limits: Mapping[str, float]) -> Float[Array, "*runs"]:
    """Share of requests within all limits, as `jaxsim.metrics` counts it."""
    met: Bool[Array, "*runs requests"] = jnp.isfinite(latencies["e2e"])
    for name, limit in limits.items():
        met = met & ~(latencies[name] > limit)
    return met.mean(axis=-1)


def slope(latencies: Latencies, tangents: Latencies, limits: Mapping[str, float],
          temperature: float = TEMPERATURE) -> tuple[Float[Array, "*runs"], Float[Array, "*runs"]]:
    """Relaxed attainment, and its derivative along tangents of the latencies (per whatever these are per)."""
    names = ("e2e", *(name for name in limits if name != "e2e"))

    def of(*values):
        return attainment(dict(zip(names, values, strict=True)), limits, temperature)

    given = tuple(jnp.asarray(latencies[name]) for name in names)
    moved = tuple(jnp.where(jnp.isfinite(jnp.asarray(tangents[name])), tangents[name], 0.0).astype(x.dtype)
                  for name, x in zip(names, given, strict=True))
    return jax.jvp(of, given, moved)
