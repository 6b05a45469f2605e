"""Executors, ranks, batches and groups: what one of them does depends on nobody else's place in the arrays."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsim.cost.fitted import FittedCost
from jaxsim.engine import loop
from jaxsim.engine.common import Group
from jaxsim.policy import routing
from tests.engine import cases as c
from tests.reference import simulator

pytestmark = pytest.mark.unoptimised

EXECUTORS = 3
"""As in the programs of the comparison with the reference, so that they are shared."""


class FirstRanks(routing.AbstractRouting):
    """Round robin over executors: always to the first of an executor's two ranks."""

    def choose(self, view: routing.View):
        return 2 * (view.num_routed % EXECUTORS)


def run(batch, flags, dims, router: str, change=lambda params: params):
    """Behind one of the routers of `cases`; unless something is changed, the program of the comparison."""
    batch = [replace(case, router=c.MIXED.index(router)) for case in batch]
    params, requests = c.inputs(batch, flags, dims, "mixed")
    world = jax.device_get(loop.run(dims, change(params), requests))
    return [c.unpack(dims, world, lane, len(case)) for lane, case in enumerate(batch)]


@pytest.mark.parametrize("name", ["vllm-v1", pytest.param("vllm-v1-priority", marks=pytest.mark.slow)])
def test_ranks_and_batches_that_idle_change_nothing(name):
    """Two ranks of two batches each, of which one runs: as if there were no others."""
    flags, dims = simulator.preset(name), c.dims_of(name, EXECUTORS)
    batch = c.draw_many(3, flags, dims)
    plain = run(batch, flags, dims, "round_robin")
    nested = run(batch, flags, replace(dims, num_ranks=2, num_batches=2), "round_robin",
                 lambda params: replace(params, routing=FirstRanks()))
    for one, other in zip(plain, nested, strict=True):
        # Ranks take turns, in steps of their own.
        assert c.differences(other | {"instance": other["instance"] // 2, "steps": one["steps"]}, one) == []
    assert sum(lane["preemptions"].sum() for lane in plain) > 10


def test_groups_have_their_own_costs_and_numbers():
    """Executors of two kinds, one with costs of another form, each as it would do its share alone and elsewhere."""
    flags, dims = simulator.preset("vllm-v1"), c.dims_of("vllm-v1", EXECUTORS)
    batch, kinds = c.draw_many(4, flags, dims), (0, 1, 0)

    def other(group: Group) -> Group:
        # More blocks, and a cost that doubles from three sequences on: leaves of other shapes than the plain form's.
        rows = group.cost.coefficients
        steps = jnp.broadcast_to(jnp.array([0, 3], jnp.int32), (*rows.shape[:2], 2))
        cost = FittedCost(jnp.concatenate([rows, 2 * rows], axis=2), None, steps)
        return Group(replace(group.batching, num_blocks=group.batching.num_blocks + 3), cost)

    def mixed(params):
        (group,) = params.groups
        return replace(params, groups=(group, other(group)),
                       group_of=jnp.tile(jnp.array(kinds, jnp.int32), (len(batch), 1)))

    def second(params):
        return replace(params, groups=(other(params.groups[0]),))

    both = run(batch, flags, dims, "round_robin", mixed)
    for executor, kind in enumerate(kinds):
        mine = [case.kept(np.arange(len(case)) % EXECUTORS == executor) for case in batch]
        mine = [case if len(case) else batch[i].kept(np.arange(len(batch[i])) == 0) for i, case in enumerate(mine)]
        alone = run(mine, flags, dims, "first", *([second] if kind else []))
        for case, together, single in zip(batch, both, alone, strict=True):
            is_mine = np.arange(len(case)) % EXECUTORS == executor
            if not is_mine.any():
                continue
            assert np.all(together["instance"][is_mine] == executor)
            for field in ("scheduled_s", "first_token_s", "finish_s", "preemptions"):
                assert np.array_equal(together[field][is_mine], single[field]), field
            for field in ("busy_s", "num_iterations", "peak_blocks"):
                assert together[field][executor] == single[field][0], field


def test_groups_that_cannot_share_a_program_are_refused():
    flags, dims = simulator.preset("vllm-v1"), c.dims_of("vllm-v1", EXECUTORS)
    params, _ = c.inputs(c.draw_many(4, flags, dims)[:1], flags, dims, "round_robin")
    other = Group(replace(params.flags, order="priority"), params.groups[0].cost)
    with pytest.raises(ValueError, match="flags of their batching differ"):
        replace(params, groups=(*params.groups, other), group_of=jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match="needed for 2 groups"):
        replace(params, groups=(*params.groups, *params.groups))
