"""Who waits for whom in a pass of a whole model: its kernels (`eager`) priced by a device's roofline, in two lanes.

    eager       each kernel of the list is launched by itself
    compiled    norms, softmax, copies and pointwise operators between two products are one kernel, as an ideal compiler
                of pointwise operators and reductions makes it: what they hand on to each other is not written
    cuda_graph  one launch a pass; on the device a gap between kernels

    chains      every chain of L kernels whose first is never followed by others (proximity score 1) is one launch:
                    score = times the chain occurs / times its first kernel does;   n' = n - chains (L - 1)
    knee        the first batch at which TKLQT leaves its floor n l: on average more than one launched kernel waits
                for the device (their number is the time in the queue over the host's, by Little's law)

Source: SKIP (arXiv 2504.11750) for measures and proximity score; `jaxsim.analytic.launches` for the lanes. Seconds of
a kernel are those of `jaxsim.cost.roofline`: products by tiles, a batched one with its batch in the rows; fused
attention as a prefill; the rest a floor and bytes. Their floors are of kernels in a captured graph, so a graph's gap is
in them.

Known gaps: one stream, no synchronisation, no allocator; the host takes the same seconds for every kernel. What a
compiler changes in the host's seconds a launch is not known: the same number is taken.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsim._core.errors import InputError, suggest
from jaxsim.analytic import launches
from jaxsim.analytic.eager import CHAIN, ELEMENTWISE, FUSED, FUSIBLE, Kernel, Pass
from jaxsim.analytic.launches import Lanes, Scalar
from jaxsim.cost.attention import chunk_seconds
from jaxsim.cost.rank import Roofline, pad_to_graph
from jaxsim.cost.rates import Rates

Mode = Literal["eager", "compiled", "cuda_graph"]

NULL_LAUNCH_S = {"epyc_7313": 2260.5e-9, "xeon_8468v": 2374.6e-9, "grace": 2771.6e-9}
"""From the call to the start of an empty kernel, by host: under an A100, an H100 PCIe, and in a GH200.

