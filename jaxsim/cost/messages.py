"""Messages of a plan: links between its devices, and what goes over each of them, as parts of a `Roofline`.

Collectives of tensor-parallel ranks and of those that share experts, hops between pipeline stages, and what only some
plans have: sequence parallelism, DeepEP, KV caches cut by tokens, rings.
"""

import jax.numpy as jnp

from jaxsim.cost import operators
from jaxsim.cost.collectives import CUSTOM_RANKS, CustomAllReduce, Hop, Nccl, over
from jaxsim.cost.context_parallel import KvShards
from jaxsim.cost.two_level import TwoLevel, collective, deep_ep
from jaxsim.spec.device import DeviceSpec, Link
from jaxsim.spec.efficiency import Efficiency
from jaxsim.spec.model import ModelSpec
from jaxsim.spec.plan import Plan


def links(model: ModelSpec, device: DeviceSpec, plan: Plan) -> tuple[Link, Link, Link]:
    """Of a device to its group of tensors, of experts, and to the next stage: ranks of one stage lie side by side."""
    tensors, ranks = plan.tensor_parallel_size, plan.ranks_of_tokens(model)
    group = plan.expert_ranks if operators.sends_tokens(plan) else ranks
    exchange = device.link_among(group, tensors * ranks if ranks > 1 else 1)
    stages = plan.pipeline_parallel_size
    whole = plan.expert_group // plan.data_parallel_size
    return (device.link_among(tensors), exchange,
            device.link_among(min(stages, 2), whole * stages if stages > 1 else 1))


def messages(record: Efficiency, model: ModelSpec, device: DeviceSpec, plan: Plan, all_reduce: str) -> dict:
    """Links, and collectives over them: vLLM's own all-reduce where devices read each other, NCCL otherwise."""
    tensors, experts, stages = links(model, device, plan)
    can_be_custom = tensors.kind == "direct" and plan.tensor_parallel_size in CUSTOM_RANKS
    among = plan.ranks_of_tokens(model) * plan.tensor_parallel_size

    def nccl(name: str, link: Link) -> Nccl | TwoLevel:
        span = max(among, experts.ranks) if link is experts else link.ranks
        return collective(record, name, device, link, link.ranks, span)

    reduce = (CustomAllReduce.of(record.custom_all_reduce) if all_reduce == "custom" and can_be_custom
              else nccl("all_reduce", tensors))
    return dict(link_bytes_per_s=tensors.bytes_per_s, exchange_bytes_per_s=experts.bytes_per_s,
                hop_bytes_per_s=stages.bytes_per_s, all_reduce=reduce, all_gather=nccl("all_gather", tensors),
                exchange_gather=nccl("all_gather", experts), reduce_scatter=nccl("reduce_scatter", experts),
                all_to_all=nccl("all_to_all", experts), hop=Hop.of(over(record.hop, stages.kind)),
                **_more_messages(record, model, device, plan, nccl("reduce_scatter", tensors)))


def _more_messages(record: Efficiency, model: ModelSpec, device: DeviceSpec, plan: Plan, scatter: Nccl | TwoLevel
                   ) -> dict:
    """Those of plans that have them."""
    found: dict = {}
    if plan.enable_sequence_parallelism:
        found["tensor_scatter"] = scatter
    if plan.deep_ep and operators.sends_tokens(plan):
        found["deep_ep"] = deep_ep(model, plan, device, plan.expert_group)
    if (shards := plan.decode_context_parallel_size) > 1:
        link = device.link_among(shards)
        found["shards"] = KvShards(*(collective(record, name, device, link, shards, shards)
                                     for name in ("all_gather", "reduce_scatter")),
                                   jnp.asarray(link.bytes_per_s, float), shards)
    if (contexts := plan.prefill_context_parallel_size) > 1:
        # To the next one of the ring; the way back to the first is over the same kind of link, or a slower one.
        link = device.link_among(contexts, contexts * plan.tensor_parallel_size)
        found |= {"passing": Hop.of(over(record.hop, link.kind)),
                  "pass_bytes_per_s": jnp.asarray(link.bytes_per_s, float)}
    return found
