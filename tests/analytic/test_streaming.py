"""Weights from host memory: MoE-Lens' own numbers, its closed form worked out by hand, limits and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsim.analytic import streaming
from jaxsim.analytic.streaming import Streaming

pytestmark = pytest.mark.unoptimised

GB = 1e9
MIXTRAL = dict(weight_bytes=94 * GB, link_bytes_per_s=19.5 * GB, gpu_tokens_per_s=18_236 / (94 / 19.5),
               token_bytes=131_072.0)
"""Mixtral-8x7B on an A40 behind 19.5 GB/s, which is saturated by 18,236 tokens a pass (MoE-Lens)."""


def mixtral(kv_gb: float, **numbers) -> Streaming:
    return Streaming(**MIXTRAL | {"kv_bytes": kv_gb * GB} | numbers)


@pytest.mark.parametrize(("prompt", "output", "kv_gb", "pme", "linked", "total", "outputs", "used"), [
    (98, 32, 70, 0.0356, 3948, 3783, 931, 1.00), (98, 64, 70, 0.0195, 2157, 2157, 852, 0.57),
    (98, 128, 70, 0.0109, 1207, 1207, 684, 0.32), (98, 256, 70, 0.0061, 678, 678, 490, 0.18),
    (98, 128, 210, 0.0109, 3622, 3622, 2052, 0.96), (98, 256, 210, 0.0061, 2034, 2034, 1471, 0.54),
    (926, 128, 70, 0.0083, 921, 921, 112, 0.24), (926, 128, 210, 0.0083, 2764, 2764, 336, 0.73)])
def test_reference_values(prompt, output, kv_gb, pme, linked, total, outputs, used):
    """Within the digits they are given with, and within 1 %."""
    s = mixtral(kv_gb)
    assert streaming.parallelism_memory_efficiency(prompt, output) == pytest.approx(pme, abs=5e-5)
    for ours, theirs, digit in ((s.link_tokens_per_s(prompt, output), linked, 0.5),
                                (s.throughput(prompt, output), total, 0.5),
                                (s.output_throughput(prompt, output), outputs, 0.5),
                                (s.gpu_utilisation(prompt, output), used, 0.005)):
        assert float(ours) == pytest.approx(theirs, abs=max(digit, 0.002 * theirs))
        assert float(ours) == pytest.approx(theirs, rel=0.01) or theirs < 1


@pytest.mark.parametrize(("tflops", "tokens", "kv_256", "kv_512"), [
    (150, 19_200, 614, 1228), (181, 23_200, 741, 1482), (312, 40_000, 1277, 2554)])
def test_tokens_that_saturate(tflops, tokens, kv_256, kv_512):
    """Table 2 of the paper (A40, L40, A100), whose entries follow from 31.25 GB/s and 125 KB a token."""
    ours = streaming.saturating_tokens(tflops * 1e12, 31.25e9, 8, 2)
    # 39,936 is printed as 40.0 thousand, though the room beside it is of 39.9.
    assert ours == pytest.approx(tokens, abs=70)
    for length, gb in ((256, kv_256), (512, kv_512)):
        # Those of 512 tokens are printed as twice the rounded ones of 256.
        assert ours * length * 125e3 / GB == pytest.approx(gb, abs=length / 256)


def test_serial_baseline():
    """Shares of the room that MoE-Lightning's plans use are published; the throughputs follow."""
    for (prompt, output), used, outputs in (((98, 32), 0.52, 326), ((98, 64), 0.562, 333), ((926, 128), 0.35, 34)):
        ours = mixtral(70).serial_output_throughput(prompt, output, used)
        assert float(ours) == pytest.approx(outputs, abs=0.5)


def test_room_of_sequences_of_all_ages():
    assert streaming.room_gain(98, 256) == pytest.approx(1.57, abs=0.005)
    # A sequence holds its prompt and one output when it first decodes, and one more each pass; half of one is left out.
    for prompt, output, page in ((98, 32, 1), (100, 64, 16), (7, 8, 4)):
        each = np.ceil((prompt + np.arange(output) + 1) / page)
        assert streaming.held_pages(prompt, output, page) == pytest.approx(each.mean(), abs=0.5 / page + 1e-9)


