"""Pools of engines that differ, as a user describes them."""

import numpy as np
import pytest

from jaxsim import Environment, functional
from jaxsim._core.errors import InputError
from jaxsim.engine import lower
from jaxsim.engine.simulate import simulate
from jaxsim.io.timeline import trace_events
from jaxsim.metrics import request_frame
from jaxsim.spec.device import load_device
from jaxsim.spec.scenario import Scenario
from jaxsim.study import runner

pytestmark = pytest.mark.unoptimised

ROLES = [{"role": "prefill"}, {"role": "decode", "replicas": 2}]


def scenario(pools=ROLES, transfer=None, **changes) -> Scenario:
    tree = {
        "schema_version": 1, "num_seeds": 1, "model": {"name": "llama-3.1-8b"}, "device": {"name": "h100"},
        "engine": {"preset": "vllm-v1@0.9", "max_num_seqs": 16, "max_model_len": 4096},
        "cluster": {"pools": pools} | ({"transfer": transfer} if transfer else {}),
        "workload": {"kind": "poisson", "rate_rps": 8.0, "num_requests": 60, "input": 900,
                     "output": {"kind": "uniform", "min_tokens": 1, "max_tokens": 60}}}
    return Scenario.from_dict(tree).with_values(changes)


def run(*args, **changes):
    return simulate(scenario(*args, **changes)).lanes[0][0]


def test_phases_add_up_and_links_take_their_time():
    """KV of a prompt: 2 x 8 heads x 128 x 2 bytes x 32 layers a token, at a tenth of a GB a second and twice that."""
    slow, fast = run(transfer={"gb_per_s": 0.1}), run(transfer={"gb_per_s": 0.2})
    alone_s = 900 * 2 * 8 * 128 * 2 * 32 / 0.1e9
    for lane, least in ((slow, alone_s), (fast, alone_s / 2)):
        frame = request_frame(lane)
        parts = frame[["front_end_s", "queue_s", "prefill_s", "transfer_s", "decode_s", "stall_s"]].sum(axis=1)
        assert np.allclose(parts, frame["e2e_s"])
        moved = frame["output_tokens"] > 1
        assert ((frame["decode_instance"] > 0) == moved).all() and (frame["instance"] == 0).all()
        assert (frame["transfer_s"][~moved] == 0).all()
        assert frame["transfer_s"][moved].min() == pytest.approx(least, rel=1e-5)
    assert np.array_equal(slow.first_token_s, fast.first_token_s)
    assert slow.finish_s.mean() > fast.finish_s.mean() + alone_s / 4
    # One after the other out of the only prefill engine.
    ends = np.sort(slow.delivered_s[slow.decode_instance >= 0])
    assert np.diff(ends).min() > 0.999 * alone_s


def test_layer_by_layer_hides_all_but_the_last():
    whole, layers = run(transfer={"gb_per_s": 2.0}), run(transfer={"gb_per_s": 2.0, "by_layer": True})
    moved = whole.decode_instance >= 0
    shortest = [np.min((lane.delivered_s - lane.accepted_s)[moved]) for lane in (whole, layers)]
    assert shortest[1] < shortest[0]
    assert shortest[1] == pytest.approx(max(shortest[0] / 32, shortest[0] - iteration_s(layers)), rel=0.2)


def iteration_s(lane) -> float:
    """The longest a prompt took."""
    return float(np.max(lane.first_token_s - lane.scheduled_s))


