"""The Workload record, the generator's separate streams, and workloads by name."""

import dataclasses
import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsim._core.errors import InputError, suggest
from jaxsim.workload import (
    Deterministic,
    Fixed,
    Gamma,
    Generator,
    Independent,
    LogNormal,
    Paired,
    Poisson,
    Stream,
    Tenant,
    Workload,
    fixed_lengths,
    generator,
    routing_uniforms,
    stream_key,
)
from jaxsim.workload.arrivals import GRID_S
from jaxsim.workload.named import class_name
from jaxsim.workload.streams import uniforms

TENANTS = (Tenant("batch", 3.0, 10), Tenant("chat", 1.0, 0))


def small(**changes):
    fields = dict(
        arrival_s=[0.0, 0.5, 0.5, 2.0],
        input_tokens=[40, 16, 17, 300],
        output_tokens=[1, 2, 3, 4],
        prefix_offsets=[0, 3, 4, 6, 6],
        prefix_hashes=[7, 8, 9, 7, 7, 11],
        prefix_block_size=16,
    )
    return Workload(**{**fields, **changes})


def test_defaults():
    w = small()
    np.testing.assert_array_equal(w.max_tokens, w.output_tokens)
    np.testing.assert_array_equal(w.priority, 0)
    np.testing.assert_array_equal(w.uniforms, routing_uniforms(0, 4))
    assert (w.num_requests, len(w), w.span_s, w.mean_rate_rps) == (4, 4, 2.0, 1.5)
    assert w.input_tokens.dtype == w.priority.dtype == w.tenant.dtype == np.int32
    assert [w.prefix_of(i).tolist() for i in range(4)] == [[7, 8, 9], [7], [7, 11], []]


def test_arrays_are_copies_and_read_only():
    arrivals = np.array([0.0, 1.0])
    w = Workload(arrival_s=arrivals, input_tokens=[1, 1], output_tokens=[1, 1])
    arrivals[0] = 9.0
    assert w.arrival_s[0] == 0.0
    with pytest.raises(ValueError, match="read-only"):
        w.arrival_s[0] = 1.0


def test_arrivals_are_put_on_the_grid():
    w = Workload(arrival_s=[0.1, 0.3], input_tokens=[1, 1], output_tokens=[1, 1])
    np.testing.assert_array_equal(w.arrival_s, np.round(np.array([0.1, 0.3]) * 2**20) / 2**20)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arrival_s": []}, "arrival_s = .*no requests"),
        ({"arrival_s": [0.0, 1.0, 0.5, 2.0]}, r"arrival_s\[2\] = 0.5.*sort"),
        ({"arrival_s": [0.0, math.nan, 1.0, 2.0]}, r"arrival_s\[1\] = nan"),
        ({"arrival_s": [0.0, 1.0, 2.0, math.inf]}, r"arrival_s\[3\] = inf"),
        ({"arrival_s": [-1.0, 1.0, 2.0, 3.0]}, r"arrival_s\[0\] = -1.0"),
        ({"arrival_s": ["a", "b", "c", "d"]}, "flat list of numbers"),
        ({"input_tokens": [1, 2, 3]}, "input_tokens = 3: entries for 4 requests"),
        ({"input_tokens": [40, 0, 17, 300]}, r"input_tokens\[1\] = 0"),
        ({"output_tokens": [1, 2.5, 3, 4]}, r"output_tokens\[1\] = 2.5.*whole"),
        ({"output_tokens": [1, 2, 3, 2**31]}, r"output_tokens\[3\]"),
        ({"max_tokens": [1, 1, 3, 4]}, r"max_tokens\[1\] = 1.*below"),
        ({"input_tokens": [40, 16, 17, 2**31 - 2]}, "32 bits"),
        ({"tenant": [0, 0, 1, 0]}, r"tenant\[2\] = 1.*no name"),
        ({"tenant": [0, -1, 0, 0]}, r"tenant\[1\] = -1"),
        ({"uniforms": np.zeros((4, 3))}, "uniforms"),
        ({"uniforms": np.full((4, 2), 1.0)}, r"uniforms\[0, 0\] = 1.0"),
        ({"prefix_hashes": None}, "go together"),
        ({"prefix_offsets": [0, 3, 4, 6]}, "prefix_offsets"),
        ({"prefix_offsets": [0, 3, 2, 6, 6]}, "backwards"),
        ({"prefix_offsets": [0, 3, 4, 6, 5]}, "backwards"),
        ({"prefix_offsets": [0, 3, 4, 5, 5]}, "does not end at the 6"),
        ({"prefix_offsets": [0, 4, 4, 6, 6]}, "more blocks of 16"),
        ({"prefix_block_size": 0}, "prefix_block_size = 0"),
        ({"unit_times": [0.0, 1.0, 2.0, 3.0]}, "rate_rps"),
        ({"unit_times": [0.0, 1.0, 0.5, 3.0], "rate_rps": 1.0}, r"unit_times\[2\]"),
    ],
)
def test_bad_workloads_are_refused(changes, message):
    with pytest.raises(InputError, match=message) as caught:
        small(**changes)
    assert caught.value.remedy and "\n" not in str(caught.value)