Source: SKIP (arXiv 2504.11750), through third-party notes.
"""


# From kernels to fewer kernels


def compiled(made: Pass) -> Pass:
    """The pass after a compiler: each run of fusible kernels as one."""
    runs: list[tuple[int, ...]] = []
    for i in made.order:
        is_fusible = made.kernels[i].kind in FUSIBLE
        if is_fusible and runs and made.kernels[runs[-1][0]].kind in FUSIBLE:
            runs[-1] = (*runs[-1], i)
        else:
            runs.append((i,))
    return _of_runs(made, runs, _joined)


def chained(made: Pass, length: int) -> Pass:
    """The pass with every chain of so many kernels that always occur together launched as one, from the left.

    The device takes as long as before: an ideal fusion, of launches alone.
    """
    if length < 1:
        raise InputError("length", length, "is not a number of kernels", "give 1 or more")
    names, runs, i = made.names, [], 0
    is_sure = _sure(names, length)
    while i < len(names):
        taken = length if is_sure[i] else 1
        runs.append(made.order[i:i + taken])
        i += taken
    return _of_runs(made, runs, lambda kernels: Kernel(" > ".join(k.name for k in kernels), CHAIN, parts=kernels))


def _sure(names: Sequence[str], length: int) -> list[bool]:
    """Whether the chain from each kernel on has a proximity score of 1."""
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    ids = np.array([number[name] for name in names])
    if len(ids) < length:
        return [False] * len(ids)
    windows = np.lib.stride_tricks.sliding_window_view(ids, length)
    _, which, counts = np.unique(windows, axis=0, return_inverse=True, return_counts=True)
    firsts = np.bincount(ids)
    return [*(counts[which.ravel()] == firsts[ids[:len(windows)]]).tolist(), *[False] * (length - 1)]


def _of_runs(made: Pass, runs, join) -> Pass:
    """A pass of these runs of kernels, the same run being the same kernel."""
    distinct = {run: index for index, run in enumerate(dict.fromkeys(map(tuple, runs)))}
    kernels = tuple(made.kernels[run[0]] if len(run) == 1 else join(tuple(made.kernels[i] for i in run))
                    for run in distinct)
    return Pass(kernels, tuple(distinct[tuple(run)] for run in runs))


def _joined(kernels: tuple[Kernel, ...]) -> Kernel:
    """One kernel for a run of fusible ones: it reads what comes from outside of the run and writes what others need."""
    taken = sum((k.taken for i, k in enumerate(kernels) if i == 0 or k.is_fresh), 0.0)
    given = sum((k.given for i, k in enumerate(kernels) if i == len(kernels) - 1 or k.is_kept), 0.0)
    return Kernel("fused " + "_".join(k.name for k in kernels), ELEMENTWISE, taken=taken,
                  beside=sum((k.beside for k in kernels), 0.0), given=given)


# Seconds


def pass_seconds(cost: Roofline, made: Pass) -> Float[Array, "kernels batches"]:
    """Device seconds of every kernel of a pass, in the order of launches."""
    parts = {id(part): part for kernel in made.kernels for part in kernel.parts or (kernel,)}
    by_form: dict[str, dict[int, tuple]] = {}
    for key, kernel in parts.items():
        form = "product" if kernel.shape is not None else "fused" if kernel.kind == FUSED else "bytes"
        by_form.setdefault(form, {})[key] = _numbers(kernel, form)
    attention = cost.prefill.coefficients(cost.attention_shape(), cost.rates()) if "fused" in by_form else None
    modules = {"product": cost.gemm_16, "fused": (cost.prefill.floor_s, attention), "bytes": cost.elementwise}
    rows, place = [], {}
    for form, some in by_form.items():
        place |= {key: len(rows) * _ROWS + i for i, key in enumerate(some)}
        for table in _tables(list(some.values())):
            rows.append(_seconds(form, modules[form], cost.rates(), table))
    width = max(row.shape[1] for row in rows)
    # Where the parts of each launch are, and the launch of each part.
    index = [[place[id(part)] for part in made.kernels[i].parts or (made.kernels[i],)] for i in made.order]
    launch = np.repeat(np.arange(len(index)), [len(one) for one in index])
    each = jnp.concatenate([jnp.broadcast_to(row, (_ROWS, width)) for row in rows])
    return _summed(each, np.concatenate(index), launch, len(index))


_ROWS = 64
"""Kernels priced at once: one program whatever their number."""


def _numbers(kernel: Kernel, form: str) -> tuple:
    if form == "product":
        return (*kernel.shape, kernel.weight_bytes)
    if form == "fused":
        return kernel.tokens, kernel.sequences, kernel.pairs
    return (kernel.taken + kernel.beside + kernel.given,)


def _tables(rows: list[tuple]) -> list[Float[Array, "numbers kernels batches"]]:
    """Numbers of kernels side by side, `_ROWS` at a time; the last is repeated."""
    rows = rows + [rows[-1]] * (-len(rows) % _ROWS)
    flat = [x for row in rows for x in row]
    xp = jnp if any(isinstance(x, jax.Array) for x in flat) else np
    width = np.broadcast_shapes(*(np.shape(x) for x in flat), (1,))
    whole = xp.stack([xp.broadcast_to(xp.asarray(x, float), width) for x in flat]).reshape(len(rows), -1, *width)
    return [jnp.asarray(whole[i:i + _ROWS].swapaxes(0, 1), float) for i in range(0, len(rows), _ROWS)]


@eqx.filter_jit
def _seconds(form: str, module: Any, rates: Rates, numbers: Float[Array, "numbers kernels batches"]
             ) -> Float[Array, "kernels batches"]:
    """Device seconds of kernels of one form."""
    if form == "product":
        return module.seconds(*numbers, rates)
    if form == "fused":
        (floor, coefficients), (tokens, sequences, pairs) = module, numbers
        return floor + chunk_seconds(coefficients, tokens, sequences, pairs, tokens, jnp.zeros(()), jnp.zeros(()))
    return module.floor_s + numbers[0] / (rates.bytes_per_s * module.efficiency)


@functools.partial(jax.jit, static_argnums=3)
def _summed(each, index, launch, number):
    return jax.ops.segment_sum(each[index], launch, num_segments=number)


@functools.partial(jax.jit, static_argnames="mode")
def measures(kernel_s: Float[Array, "kernels batches"], issue_s: Scalar, launch_s: Scalar, *, mode: Mode = "eager",
             gap_s: Scalar = 0.0) -> Lanes:
    """Latency, TKLQT, AKD and idle seconds of a pass, each over the batches.

    kernel_s: as `pass_seconds` gives it, of `compiled(...)` for that mode; issue_s: host seconds to issue a kernel
    (one number, or without a graph one a kernel); launch_s: from the call to the start on an idle device; gap_s:
    between the kernels of a graph, beyond what their floors hold. Differentiable in all of them.
    """
    if mode not in get_args(Mode):
        raise InputError("mode", mode, "is not known", suggest(mode, get_args(Mode)))
    if mode == "cuda_graph":
        return jax.vmap(lambda d: launches.captured(issue_s, launch_s, d, gap_s), in_axes=1)(kernel_s)
    return jax.vmap(lambda d: launches.lanes(jnp.broadcast_to(issue_s, d.shape), launch_s, d), in_axes=1)(kernel_s)


def queued_kernels(found: Lanes, number: int, issue_s: Scalar, launch_s: Scalar) -> Scalar:
    """Launched kernels that wait for the device, on average: TKLQT beyond its floor, over the host's seconds."""
    return (found.launch_and_queue_s - number * launch_s) / (number * issue_s)


