"""Weights from host memory: MoE-Lens' own numbers, its closed form worked out by hand, limits and gradients."""

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
    return Streaming(**MIXTRAL | dict(kv_bytes=kv_gb * GB) | numbers)


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


def test_what_the_processor_needs():
    """All KV once a pass: twice the model in KV is twice the link's rate, beside the weights."""
    s = mixtral(188)
    assert s.kv_bytes_per_s() == pytest.approx(2 * 19.5 * GB)
    assert s.cpu_bytes_per_s() == pytest.approx(3 * 19.5 * GB)
    assert 1e11 < s.cpu_flops(4) < 1e12


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
