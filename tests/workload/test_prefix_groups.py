"""Prompts that begin alike in groups."""

import numpy as np
import pytest

from jaxsim._core.errors import InputError
from jaxsim.engine import lower
from jaxsim.workload.named import generator
from jaxsim.workload.prefix_groups import PrefixGroups

GROUPS = {"number": 20, "tokens": 64}


def made(seed=3, count=4000, **groups):
    return generator("poisson", rate_rps=2.0, input=10, output=5, prefix_groups=GROUPS | groups).sample(seed, count)


def test_a_group_is_one_segment():
    """Prompts are longer by the group's tokens, which those of a group share and nobody else."""
    workload = made(count=300)
    assert np.all(workload.input_tokens == 74) and len(np.unique(workload.prefix_hashes)) == 20
    prefixes = lower.shared_prefixes(workload, 16)
    assert prefixes.num_segments == 20 and np.all(prefixes.bounds[:, 1] == 4)
    same = prefixes.paths[:, 0][:, None] == prefixes.paths[:, 0][None, :]
    np.testing.assert_array_equal(same, workload.prefix_hashes[:, None] == workload.prefix_hashes[None, :])


def test_nothing_else_is_drawn_anew():
    """Arrivals and lengths are those of the same seed without groups; fewer requests are the first of more."""
    plain = generator("poisson", rate_rps=2.0, input=10, output=5).sample(3, 4000)
    workload = made()
    np.testing.assert_array_equal(workload.arrival_s, plain.arrival_s)
    np.testing.assert_array_equal(workload.prefix_hashes[:100], made(count=100).prefix_hashes)


@pytest.mark.parametrize("more, shares", [
    ({}, np.full(20, 1 / 20)), ({"distribution": "zipf"}, 1 / np.arange(1, 21)),
    ({"distribution": "zipf", "exponent": 2.0}, 1 / np.arange(1, 21) ** 2)])
def test_shares_of_groups(more, shares):
    """Within four standard deviations of a multinomial."""
    counts, shares = np.bincount(made(**more).prefix_hashes, minlength=20), shares / shares.sum()
    assert np.all(np.abs(counts - 4000 * shares) < 4 * np.sqrt(4000 * shares * (1 - shares)) + 1)


@pytest.mark.parametrize("field, value", [("number", 0), ("tokens", 0), ("distribution", "normal"), ("exponent", -1.0)])
def test_what_is_refused(field, value):
    with pytest.raises(InputError, match=field):
        PrefixGroups(**(GROUPS | {field: value}))


def test_sessions_are_refused():
    with pytest.raises(InputError, match="sessions"):
        generator("conversation", rate_rps=1.0, prefix_groups=GROUPS)
