"""What can be a parameter, and what is refused with which words. No program of the engine is compiled."""

import math

import pytest

import jaxsim
from jaxsim._core.errors import InputError
from jaxsim.sensitivity import costs, fields, metrics
from jaxsim.spec.device import load_device
from jaxsim.spec.scenario import Scenario
from jaxsim.study.lanes import Lanes
from tests.sensitivity import queues as q

pytestmark = pytest.mark.unoptimised

DENSE = {
    "schema_version": 1, "model": {"name": "llama-3.1-8b"}, "device": {"name": "h100"}, "num_seeds": 2,
    "slo": {"ttft_ms": 300.0}, "engine": {"max_num_seqs": 16, "max_model_len": 8192},
    "workload": {"kind": "poisson", "rate_rps": 4.0, "num_requests": 24, "output": 16,
                 "input": {"kind": "log-normal", "mean_tokens": 300.0, "sigma": 0.5, "max_tokens": 2000},
                 "tenants": [{"name": "paid", "share": 1.0}, {"name": "free", "share": 3.0, "priority": 2}]}}


@pytest.fixture(scope="module")
def dense() -> Scenario:
    return Scenario.from_dict(DENSE)


@pytest.fixture(scope="module")
def lanes() -> Lanes:
    return Lanes()


def test_patterns_find_what_has_an_effect(dense, lanes):
    """Element-wise kernels of a dense model and none of experts; limits, power and price; what is left out has its own
    value."""
    found = {field.name: field for field in fields.chosen(
        dense, ["cost.overrides.e*", "device.numbers.*", "engine.max_num_*", "slo.*"], 0.1, lanes)}
    assert set(found) == {
        "cost.overrides.elementwise_floor_s", "cost.overrides.elementwise_efficiency", "device.numbers.memory_bytes",
        "device.numbers.power.idle_w", "device.numbers.power.busy_w", "device.numbers.usd_per_h", "engine.max_num_seqs",
        "engine.max_num_batched_tokens", "slo.ttft_ms"}
    assert found["engine.max_num_batched_tokens"] == ("engine.max_num_batched_tokens", 8192, True)
    assert found["device.numbers.power.busy_w"].value == load_device("h100").power.busy_w


@pytest.mark.slow
def test_all_is_what_has_an_effect(dense, lanes):
    """Constants of a dense model on one device, limits, load; nothing of experts, collectives, eight-bit caches."""
    everything = {field.name: field for field in fields.all_fields(dense, 0.1, lanes)}
    named = {"workload.rate_rps", "workload.input.mean_tokens", "workload.input.sigma", "workload.output",
             "slo.ttft_ms", "engine.max_num_seqs", "engine.max_num_batched_tokens", "engine.gpu_memory_utilization",
             "cost.front_end_s", "cost.overrides.gemm_efficiency", "cost.overrides.memory_bytes_per_s",
             "cost.overrides.host_step_s", "device.numbers.memory_bytes", "device.numbers.power.busy_w"}
    assert named <= set(everything)
    for part in ("expert", "all_reduce", "all_to_all", "8bit", "hop", "seed", "num_requests", "parallel_size"):
        assert not [name for name in everything if part in name], part
    assert everything["workload.output"].is_whole and not everything["workload.input.mean_tokens"].is_whole
    assert everything["cost.overrides.memory_bytes_per_s"].value == pytest.approx(3.35e12)


@pytest.mark.slow
def test_experts_and_links_appear_where_they_are_used(lanes):
    moe = Scenario.from_dict(DENSE | {"model": {"name": "mixtral-8x7b"}, "engine": {
        "max_num_seqs": 16, "max_model_len": 8192, "tensor_parallel_size": 2}})
    found = {field.name for field in fields.chosen(moe, ["cost.overrides.expert_*", "cost.overrides.all_reduce_*",
                                                         "cost.overrides.link_bytes_per_s"], 0.1, lanes)}
    assert {"cost.overrides.expert_efficiency", "cost.overrides.expert_read_efficiency",
            "cost.overrides.all_reduce_latency_s", "cost.overrides.link_bytes_per_s"} <= found