def knee(batches: Sequence[float], kernel_s: Float[Array, "kernels batches"], issue_s: Scalar, launch_s: Scalar
         ) -> Float[np.ndarray, "*shape"]:
    """The first of these batches at which TKLQT has left its floor, for each of the host's seconds; infinite where it
    stays there."""
    issue = jnp.asarray(issue_s, float)

    def queued(one):
        return queued_kernels(measures(kernel_s, one, launch_s), kernel_s.shape[0], one, launch_s)

    is_left = np.asarray(jax.vmap(queued)(jnp.ravel(issue))) > 1.0
    first = np.where(is_left.any(axis=1), np.asarray(batches, float)[is_left.argmax(axis=1)], np.inf)
    return first.reshape(issue.shape)


# Engines


class DecodeLanes(NamedTuple):
    """An engine's decode iterations by batch: seconds of its lanes and of the whole, kernels launched one by one where
    graphs are off."""

    batches: tuple[int, ...]
    serial_s: Float[np.ndarray, " batches"]
    launch_s: Float[np.ndarray, " batches"]
    device_s: Float[np.ndarray, " batches"]
    seconds: Float[np.ndarray, " batches"]
    num_kernels: int

    @property
    def host_bound(self) -> tuple[int, ...]:
        """Batches at which the device waits for launches, and for what is done beside them."""
        return tuple(n for n, is_host in zip(self.batches, self.launch_s > self.device_s, strict=True) if is_host)


def decode_lanes(cost: Roofline, batches: Sequence[int], context: int | Sequence[int], *,
                 cuda_graphs: bool | str = True, async_scheduling: bool = False) -> DecodeLanes:
    """Decode iterations of so many sequences with `context` tokens each (one number, or one a batch), as the engine's
    tables have them."""
    counts = np.asarray(batches)
    sequences = jnp.asarray(counts, float)
    padded = jnp.asarray(pad_to_graph(counts) if cuda_graphs else counts, float)
    device, (full, windowed) = cost.decode_seconds(sequences, padded), cost.decode_attention(sequences)[1:3]
    read = sequences * jnp.asarray(context, float)
    device = device + full * read + windowed * jnp.minimum(read, sequences * cost.window_reach)
    if cost.num_ranks > 1:
        device = device + sum(cost.together_seconds(padded))
    launch, _, serial = cost.host_seconds(sequences, cuda_graphs=cuda_graphs, async_scheduling=async_scheduling)
    joined = jnp.maximum(launch, device)
    if cost.stages is not None:
        # One stage after the other, each with its launches; the last has the head.
        head = cost.sampled_seconds(sequences)
        shares, last = cost.stages[:, None], jnp.arange(cost.stages.shape[0])[:, None] == cost.stages.shape[0] - 1
        joined = jnp.sum(jnp.maximum(shares * launch, shares * (device - head) + last * head), axis=0)
    return DecodeLanes(tuple(batches), *(np.asarray(x, np.float64) for x in (serial, launch, device, serial + joined)),
                       round(float(cost.num_kernels)))
