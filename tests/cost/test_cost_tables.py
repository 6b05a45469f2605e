"""The tables the loop reads: against direct evaluation, between knots, and as decode runs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsim.cost.base import BatchStats
from jaxsim.cost.rank import pad_to_graph
from jaxsim.cost.roofline import roofline
from jaxsim.cost.tabulated import SAMPLED, TOKENS
from jaxsim.kernels import octaves
from jaxsim.spec.device import load_device
from jaxsim.spec.model import load_model
from jaxsim.spec.plan import Plan

pytestmark = pytest.mark.unoptimised

MAX_TOKENS, MAX_SEQUENCES = 2048, 256
MODELS = {"llama-3.1-8b": 1, "llama-3.1-70b": 4, "mixtral-8x7b": 2, "qwen3-30b-a3b": 1, "deepseek-v3": 8,
          "gpt-oss-20b": 1, "mistral-7b": 1}


@pytest.fixture(scope="module")
def costs():
    made = {}
    for name, ranks in MODELS.items():
        cost = roofline(load_model(name), load_device("h200"), Plan(tensor_parallel_size=ranks))
        made[name] = cost, TABULATE(cost, {})
    return made


ITERATION = jax.jit(lambda table, stats: table.iteration(stats))
DECODE = jax.jit(lambda table, batch, context: table.decode(batch, context))
TABULATE = eqx.filter_jit(lambda cost, options: cost.tabulate(MAX_TOKENS, MAX_SEQUENCES, **options))


@pytest.mark.parametrize("name", MODELS)
def test_tables_equal_direct_evaluation_at_the_knots(costs, name):
    cost, table = costs[name]
    knots = octaves.knots(TOKENS, MAX_TOKENS)
    for tokens in (int(knots[5]), int(knots[40]), int(knots[60]), int(knots[200]), MAX_TOKENS):
        stats = BatchStats.of(0, 0, 1, tokens, tokens + 500, float((tokens + 500) ** 2 - 500 ** 2))
        assert float(ITERATION(table, stats)) == pytest.approx(cost.explain(stats).seconds, rel=1e-5)
    for batch in (1, 3, 17, 100, 256):
        stats = BatchStats.of(batch, batch * 777)
        assert float(ITERATION(table, stats)) == pytest.approx(cost.explain(stats).seconds, rel=1e-5)
    mixed = BatchStats.of(16, 16 * 300, 1, 112, 400, 400.0 ** 2 - 288 ** 2, num_sampled=16)
    assert float(ITERATION(table, mixed)) == pytest.approx(cost.explain(mixed).seconds, rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_interpolation_between_the_knots(costs, name):
    """Knots lie a 64th of the count apart. Products step where a wave of tiles more begins: there a table is off by as
    half of that step, over 1/64 of the count. (Without tiles the curve was smooth, and all counts within 2 %.)"""
    cost, table = costs[name]
    counts = np.arange(1, MAX_TOKENS + 1)
    exact = np.asarray(cost.token_seconds(jnp.asarray(pad_to_graph(counts), jnp.float32)))
    read = np.asarray(jax.vmap(lambda c: octaves.look_up(TOKENS, table.by_tokens, c))(jnp.asarray(counts)))
    error = np.abs(read / exact - 1)
    assert np.quantile(error, 0.95) < 0.03 and error.mean() < 0.005 and error.max() < 0.12
    assert error[:128].max() < 1e-5
    counts = np.arange(1, MAX_SEQUENCES + 1)
    exact = np.asarray(cost.sampled_seconds(jnp.asarray(counts, jnp.float32)))
    read = np.asarray(jax.vmap(lambda c: octaves.look_up(SAMPLED, table.by_sampled, c))(jnp.asarray(counts)))
    error = np.abs(read / exact - 1)
    assert error[:32].max() < 1e-5 and np.quantile(error, 0.95) < 0.03 and error.max() < 0.12


def test_sizes(costs):
    _, table = costs["llama-3.1-8b"]
    assert table.by_tokens.shape == (len(octaves.knots(TOKENS, MAX_TOKENS)),)
    assert table.by_sampled.shape == (len(octaves.knots(SAMPLED, MAX_SEQUENCES)),)
    assert table.by_sequences.shape == (MAX_SEQUENCES + 1, 8)
    assert table.attention.shape == (2, 15) and int(table.window) == 0
    # A lane carries its tables.
    assert sum(x.nbytes for x in jax.tree.leaves(table)) < 12_000
    # A window of 128 tokens, and the tile of keys it begins in.
    assert int(costs["gpt-oss-20b"][1].window) == 256
    assert all(np.all(np.isfinite(np.asarray(x))) for _, t in costs.values() for x in jax.tree.leaves(t))


@pytest.mark.parametrize("name, options", [
    ("llama-3.1-8b", {}), ("gpt-oss-20b", {}), ("deepseek-v3", {}), ("mistral-7b", {}),
    ("llama-3.1-8b", dict(cuda_graphs=False)), ("llama-3.1-8b", dict(async_scheduling=True)),
])
@pytest.mark.parametrize("batch, mean_context", [(1, 5), (7, 100), (64, 126), (200, 4000)])
def test_decode_pace_is_iteration_by_iteration(costs, name, options, batch, mean_context):
    table = TABULATE(costs[name][0], options)
    context = batch * mean_context + batch // 2
    pace = DECODE(table, jnp.int32(batch), jnp.int32(context))
    horizon = int(pace.horizon)
    assert horizon >= 1
    for j in sorted({j for j in (0, 1, 2, 10, 100, 1000, horizon - 1) if j < min(horizon, 5000)}):
        stats = BatchStats.of(batch, context + j * batch)
        assert float(pace.first_s + j * pace.growth_s) == pytest.approx(float(ITERATION(table, stats)),
                                                                        rel=2e-6)


def test_decode_only_and_mixed_iterations_agree_where_they_meet(costs):
    """A chunk of one token costs about what one more decode does, and a tile that passes its history alone, unsplit."""
    _, table = costs["llama-3.1-70b"]
    decode = float(ITERATION(table, BatchStats.of(8, 8 * 1000)))
    mixed = float(ITERATION(table, BatchStats.of(7, 7 * 1000, 1, 1, 1000, 1000.0 ** 2 - 999 ** 2)))
    assert decode < mixed < 1.1 * decode


def test_batches_of_scenarios():
    """Tables of many parameter sets in one program, equal to one at a time."""
    cost = roofline(load_model("llama-3.1-8b"), load_device("h100"))
    scales = jnp.asarray([0.5, 1.0, 2.0])

    def table(scale):
        return eqx.tree_at(lambda c: c.memory_bytes_per_s, cost,
                           cost.memory_bytes_per_s * scale).tabulate(512, 64)

    many, alone = jax.jit(jax.vmap(table))(scales), jax.jit(table)(2.0)
    np.testing.assert_allclose(many.by_tokens[2], alone.by_tokens, rtol=1e-6)
    np.testing.assert_allclose(many.by_sequences[2], alone.by_sequences, rtol=1e-6)
    assert float(many.by_tokens[0, 1]) > float(many.by_tokens[2, 1])
