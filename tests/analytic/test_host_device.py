"""Passes of whole models: kernels counted by hand, fusion and lanes in plain Python, the knee, engines' iterations."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsim._core.errors import InputError
from jaxsim.analytic import eager, launches
from jaxsim.analytic import host_device as hd
from jaxsim.cost.base import BatchStats
from jaxsim.cost.roofline import roofline
from jaxsim.spec.device import load_device
from jaxsim.spec.model import load_model
from jaxsim.spec.plan import Plan
from tests.analytic.test_launches import replay

pytestmark = pytest.mark.unoptimised

US = 2.0**-20
BATCHES = 2.0 ** np.arange(8)


def model(name):
    return eager.ENCODERS.get(name) or load_model(name)


def passed(name, attention="eager", batch=4.0, length=512):
    return eager.eager_pass(model(name), batch, length, attention)


# Lists


@pytest.mark.parametrize("name, layers, each, rest, linear, fused", [
    ("bert-base", 12, 20, 9 + 2, 6, 12), ("xlm-roberta-base", 12, 20, 16 + 2, 6, 12), ("gpt2", 12, 27, 4 + 2, 4, 17),
    ("llama-3.2-1b", 16, 47, 15 + 9, 7, 40)])
def test_launches_are_those_of_the_operators(name, layers, each, rest, linear, fused):
    """By hand from the operators of a layer; two products a layer, or one kernel for all of attention."""
    made = passed(name)
    assert len(made.order) == layers * each + rest
    assert made.count(eager.PRODUCT) == 2 * layers and made.count(eager.FUSED) == 0
    pooler = name in eager.ENCODERS
    assert made.count(eager.LINEAR) == linear * layers + pooler and made.count(eager.HEAD) == (not pooler)
    made = passed(name, "fused")
    assert len(made.order) == layers * fused + rest
    assert made.count(eager.PRODUCT) == 0 and made.count(eager.FUSED) == layers


@pytest.mark.parametrize("name", ["bert-base", "gpt2", "llama-3.2-1b"])
def test_products_are_those_of_the_model(name):
    """2 FLOP a parameter and token in linear layers, 4 a pair of tokens and number of a head in attention."""
    made, m, tokens = passed(name), model(name), 4 * 512
    flops = Counter()
    for i in made.order:
        kernel = made.kernels[i]
        if kernel.shape is not None:
            rows, columns, depth = kernel.shape
            flops[kernel.kind] += 2 * float(rows) * columns * depth
    layer = m.layer_parameters()
    linear = m.layers * (layer.attention + layer.dense_ffn - m.ffn_bias * (m.ffn + m.hidden))
    pooled = 2 * 4 * m.hidden**2 * (name in eager.ENCODERS)
    assert flops[eager.LINEAR] == pytest.approx(2 * linear * tokens + pooled)
    assert flops[eager.PRODUCT] == pytest.approx(4 * m.layers * m.heads * m.head_dim * tokens * 512)
    assert flops[eager.HEAD] == 2 * 4 * m.vocab * m.hidden * (name not in eager.ENCODERS)


@pytest.mark.parametrize("name, says", [
    ("mixtral-8x7b", "not counted"), ("deepseek-v3", "not counted"), ("qwen3-8b", "not counted"),
    ("qwen2.5-7b", "not counted"), ("mistral-7b", "not counted")])
def test_models_with_other_layers_are_refused(name, says):
    with pytest.raises(InputError, match=says):
        passed(name)


def test_refusals():
    with pytest.raises(InputError, match="'eager' or 'fused'"):
        passed("gpt2", "flash")
    with pytest.raises(InputError, match="not a number of kernels"):
        hd.chained(passed("gpt2"), 0)
    with pytest.raises(InputError, match="cuda_graph"):
        hd.measures(jnp.ones((3, 1)), 1.0, 1.0, mode="graph")


# Fusion


def chains_by_hand(names, length):
    """Launches left where chains of proximity score 1 are one each, in plain Python."""
    windows = Counter(tuple(names[i:i + length]) for i in range(len(names) - length + 1))
    firsts, left, i = Counter(names), 0, 0
    while i < len(names):
        chain = tuple(names[i:i + length])
        is_sure = len(chain) == length and windows[chain] == firsts[names[i]]
        i, left = i + (length if is_sure else 1), left + 1
    return left


def test_chains_that_always_occur_together():
    rng, shorter = np.random.default_rng(0), 0
    kernels = tuple(eager.Kernel(name, eager.ELEMENTWISE, given=float(i)) for i, name in enumerate("abcdef"))
    for _ in range(60):
        layer = rng.integers(0, 6, rng.integers(2, 9))
        made = eager.Pass(kernels, (*map(int, layer),) * int(rng.integers(1, 6)))
        for length in (1, 2, 3, 5, 9):
            left = hd.chained(made, length)
            assert len(left.order) == chains_by_hand(made.names, length)
            joined = sum(left.kernels[i].kind == eager.CHAIN for i in left.order)
            assert len(left.order) == len(made.order) - joined * (length - 1)
            shorter += len(left.order) < len(made.order)
    assert shorter > 30


def test_chains_of_a_pass_by_hand():
    """a b c a b d: b always follows a, c only half of the time."""
    made = eager.Pass(tuple(eager.Kernel(n, eager.ELEMENTWISE) for n in "abcd"), (0, 1, 2, 0, 1, 3))
    assert hd.chained(made, 2).names == ("a > b", "c > a", "b", "d")
    assert hd.chained(made, 3).names == ("a", "b", "c > a > b", "d")


def test_chains_leave_the_device_as_it_was():
    cost, made = roofline(model("bert-base"), load_device("a100"), dtype="float16"), passed("bert-base")
    before, after = (float(jnp.sum(hd.pass_seconds(cost, p))) for p in (made, hd.chained(made, 8)))
    assert before == pytest.approx(after, rel=1e-5) and len(hd.chained(made, 8).order) < len(made.order)


def test_a_compiler_joins_what_is_between_products():
    """BERT: of a layer's 20 kernels 6 linear ones and 2 products are left, and 6 runs between them; all before the
    first layer is one. What a run hands on to itself is not moved."""
    made = hd.compiled(passed("bert-base"))
    assert len(made.order) == 1 + 12 * (6 + 2 + 6) + 2 and not any(
        {made.kernels[a].kind, made.kernels[b].kind} <= set(eager.FUSIBLE)
        for a, b in zip(made.order, made.order[1:], strict=False))
    run = [eager.Kernel("a", eager.ELEMENTWISE, taken=1.0, given=10.0),
           eager.Kernel("b", eager.ELEMENTWISE, taken=10.0, beside=100.0, given=1000.0, is_kept=True),
           eager.Kernel("c", eager.ELEMENTWISE, taken=1e4, given=1e5, is_fresh=True),
           eager.Kernel("d", eager.ELEMENTWISE, taken=1e5, given=1e6)]
    one, = hd.compiled(eager.Pass(tuple(run), (0, 1, 2, 3))).kernels
    assert (one.taken, one.beside, one.given) == (1.0 + 1e4, 100.0, 1000.0 + 1e6)


# Lanes


def test_lanes_of_a_pass_in_plain_python():
    """Device seconds of a model, rounded to a grid so that sums are exact: kernel by kernel, equal to the last bit."""
    cost, made = roofline(model("gpt2"), load_device("gh200"), dtype="float16"), passed("gpt2", batch=BATCHES)
    seconds = np.asarray(hd.pass_seconds(cost, made))
    grid = np.round(seconds / US) * US
    found = hd.measures(jnp.asarray(grid), 8 * US, 2 * US)
    for i in range(len(BATCHES)):
        latency, waited = replay([8 * US] * len(grid), 2 * US, grid[:, i])
        assert (float(found.latency_s[i]), float(found.launch_and_queue_s[i])) == (latency, waited)
        assert float(found.mean_kernel_s[i]) == pytest.approx(grid[:, i].mean())
        assert float(found.idle_s[i]) == latency - grid[:, i].sum()
    graph = hd.measures(jnp.asarray(grid), 8 * US, 2 * US, mode="cuda_graph")
    assert np.asarray(graph.latency_s).tolist() == (grid.sum(axis=0) + 10 * US).tolist()


def test_the_knee_of_equal_kernels_is_that_of_the_closed_form():
    batches, fixed, slope, issue, launch = 2.0 ** np.arange(10), 1 * US, US / 2, 8 * US, 2 * US
    seconds = jnp.asarray(np.tile(fixed + slope * batches, (200, 1)))
    turn = (issue - fixed) / slope
    assert hd.knee(batches, seconds, issue, launch) == batches[batches > turn][0] == 16
    # Twice the host's seconds, half the device's: as much later.
    assert hd.knee(batches, seconds, 4 * issue, launch) == 64
    assert hd.knee(batches, seconds, np.array([issue, 1000 * issue]), launch).tolist() == [16, np.inf]


@pytest.mark.slow
def test_gradients():
    """Where the host limits, latency grows with its seconds; where the device does, with the bandwidth's inverse."""
    cost = roofline(model("bert-base"), load_device("h100_pcie_80"), dtype="float16")

    def latency(issue_us, speed, batch):
        import equinox as eqx

        faster = eqx.tree_at(lambda c: c.memory_bytes_per_s, cost, cost.memory_bytes_per_s * speed)
        seconds = hd.pass_seconds(faster, passed("bert-base", batch=batch))
        return hd.measures(seconds, 1e-6 * issue_us, 2e-6).latency_s[0]

    of_host, of_device = (jax.grad(latency, (0, 1))(10.0, 1.0, batch) for batch in (1.0, 64.0))
    assert float(of_host[0]) == pytest.approx(251e-6, rel=0.01) and abs(float(of_host[1])) < 1e-4
    assert float(of_device[0]) < 30e-6 and float(of_device[1]) < -1e-3
    up, down = (float(latency(10.0, 1.0 + s, 64.0)) for s in (0.01, -0.01))
    assert float(of_device[1]) == pytest.approx((up - down) / 0.02, rel=0.02)