@pytest.mark.slow
def test_a_sweep_gives_what_single_runs_give():
    """Of pools that differ in device, limits and numbers, in one program."""
    pools = [{"role": "prefill", "device": "a100-80gb"}, {"role": "decode", "engine": {"max_num_seqs": 4}}]
    many = [scenario(pools, {"gb_per_s": gb, "hand_over": how}) for gb in (0.2, 20.0) for how in ("pull", "push")]
    table, refused = runner.table(many)
    assert not refused
    for scenario_, (_, row) in zip(many, table.iterrows(), strict=True):
        alone = simulate(scenario_).metrics[0]
        for key, value in (("mean_ttft_ms", alone["mean_ttft_ms"]), ("mean_tpot_ms", alone["mean_tpot_ms"]),
                           ("transfers.mean_ms", alone["transfers"]["mean_ms"]),
                           ("kv.mean_share", alone["kv"]["mean_share"])):
            assert row[key] == pytest.approx(value, rel=1e-6), key
        for key in ("mean_power_w", "energy_j_per_output_token"):
            assert row[key] == pytest.approx(alone[key], rel=1e-9), key
    assert table["transfers.mean_ms"].iloc[0] > 10 * table["transfers.mean_ms"].iloc[2]
    lane, slow, fast = simulate(many[0]).lanes[0][0], load_device("a100-80gb"), load_device("h100")
    share = lane.busy_s / lane.duration_s
    watts = [d.power.idle_w + (d.power.busy_w - d.power.idle_w) * s for d, s in zip((slow, fast), share, strict=True)]
    assert table["mean_power_w"].iloc[0] == pytest.approx(sum(watts), rel=1e-9)
    usd = (slow.usd_per_h + fast.usd_per_h) / 3600 / table["output_throughput"].iloc[0] * 1e6
    assert slow.usd_per_h != fast.usd_per_h
    assert table["usd_per_million_output_tokens"].iloc[0] == pytest.approx(usd, rel=1e-9)


def rates(model="llama-3.1-8b", pools=ROLES, **engine) -> tuple[float, float]:
    """Bytes of KV a token and bytes a second, as derived from the devices."""
    made = scenario(pools, **{"model.name": model}, **{f"engine.{name}": value for name, value in engine.items()})
    return lower.transfer_rates(made, lower.resolve_system(made))


def test_links_carry_what_a_rank_holds():
    """NVLink of an H100 carries 450 GB/s a direction: four ranks a quarter of the KV heads each; of MLA all of it."""
    nvlink = 450e9
    assert rates() == (2 * 8 * 128 * 2 * 32, nvlink)
    alike = [{"role": "prefill"}, {"role": "decode"}]
    assert rates(pools=alike, tensor_parallel_size=4)[1] == pytest.approx(4 * nvlink)
    # Sixteen ranks hold each of the eight KV heads twice, and are in two nodes.
    _, many = rates(pools=alike, tensor_parallel_size=16)
    assert many == pytest.approx(8 * load_device("h100").link_among(2, 32).bytes_per_s)
    assert rates("deepseek-v2-lite", alike, tensor_parallel_size=4)[1] == pytest.approx(nvlink)


def test_devices_that_differ_are_in_different_nodes():
    pools = [{"role": "prefill"}, {"role": "decode", "device": "a100-80gb"}]
    slowest = min(load_device(name).link_among(2, 99).bytes_per_s for name in ("h100", "a100-80gb"))
    assert rates(pools=pools)[1] == slowest < 100e9


def test_the_timeline_shows_transfers():
    """From arrival to last token, without a hole."""
    lane = run(transfer={"gb_per_s": 0.1})
    seconds = {}
    for event in trace_events(lane):
        if event["ph"] in "be":
            sign = 1 if event["ph"] == "e" else -1
            name = event["name"] if event["name"] == "transfer" else event["name"].split()[0]
            seconds[name] = seconds.get(name, 0.0) + sign * event["ts"] / 1e6
    moved = lane.decode_instance >= 0
    assert seconds["transfer"] == pytest.approx(np.sum((lane.delivered_s - lane.first_token_s)[moved]))
    assert seconds["request"] == pytest.approx(np.sum(lane.finish_s - lane.arrival_s))


def test_mixed_pools_may_differ():
    """A slower device serves fewer; as many blocks as it has room for."""
    pools = [{"device": "h100"}, {"device": "l40s"}]
    lane = simulate(scenario(pools, **{"cluster.router": "least_outstanding"})).lanes[0][0]
    assert len(lane.num_blocks) == 2 and lane.num_blocks[0] > lane.num_blocks[1]
    served = np.bincount(lane.instance)
    assert served[0] > served[1] > 0 and lane.decode_instance is None


