"""Writes over a batch against one NumPy assignment at a time."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsim.engine.writes import Add, Put, apply, at, forget, recall, rewrites
from jaxsim.kernels import packed
from jaxsim.spec.dims import Dims
from jaxsim.state.world import initial_world


def random_world(rng, dims: Dims, lanes: int):
    def fill(leaf):
        return jnp.asarray(rng.integers(0, 99, (lanes, *leaf.shape)), leaf.dtype)

    return jax.tree.map(fill, initial_world(dims))


def random_writes(rng, dims: Dims, lanes: int):
    """One entry, a pair of slots, a row of the requests, sums with repeated indices, a row of the executor."""
    def ints(high, *shape):
        return jnp.asarray(rng.integers(0, high, (lanes, *shape)), jnp.int32)

    executor, slot = ints(dims.num_executors), ints(dims.num_slots - 1)
    return {
        "slot_keys": Put(at(dims, "slot_keys", executor, (slot, slot + 1)), (ints(99), ints(99))),
        "slot_entries": Put(at(dims, "slot_entries", executor, slot), ints(99, 3)),
        "finished": Put((ints(dims.num_requests),), ints(99, 3).astype(jnp.float32)),
        "itl": Add((ints(3, 4),), ints(99, 4)),
        "residues": Put(at(dims, "residues", executor), ints(99, dims.block_size)),
        "wake_hi": Put(at(dims, "wake_hi", executor), ints(99).astype(jnp.float32)),
    }


def one_by_one(world, writes, dims: Dims):
    arrays = {name: np.array(getattr(world, name)) for name in writes}
    for name, write in writes.items():
        on_executor = name in ("slot_keys", "slot_entries", "residues", "wake_hi")
        for lane, array in enumerate(arrays[name]):
            index = [np.asarray(i)[lane] for i in jax.tree.leaves(write.index)]
            if on_executor and dims.num_executors == 1:
                index = [0, *index]
            if isinstance(write.value, tuple):
                for at, value in zip(index[1:], write.value, strict=True):
                    array[index[0], at] = np.asarray(value)[lane]
            elif isinstance(write, Add):
                np.add.at(array, tuple(index), np.asarray(write.value)[lane])
            else:
                array[tuple(index)] = np.asarray(write.value)[lane]
    return arrays


@pytest.mark.parametrize("instances, lanes", [(1, 1), (1, 5), (3, 1), (3, 5)])
def test_writes_are_assignments(instances, lanes):
    dims = Dims(num_requests=20, num_executors=instances, num_slots=6, block_size=4)
    rng = np.random.default_rng(instances * 10 + lanes)
    world, writes = random_world(rng, dims, lanes), random_writes(rng, dims, lanes)
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), writes)
    packing = packed.Packing(like)

    @jax.jit
    def written(world, writes):
        bits = packing.pack(writes)
        after = apply(dims, forget(world, writes), packing, bits)
        return jax.vmap(recall)(after, packing.unpack(bits))

    after, want = written(world, writes), one_by_one(world, writes, dims)
    for name, expected in want.items():
        assert np.array_equal(np.asarray(getattr(after, name)), expected), name
    # Nothing else has changed, and rewriting what is there changes nothing at all.
    same = written(world, jax.vmap(lambda world: rewrites(dims, world, like))(world))
    untouched = replace(after, **{name: getattr(world, name) for name in want})
    for other in (untouched, same):
        assert all(np.array_equal(x, y) for x, y in
                   zip(jax.tree.leaves(world), jax.tree.leaves(other), strict=True))
