"""Random numbers with a purpose: every use of a seed has its own stream, so adding one never shifts another.

A stream is the scenario's key folded with a named constant. Draws are made on the CPU with the counter-based
(partitionable) form of threefry, whatever the session's default device and flags, and turned into float64 on
the host. So the same seed gives the same workload on every backend, no x64 flag is needed, and the first n of
N draws are the n draws: asking for more requests never changes the earlier ones.
"""

import contextlib
import enum

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from jaxsim._core.errors import InputError

MIN_DRAWS = 256


class Stream(enum.IntEnum):
    """What a random number is for. The values are part of every published seed: add, never renumber."""

    ARRIVALS = 1
    ARRIVAL_STATES = 2
    LENGTHS = 3
    ROUTING = 4
    TENANTS = 5
    THINNING = 6
    DITHER = 7
    TURNS = 8
    THINKING = 9
    IMAGES = 10
    PREFIX_GROUPS = 11
    PREDICTIONS = 16
    FAILURES = 21
    VARIANTS = 23


def as_key(seed: int | PRNGKeyArray) -> PRNGKeyArray:
    """A key from an integer seed; a key (typed, or the older uint32 pair) passes through."""
    if isinstance(seed, (bool, float, str)) or seed is None:
        raise InputError("seed", seed, "is not an integer or a JAX key", "give an integer such as 0")
    if isinstance(seed, (int, np.integer)):
        if not -(2**63) <= int(seed) < 2**63:
            raise InputError("seed", seed, "does not fit 64 bits", "use a smaller integer")
        # Split in two words here: without the x64 flag JAX would refuse or cut a seed above 32 bits.
        high, low = int(seed) >> 32 & 0xFFFFFFFF, int(seed) & 0xFFFFFFFF
        return jax.random.wrap_key_data(jnp.array([high, low], jnp.uint32), impl="threefry2x32")
    if jnp.issubdtype(jnp.asarray(seed).dtype, jax.dtypes.prng_key):
        return seed
    return jax.random.wrap_key_data(jnp.asarray(seed, jnp.uint32))


def stream_key(seed: int | PRNGKeyArray, stream: Stream) -> PRNGKeyArray:
    """The key of one purpose."""
    return jax.random.fold_in(as_key(seed), int(stream))


@contextlib.contextmanager
def _host_draws():
    with contextlib.ExitStack() as stack:
        # Deprecated flags disappear from JAX one day, with this behaviour as the only one.
        partitionable = getattr(jax, "threefry_partitionable", None)
        if partitionable is not None:
            stack.enter_context(partitionable(True))
        try:
            cpu = jax.local_devices(backend="cpu")[0]
        except RuntimeError:  # the session was started without the CPU backend
            cpu = None
        if cpu is not None:
            stack.enter_context(jax.default_device(cpu))
        yield


def _on_host(key: PRNGKeyArray) -> PRNGKeyArray:
    data, impl = np.asarray(jax.random.key_data(key)), jax.random.key_impl(key)
    return jax.random.wrap_key_data(jnp.asarray(data), impl=impl)


def _padded(count: int) -> int:
    # Powers of two, so that a study over many request counts compiles a draw a handful of times.
    return max(MIN_DRAWS, 1 << (int(count) - 1).bit_length())


def uniforms(key: PRNGKeyArray, count: int, width: int = 1) -> Float[np.ndarray, "count width"]:
    """Independent uniforms strictly inside (0, 1), on a grid of 2^-32 offset by half a step, as float64."""
    with _host_draws():
        bits = jax.random.bits(_on_host(key), (_padded(count), width), dtype=jnp.uint32)
        bits = np.asarray(bits)[:count]
    return (bits.astype(np.float64) + 0.5) * 2.0**-32


def routing_uniforms(seed: int | PRNGKeyArray, count: int) -> Float[np.ndarray, "requests 2"]:
    """Two float32 uniforms in [0, 1) per request, for routers that draw."""
    draws = uniforms(stream_key(seed, Stream.ROUTING), count, 2)
    # Cut to 24 bits: rounding to float32 would turn the largest draws into 1.
    return (np.floor(draws * 2.0**24) * 2.0**-24).astype(np.float32)
