"""Two lanes, a host that issues kernels and a device that runs them in order: who waits for whom (SKIP).

    host        h_j = h_{j-1} + c_j            device    s_j = max(h_j + l, e_{j-1}),  e_j = s_j + d_j
    TKLQT       sum of s_j - h_j               launching and queueing: flat while the host is behind, then rising
    n alike     latency  c + l + (n - 1) max(c, d) + d         TKLQT  n l + max(0, d - c) n (n - 1) / 2
    turn        batch (c - d_0) / d_1, from which on kernels of d_0 + d_1 batch seconds take longer than issuing them

c_j: host seconds to issue a kernel (the walk through the framework); l: from the call to the start on an idle device;
d_j: device seconds. A lane's step is linear over (max, +), so a pass is a product of small matrices in any order of
association: `lanes` is a scan of logarithmic depth, and differentiable.

Source: SKIP (arXiv 2504.11750) for the measures; recurrence and closed form follow from them. Nothing bounds how far
the host runs ahead, as in SKIP.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Scalar = Float[Array, "*shape"] | float


class Lanes(NamedTuple):
    """What a pass of n kernels comes to, in seconds.

    latency_s: from the first operator to the end of the last kernel; launch_and_queue_s: TKLQT; mean_kernel_s: AKD;
    idle_s: of the device, over the latency.
    """

    latency_s: Scalar
    launch_and_queue_s: Scalar
    mean_kernel_s: Scalar
    idle_s: Scalar


def alike(number: Scalar, issue_s: Scalar, launch_s: Scalar, kernel_s: Scalar) -> Lanes:
    """A pass of so many equal kernels, in closed form; broadcasts."""
    latency = issue_s + launch_s + (number - 1) * jnp.maximum(issue_s, kernel_s) + kernel_s
    waited = number * launch_s + jnp.maximum(kernel_s - issue_s, 0.0) * number * (number - 1) / 2
    return Lanes(latency, waited, kernel_s, latency - number * kernel_s)


def lanes(issue_s: Float[Array, " kernels"], launch_s: Scalar, kernel_s: Float[Array, " kernels"]) -> Lanes:
    """A pass of any kernels, each with its own seconds, without a bound on the queue."""
    issue_s, kernel_s = jnp.broadcast_arrays(jnp.asarray(issue_s, float), jnp.asarray(kernel_s, float))
    called = jnp.cumsum(issue_s)
    # Of kernels i..j: done at max(start + busy, ready), with the end of those before as `start`.
    busy, ready = lax.associative_scan(
        lambda a, b: (a[0] + b[0], jnp.maximum(a[1] + b[0], b[1])), (kernel_s, called + launch_s + kernel_s))
    ends = jnp.maximum(busy, ready)
    waited = jnp.sum(ends - kernel_s - called)
    total = jnp.sum(kernel_s)
    return Lanes(ends[-1], waited, total / kernel_s.shape[0], ends[-1] - total)


def segments(numbers: Float[Array, " segments"], issue_s: Float[Array, " segments"], launch_s: Scalar,
             kernel_s: Float[Array, " segments"]) -> Lanes:
    """A pass of segments, so many equal kernels each, in closed form a segment.

    With w = e - h - c, the wait of the segment's first kernel behind those before it, kernel j = 0 .. n - 1 waits
    max(l, w) + j (d - c) where d >= c, and max(l, w - j (c - d)) where the host is behind.
    """
    numbers, issue_s, kernel_s = jnp.broadcast_arrays(*(jnp.asarray(x, float) for x in (numbers, issue_s, kernel_s)))

    def segment(carry, one):
        called, end, waited = carry
        n, c, d = one
        behind = jnp.maximum(end - called - c - launch_s, 0.0)
        grows, shrinks = jnp.maximum(d - c, 0.0), jnp.maximum(c - d, 0.0)
        # Kernels that still find the device busy: the queue of before drains by c - d each.
        busy = jnp.where(shrinks > 0, jnp.ceil(behind / jnp.where(shrinks > 0, shrinks, 1.0)), n)
        busy = jnp.clip(busy, 0.0, n)
        queued = busy * behind - shrinks * busy * (busy - 1) / 2 + grows * n * (n - 1) / 2
        finish = jnp.maximum(end + n * d, called + launch_s + jnp.maximum(c + n * d, n * c + d))
        return (called + n * c, jnp.where(n > 0, finish, end), waited + n * launch_s + queued), None

    zero = jnp.zeros((), kernel_s.dtype)
    (_, end, waited), _ = lax.scan(segment, (zero, zero, zero), (numbers, issue_s, kernel_s))
    total = jnp.sum(numbers * kernel_s)
    return Lanes(end, waited, total / jnp.sum(numbers), end - total)


def captured(issue_s: Scalar, launch_s: Scalar, kernel_s: Float[Array, " kernels"], gap_s: Scalar = 0.0) -> Lanes:
    """A pass captured in a CUDA graph: one call for all of its kernels, which follow each other `gap_s` apart."""
    kernel_s = jnp.asarray(kernel_s, float)
    number, total = kernel_s.shape[0], jnp.sum(kernel_s)
    latency = issue_s + launch_s + total + (number - 1) * gap_s
    return Lanes(latency, launch_s + 0 * total, total / number, latency - total)


def turning_batch(issue_s: Scalar, fixed_s: Scalar, slope_s: Scalar) -> Scalar:
    """Batch from which on kernels of `fixed_s + slope_s batch` take longer than issuing them."""
    return (issue_s - fixed_s) / slope_s
