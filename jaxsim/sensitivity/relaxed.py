"""SLO attainment with a slope: each limit as a sigmoid, a request's limits multiplied.

    s(latency) = 1 / (1 + exp((latency - limit) / (temperature limit)))
    attainment = mean over requests of prod over limits of s

A temperature is a share of the limit: at `TEMPERATURE` a request that is a tenth over its limit counts 0.27, one at it
a half. As it falls the relaxed attainment goes to the hard one, wherever no request is just at its limit, and its slope
to that of fewer and fewer requests: low temperatures are noisy, high ones of another question. Both attainments are to
be shown together.

What the slope is of is whatever the latencies' tangents are of: `attainment` is plain JAX, and `slope` takes tangents
as `jaxsim.sensitivity.pathwise` gives them.

Known gaps: requests that end without an answer count as missed whatever their limits, with no slope.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxsim._core.errors import InputError
from jaxsim.metrics.limits import limits_ms
from jaxsim.spec.sections import SloSection
from jaxsim.spec.workload import TenantSection
from jaxsim.workload.workload import Workload

TEMPERATURE = 0.1
"""Of a sigmoid, as a share of the limit."""

NAMES = ("ttft", "tpot", "e2e")

Latencies = Mapping[str, Float[Array, "*runs requests"]]
"""Seconds by "ttft", "tpot" and "e2e"; NaN where a request has none."""


Limits = Mapping[str, Float[Array, "*#runs #requests"] | float]
"""Seconds by the same names, of those that are given; infinite for a request that has none."""


def check_limits(slo: SloSection, tenants: Sequence[TenantSection] = ()) -> None:
    """Refuse what has nothing to attain. Raises `InputError`."""
    own = (limit for t in tenants for limit in (t.ttft_ms, t.tpot_ms, t.deadline_ms))
    if all(limit is None for limit in (slo.ttft_ms, slo.tpot_ms, slo.e2e_ms, *own)):
        raise InputError("slo", None, "has no limits", "give slo.ttft_ms, slo.tpot_ms or slo.e2e_ms")


def limits_s(slo: SloSection, tenants: Sequence[TenantSection] = (), drawn: Workload | None = None) -> Limits:
    """The limits that are given, in seconds: one a request of `drawn` where tenants have their own, as
    `jaxsim.metrics.limits` has them. Raises `InputError` where there is none."""
    check_limits(slo, tenants)
    names, tenant = (drawn.tenant_names, drawn.tenant) if tenants and drawn is not None else ((), None)
    found = limits_ms(slo, tenants if drawn is not None else (), names, tenant)
    return {name: np.asarray(limit) / 1e3 if np.ndim(limit) else limit / 1e3
            for name, limit in found.items() if limit is not None}


def attainment(latencies: Latencies, limits: Limits, temperature: Array | float = TEMPERATURE
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
        is_known = jnp.isfinite(latencies[name]) & jnp.isfinite(limit)
        usual = jnp.where(jnp.isfinite(limit), limit, 1.0)
        seconds = jnp.where(is_known, latencies[name], usual)
        met = met * jnp.where(is_known, jax.nn.sigmoid((1 - seconds / usual) / temperature), 1.0)
    return met.mean(axis=-1)


def hard(latencies: Latencies, limits: Limits) -> Float[Array, "*runs"]:
    """Share of requests within all limits, as `jaxsim.metrics` counts it."""
    met: Bool[Array, "*runs requests"] = jnp.isfinite(latencies["e2e"])
    for name, limit in limits.items():
        met = met & ~(latencies[name] > limit)
    return met.mean(axis=-1)


def slope(latencies: Latencies, tangents: Latencies, limits: Limits,
          temperature: float = TEMPERATURE) -> tuple[Float[Array, "*runs"], Float[Array, "*runs"]]:
    """Relaxed attainment, and its derivative along tangents of the latencies (per whatever these are per)."""
    names = ("e2e", *(name for name in limits if name != "e2e"))

    def of(*values):
        return attainment(dict(zip(names, values, strict=True)), limits, temperature)

    given = tuple(jnp.asarray(latencies[name]) for name in names)
    moved = tuple(jnp.where(jnp.isfinite(jnp.asarray(tangents[name])), tangents[name], 0.0).astype(x.dtype)
                  for name, x in zip(names, given, strict=True))
    return jax.jvp(of, given, moved)