def test_take_keeps_each_request_whole():
    w = small(priority=[3, 2, 1, 0], tenant=[0, 1, 1, 0], tenant_names=("a", "b"))
    t = w.take(np.array([0, 2]))
    assert t.arrival_s.tolist() == [0.0, 0.5] and t.priority.tolist() == [3, 1]
    assert [t.prefix_of(i).tolist() for i in range(2)] == [[7, 8, 9], [7, 11]]
    np.testing.assert_array_equal(t.uniforms, w.uniforms[[0, 2]])
    assert w.take(slice(1, None)).from_zero().arrival_s.tolist() == [0.0, 0.0, 1.5]
    with pytest.raises(InputError, match="picks none"):
        w.take(slice(9, None))


def test_scaling_a_given_workload():
    w = small()
    assert w.scaled(2.0).arrival_s.tolist() == [0.0, 0.25, 0.25, 1.0]
    assert w.with_rate(3.0).mean_rate_rps == pytest.approx(3.0)
    assert w.with_rate(math.inf).span_s == 0.0
    with pytest.raises(InputError, match="rate_scale"):
        w.scaled(0.0)


def test_thinning_is_nested_and_keeps_its_share():
    w = generator("poisson", rate_rps=10.0).sample(0, 20_000)
    half, tenth = w.thinned(0.5), w.thinned(0.1)
    assert len(half) == pytest.approx(10_000, abs=5 * math.sqrt(5000))
    assert set(tenth.arrival_s) <= set(half.arrival_s) <= set(w.arrival_s)
    with pytest.raises(InputError, match="keep"):
        w.thinned(0.0)


def test_generated_workloads_scale_without_drift():
    w = generator("gamma", rate_rps=3.0, cv=2.0).sample(1, 500)
    back = w.with_rate(7.3).with_rate(3.0)
    np.testing.assert_array_equal(back.arrival_s, w.arrival_s)
    np.testing.assert_allclose(w.scaled(2.0).arrival_s, w.arrival_s / 2, atol=GRID_S)


GENERATOR = Generator(
    Gamma(2.0), Independent(LogNormal(mu=6.0, sigma=1.0), LogNormal(mu=5.0, sigma=1.0)), 4.0
)


def test_common_random_numbers_over_rates():
    slow, fast = GENERATOR.sample(3, 400), GENERATOR.sample(3, 400, rate_rps=40.0)
    for name in ("input_tokens", "output_tokens", "uniforms", "unit_times"):
        np.testing.assert_array_equal(getattr(slow, name), getattr(fast, name))
    np.testing.assert_allclose(slow.arrival_s, fast.arrival_s * 10, atol=10 * GRID_S)


@pytest.mark.parametrize(
    ("changes", "may_change"),
    [
        ({"arrivals": Poisson()}, {"arrival_s", "unit_times"}),
        ({"lengths": fixed_lengths(10, 10)}, {"input_tokens", "output_tokens", "max_tokens"}),
        ({"output_limit": 50}, {"output_tokens", "max_tokens"}),
        ({"tenants": TENANTS}, {"tenant", "priority"}),
    ],
)
def test_streams_are_separate(changes, may_change):
    fields = {f.name: getattr(GENERATOR, f.name) for f in dataclasses.fields(GENERATOR)}
    one, other = GENERATOR.sample(5, 300), Generator(**{**fields, **changes}).sample(5, 300)
    columns = (
        "arrival_s",
        "unit_times",
        "input_tokens",
        "output_tokens",
        "max_tokens",
        "uniforms",
        "tenant",
        "priority",
    )
    changed = {n for n in columns if not np.array_equal(getattr(one, n), getattr(other, n))}
    assert changed == may_change


