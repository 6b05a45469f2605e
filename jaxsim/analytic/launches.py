"""Two lanes, a host that issues kernels and a device that runs them in order: who waits for whom (SKIP).

    host        h_j = h_{j-1} + c_j            device    s_j = max(h_j + l, e_{j-1}),  e_j = s_j + d_j
    TKLQT       sum of s_j - h_j               launching and queueing: flat while the host is behind, then rising
    n alike     latency  c + l + (n - 1) max(c, d) + d         TKLQT  n l + max(0, d - c) n (n - 1) / 2

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


def captured(issue_s: Scalar, launch_s: Scalar, kernel_s: Float[Array, " kernels"], gap_s: Scalar = 0.0) -> Lanes:
    """A pass captured in a CUDA graph: one call for all of its kernels, which follow each other `gap_s` apart."""
    kernel_s = jnp.asarray(kernel_s, float)
    number, total = kernel_s.shape[0], jnp.sum(kernel_s)
    latency = issue_s + launch_s + total + (number - 1) * gap_s
    return Lanes(latency, launch_s + 0 * total, total / number, latency - total)