def test_pools_follow_the_costs_of_their_scenario(lanes):
    """Scenarios that differ in constants alone are not taken for each other."""
    pooled = Scenario.from_dict(DENSE | {"cluster": {"pools": [{"role": "prefill"}, {"role": "decode"}]}})
    found = fields.chosen(pooled, ["cost.overrides.gemm_efficiency", "workload.rate_rps"], 0.1, lanes)
    assert [field.name for field in found] == ["cost.overrides.gemm_efficiency", "workload.rate_rps"]
    slower = fields.with_value(pooled, found[0].name, 0.9 * found[0].value)
    assert fields.fingerprint(slower, lanes) == fields.fingerprint(slower, Lanes())


def test_coefficients_of_a_fitted_cost(lanes):
    """Those that are not zero."""
    queue = q.scenario(num_requests=20, num_seeds=2)
    found = {field.name: field.value for field in fields.all_fields(queue, 0.1, lanes)}
    assert found["cost.prefill.b"] == q.TOKEN_S and "cost.prefill.a" not in found
    assert "workload.input" in found and not [name for name in found if name.startswith(("cost.overrides", "device"))]


def test_steps_are_equal_in_the_logarithm(dense, lanes):
    low, high = fields.sides(dense, fields.field_of(dense, "workload.rate_rps"), 0.1, lanes)
    assert (low.value, high.value) == (4 * math.exp(-0.1), 4 * math.exp(0.1))
    assert (low.scenario.workload.rate_rps, high.scenario.workload.rate_rps) == (low.value, high.value)


def test_numbers_that_count_move_by_at_least_one(dense, lanes):
    low, high = fields.sides(dense, fields.field_of(dense, "engine.max_num_seqs"), 0.01, lanes)
    assert (low.value, high.value) == (15, 17) and high.scenario.engine.max_num_seqs == 17


def test_a_named_device_becomes_numbers(dense, lanes):
    """The same device but for one number, whose kernels are still its own; constants of kernels by name too."""
    one = fields.with_value(dense, "device.numbers.memory_bytes_per_s", load_device("h100").memory_bytes_per_s)
    assert fields.fingerprint(one, lanes) == fields.fingerprint(dense, lanes)
    more = fields.with_value(dense, "device.numbers.memory_bytes_per_s", 4e12).device.spec()
    assert more.memory_bytes_per_s == 4e12 and more.bf16_flops == load_device("h100").bf16_flops
    name = "device.numbers.efficiency.gemm.bf16.efficiency"
    value = fields.field_of(dense, name).value
    by_override = fields.with_value(dense, "cost.overrides.gemm_efficiency", 0.9 * value)
    by_device = fields.with_value(dense, name, 0.9 * value)
    assert fields.fingerprint(by_override, lanes) == fields.fingerprint(by_device, lanes)


def test_a_share_beyond_one_leaves_one_side(dense, lanes):
    high = Scenario.from_dict(DENSE | {"cost": {"overrides": {"gemm_efficiency": 0.98}}})
    low, above = fields.sides(high, fields.field_of(high, "cost.overrides.gemm_efficiency"), 0.1, lanes)
    assert low.scenario is not None and above.scenario is None
    assert "more than all that the device can do" in above.reason