def test_streams_are_independent():
    n = 20_000
    w = Generator(Poisson(), GENERATOR.lengths, 1.0).sample(0, n)
    columns = [
        np.diff(w.unit_times, prepend=0.0),
        np.log(w.input_tokens),
        np.log(w.output_tokens),
        *w.uniforms.T,
    ]
    correlations = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlations).max() < 5 / math.sqrt(n)
    assert len({s.value for s in Stream.__members__.values()}) == len(Stream.__members__)


def test_uniforms_never_touch_zero_or_one():
    draws = uniforms(stream_key(0, Stream.LENGTHS), 1000)
    np.testing.assert_array_equal(draws * 2.0**32 % 1.0, 0.5)


def test_more_requests_do_not_move_the_first():
    few, many = GENERATOR.sample(2, 100), GENERATOR.sample(2, 1000)
    for name in ("arrival_s", "input_tokens", "output_tokens", "uniforms"):
        np.testing.assert_array_equal(getattr(few, name), getattr(many, name)[:100])


def test_routing_uniforms_are_uniform_float32_below_one():
    draws = routing_uniforms(0, 100_000)
    assert draws.dtype == np.float32 and draws.max() < 1.0 and draws.min() >= 0.0
    counts = np.histogram(draws, bins=50, range=(0, 1))[0]
    # Chi-square with 49 degrees of freedom: 0.1 % point 85.4.
    assert np.sum((counts - 4000.0) ** 2 / 4000.0) < 85.4
    assert abs(np.corrcoef(draws[:, 0], draws[:, 1])[0, 1]) < 5 / math.sqrt(100_000)


def test_tenants_have_their_shares_and_priorities():
    w = Generator(Poisson(), fixed_lengths(1, 1), 1.0, tenants=TENANTS).sample(0, 40_000)
    assert w.tenant_names == ("batch", "chat")
    assert np.mean(w.tenant == 0) == pytest.approx(0.75, abs=5 * math.sqrt(0.1875 / 40_000))
    np.testing.assert_array_equal(w.priority, np.where(w.tenant == 0, 10, 0))


def test_output_limit_cuts_and_is_told_to_the_engine():
    w = Generator(Poisson(), GENERATOR.lengths, 1.0, output_limit=100).sample(0, 1000)
    free = Generator(Poisson(), GENERATOR.lengths, 1.0).sample(0, 1000)
    assert (free.output_tokens > 100).any()
    np.testing.assert_array_equal(w.output_tokens, np.minimum(free.output_tokens, 100))
    np.testing.assert_array_equal(w.max_tokens, 100)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    count=st.integers(1, 600),
    rate=st.floats(1e-3, 1e6),
    sigma=st.floats(0.0, 3.0),
)
def test_any_sample_is_a_valid_workload(seed, count, rate, sigma):
    law = LogNormal(mu=5.0, sigma=sigma, max_tokens=10_000)
    w = Generator(Poisson(), Independent(law, law), rate).sample(seed, count)
    assert len(w) == count and np.all(np.diff(w.arrival_s) >= 0)
    assert w.input_tokens.min() >= 1 and w.output_tokens.max() <= 10_000


@pytest.mark.parametrize("count", [0, -1, 2.0, True, 1 << 40])
def test_bad_counts_are_refused(count):
    with pytest.raises(InputError, match="num_requests"):
        GENERATOR.sample(0, count)


