"""Reusing a sibling's KV: the algebra by hand, its limits and bounds, and the event engine where nothing is reused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsim._core.errors import InputError
from jaxsim.analytic.context_reuse import ContextReuse, context_reuse
from jaxsim.engine import lower
from jaxsim.engine.simulate import simulate
from jaxsim.spec.scenario import Scenario

pytestmark = pytest.mark.unoptimised

SCENARIO = {
    "schema_version": 1, "model": {"name": "llama-3.1-8b"}, "device": {"name": "a100_sxm_80"},
    "engine": {"max_num_batched_tokens": 1024, "max_num_seqs": 8}, "num_seeds": 1,
    "workload": {"kind": "batch", "num_requests": 1, "input": 4096 + 512, "output": 1}}


def reuse(**numbers) -> ContextReuse:
    numbers = dict(prefill_s=8.0, suffix_s=0.5, rest_s=0.0, num_layers=32.0, kv_bytes=64.0, hidden_bytes=2.0,
                   bytes_per_s=16.0, latency_s=0.0) | numbers
    return ContextReuse(**{name: jnp.float32(value) for name, value in numbers.items()})


def test_by_hand():
    """8 of 32 layers: 2 s of recomputation, 48 bytes of KV in 3 s, 2 bytes of hidden states in 1/8 s."""
    r = reuse()
    assert r.full_s() == 8.5
    assert r.recompute_s(8.0) == 2.0 and r.load_bytes(8.0) == 48.0
    assert r.serial_s(8.0) == 0.125 + 3 + 2 + 0.5
    assert r.pipelined_s(8.0) == 0.125 + 3 + 0.5
    assert r.bound(8.0) == min(4.0, 8 / 3)
    assert reuse(rest_s=2.0).pipelined_s(8.0) == 0.125 + 4 + 0.5
    assert reuse(latency_s=0.25).serial_s(8.0) == 0.125 + 3 + 2 * 0.25 + 2 + 0.5


def test_limits():
    """All layers recomputed: as without reuse, but for the hidden states; none: only the link."""
    r = reuse(latency_s=0.25)
    assert r.pipelined_s(32.0) == r.full_s() + 2 / 16 + 0.25
    assert r.pipelined_s(0.0) == r.serial_s(0.0) == 64 / 16 + 0.25 + 0.5


def test_order_and_bound():
    rng = np.random.default_rng(0)
    for _ in range(200):
        low = reuse(prefill_s=rng.uniform(0.1, 10), suffix_s=0, hidden_bytes=0, kv_bytes=rng.uniform(1, 100),
                    bytes_per_s=rng.uniform(1, 100))
        layers = jnp.asarray(rng.integers(1, 33, 4), jnp.float32)
        assert np.all(low.pipelined_s(layers) <= low.serial_s(layers))
        # Both sides are the same quotient in another order.
        np.testing.assert_allclose(low.speedup(layers), low.bound(layers), rtol=1e-5)
        high = ContextReuse(**(vars(low) | {"suffix_s": jnp.float32(1.0), "hidden_bytes": jnp.float32(5.0)}))
        is_gain = low.bound(layers) > 1
        assert np.all((high.speedup(layers) < low.bound(layers))[is_gain])


def test_gradients_tell_what_limits():
    """Bound by the link, bandwidth counts and layers count only through what they spare it; bound by layers, neither
    bandwidth nor KV do."""
    def gradient(r, layers):
        return jax.grad(lambda r, k: r.pipelined_s(k), argnums=(0, 1))(r, jnp.float32(layers))

    linked, by_layers = gradient(reuse(hidden_bytes=0.0), 4.0)
    assert linked.bytes_per_s < 0 and linked.prefill_s == 0 and by_layers < 0
    computed, by_layers = gradient(reuse(hidden_bytes=0.0), 16.0)
    assert computed.bytes_per_s == 0 and computed.prefill_s == 0.5 and by_layers == 0.25


def test_without_reuse_it_is_the_event_engine():
    """A context of whole chunks and the tokens behind it, alone: the engine computes the same iterations."""
    scenario = Scenario.from_dict(SCENARIO)
    system = lower.resolve_system(scenario)
    cost = lower.make_cost(scenario, system, 8, 4609)
    made = context_reuse(system.model, cost, context_tokens=4096, suffix_tokens=512, max_num_batched_tokens=1024,
                         bytes_per_s=1e9)
    lane = simulate([scenario]).lanes[0][0]
    inside_s = (lane.first_token_s - lane.arrival_s)[0]
    assert lane.num_iterations == 5
    np.testing.assert_allclose(made.full_s(), inside_s, rtol=1e-6)
    assert made.kv_bytes == 4096 * 131072 and made.hidden_bytes == 4096 * 4096 * 2


@pytest.mark.parametrize("numbers, field", [
    ({"context_tokens": 0}, "context_tokens"), ({"suffix_tokens": 0}, "suffix_tokens"),
    ({"bytes_per_s": 0.0}, "bytes_per_s"), ({"bytes_per_s": float("nan")}, "bytes_per_s")])
def test_what_cannot_be(numbers, field):
    given = dict(context_tokens=16, suffix_tokens=16, max_num_batched_tokens=16, bytes_per_s=1.0) | numbers
    with pytest.raises(InputError) as refused:
        context_reuse(None, None, **given)
    assert refused.value.field == field