def test_many_sequences_reach_the_bound():
    s = mixtral(70)
    few, many, endless = (float(s.finite_throughput(k, 98, 128)) for k in (1e3, 1e5, 1e9))
    assert few < many < endless
    assert endless == pytest.approx(float(s.throughput(98, 128)), rel=1e-3)
    assert float(s.finite_throughput(1e9, 98, 128, page=16)) < endless


def test_intensity():
    """A dense model of one expert reads what it computes with: one FLOP pair a weight and token."""
    assert streaming.intensity(7.0, 1, 1, 4, 3.5) == pytest.approx(7.0)
    assert streaming.intensity(100.0, 8, 2, 4, 3.5) == pytest.approx(25, rel=0.06)
    assert streaming.intensity(100.0, 8, 2, 4, 3.5, weight_bytes=0.5) == pytest.approx(100, rel=0.06)


def test_which_resource_next():
    """Room or link while the link limits, compute once that does; one percent each."""
    def elasticity(kv_gb, output):
        s = jax.tree.map(jnp.float32, mixtral(kv_gb))
        value, gradient = jax.value_and_grad(lambda x: x.throughput(98.0, output))(s)
        return {name: float(getattr(gradient, name) * getattr(s, name) / value) for name in MIXTRAL | {"kv_bytes": 0}}

    linked, computed = elasticity(70.0, 128.0), elasticity(70.0, 32.0)
    assert linked["kv_bytes"] == pytest.approx(1) and linked["link_bytes_per_s"] == pytest.approx(1)
    assert linked["weight_bytes"] == pytest.approx(-1) and linked["gpu_tokens_per_s"] == 0
    assert computed["gpu_tokens_per_s"] == pytest.approx(1) and computed["kv_bytes"] == 0


# ---- one memory, greedy admission


def shared(kv_gb: float, **numbers) -> Streaming:
    return mixtral(kv_gb, memory_bytes_per_s=150 * GB, threads=40.0, **numbers)


def test_reads_stretch_a_pass():
    """While 40 threads read, the link has 150/41 GB/s: 210 GB of KV take 1.435 s, of which it loses 81 %."""
    assert float(shared(210).full_pass_s) == pytest.approx(94 / 19.5 + 210 / (150 - 150 / 41) * (1 - 150 / 41 / 19.5))
    assert float(mixtral(210).full_pass_s) == pytest.approx(94 / 19.5)
    # A link slower than the share of one of 41 loses nothing.
    assert float(shared(210, link_bytes_per_s=3 * GB).lost_s) == 0


def test_the_shared_bound_without_sharing_is_the_bound():
    for kv_gb, prompt, output in ((70.0, 98.0, 32.0), (70.0, 98.0, 128.0), (210.0, 926.0, 128.0)):
        plain = mixtral(kv_gb)
        assert float(plain.shared_throughput(prompt, output)) == pytest.approx(
            float(plain.throughput(prompt, output)), rel=1e-6)
        assert shared(kv_gb).shared_throughput(prompt, output, 16) < plain.throughput(prompt, output)


