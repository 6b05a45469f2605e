"""Order of plans against APEX's measured cells and its published example."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsim._core.errors import InputError
from jaxsim.analytic import Executor, Load, steady_state
from jaxsim.analytic.lower import executor_of
from jaxsim.cost import apex
from jaxsim.cost.roofline import roofline
from jaxsim.engine.lower import resolve_system
from jaxsim.planning import cells
from jaxsim.spec.device import load_device
from jaxsim.spec.model import load_model
from jaxsim.spec.plan import Plan
from jaxsim.spec.scenario import Scenario

pytestmark = pytest.mark.unoptimised

BATCHES = 33
LONGEST = 24272
"""Of the measured runs at two ranks: max_model_len, and the token budget of a prompt run whole."""

STEPS = eqx.filter_jit(lambda executor, load: executor.steps(load))


@pytest.fixture(scope="module")
def screened():
    """Milliseconds of TTFT and TPOT by tensor ranks and workload: eight H100 as 8 / ranks replicas of vLLM 0.6.

    Beside them the seconds that they are made of: of a prompt, and of a decode iteration at every batch.
    """
    state, found = eqx.filter_jit(steady_state), {}
    for ranks in apex.MEASURED_MS:
        scenario = Scenario.from_dict({
            "schema_version": 1, "model": {"name": "llama-3.1-70b", "dtype": "bf16"}, "device": {"name": "h100"},
            "engine": {"preset": "vllm-v0@0.6", "tensor_parallel_size": ranks, "max_model_len": LONGEST,
                       "max_num_seqs": BATCHES - 1, "gpu_memory_utilization": 0.97},
            "cluster": {"replicas": 8 // ranks},
            "workload": {"kind": "poisson", "rate_rps": 1, "input": 8, "output": 8}})
        system = resolve_system(scenario)
        with jax.disable_jit():
            executor = executor_of(scenario, system, num_batches=BATCHES)
        for name, load in apex.WORKLOADS.items():
            moments = Load.of(load.rate_per_s, load.prompt_tokens, load.output_tokens)
            one, made = state(executor, moments), STEPS(executor, moments)
            found[ranks, name] = 1e3 * float(one.ttft_s), 1e3 * float(one.tpot_s), (float(made.own_s[0]),
                                                                                    made.decode_s[1:])
    return found


def test_tensor_ranks_are_ordered_as_measured(screened):
    """TP 8 < 2 x TP 4 < 4 x TP 2 in TPOT, in all six workloads, as in the logs."""
    for name in apex.WORKLOADS:
        ours, theirs = ({ranks: table[ranks, name] for ranks in apex.MEASURED_MS} for table in (
            {key: tpot for key, (_, tpot, _) in screened.items()},
            {(ranks, workload): tpot for ranks, row in apex.MEASURED_MS.items()
             for workload, (_, tpot) in row.items()}))
        assert sorted(ours, key=ours.get) == sorted(theirs, key=theirs.get) == [8, 4, 2], name


def test_levels_are_near_the_measured_ones(screened):
    """But for one cell, which the cost model misses (docs/systems/apex.md): TPOT within 11 %, half of it within 5."""
    errors = {key: tpot / apex.MEASURED_MS[key[0]][key[1]][1] - 1 for key, (_, tpot, _) in screened.items()}
    assert errors.pop((8, "creation 0.5")) < 0
    sizes = np.abs(list(errors.values()))
    assert np.max(sizes) < 0.11 and np.median(sizes) < 0.05


def test_the_closed_form_is_that_of_means_at_these_loads(screened):
    """Another formula over the same seconds, for one replica at a time."""
    for ranks, name in (2, "chat 0.25"), (4, "summarization 0.5"), (8, "creation 0.5"):
        (_, tpot, seconds), load = screened[ranks, name], apex.WORKLOADS[name]
        means = apex.steady_state(*seconds, load.rate_per_s * ranks / 8, load.output_tokens)
        assert tpot == pytest.approx(1e3 * float(means.tpot_s), rel=0.02), name


def decode_ms(cost, num_ranks: int = 1, stages: int = 1) -> np.ndarray:
    """Milliseconds of a token at every batch of the executor, short contexts, nobody arriving."""
    numbers = (BATCHES - 1.0, 65536.0, 1e6, 16.0, 8192.0, 1.0, 0.0, stages)
    executor = Executor(cost, *(jnp.asarray(x, float) for x in numbers), num_batches=BATCHES, num_ranks=num_ranks,
                        is_mixed=False)
    return 1e3 * np.asarray(STEPS(executor, Load.of(0.1, 300.0, 300.0)).decode_s)


def test_the_example_is_in_order():
    """Llama-3-70B on two H100: TP 2 at 44 ms, attention copied and FFN cut at 51, a pipeline at 63 (published).

    The trace is not named, so the order is checked for all batches that its tokens/s allow.
    """
    model, device = load_model("llama-3-70b"), load_device("h100")
    with jax.disable_jit():
        single, tensor = (roofline(model, device, Plan(tensor_parallel_size=n)) for n in (1, 2))
        pipeline = roofline(model, device, Plan(pipeline_parallel_size=2))
        # As large as the tables above: the same programs.
        sizes = LONGEST, BATCHES - 1
        tables = tensor.tabulate(*sizes), cells.cell_tables(single, tensor, *sizes), pipeline.tabulate(*sizes)
    tp2, copied, pp2 = decode_ms(tables[0]), decode_ms(tables[1], num_ranks=2), decode_ms(tables[2], stages=2)
    batches = np.arange(6, 15)
    assert np.all(tp2[batches] < copied[batches]) and np.all(copied[batches] < pp2[batches])


def test_memory_of_cells_is_apex_s_and_the_embeddings():
    """Published: 75.0 GiB a device with attention copied and the FFN cut over two; APEX counts no embeddings."""
    model = load_model("llama-3-70b")
    scenario = Scenario.from_dict({
        "schema_version": 1, "model": {"name": "llama-3-70b"}, "device": {"name": "h200"},
        "engine": {"max_model_len": 2048}, "workload": {"kind": "poisson", "rate_rps": 1, "input": 8, "output": 8}})
    plan = Plan(data_parallel_size=2)
    budget = cells.cell_memory(scenario, plan).memory
    embeddings = 2 * model.vocab * model.hidden * 2
    published = apex.parameter_bytes(model, apex.ParallelPlan(1, 1, 2, 1, 1, 2)) + embeddings
    assert budget.weight_bytes == pytest.approx(published, rel=1e-3)
    with pytest.raises(InputError, match="room for 0 KV tokens.*weights.*copied 2 times.*or larger devices"):
        cells.cell_memory(scenario.with_values({"device.name": "h100"}), plan)
