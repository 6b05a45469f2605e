"""Lanes of a GPU and its host: by hand, and a pace against the iterations it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsim.cost.base import BatchStats
from jaxsim.cost.fitted import fitted
from jaxsim.cost.hybrid import HybridCost
from jaxsim.cost.tabulated import TOKENS
from jaxsim.kernels import octaves

pytestmark = pytest.mark.unoptimised


def hybrid(gpu=(1.0, 0.25, 0.0, 0.0, 0.0), decode=None, is_chained=False, experts=None, **numbers) -> HybridCost:
    numbers = dict(read_s=0.0, stream_s=0.0, in_s=0.0, out_s=0.0, prompt_out_s=0.0, contention=0.0) | numbers
    return HybridCost(gpu=fitted(gpu, decode or gpu), expert_s=experts, is_chained=is_chained,
                      **{name: jnp.float32(value) for name, value in numbers.items()})


MIXED = BatchStats.of(num_decode=4, decode_context=64, num_prefill=1, prefill_tokens=8, prefill_context=8,
                      prefill_pairs=64.0)


def test_by_hand():
    """4 decodes over 64 tokens, 8 tokens of a prompt."""
    cost = hybrid(read_s=0.5, stream_s=2.0, in_s=0.25, out_s=0.5, prompt_out_s=0.125, contention=0.5)
    assert cost.lanes(MIXED).tolist() == [1 + 0.25 * 8, 32.0, 2 + 1 + 16, 2 + 1]
    assert cost.iteration(MIXED) == 32
    assert hybrid(read_s=0.5, stream_s=64.0, contention=0.5).iteration(MIXED) == 80
    assert hybrid(read_s=0.5, stream_s=64.0).iteration(MIXED) == 64
    assert hybrid(stream_s=0.5).iteration(MIXED) == 3
    assert hybrid(read_s=0.5, stream_s=2.0, is_chained=True).iteration(MIXED) == 3 + 32 + 2


def test_each_reader_takes_its_own_from_the_link():
    """Half of the seconds of attention, an eighth of a second a token of experts; hand-overs of attention only where
    somebody decodes."""
    knots = jnp.asarray(octaves.knots(TOKENS, 4096), jnp.float32)
    cost = hybrid(experts=knots, expert_lost_s=knots / 8, read_s=0.5, stream_s=2.0, contention=0.5, hand_over_s=0.25,
                  decode_hand_over_s=0.5)
    assert cost.lanes(MIXED).tolist() == [3, 0.25 + 0.5 + 32 + 12, 2 + 16 + 12 / 8, 0]
    prompt = BatchStats.of(num_prefill=1, prefill_tokens=8, prefill_context=8, prefill_pairs=64.0)
    assert cost.lanes(prompt).tolist() == [3, 0.25 + 8, 2 + 1, 0]
    pace = cost.decode(jnp.int32(4), jnp.int32(64))
    assert pace.first_s == 0.25 + 0.5 + 32 + 4 and pace.growth_s == 2


def test_experts_go_by_the_tokens():
    knots = octaves.knots(TOKENS, 4096)
    cost = hybrid(experts=jnp.asarray(knots, jnp.float32) * 0.5, is_chained=True)
    assert cost.iteration(MIXED) == 3 + 0.5 * 12
    pace = cost.decode(jnp.int32(8), jnp.int32(100))
    assert pace.first_s == 1 + 4 and pace.growth_s == 0


@pytest.mark.parametrize("is_chained", [False, True])
def test_a_pace_is_its_iterations(is_chained):
    """Over lanes that overtake each other; as many iterations as it says, and not one more than that holds."""
    rng = np.random.default_rng(0)
    decode_forms = np.column_stack([rng.uniform(0, 4, 64), np.zeros(64), rng.uniform(0, 0.01, 64), np.zeros((64, 2))])

    @jax.jit
    def both(form, numbers, num, context):
        cost = HybridCost(fitted_of(form), numbers[0], None, *numbers[1:], is_chained)
        pace = cost.decode(num, context)

        def one(j):
            stats = BatchStats.of()
            return cost.iteration(BatchStats(num, context + j * num, *(jnp.int32(0),) * 3, jnp.float32(0), num,
                                             stats.decode_shared, stats.longest_context))
        return pace, jax.vmap(one)(jnp.arange(200))

    template = fitted((0.0,) * 5, (0.0,) * 5)

    def fitted_of(form):
        return type(template)(jnp.stack([form[None]] * 3), None, template.thresholds)

    ended = 0
    for form in decode_forms:
        numbers = jnp.float32([rng.uniform(0, 0.02), rng.uniform(0, 4), 0.01, 0.01, 0.0, rng.uniform(0, 1)])
        pace, seconds = both(jnp.asarray(form, jnp.float32), numbers, jnp.int32(rng.integers(1, 16)),
                             jnp.int32(rng.integers(16, 200)))
        horizon = min(int(pace.horizon), 200)
        said = float(pace.first_s) + np.arange(200) * float(pace.growth_s)
        np.testing.assert_allclose(said[:horizon], seconds[:horizon], rtol=1e-5)
        # At the horizon another lane is about to be the longest, within an iteration or the rounding of one.
        if horizon < 198:
            assert seconds[horizon + 2] > said[horizon + 2] - 1e-5
            ended += not np.isclose(said[horizon + 2], seconds[horizon + 2], rtol=1e-6)
    assert is_chained or ended > 10