# Engines


def engine_kernels(cost, stats: BatchStats) -> np.ndarray:
    """Device seconds of what an engine launches in one iteration without graphs, in the order of launches: those of an
    operator are spread evenly over the iteration, as layers are, and take as long each."""
    one = jnp.ones(())
    counts = {work.name: work.calls * work.kernels for work in cost.token_works(one) + cost.sampled_works(one)}
    seconds = {name: float(s) for name, s in cost.operator_seconds(stats, cuda_graphs=False).items()}
    # Floor and contexts of attention are the same kernels.
    seconds["attention"] = sum(seconds.pop(name) for name in tuple(seconds) if name.startswith("attention_")
                               and name != "attention_output")
    counts["attention"] = cost.model.layers
    each = [(seconds[name] / round(n), (np.arange(round(n)) + 0.5) / round(n)) for name, n in counts.items()]
    order = np.argsort(np.concatenate([place for _, place in each]), kind="stable")
    return np.concatenate([np.full(len(place), s) for s, place in each])[order]


@pytest.mark.slow
@pytest.mark.parametrize("name, ranks, batch", [("llama-3.1-8b", 1, 128), ("mixtral-8x22b", 8, 4)])
def test_an_engine_launches_the_kernels_of_its_operators(name, ranks, batch):
    """As many as the eager launch lane counts, and all of the device lane; launched one by one they take little longer
    than the longer lane, also where both are as long."""
    cost = roofline(load_model(name), load_device("h100"), Plan(tensor_parallel_size=ranks), "bfloat16")
    stats = BatchStats.of(batch, batch * 500)
    found, step = engine_kernels(cost, stats), cost.explain(stats, cuda_graphs=False)
    assert len(found) == round(float(cost.num_kernels))
    assert found.sum() == pytest.approx(step.device_s, rel=1e-5)
    issue = float(cost.launch_kernel_s)
    whole = float(launches.lanes(np.full(len(found), issue), 2e-6, found).latency_s)
    limit = max(step.launch_s, step.device_s)
    assert limit <= whole <= 1.02 * limit


@pytest.mark.slow
@pytest.mark.parametrize("plan, cuda_graphs", [
    (Plan(), True), (Plan(), False), (Plan(tensor_parallel_size=2, pipeline_parallel_size=2), False)])
def test_decode_lanes_are_those_that_are_explained(plan, cuda_graphs):
    cost = roofline(load_model("llama-3.1-8b"), load_device("h100"), plan)
    lanes = hd.decode_lanes(cost, (1, 5, 64), 800, cuda_graphs=cuda_graphs, async_scheduling=True)
    for i, n in enumerate(lanes.batches):
        step = cost.explain(BatchStats.of(n, 800 * n), cuda_graphs=cuda_graphs, async_scheduling=True)
        assert (lanes.serial_s[i], lanes.launch_s[i], lanes.device_s[i]) == pytest.approx(
            (step.serial_s, step.launch_s, step.device_s), rel=1e-4)
        assert lanes.seconds[i] == pytest.approx(step.seconds, rel=1e-4)
        assert (n in lanes.host_bound) == (step.bound == "host")
    assert bool(lanes.host_bound) == (not cuda_graphs)
