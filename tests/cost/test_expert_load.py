"""Load of the busiest rank, load balancing and visits of ranks, against draws and DeepSeek's published example."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsim._core.errors import InputError
from jaxsim.cost.expert_load import (
    balanced_share,
    busiest_pairs,
    popularities,
    rank_loads,
    ranks_touched,
    rebalance,
)
from jaxsim.cost.operators import token_work
from jaxsim.cost.roofline import roofline
from jaxsim.spec.device import load_device
from jaxsim.spec.model import load_model
from jaxsim.spec.plan import Plan, weight_format

EXAMPLE = np.array([[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
                    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]])
PLACES = [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]
"""The example of deepseek-ai/EPLB: 12 experts in 4 groups, 16 places on 8 devices of two nodes."""


def test_the_published_example_of_the_load_balancer():
    found = rebalance(EXAMPLE, 16, ranks=8, nodes=2, groups=4)
    assert found.tolist() == PLACES
    loads = rank_loads(EXAMPLE, found, 8)
    assert loads.sum(axis=1) == pytest.approx(EXAMPLE.sum(axis=1))
    assert loads[0, 0] == pytest.approx(165 / 2 + 39) and loads[0, 7] == pytest.approx(86 + 132 / 2)


def test_groups_that_nodes_do_not_divide_are_left_alone():
    """Every expert is somewhere, every rank is full, and copies even out what no placement can."""
    weight = popularities(60, 1.5, layers=8)
    plain, more = (rank_loads(weight, rebalance(weight, 60 + r, 12, 5, 4), 12).max(axis=1) / 5 for r in (0, 24))
    assert all(set(row) == set(range(60)) for row in rebalance(weight, 84, 12, 5, 4))
    assert more.mean() < 0.9 * plain.mean() and more.mean() >= 1


def test_ranks_that_nodes_do_not_divide_are_balanced_as_one():
    """Nine ranks on nodes of eight: over all of them, though two nodes would divide the groups."""
    weight = popularities(72, 1.0, layers=8)
    for redundant in (0, 9):
        found = rebalance(weight, 72 + redundant, 9, 2, 8)
        assert found.tolist() == rebalance(weight, 72 + redundant, 9).tolist()
        assert all(set(row) == set(range(72)) for row in found)
    # Places that they do not divide, of ranks that they do.
    assert rebalance(weight, 80, 16, 5, 5).shape == (8, 80)
    odd = rebalance(weight[:, :35], 35, 5, 2, 1)
    assert all(set(row) == set(range(35)) for row in odd)
    assert balanced_share(72, 0, 9, 2, 8, 1.0) == balanced_share(72, 0, 9, 1, 1, 1.0)


def drawn(pairs: float, ranks: int, local: int, skew: float, trials: int = 400) -> float:
    """Busiest rank of Poisson pairs, experts of random popularities in a row, averaged."""
    rng = np.random.default_rng(3)
    weight = rng.gamma(1 / skew**2, size=(trials, ranks, local)) if skew else np.ones((trials, ranks, local))
    share = weight.sum(axis=2) / weight.sum(axis=(1, 2))[:, None]
    return rng.poisson(pairs * ranks * share).max(axis=1).mean()


@pytest.mark.parametrize("ranks, local", [(8, 32), (32, 8), (128, 2)])
@pytest.mark.parametrize("pairs", [20.0, 400.0, 8000.0])
@pytest.mark.parametrize("skew", [0.0, 0.5, 1.0])
def test_the_busiest_rank(ranks, local, pairs, skew):
    found = float(busiest_pairs(jnp.asarray(pairs), ranks, load="skewed", local_experts=local, skew=skew))
    measured = drawn(pairs, ranks, local, skew)
    assert found == pytest.approx(measured, rel=0.03)
    # Of what lies beyond the mean.
    assert 0.93 < (found - pairs) / (measured - pairs) < 1.07
    if not skew:
        assert float(busiest_pairs(jnp.asarray(pairs), ranks)) == found


TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 16_384, 100_000)


@pytest.mark.parametrize("ranks", [2, 8, 32, 256])
@pytest.mark.parametrize("experts, per_token, skew", [
    (256, 8, 0.0), (256, 8, 0.5), (256, 8, 1.0), (256, 8, 2.0), (8, 2, 0.0), (8, 2, 0.5), (8, 2, 1.0)])
def test_few_and_many_tokens(ranks, experts, per_token, skew):
    """Against multinomial draws: every pair goes to an expert by its popularity, experts lie in a row."""
    if ranks > experts:
        return
    rng, pairs = np.random.default_rng(7), np.array(TOKENS) * per_token
    weight = rng.gamma(1 / skew**2, size=(600, ranks, experts // ranks)) if skew else np.ones((600, ranks, 1))
    share = weight.sum(axis=2) / weight.sum(axis=(1, 2))[:, None]
    measured = np.array([np.mean([rng.multinomial(count, one).max() for one in share]) for count in pairs])
    found = np.asarray(busiest_pairs(jnp.asarray(pairs / ranks), ranks, load="skewed", skew=skew,
                                     local_experts=experts / ranks))
    error, is_few = found / measured - 1, pairs < 2 * ranks
    assert np.all(np.abs(error[~is_few]) < (0.03 if ranks < 256 else 0.12)), error
    assert np.all((error[is_few] > -0.05) & (error[is_few] < 0.35)), error
    assert np.all(np.abs(error[pairs > 30 * ranks]) < 0.04), error


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 16, 32, 64, 128, 256])
def test_loads_are_in_order(ranks):
    """Every token on one rank, as popular as experts are, as a load balancer leaves them, as if all were alike."""
    per_token, redundant = 8, ranks
    pairs = jnp.asarray(np.unique(np.geomspace(1, 100_000, 120).astype(int)) * per_token / ranks)
    experts = 256 if 256 % ranks == 0 else 255
    share, _ = balanced_share(experts, redundant, ranks, 1, 1, 1.0)
    options = {"load": "skewed", "skew": 1.0, "local_experts": experts / ranks}
    worst = np.asarray(busiest_pairs(pairs, ranks, load="worst"))
    skewed = np.asarray(busiest_pairs(pairs, ranks, **options))
    placed = np.asarray(busiest_pairs(pairs, ranks, share=jnp.asarray(share), **options))
    balanced = np.asarray(busiest_pairs(pairs, ranks))
    for more, less in ((worst, skewed), (skewed, placed), (placed, balanced), (balanced, np.asarray(pairs))):
        assert np.all(more >= less * (1 - 1e-6))
    assert skewed[-1] > 1.02 * placed[-1] > 1.02 * balanced[-1]


@pytest.mark.parametrize("redundant", [0, 32, 128])
def test_what_a_load_balancer_leaves(redundant):
    """Against draws: its own share of the busiest rank, and Poisson pairs around it."""
    share, spread = balanced_share(256, redundant, 32, 4, 8, 1.0)
    assert 1 <= share < 1.25 and spread < (1.0 if redundant else 1.01)
    rng, found = np.random.default_rng(5), []
    for one in popularities(256, 1.0, layers=64, seed=9):
        loads = rank_loads(one[None], rebalance(one[None], 256 + redundant, 32, 4, 8), 32)[0]
        found.append(rng.poisson(400 * loads / loads.mean()).max())
    expected = float(busiest_pairs(jnp.asarray(400.0), 32, load="skewed", skew=1.0, share=jnp.asarray(share)))
    assert expected == pytest.approx(np.mean(found), rel=0.08)


@pytest.mark.parametrize("experts, per_token, ranks, groups, limit", [
    (256, 8, 8, 1, 1), (256, 8, 2, 8, 4), (256, 8, 4, 8, 4), (256, 8, 32, 8, 4), (256, 8, 16, 8, 4), (160, 6, 5, 8, 3),
    (128, 8, 16, 1, 1)])
def test_ranks_that_a_token_visits(experts, per_token, ranks, groups, limit):
    rng, total = np.random.default_rng(1), 0
    for _ in range(4000):
        chosen = rng.permutation(groups)[:limit]
        pool = np.concatenate([np.arange(g * experts // groups, (g + 1) * experts // groups) for g in chosen])
        total += len(set(rng.choice(pool, per_token, replace=False) * ranks // experts))
    assert ranks_touched(experts, per_token, ranks, groups, limit) == pytest.approx(total / 4000, rel=0.01)


def load_of(plan: Plan, **options):
    work = token_work(load_model("deepseek-v3"), plan, weight_format("fp8"), jnp.asarray([64.0]), skew=0.5, **options)
    return next(w for w in work if w.name == "experts").load


def test_loads_of_a_plan():
    """Balanced as it always was; worst: every token on one rank; balanced by placement, with its copies."""
    wide = Plan(data_parallel_size=32, enable_expert_parallel=True, all_to_all=True)
    pairs = 64 * 8.0
    assert float(load_of(wide).pairs[0]) == pytest.approx(drawn(pairs, 32, 8, 0.0), rel=0.03)
    assert float(load_of(wide, routing="worst").pairs[0]) == 64 * 32 * 8
    skewed = float(load_of(wide, routing="skewed").pairs[0])
    assert skewed == pytest.approx(drawn(pairs, 32, 8, 0.5), rel=0.03)
    balanced = Plan(data_parallel_size=32, enable_expert_parallel=True, all_to_all=True, enable_eplb=True,
                    num_redundant_experts=32)
    placed = load_of(balanced, routing="skewed", placed=(jnp.asarray(1.05), jnp.asarray(0.3)))
    assert pairs < float(placed.pairs[0]) < skewed and placed.local_experts == 9
    # Copies are read like other experts: more of them, for the same tokens.
    assert float(placed.weight_bytes[0]) > float(load_of(wide, routing="skewed").weight_bytes[0])
    # As DeepSeek decodes: more ranks than experts, a place each.
    widest = Plan(data_parallel_size=320, enable_expert_parallel=True, all_to_all=True, enable_eplb=True,
                  num_redundant_experts=64).check(load_model("deepseek-v3"))
    assert load_of(widest).local_experts == 1
    cost = roofline(load_model("deepseek-v3"), load_device("h100"), balanced, expert_load="skewed")
    assert 1 < float(cost.expert_share) < 1.1 and float(cost.expert_spread) < 0.5


DEEPSEEK = load_model("deepseek-v3").name


@pytest.mark.parametrize("model, engine, more, field, other", [
    ("deepseek-v3", {"enable_eplb": True}, {}, "engine.enable_eplb", "cost.expert_load = 'balanced'"),
    ("deepseek-v3", {"enable_eplb": True}, {"expert_load": "worst"}, "engine.enable_eplb",
     "cost.expert_load = 'worst'"),
    ("llama-3.1-8b", {}, {"expert_load": "skewed"}, "cost.expert_load", "model.name = 'meta-llama/Llama-3.1-8B'"),
    ("deepseek-v3", {}, {"split_kv": True}, "cost.split_kv", f"model.name = {DEEPSEEK!r}")])
def test_what_changes_nothing_is_refused(model, engine, more, field, other):
    plan = Plan(data_parallel_size=32, enable_expert_parallel=load_model(model).experts > 0, all_to_all=True, **engine)
    with pytest.raises(InputError) as refusal:
        roofline(load_model(model), load_device("h100"), plan, **more)
    assert refusal.value.field == field and f"has no effect with {other}" in str(refusal.value)
