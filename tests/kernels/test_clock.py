"""The clock against Python integers: one tick is 2^-30 s, so every answer is exact or wrong."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsim.kernels import clock
from jaxsim.kernels.clock import Time

BATCH = 256
TICKS_PER_SECOND = 1 << 30
SEEDS = settings(max_examples=25, deadline=None, derandomize=True)


def durations(rng: np.random.Generator, count: int = BATCH) -> np.ndarray:
    """Multiples of the grid that float32 holds: a mantissa of 24 bits at a random scale, up to 2^14 s."""
    mantissa = rng.integers(0, 1 << 24, count).astype(np.int64)
    scale = rng.integers(-20, 21, count)
    ticks = np.where(scale >= 0, mantissa << np.maximum(scale, 0), mantissa >> np.maximum(-scale, 0))
    # A mantissa moved right keeps fewer bits, one moved left the same: both fit.
    return np.ldexp(ticks.astype(np.float64), -30).astype(np.float32)


def ticks_of(seconds) -> list[int]:
    """Exact ticks of float numbers, as Python integers."""
    ticks = np.asarray(seconds, np.float64) * TICKS_PER_SECOND
    assert np.array_equal(ticks, np.round(ticks)), "off the grid"
    return [int(x) for x in np.ravel(ticks)]


def time_ticks(time: Time) -> np.ndarray:
    hi, lo = np.asarray(time.hi, np.float64), np.asarray(time.lo, np.float64)
    return np.array(ticks_of(hi)) + np.array(ticks_of(lo))


def random_times(rng: np.random.Generator, below_s: float = 2 * clock.EPOCH_S) -> tuple[np.ndarray, Time]:
    """Ticks, and the canonical pairs that stand for them; some of them equal, some neighbours."""
    ticks = rng.integers(0, int(below_s * TICKS_PER_SECOND), BATCH)
    ticks[: BATCH // 4] >>= rng.integers(0, 40, BATCH // 4)
    seconds = ticks / TICKS_PER_SECOND
    hi = seconds.astype(np.float32)
    return ticks, Time(jnp.asarray(hi), jnp.asarray((seconds - hi.astype(np.float64)).astype(np.float32)))


def scaled(numbers, bits: int) -> list[int]:
    """Floats in units of 2^-bits, as Python integers: sums and products of these are exact."""
    return [int(Fraction(x) * (1 << bits)) for x in np.ravel(np.asarray(numbers, np.float64)).tolist()]


def is_canonical(time: Time) -> bool:
    hi, lo = np.asarray(time.hi, np.float64), np.asarray(time.lo, np.float64)
    return np.array_equal((hi + lo).astype(np.float32), np.asarray(time.hi))


add, shift, elapsed, on_grid, select, multiply, two_product = (jax.jit(f) for f in (
    clock.add, clock.shift, clock.elapsed, clock.on_grid, clock.select, clock.multiply, clock.two_product))
round_to_arrivals = jax.jit(clock.round_to_arrival_grid)
to_integers = jax.jit(jax.vmap(clock.to_integers))


@SEEDS
@given(st.integers(0, 2**32))
def test_add_is_exact(seed):
    rng = np.random.default_rng(seed)
    ticks, time = random_times(rng, 1.75 * clock.EPOCH_S)
    duration = durations(rng)
    total = add(time, jnp.asarray(duration))
    assert np.array_equal(time_ticks(total), ticks + np.array(ticks_of(duration)))
    assert is_canonical(total)


@SEEDS
@given(st.integers(0, 2**32))
def test_add_of_a_pair_is_exact(seed):
    rng = np.random.default_rng(seed)
    ticks, time = random_times(rng, clock.EPOCH_S)
    more_ticks, more = random_times(rng, 0.75 * clock.EPOCH_S)
    total = add(time, more)
    assert np.array_equal(time_ticks(total), ticks + more_ticks)
    assert is_canonical(total)


@SEEDS
@given(st.integers(0, 2**32))
def test_select_takes_both_parts(seed):
    rng = np.random.default_rng(seed)
    (a_ticks, a), (b_ticks, b), is_a = random_times(rng), random_times(rng), rng.random(BATCH) < 0.5
    assert np.array_equal(time_ticks(select(is_a, a, b)), np.where(is_a, a_ticks, b_ticks))


@SEEDS
@given(st.integers(0, 2**32))
def test_two_sum_is_exact(seed):
    rng = np.random.default_rng(seed)
    a = np.ldexp(rng.integers(-(1 << 24), 1 << 24, BATCH), rng.integers(-40, 10, BATCH)).astype(np.float32)
    b = np.ldexp(rng.integers(-(1 << 24), 1 << 24, BATCH), rng.integers(-40, 10, BATCH)).astype(np.float32)
    total = jax.jit(clock.two_sum)(a, b)
    # Numbers of 24 bits at most 50 binary places apart: their sum may need more than 53, so add as integers.
    scale = 1 << 40
    exact = [int(x * scale) + int(y * scale) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    got = [int(x * scale) + int(y * scale)
           for x, y in zip(np.asarray(total.hi).tolist(), np.asarray(total.lo).tolist(), strict=True)]
    assert got == exact
    assert np.array_equal(np.asarray(total.hi), a + b)


@SEEDS
@given(st.integers(0, 2**32))
def test_two_product_is_exact(seed):
    """While the last bit of the product, at worst 2^-106 here, is a normal number. Compiled, where a product may be
    fused into a sum, and one operation at a time, where each is rounded."""
    rng = np.random.default_rng(seed)
    a, b = (np.ldexp(rng.integers(-(1 << 24) + 1, 1 << 24, BATCH), rng.integers(-53, -3, BATCH)).astype(np.float32)
            for _ in range(2))
    a[: BATCH // 4] = np.round(a[: BATCH // 4] * 2.0**20)  # counts, zero among them
    b[BATCH // 8: BATCH // 2] = np.float32(1 - 2.0**-24)  # all bits of a mantissa
    exact = [x * y for x, y in zip(scaled(a, 53), scaled(b, 53), strict=True)]
    for function in (two_product, clock.two_product):
        product = function(jnp.asarray(a), jnp.asarray(b), jnp.int32(0))
        got = [x + y for x, y in zip(scaled(product.hi, 106), scaled(product.lo, 106), strict=True)]
        assert got == exact
        assert np.array_equal(np.asarray(product.hi), a * b)


@SEEDS
@given(st.integers(0, 2**32))
def test_multiply_rounds_to_the_nearest_tick(seed):
    """Half a tick from the exact product, and the one rounding (2^-24) of that half; no error where both are ticks."""
    rng = np.random.default_rng(seed)
    count = rng.integers(0, 1 << 12, BATCH).astype(np.int32)
    count[:4] = [0, 1, 4094, 4095]
    duration = np.exp2(rng.uniform(-40, 4, BATCH)).astype(np.float32)
    is_whole = rng.random(BATCH) < 0.5
    duration = np.where(is_whole, np.asarray(on_grid(jnp.asarray(duration))), duration)
    count, duration = jnp.asarray(count), jnp.asarray(duration)
    exact = [n * x for n, x in zip(count.tolist(), scaled(duration, 80), strict=True)]  # in 2^-50 ticks
    for function in (multiply, clock.multiply):
        for ticks, want, is_exact in zip(time_ticks(function(count, duration)).tolist(), exact, is_whole, strict=True):
            assert abs((ticks << 50) - want) <= (0 if is_exact else (1 << 49) + (1 << 25))
    slope = jax.vmap(jax.grad(lambda x, n: sum(clock.multiply(n, x))))(duration, count)
    assert np.array_equal(slope, count)


@SEEDS
@given(st.integers(0, 2**32))
def test_shift_by_any_amount_is_exact(seed):
    """Both ways, on the grid; the result may be negative."""
    rng = np.random.default_rng(seed)
    ticks, time = random_times(rng, 1.75 * clock.EPOCH_S)
    amount = durations(rng) * rng.choice([-1, 1], BATCH).astype(np.float32)
    moved = shift(time, jnp.asarray(amount))
    assert np.array_equal(time_ticks(moved), ticks + np.array(ticks_of(amount)))
    assert is_canonical(moved)


@SEEDS
@given(st.integers(0, 2**32))
def test_integers_are_whole_times(seed):
    """Signed sums of times, part by part in 32 bits, are those of their ticks (below 2^22 s, what float64 holds)."""
    rng = np.random.default_rng(seed)
    ticks, time = random_times(rng)
    epoch = rng.integers(0, 7, BATCH).astype(np.int32)
    parts = np.asarray(to_integers(jnp.asarray(epoch), time))
    whole, share = np.divmod(np.asarray(time.hi, np.float64), 1.0)
    assert parts.dtype == np.int32
    assert np.array_equal(parts[:, :2], np.stack([whole + epoch * clock.EPOCH_S, np.floor(share * 2**15)], axis=1))
    ticks = ticks + epoch.astype(np.int64) * (int(clock.EPOCH_S) * TICKS_PER_SECOND)
    assert np.array_equal(parts.astype(np.int64) @ (1 << np.array([30, 15, 0])), ticks)
    assert np.array_equal(clock.from_integers_reference(parts), ticks / TICKS_PER_SECOND)
    sign = rng.choice([-1, 1], (BATCH // 8, 8))
    sums = np.sum(parts.reshape(-1, 8, 3) * sign[..., None].astype(np.int32), axis=1, dtype=np.int32)
    assert scaled(clock.from_integers_reference(sums), 30) == np.sum(ticks.reshape(-1, 8) * sign, axis=1).tolist()


@SEEDS
@given(st.integers(0, 2**32))
def test_shift_by_epochs_is_exact_and_keeps_never(seed):
    rng = np.random.default_rng(seed)
    ticks, time = random_times(rng)
    is_never = rng.random(BATCH) < 0.2
    time = clock.select(jnp.asarray(is_never), clock.never((BATCH,)), time)
    back = np.floor(ticks / TICKS_PER_SECOND / clock.EPOCH_S) * clock.EPOCH_S
    moved = shift(time, jnp.asarray(-back, jnp.float32))
    assert np.array_equal(np.isinf(np.asarray(moved.hi)), is_never)
    kept = Time(*(np.where(is_never, 0.0, x) for x in moved))
    want = np.where(is_never, 0, ticks - (back * TICKS_PER_SECOND).astype(np.int64))
    assert np.array_equal(time_ticks(kept), want)
    assert is_canonical(kept)


@SEEDS
@given(st.integers(0, 2**32))
def test_order_is_that_of_ticks(seed):
    rng = np.random.default_rng(seed)
    a_ticks, a = random_times(rng)
    b_ticks, b = random_times(rng)
    # Neighbours and equals, which random pairs never are.
    near = a_ticks + rng.integers(-2, 3, BATCH)
    is_near = (rng.random(BATCH) < 0.5) & (near >= 0)
    b_ticks = np.where(is_near, near, b_ticks)
    seconds = b_ticks / TICKS_PER_SECOND
    hi = seconds.astype(np.float32)
    b = Time(jnp.asarray(hi), jnp.asarray((seconds - hi.astype(np.float64)).astype(np.float32)))
    assert np.array_equal(np.asarray(a < b), a_ticks < b_ticks)
    assert np.array_equal(np.asarray(a <= b), a_ticks <= b_ticks)
    assert np.array_equal(np.asarray(a.equals(b)), a_ticks == b_ticks)
    assert np.all(np.asarray(a < clock.never((BATCH,))))
    assert not np.any(np.asarray(clock.never((BATCH,)) <= a))


@SEEDS
@given(st.integers(0, 2**32))
def test_elapsed_is_right_to_a_rounding(seed):
    rng = np.random.default_rng(seed)
    first, a = random_times(rng)
    second, b = random_times(rng)
    exact = (second - first) / TICKS_PER_SECOND
    got = np.asarray(elapsed(a, b), np.float64)
    assert np.all(np.abs(got - exact) <= 2.0**-23 * np.abs(exact))
    # Differences that float32 holds come out exactly: that is what makes answers independent of the epoch.
    near = first + rng.integers(0, 1 << 24, BATCH)
    seconds = near / TICKS_PER_SECOND
    hi = seconds.astype(np.float32)
    c = Time(jnp.asarray(hi), jnp.asarray((seconds - hi.astype(np.float64)).astype(np.float32)))
    assert np.array_equal(np.asarray(elapsed(a, c), np.float64), (near - first) / TICKS_PER_SECOND)


@SEEDS
@given(st.integers(0, 2**32))
def test_on_grid_rounds_half_to_even(seed):
    rng = np.random.default_rng(seed)
    x = np.exp(rng.uniform(np.log(2.0**-36), np.log(2.0**14), BATCH)).astype(np.float32)
    # Halves of the grid, which random numbers never are.
    x[: BATCH // 4] = (rng.integers(0, 1 << 20, BATCH // 4) + 0.5) * 2.0**-30
    x[0] = 0.0
    x *= rng.choice([-1, 1], BATCH).astype(np.float32)  # what a rounding left may be negative
    want = np.round(x.astype(np.float64) * TICKS_PER_SECOND) / TICKS_PER_SECOND
    got = np.asarray(on_grid(jnp.asarray(x)), np.float64)
    assert np.array_equal(got, want)
    slopes = jax.vmap(jax.grad(clock.on_grid))(jnp.asarray(x))
    assert np.array_equal(np.asarray(slopes), np.ones(BATCH))


@SEEDS
@given(st.integers(0, 2**32))
def test_host_split_and_join_round_trip(seed):
    rng = np.random.default_rng(seed)
    ticks = rng.integers(0, 1 << 52, BATCH)
    ticks[:4] = [0, 1, (1 << 46) - 1, 1 << 46]  # around an epoch
    seconds = ticks / TICKS_PER_SECOND
    epoch, hi, lo = clock.split_reference(seconds)
    assert hi.dtype == lo.dtype == np.float32 and epoch.dtype == np.int32
    assert np.array_equal(clock.join_reference(epoch, hi, lo), seconds)
    assert np.all((hi >= 0) & (hi <= clock.EPOCH_S))


@SEEDS
@given(st.integers(0, 2**32))
def test_arrivals_are_rounded_half_to_even(seed):
    rng = np.random.default_rng(seed)
    ticks = rng.integers(0, 1 << 40, BATCH)
    halves = (ticks + 0.5) * clock.ARRIVAL_GRID_S
    want = np.where(ticks % 2 == 0, ticks, ticks + 1) * clock.ARRIVAL_GRID_S
    assert np.array_equal(clock.round_arrivals_reference(halves), want)
    assert np.array_equal(clock.round_arrivals_reference(ticks * clock.ARRIVAL_GRID_S),
                          ticks * clock.ARRIVAL_GRID_S)


@SEEDS
@given(st.integers(0, 2**32))
def test_times_round_to_arrivals_as_the_host_does(seed):
    """Half to even too, which canonical pairs decide rightly part by part; the derivative is that of the time."""
    rng = np.random.default_rng(seed)
    ticks, _ = random_times(rng)
    # Halves of the grid at every scale, and what is a tick beside them.
    ticks[::2] = ((ticks[::2] >> 10) << 10) + 512 + rng.integers(-1, 2, BATCH // 2) * (rng.random(BATCH // 2) < 0.5)
    seconds = ticks / TICKS_PER_SECOND
    hi = seconds.astype(np.float32)
    lo = (seconds - hi.astype(np.float64)).astype(np.float32)
    rounded = round_to_arrivals(Time(hi, lo))
    assert np.array_equal(time_ticks(rounded) / TICKS_PER_SECOND, clock.round_arrivals_reference(seconds))
    assert is_canonical(rounded)
    slope = jax.vmap(jax.grad(lambda hi, lo: sum(clock.round_to_arrival_grid(Time(hi, lo)))))(hi, lo)
    assert np.array_equal(np.asarray(slope), np.ones(BATCH))


@pytest.fixture(scope="module")
def long_sum():
    """100,000 additions a lane, the epoch moved whenever the offset leaves it."""
    def body(carry, duration):
        epoch, time = carry
        time = clock.add(time, duration)
        turns = jnp.floor(time.hi / clock.EPOCH_S)
        return (epoch + turns.astype(jnp.int32), clock.shift(time, -turns * clock.EPOCH_S)), None

    @jax.jit
    def run(steps):
        start = jnp.zeros(steps.shape[1], jnp.float32)
        (epoch, time), _ = jax.lax.scan(body, (start.astype(jnp.int32), Time(start, start)), steps)
        return epoch, time

    return run


@pytest.mark.parametrize("largest_s", [0.05, 20.0])
def test_long_sums_do_not_drift(long_sum, largest_s):
    rng = np.random.default_rng(7)
    steps = np.asarray(on_grid(jnp.asarray(rng.uniform(0, largest_s, (100_000, 8)), jnp.float32)))
    epoch, time = long_sum(jnp.asarray(steps))
    ticks = np.round(steps.astype(np.float64) * TICKS_PER_SECOND).astype(np.int64).sum(axis=0)
    got = np.asarray(epoch, np.int64) * int(clock.EPOCH_S) * TICKS_PER_SECOND + time_ticks(time)
    assert np.array_equal(got, ticks)
    # The same sum in float32 is off by far more than a tick, so the test can tell.
    naive = np.cumsum(steps, axis=0, dtype=np.float32)[-1]
    assert np.all(np.abs(naive - ticks / TICKS_PER_SECOND) > 1e-3)
