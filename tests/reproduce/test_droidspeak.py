"""DroidSpeak: claims that can be missed, layers and rates read off by other means, the timeline step by step."""

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from jaxsim.analytic.context_reuse import ContextReuse
from jaxsim.reproduce import droidspeak
from jaxsim.reproduce.claim import NO_GATE, NOT_REPRODUCED, REPRODUCED

pytestmark = pytest.mark.unoptimised


def reuse(**numbers) -> ContextReuse:
    numbers = dict(prefill_s=8.0, suffix_s=0.0, rest_s=0.0, num_layers=32.0, kv_bytes=32.0, hidden_bytes=1.0,
                   bytes_per_s=64.0, latency_s=0.0) | numbers
    return ContextReuse(**{name: jnp.float32(value) for name, value in numbers.items()})


def test_a_slow_link_or_a_dear_rest_misses_the_bounds():
    # Where the link is all that counts, so does the order in which it carries things: not at all.
    for numbers, is_near, is_falling in (({}, True, True), ({"rest_s": 2.0}, False, True),
                                         ({"bytes_per_s": 4.0}, False, False)):
        bound, order, toy, *others = droidspeak.claims(reuse(**numbers))
        assert (np.abs(np.divide(bound.ours, droidspeak.FRACTIONS) - 1) <= 0.15).all() == is_near
        assert (np.diff(order.ours) < 0).all() == is_falling and (np.diff(order.ours) <= 0).all()
        assert toy.verdict == NOT_REPRODUCED
        # What cannot be missed with the link assumed here is no gate.
        assert {claim.verdict for claim in (bound, order, *others)} == {NO_GATE}


def test_layers_in_order_by_steps():
    """One layer after the other over the link, the hidden states before the first that is recomputed."""
    made, first, count = reuse(bytes_per_s=4.0), 10, 6
    linked = ready = 0.0
    for layer in range(32):
        if layer == first:
            linked = ready = linked + 1 / 4
        if first <= layer < first + count:
            ready += 8 / 32
        else:
            linked += 1 / 4
    assert droidspeak.in_layer_order_s(made, count, first) == pytest.approx(max(linked, ready))
    assert float(made.pipelined_s(jnp.float32(count))) <= droidspeak.in_layer_order_s(made, count, first)


def test_the_toy_timeline_fits_no_parts():
    """47 in a row and 17 with hidden states first: no times of hidden states, KV and recomputation, all positive."""
    parts = np.stack(np.meshgrid(*[np.linspace(0, 47, 95)] * 2, indexing="ij"))
    kv, computed = parts
    hidden = 47 - kv - computed
    assert np.min((hidden + np.maximum(kv, computed))[hidden >= 0]) > 17


@pytest.mark.parametrize("gain", [1.0, 1.7, 3.1, 20.0])
def test_layers_for_a_gain(gain):
    made = reuse()
    layers = droidspeak.layers_for(made, gain)
    assert layers == 0 or made.speedup(jnp.float32(layers)) >= gain
    assert layers == 32 or made.speedup(jnp.float32(layers + 1)) < gain


def rows(medians: dict[int, float]) -> pd.DataFrame:
    """Runs of 4 seeds whose median TTFT is so many ms a request a second, by layers computed."""
    return pd.DataFrame([{droidspeak.LAYERS: layers, droidspeak.RATE: rate, "seed": seed,
                          droidspeak.TTFT: rate * ms * (1 + 0.001 * seed)}
                         for layers, ms in medians.items() for rate in (0.5, 1.0, 2.0, 4.0) for seed in range(4)])


def test_order_and_throughput_under_load():
    falling = rows({32: 500.0, 19: 400.0, 10: 300.0, 4: 250.0})
    order, most, _ = droidspeak.load_claims(falling)
    assert order.verdict == REPRODUCED and most.verdict == NO_GATE
    # Half a second a request a second reaches a second at two; a quarter at four.
    assert most.ours == pytest.approx(2.0, rel=0.01)
    assert droidspeak.load_claims(rows({32: 500.0, 19: 400.0, 10: 400.0, 4: 250.0}))[0].verdict == NOT_REPRODUCED


def test_order_and_gains_of_agents():
    rates = {droidspeak.RATE: {0.5: droidspeak.AGENTS_RATE}}
    falling = rows({32: 500.0, 19: 400.0, 10: 300.0, 4: 250.0}).replace(rates)
    order, gains, most = droidspeak.agents_claims(falling)
    assert (order.verdict, gains.verdict, most.verdict) == (REPRODUCED, NO_GATE, NO_GATE)
    assert gains.ours == pytest.approx((500 / 400, 500 / 250)) and most.ours == pytest.approx(2.0, rel=0.01)
    level = rows({32: 500.0, 19: 500.0, 10: 300.0, 4: 250.0}).replace(rates)
    assert droidspeak.agents_claims(level)[0].verdict == NOT_REPRODUCED