@pytest.mark.parametrize("pools, values, says", [
    ([{"role": "decode"}], {}, "nobody would compute its prompts"),
    ([{"role": "prefill"}], {}, "nobody would go on after them"),
    ([{"role": "prefill", "replicas": 0}, {"role": "decode"}], {}, "cluster.pools"),
    (ROLES, {"cluster.replicas": 2}, "beside"),
    (ROLES, {"cluster.transfer.gb_per_s": 0.0}, "gb_per_s"),
    (ROLES, {"cluster.transfer.gb_per_s": 1e-30}, "for one transfer"),
    (ROLES, {"cluster.transfer.latency_us": 1e30}, "cluster.transfer.latency_us"),
    (ROLES, {"cluster.transfer.latency_us": 1.6e10, "workload.num_requests": 65536}, "one after the other"),
    (ROLES, {"cluster.transfer.hand_over": "push", "cluster.transfer.waiting_block_share": 0.5}, "use 'pull'"),
    (ROLES, {"workload.input": 4096}, "engine.max_model_len = 4096: the longest"),
    ([{"role": "prefill"}, {"role": "decode", "engine": {"tensor_parallel_size": 3}}], {},
     "cluster.pools[1]: engine.tensor_parallel_size"),
    ([], {"cluster.transfer.gb_per_s": 1.0}, "has no effect"),
    ([{}, {}], {"cluster.transfer.gb_per_s": 1.0}, "has no effect"),
    (ROLES, {"cluster.transfer.router": "least"}, "cluster.transfer.router"),
    (ROLES, {"engine.enable_prefix_caching": True}, "enable_prefix_caching"),
    (ROLES, {"engine.preset": "sglang"}, "use a preset 'vllm-v1'"),
    (ROLES, {"engine.pipeline_parallel_size": 2}, "pipeline_parallel_size"),
    ([*ROLES, {"engine": {"max_num_seq": 3}}], {}, "did you mean 'max_num_seqs'"),
    ([*ROLES, {"engine": {"block_size": 32}}], {}, "differs from the first pool"),
    (ROLES, {"engine.preset": "distserve-sim", "engine.pipeline_parallel_size": 2,
             "cluster.transfer.by_layer": True, "cluster.transfer.gb_per_s": 1.0}, "cluster.transfer.by_layer"),
    ([{}, {}], {"engine.preset": "distserve-sim", "engine.pipeline_parallel_size": 2}, "use roles"),
    ([], {"engine.preset": "distserve-sim", "engine.pipeline_parallel_size": 2}, "[[cluster.pools]]"),
    (ROLES, {"engine.preset": "distserve-sim", "engine.decode_context_limit": 500}, "decode_context_limit"),
    (ROLES, {"engine.preset": "vllm-v0", "engine.enable_chunked_prefill": True, "engine.phase_mix": "prefill_first"},
     "is not simulated with prefill and decode engines"),
    *(([{}, {"engine": {name: value}}], {}, f"cluster.pools[1].engine.{name}")
      for name, value in (("target_batch_time_ms", 20.0), ("kv_parallel_size", 2), ("kv_parallel_tokens", 4096),
                          ("prefill_context_parallel_size", 2), ("decode_context_parallel_size", 2))),
    (ROLES, {"engine.prefill_context_parallel_size": 2}, "engine.prefill_context_parallel_size = 2: is not simulated"),
    (ROLES, {"engine.decode_context_parallel_size": 2}, "engine.decode_context_parallel_size = 2: is not simulated"),
    ([{"device": "h101"}, {}], {}, "h100"),
    ([{"role": "prefill"}, {"role": "decode", "engine": {"gpu_memory_utilization": 0.2}}], {},
     "cluster.pools[1]: model.name"),
])
def test_refused(pools, values, says):
    with pytest.raises(InputError) as error:
        simulate(scenario(pools, **values))
    assert says in str(error.value)


def test_roles_have_no_tape_and_no_environment():
    with pytest.raises(InputError, match="not part of an environment"):
        Environment(scenario(), 1.0)
    with pytest.raises(ValueError, match="from one executor to another"):
        functional.simulate_recorded(*functional.inputs(scenario()))
