"""APEX's cell-level plans: attention copied over groups of ranks that share one dense FFN.

    own        attention of a group of ranks, with its own sequences and KV pool
    together   gather the tokens of all groups, FFN cut over all ranks, scatter the sums back

which is how the cost model prices ranks that share experts. No engine that is simulated here runs such a plan.

Source: the cells of APEX+ (arXiv 2411.17651) and its resharding collectives between them.
"""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
import msgspec
import numpy as np
from jaxtyping import Array, Float

from jaxsim._core.errors import InputError
from jaxsim.cost.rank import CUDA_GRAPHS, Roofline, captured_tokens, pad_to_graph
from jaxsim.cost.roofline import roofline
from jaxsim.cost.tabulated import DECODE_DEVICE, TOKENS, TabulatedCost, Together
from jaxsim.engine import lower
from jaxsim.kernels import octaves
from jaxsim.spec.memory import MemoryBudget, activation_bytes, kv_rule, rank_weight_bytes
from jaxsim.spec.plan import Plan, kv_cache_bytes, weight_format
from jaxsim.spec.scenario import Scenario

FFN = ("ffn_up", "ffn_down", "ffn_activation")
"""Operators of the FFN cell."""


def cell_memory(scenario: Scenario, plan: Plan) -> lower.System:
    """The scenario resolved, with the KV pool of one group: attention over its ranks, FFN over those of all.

    plan: `tensor_parallel_size` of a group, `data_parallel_size` groups. Raises `InputError` where it does not fit.
    """
    if scenario.engine.hybrid is not None:
        raise InputError("engine.hybrid", "given", "is not simulated with attention copied", "use one GPU")
    given = msgspec.structs.replace(scenario.engine, num_gpu_blocks_override=1)
    system = lower.resolve_system(msgspec.structs.replace(scenario, engine=given))
    group, whole = _plans(plan)
    model, device, s = system.model, system.device, system.scheduler
    whole.check(model)
    fmt, (rule, space) = weight_format(scenario.dtype, model), kv_rule(s.kv_rule)
    ffn = model.layer_parameters(group.tensor_parallel_size, 1).dense_ffn * fmt.linear_bytes * model.layers
    weights = rank_weight_bytes(model, group, fmt) - ffn * (1 - 1 / plan.data_parallel_size)
    activations = activation_bytes(model, group, fmt, space, min(s.max_num_batched_tokens, system.max_model_len),
                                   s.max_num_seqs)
    other = space.other_bytes(True)
    left = rule.kv_bytes(device.usable_memory_bytes, s.gpu_memory_utilization,
                         {"weights": weights, "activations": activations, "other": other})
    width = kv_cache_bytes(scenario.kv_dtype, scenario.dtype, model)
    block = model.layer_kv_bytes_per_token(width, group.tensor_parallel_size) * s.block_size * model.layers
    budget = MemoryBudget(
        rule=rule, num_blocks=max(int(left // block), 0), block_size=s.block_size, block_bytes=block,
        visible_bytes=device.usable_memory_bytes, gpu_memory_utilization=s.gpu_memory_utilization,
        weight_bytes=weights, activation_bytes=activations, other_bytes=other, kv_bytes=left)
    if budget.num_tokens < (system.max_model_len if rule.must_hold_max_model_len else 1):
        raise InputError("model.name", model.name, f"leaves room for {budget.num_tokens:,} KV tokens on {device.name}:"
                         f" {budget.sum} for KV a rank with attention copied {plan.data_parallel_size} times",
                         "use more tensor-parallel ranks, or " + (
                             "larger devices" if left <= 0 else "lower engine.max_model_len"))
    blocks = scenario.engine.num_gpu_blocks_override or budget.num_blocks
    return dataclasses.replace(system, plan=plan, memory=budget, num_blocks=blocks)


def _plans(plan: Plan) -> tuple[Plan, Plan]:
    """Of a group for itself, and of all ranks together."""
    return (Plan(tensor_parallel_size=plan.tensor_parallel_size),
            Plan(tensor_parallel_size=plan.tensor_parallel_size * plan.data_parallel_size))


def cell_cost(scenario: Scenario, system: lower.System, max_sequences: int, longest: int) -> TabulatedCost:
    """Tables of a group of ranks, with what all groups do together, from the scenario's roofline."""
    s, cost = system.scheduler, scenario.cost
    group, whole = (roofline(system.model, system.device, plan, scenario.dtype, scenario.kv_dtype,
                             host=cost.host or s.host, **cost.overrides) for plan in _plans(system.plan))
    return cell_tables(group, whole, s.most_tokens(max_sequences, longest), max_sequences,
                       cuda_graphs=CUDA_GRAPHS[s.cudagraph_mode], async_scheduling=s.async_scheduling)


def cell_tables(group: Roofline, whole: Roofline, max_tokens: int, max_sequences: int, **options: bool | str
                ) -> TabulatedCost:
    """The tables of `group` with its FFN taken out, and that of `whole` put in around its exchange.

    options: of `Roofline.tabulate`.
    """
    made = group.tabulate(max_tokens, max_sequences, **options)
    graphs = options.get("cuda_graphs", True)

    def padded(counts, is_captured) -> Float[Array, " counts"]:
        return jnp.asarray(pad_to_graph(counts) if is_captured else counts, float)

    tokens = padded(octaves.knots(TOKENS, max_tokens), graphs is True)
    sequences = padded(np.arange(max_sequences + 1), graphs)
    by_sequences = made.by_sequences.at[:, DECODE_DEVICE].add(-_ffn_seconds(group, sequences))
    groups = whole.plan.tensor_parallel_size // group.plan.tensor_parallel_size
    together = Together(sum(_shared_seconds(group, whole, sequences)), *_shared_seconds(group, whole, tokens),
                        captured_tokens(graphs), groups)
    return eqx.tree_at(lambda t: (t.by_tokens, t.by_sequences, t.together), made, (
        made.by_tokens - _ffn_seconds(group, tokens), by_sequences, together), is_leaf=lambda x: x is None)


def _ffn_seconds(cost: Roofline, tokens: Float[Array, " counts"]) -> Float[Array, " counts"]:
    """Of the FFN in the iteration of one plan."""
    return sum(w.calls * cost.call_seconds(w) for w in cost.token_works(tokens) if w.name in FFN) + 0 * tokens


def _shared_seconds(group: Roofline, whole: Roofline, tokens: Float[Array, " counts"]
                    ) -> tuple[Float[Array, " counts"], Float[Array, " counts"]]:
    """Of the FFN and of its exchange, with as many tokens on every group.

    The sums of a group's own ranks are added by the all-reduce that the group has after an FFN of its own.
    """
    groups = whole.plan.tensor_parallel_size // group.plan.tensor_parallel_size
    total = tokens * groups
    message = total * whole.model.hidden * whole.weights.activation_bytes
    exchange = (whole.all_gather.seconds(groups, message, whole.link_bytes_per_s)
                + whole.reduce_scatter.seconds(groups, message, whole.link_bytes_per_s))
    return _ffn_seconds(whole, total), whole.model.layers * exchange