REFUSED = [
    ("engine.preset", "wrt = 'engine.preset': is a choice (\"vllm-v1\"), not a number, so it has no derivative; study"
     ' it with an axis: [axes] "engine.preset" = ["vllm-v1", ...]'),
    ("engine.enforce_eager", "wrt = 'engine.enforce_eager': is a choice (false), not a number, so it has no derivative;"
     ' study it with an axis: [axes] "engine.enforce_eager" = [false, ...]'),
    ("workload.seed", "wrt = 'workload.seed': is of the experiment, and not of what it is about; ask for a number of"
     " the system, its load or its limits"),
    ("cluster.replicas", "wrt = 'cluster.replicas': says of how many parts something is made: another one is another"
     ' system; study it with an axis: [axes] "cluster.replicas" = [...]'),
    ("engine.block_size", "wrt = 'engine.block_size': says of how many parts something is made: another one is another"
     ' system; study it with an axis: [axes] "engine.block_size" = [...]'),
    ("workload.rate", "wrt = 'workload.rate': is no field of a scenario; did you mean"),
    ("workload.think_s", "wrt = 'workload.think_s': is not used by this scenario; give it a value there, or ask for"
     " `all` that it uses"),
    ("workload.input", "wrt = 'workload.input': is a table, not a number; name a number in it"),
    ("workload.tenants.1.priority", "wrt = 'workload.tenants.1.priority': says who goes first: it is a place in an"
     ' order and not a quantity; study it with an axis: [axes] "workload.tenants.1.priority" = [...]'),
    ("engine.watermark", "wrt = 'engine.watermark': is 0, of which no per cent are a step; give it a value above 0 in"
     " the scenario"),
    ("cost.overrides.expert_efficiency", "wrt = 'cost.overrides.expert_efficiency': has no effect in this scenario; ask"
     " for `all` to see what has one"),
    ("cost.overrides.gemm_eficiency", "wrt = 'cost.overrides.gemm_eficiency': is not a parameter of the roofline; did"
     " you mean 'gemm_efficiency'"),
    ("device.numbers.tflops", "wrt = 'device.numbers.tflops': is no number of a device; did you mean"),
    ("workload.nothing.*", "wrt = 'workload.nothing.*': matches no number that this scenario uses; ask for `all` to see"
     " them"),
]


@pytest.mark.parametrize("name, message", REFUSED, ids=[name for name, _ in REFUSED])
def test_what_has_no_derivative_is_refused(dense, lanes, name, message):
    with pytest.raises(InputError) as caught:
        fields.chosen(dense, [name], 0.1, lanes)
    assert str(caught.value).startswith(message)


def test_a_fitted_cost_has_no_roofline(lanes):
    with pytest.raises(InputError, match="is not used by a scenario with fitted coefficients; ask for those, e.g. "
                                         "cost.decode.a"):
        fields.chosen(q.scenario(num_requests=20), "cost.overrides.gemm_efficiency", 0.1, lanes)


def test_other_programs_are_not_steps(dense, lanes):
    """More attempts of a client are more rows of the program."""
    clients = Scenario.from_dict(DENSE | {"workload": DENSE["workload"] | {
        "client": {"deadline_s": 3.0, "retries": 2, "backoff_s": 0.5}}})
    with pytest.raises(InputError, match="workload.client.retries = 3 would be another compiled program.*study it with"
                                         " an axis"):
        fields.chosen(clients, "workload.client.retries", 0.1, lanes)
    assert fields.chosen(clients, "workload.client.backoff_s", 0.1, lanes)[0].value == 0.5


@pytest.mark.parametrize("name, message", [
    ("p99_ttft", "of = 'p99_ttft': is no metric of a run; did you mean 'p99_ttft_ms'"),
    ("outages.numbr", "of = 'outages.numbr': is no metric of a run; did you mean 'outages.number'"),
    ("outages.number", "of = 'outages.number': is not computed: the scenario has nothing that it is about"),
    ("mean_tpot_ms", "of = 'mean_tpot_ms': is not computed: every answer is one token"),
    ("energy_j", "of = 'energy_j': is not computed: the power of the device is not known"),
    ("unstable", "of = 'unstable': is a verdict, not a number; ask for a number it rests on"),
    ("slo.attainment", "of = 'slo.attainment': is not computed: the scenario has no limits; give it some, e.g. --set"
                       " slo.ttft_ms=500, or ask for p99_ttft_ms"),
])
def test_metrics_that_are_not_there_are_refused(name, message):
    with pytest.raises(InputError) as caught:
        jaxsim.sensitivity(q.scenario(num_requests=20), "workload.rate_rps", name)
    assert str(caught.value).startswith(message)