def test_generator_numbers_are_checked():
    with pytest.raises(InputError, match="rate_rps"):
        Generator(Poisson(), fixed_lengths(1, 1), -1.0)
    with pytest.raises(InputError, match="output_limit"):
        Generator(Poisson(), fixed_lengths(1, 1), 1.0, output_limit=0)
    with pytest.raises(InputError, match="tenants"):
        Generator(Poisson(), fixed_lengths(1, 1), 1.0, tenants=())
    with pytest.raises(InputError, match=r"tenants\[a\].share"):
        Generator(Poisson(), fixed_lengths(1, 1), 1.0, tenants=(Tenant("a", 0.0),))


# ---- by name


def test_names_are_made_of_class_names():
    from jaxsim.workload import MMPP2

    assert [class_name(c) for c in (MMPP2, LogNormal, Poisson)] == ["mmpp2", "log-normal", "poisson"]


def test_generator_by_name_builds_what_it_says():
    g = generator(
        "mmpp2", rate_rps=4.0, rate_ratio=5.0, high_dwell_s=10, low_dwell_s=60,
        input={"kind": "log-normal", "mean_tokens": 512, "sigma": 1.0}, output=128,
    )  # fmt: skip
    assert (g.arrivals.high_dwell_gaps, g.arrivals.low_dwell_gaps, g.rate_rps) == (40.0, 240.0, 4.0)
    assert isinstance(g.lengths.input, LogNormal) and g.lengths.output == Fixed(128)
    assert generator().name == "azure-conv-2023"
    assert generator("poisson", rate_rps=1.0, input=5, spearman=0.5).lengths.rho == 0.5
    pairs = Paired([1], [2])
    assert generator("poisson", rate_rps=1.0, lengths=pairs).lengths is pairs
    nested = generator(
        "modulated", rate_rps=1.0, base={"kind": "deterministic"}, relative_rates=[1, 2], period_gaps=9
    )
    assert isinstance(nested.arrivals.base, Deterministic)
    assert generator("deterministic", rate_rps=math.inf, input=1, output=1).sample(0, 3).span_s == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "poison", "rate_rps": 1.0}, "workload.kind = 'poison'.*did you mean 'poisson'"),
        ({"kind": "poisson"}, "rate_rps.*missing"),
        ({"kind": "gamma", "rate_rps": 1.0}, "lacks cv"),
        ({"kind": "gamma", "rate_rps": 1.0, "cvs": 1.0}, "workload.cvs.*did you mean 'cv'"),
        ({"kind": "gamma", "rate_rps": 1.0, "cv": -1.0}, "workload.cv = -1.0"),
        ({"kind": "gamma", "rate_rps": 1.0, "cv": "two"}, "workload"),
        ({"kind": "mmpp2", "rate_rps": 1.0, "rate_ratio": 2.0, "high_dwell_s": 1.0}, "low_dwell_s"),
        ({"kind": "azure-conv-2023", "cv": 1.0}, "workload.cv"),
        ({"kind": "poisson", "rate_rps": 1.0, "input": {"kind": "lognormal"}}, "did you mean 'log-normal'"),
        ({"kind": "poisson", "rate_rps": 1.0, "input": {"mean": 3}}, "does not say its kind"),
        ({"kind": "poisson", "rate_rps": 1.0, "input": 0}, "workload.input.tokens = 0"),
        (
            {"kind": "poisson", "rate_rps": 1.0, "input": 1, "lengths": fixed_lengths(1, 1)},
            "one or the other",
        ),
        ({"rate_rps": 0.0}, "rate_rps"),
    ],
)
def test_bad_names_and_numbers_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        generator(**arguments)


# ---- errors


def test_input_error_is_one_line_and_survives_pickling():
    error = InputError("engine.max_num_seqs", -3, "is negative\n(really)", "give 1 or more")
    assert str(error) == "engine.max_num_seqs = -3: is negative (really); give 1 or more"
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.field, again.value) == (str(error), "engine.max_num_seqs", -3)
    assert isinstance(error, ValueError)
    assert len(str(InputError("x", "a" * 10_000, "is long"))) < 400


def test_suggest():
    assert suggest("posson", ["poisson", "gamma"]) == "did you mean 'poisson'?"
    assert suggest("POISSON", ["poisson", "gamma"]) == "did you mean 'poisson'?"
    assert suggest("zzz", ["poisson", "gamma"]) == "choose from gamma, poisson"
    assert "nothing" in suggest("zzz", [])
