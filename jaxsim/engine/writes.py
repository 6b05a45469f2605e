"""What a step changes in the large arrays: decided by one step, applied by the next before it reads anything.

So every array is read after its last write, which is what lets the compiled loop update it in place: a read that could
be ordered after a write would make XLA copy the array in every step.
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Shaped

from jaxsim.kernels import packed
from jaxsim.kernels.fence import kernel, stage
from jaxsim.spec.dims import Dims
from jaxsim.state import world as w
from jaxsim.state.world import World

FEW = 8
"""Entries that a single scenario writes one after the other; a scatter of many compiles much faster."""


class Put(NamedTuple):
    """Overwrite an entry, or as many as the last index has; `index` and `value` may be tuples of scalars there.

    Entries are distinct, or all but one of equal ones hold what is never read. The value of a row may be a record.
    """

    index: tuple
    value: Array | tuple


class Add(NamedTuple):
    """Add to an entry, or to as many as the last index has."""

    index: tuple
    value: Array


Writes = dict[str, Put | Add]
"""By name of the array in `World`."""


def owners(dims: Dims, name: str) -> int:
    """How many executors, ranks or batches an array has entries of; 0 if it is about something else."""
    for names, count in ((w.OF_EXECUTOR, dims.num_executors), (w.OF_RANK, dims.all_ranks),
                         (w.OF_BATCH, dims.all_batches)):
        if name in names:
            return count
    return 0


def at(dims: Dims, name: str, owner: Int[Array, ""], *index) -> tuple:
    """Index into an array of executors, ranks or batches. The only one needs none."""
    return (owner, *index) if owners(dims, name) > 1 else index


def is_own_row(name: str, write: Put | Add) -> bool:
    """Whether the write is all there is to know of an array: the row of its only owner."""
    return write.index == () and name in w.WHOLE_ROWS


def forget(world: World, writes: Writes) -> World:
    """Without the arrays of which the writes are all there is to know."""
    return replace(world, **{name: None for name, write in writes.items() if is_own_row(name, write)})


def recall(world: World, writes: Writes) -> World:
    """The arrays of a scenario that `forget` left out."""
    rows = {name: as_row(write.value) for name, write in writes.items() if is_own_row(name, write)}
    return replace(world, **{name: jnp.expand_dims(row, 0) for name, row in rows.items()})


def as_row(value) -> Shaped[Array, " fields"]:
    """A record as one vector."""
    return value if isinstance(value, jax.Array) else packed.to_row(value)


def aim(dims: Dims, name: str, write: Put | Add) -> tuple[Int[Array, "entries axes"], Array]:
    """A write of a batch as indices (scenario, axes...) and entries."""
    *outer, last = write.index
    value = jnp.stack(write.value, -1) if isinstance(write.value, tuple) else write.value
    last = jnp.stack(last, -1) if isinstance(last, tuple) else last
    if last.ndim == 1:
        last, value = last[:, None], value[:, None]
    outer = [lax.broadcasted_iota(jnp.int32, last.shape, 0), *(jnp.broadcast_to(i[:, None], last.shape) for i in outer)]
    if owners(dims, name) == 1:
        outer.append(jnp.zeros_like(last))
    index = jnp.stack([*outer, last], -1)
    return index.reshape(-1, index.shape[-1]), value.reshape(-1, *value.shape[2:])


def apply(dims: Dims, world: World, packing: packed.Packing, writes) -> World:
    """The world of a batch after the packed writes, but for those that are all there is to know of an array."""
    def aimed(_):
        return {name: (write.value[:, None] if write.index == () else aim(dims, name, write))
                for name, write in packing.unpack(writes).items() if not is_own_row(name, write)}

    adds = [name for name, write in packing.unpack(writes).items() if isinstance(write, Add)]
    is_alone = writes["int32"].shape[1] == 1

    def put(name, index, value):
        write = put_one if is_alone and index.shape[0] <= FEW else put_many
        return write(getattr(world, name), index, value, name in adds)

    return replace(world, **{
        name: put(name, *entry) if isinstance(entry, tuple) else entry
        for name, entry in kernel(lambda: stage(aimed, None, "aim"), "aim").items()})


def put_many(array: Shaped[Array, "..."], index: Int[Array, "entries axes"], value: Shaped[Array, "entries ..."],
             adds: bool) -> Shaped[Array, "..."]:
    """Scatter entries."""
    axes = tuple(range(index.shape[1]))
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(1, value.ndim)), inserted_window_dims=axes, scatter_dims_to_operand_dims=axes)
    scatter = lax.scatter_add if adds else lax.scatter
    return scatter(array, index, value, numbers, mode="promise_in_bounds")


def put_one(array: Shaped[Array, "..."], index: Int[Array, "entries axes"], value: Shaped[Array, "entries ..."],
            adds: bool) -> Shaped[Array, "..."]:
    """One entry after the other: for a single scenario, slices in place."""
    for i in range(index.shape[0]):
        start = (*(index[i, k] for k in range(index.shape[1])), *[0] * (array.ndim - index.shape[1]))
        entry = value[i].reshape((1,) * index.shape[1] + value.shape[1:])
        if adds:
            entry = entry + lax.dynamic_slice(array, start, entry.shape)
        array = lax.dynamic_update_slice(array, entry, start)
    return array


def rewrites(dims: Dims, world: World, like: Writes) -> Writes:
    """Writes of the structure of `like` that leave every array of a scenario as it is."""
    def zeros(tree):
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)

    kept = {}
    for name, write in like.items():
        array = getattr(world, name)
        if owners(dims, name) == 1:
            array = array[0]
        index = zeros(write.index)
        if isinstance(write, Add):
            value = zeros(write.value)
        elif index and isinstance(index[-1], tuple):
            value = (array[(*index[:-1], index[-1][0])],) * len(write.value)
        else:
            value = array[index]
            if not isinstance(write.value, jax.ShapeDtypeStruct):
                value = packed.from_row(write.value, value)
        kept[name] = type(write)(index, value)
    return kept