def test_default_metrics_have_values(dense, lanes):
    """Of one-token answers no TPOT; energy where every pool's device has a power; goodput where there are limits."""
    assert metrics.default_metrics([dense], lanes) == [
        "p99_ttft_ms", "mean_ttft_ms", "mean_tpot_ms", "request_goodput", "energy_j_per_output_token"]
    assert metrics.default_metrics([q.scenario(num_requests=20)], lanes) == ["p99_ttft_ms", "mean_ttft_ms"]
    pooled = Scenario.from_dict(DENSE | {"cluster": {"pools": [
        {"role": "prefill"}, {"role": "decode", "device": "h200"}]}})
    assert load_device("h200").power is None
    assert metrics.default_metrics([pooled], lanes)[-1] == "request_goodput"
    assert metrics.missing("energy_j", pooled, lanes) == "the power of the device is not known"
    assert not metrics.missing("transfers.mean_ms", pooled, lanes) and metrics.missing("swaps.total", pooled, lanes)


def test_direct_moves_what_total_moves(dense):
    """One resolver: calibrated values, written-out devices, constants of a kernel; whole numbers and choices do not."""
    for name in ("cost.overrides.gemm_efficiency", "device.numbers.efficiency.gemm.bf16.efficiency"):
        moved = costs.changed(dense, name, 0.9)
        assert fields.field_of(moved, name).value == pytest.approx(0.9 * fields.field_of(dense, name).value, rel=1e-6)
    for name in ("engine.max_num_seqs", "engine.preset", "workload.think_s", "cost.overrides.gemm_eficiency"):
        assert costs.changed(dense, name, 0.9) is None


def test_metrics_by_kind():
    """Whatever few requests decide takes the larger step."""
    assert [metrics.kind(name) for name in ("mean_ttft_ms", "output_throughput", "energy_j", "kv.mean_share")] == [
        "mean"] * 4
    assert [metrics.kind(name) for name in ("p99_ttft_ms", "median_tpot_ms", "slo.attainment", "request_goodput",
                                            "queueing.p90_ms", "queueing.max_ms", "preemptions.total",
                                            "utilisation.num_iterations", "completed", "sessions.failed")] == [
        "percentile"] * 10
    assert metrics.steps_of(0.05) == {"mean": 0.05, "percentile": 0.05}
    assert metrics.steps_of({"mean": 0.01}) == {"mean": 0.01, "percentile": 0.1}


@pytest.mark.parametrize("arguments, message", [
    (dict(num_seeds=1), "num_seeds = 1: leaves nothing to make an interval from; give 8 or more"),
    (dict(steps=0.9), "steps = 0.9: is not a share from 0.0001 to 0.5"),
    (dict(steps="0.1"), "steps = '0.1': is no number, and no table of numbers by kind of metric"),
    (dict(steps={"rate": 0.1}), "steps = 'rate': is no kind of metric; kinds are mean and percentile"),
    (dict(wrt=[]), "wrt = []: names nothing"),
    (dict(of=[]), "of = []: names nothing"),
])
def test_options_are_checked(arguments, message):
    given = dict(wrt="workload.rate_rps", of="mean_ttft_ms") | arguments
    with pytest.raises(InputError) as caught:
        jaxsim.sensitivity(q.scenario(num_requests=20), **given)
    assert str(caught.value).startswith(message)


def test_what_is_no_scenario_is_refused():
    with pytest.raises(InputError, match="is not a Scenario, a list of them, or a Study"):
        jaxsim.sensitivity({"schema_version": 1})
    with pytest.raises(InputError, match="no such file, and no scenario of that name; did you mean 'default'"):
        jaxsim.sensitivity("defalt")


def test_the_package_can_be_called():
    import jaxsim.sensitivity.total as total

    assert callable(jaxsim.sensitivity) and jaxsim.sensitivity.Sensitivity is total.Sensitivity
    with pytest.raises(AttributeError):
        jaxsim.sensitivity.nothing  # noqa: B018