def greedily(sequences: int, prompt: int, output: int, room: int, cap: int) -> int:
    """Iterations of an engine that admits whatever fits, cohort by cohort.

    A cohort is sequences of one admission: [count, outputs so far]. The last admitted give way when room is short and
    come back first, with their outputs to compute again.
    """
    running, waiting = [], [[sequences, 0]]
    iterations = 0
    while running or waiting:
        # Everyone gets a token; those that make room short leave, the youngest first.
        def held(running=running):
            return sum(n * (prompt + done + 1) for n, done in running)

        while held() > room:
            n, done = running[-1]
            gone = min(n, -(-(held() - room) // (prompt + done + 1)))
            running[-1][0] -= gone
            waiting.insert(0, [gone, done])
            if not running[-1][0]:
                running.pop()
        tokens, used = cap - sum(n for n, _ in running), held()
        while waiting and tokens > 0:
            n, done = waiting[0]
            size = prompt + done
            fits = min(n, tokens // size, (room - used) // (size + 1))
            if fits <= 0:
                break
            running.append([fits, done])
            tokens, used = tokens - fits * size, used + fits * (size + 1)
            waiting[0][0] -= fits
            if not waiting[0][0]:
                waiting.pop(0)
        for cohort in running:
            cohort[1] += 1
        running = [cohort for cohort in running if cohort[1] < output]
        iterations += 1
    return iterations


def test_greedy_iterations_against_cohorts():
    """Within 6 % on average. Worst where room holds nearly all 5,000 at once, so that few are left when the first end
    (docs/reproduce/moe-lens.md has the number)."""
    points = ((70, 98, 32), (70, 98, 64), (70, 98, 128), (210, 98, 128), (210, 926, 128), (70, 926, 128))
    errors = {}
    for kv_gb, prompt, output in points:
        s = shared(kv_gb)
        iterations = greedily(5000, prompt, output, int(s.room_tokens), int(s.token_cap))
        errors[kv_gb, prompt, output] = abs(float(s.greedy_iterations(5000.0, prompt, output)) / iterations - 1)
    assert np.mean(list(errors.values())) < 0.06 and max(errors, key=errors.get) == (70, 98, 64), errors


def test_greedy_throughput_is_of_iterations_and_reads():
    """Each context token of each decode is read once: p + 1 ... p + g of every sequence."""
    s = shared(70.0)
    read = 5000 * sum(98 + j for j in range(1, 65))
    seconds = float(s.greedy_iterations(5000.0, 98.0, 64.0)) * float(s.pass_s) + float(s.lost_s) * read
    assert float(s.greedy_throughput(5000.0, 98.0, 64.0)) == pytest.approx(5000 * 162 / seconds, rel=1e-5)
    # The GPU limits where all fits, and the link has time.
    fast = mixtral(1e6, link_bytes_per_s=1e15, gpu_tokens_per_s=1e4 / (94e9 / 1e15))
    capped = float(fast.greedy_iterations(5000.0, 98.0, 64.0))
    assert capped > 5000 * 162 / 1e4


@pytest.mark.parametrize("kv_gb, prompt, output, sequences", [
    (70.0, 98.0, 128.0, None), (300.0, 98.0, 128.0, None), (70.0, 926.0, 128.0, 5000.0), (210.0, 98.0, 256.0, 5000.0)])
def test_which_resource_next_against_differences(kv_gb, prompt, output, sequences):
    found = streaming.which_resource_next(shared(kv_gb), prompt, output, sequences, page=16)
    assert list(found) == list(streaming.RESOURCES)
    for name, slope in found.items():
        base = getattr(shared(kv_gb), name)
        up, down = (throughput_of(shared(kv_gb), name, base * (1 + x), prompt, output, sequences)
                    for x in (0.01, -0.01))
        assert slope == pytest.approx(np.log(up / down) / np.log(1.01 / 0.99), abs=0.01)
    assert sum(found.values()) > 0.9
    endless = streaming.which_resource_next(mixtral(kv_gb), prompt, output, sequences, page=16)
    assert endless["memory_bytes_per_s"] == 0


def throughput_of(s: Streaming, name: str, value: float, prompt, output, sequences) -> float:
    changed = dataclasses.replace(s, **{name: value})
    if sequences is None:
        return float(changed.shared_throughput(prompt, output, 16))
    return float(changed.greedy_throughput(sequences, prompt, output, 16))


@pytest.mark.parametrize("numbers", [{}, {"memory_bytes_per_s": 200 * GB, "threads": 24.0}, {"gpu_tokens_per_s": 100.0},
                                     {"kv_bytes": 1e-9}, {"gpu_tokens_per_s": "just saturated"}])
def test_no_slope_is_lost_at_an_edge(numbers):
    """A memory without end, a saturated GPU, next to no room, both limits at once: every number has a finite one."""
    if "just saturated" in numbers.values():
        numbers = {"gpu_tokens_per_s": mixtral(70.0).link_tokens_per_s(98.0, 128.0)}
    s = jax.tree.map(jnp.float32, mixtral(70.0, **{"memory_bytes_per_s": np.inf, "threads": 1.0} | numbers))
    for of in (lambda s: s.throughput(98.0, 128.0), lambda s: s.shared_throughput(98.0, 128.0),
               lambda s: s.greedy_throughput(1000.0, 98.0, 128.0)):
        assert all(np.isfinite(slope) for slope in jax.tree.leaves(jax.grad(of)(s)))
