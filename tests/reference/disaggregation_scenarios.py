"""Small random clusters with prefill, decode and mixed instances, tight in blocks, busy on links, full of ties."""

import random
from dataclasses import replace

from .simulator import UNLIMITED, Disaggregation, Flags, Request, preset
from .test_laws import dyadic_cost

PREFILL = ("vllm-v1", "vllm-v1-async", "vllm-v1-priority", "vllm-v0", "sarathi", "distserve-prefill", "caching")
DECODE = ("vllm-v1", "vllm-v1-async", "vllm-v1-priority", "vllm-v0", "sarathi", "distserve-decode", "swapping-v0")
MIXED = ("vllm-v1", "orca", "sglang")
ROUTERS = ("round_robin", "random", "least_outstanding", "power_of_two", "least_kv")


def slower_cost(stats):
    return 3 * dyadic_cost(stats)


def draw_flags(rng: random.Random, name: str, most: int) -> Flags:
    """An engine whose pool has room for little more than the largest request."""
    block_size = rng.choice([1, 2, 4, 8])
    smallest = -(-most // block_size)
    numbers = {
        "block_size": block_size,
        "num_blocks": smallest + rng.randint(0, 2 * smallest),
        "max_model_len": most,
        "max_num_seqs": rng.randint(1, 8),
    }
    if name == "sglang":  # it wants more than it needs
        numbers["num_blocks"] += 1
    numbers["max_num_batched_tokens"] = rng.randint(numbers["max_num_seqs"], 40)
    if name in ("vllm-v0", "sarathi", "swapping-v0"):
        numbers["watermark_blocks"] = rng.choice([0, 0, 2])
        numbers["num_blocks"] += numbers["watermark_blocks"]
    if name in ("distserve-decode", "swapping-v0"):
        numbers |= {"preemption": "swap", "kv_bytes_per_token": 1.0, "swap_bandwidth": rng.choice([2.0**8, 2.0**12])}
    changes = {}
    if name in ("vllm-v1", "sarathi") and rng.random() < 0.3:
        changes = {"stages": rng.choice([2, 4]), "pass_on_arrival": rng.random() < 0.5,
                   "max_batch_seqs": rng.choice([2, UNLIMITED])}
    if name == "caching":
        changes = {"prefix_caching": True}
        numbers["max_num_batched_tokens"] += most
    flags = preset({"caching": "vllm-v1", "swapping-v0": "vllm-v0"}.get(name, name), **numbers)
    if not flags.chunked_prefill:
        budget = UNLIMITED if name == "orca" else most + rng.randint(0, 40) + flags.max_num_seqs
        changes["max_num_batched_tokens"] = budget
    return replace(flags, **changes)


def random_cluster(seed: int):
    """(requests, flags, number of instances, router, costs), rules."""
    rng = random.Random(f"disaggregated {seed}")
    count, horizon = rng.randint(1, 24), rng.choice([0, 64, 512])
    arrivals = sorted(rng.randint(0, horizon) / 2**10 for _ in range(count))
    lengths = [(rng.randint(1, 24), rng.choice([1, rng.randint(1, 24), rng.randint(12, 24)])) for _ in range(count)]
    requests = [
        Request(i, arrivals[i], p, out, priority=rng.randint(0, 2), uniforms=(rng.random(), rng.random()))
        for i, (p, out) in enumerate(lengths)
    ]
    most = max(p + out for p, out in lengths)
    roles = ["prefill"] * rng.randint(1, 3) + ["decode"] * rng.randint(1, 3) + ["mixed"] * rng.choice([0, 0, 0, 1])
    rng.shuffle(roles)
    names = [rng.choice({"prefill": PREFILL, "decode": DECODE, "mixed": MIXED}[role]) for role in roles]
    flags = [draw_flags(rng, name, most) for name in names]
    costs = [rng.choice([dyadic_cost, slower_cost]) for _ in roles]
    rules = Disaggregation(
        roles=tuple(roles),
        decode_router=rng.choice(ROUTERS),
        hand_over=rng.choice(["pull", "push"]),
        waiting_block_share=rng.choice([0.05, 0.5, 1.0]),
        bytes_per_token=rng.choice([0.0, 1.0, 1.0]),
        bandwidth=rng.choice([2.0**5, 2.0**9, 2.0**12, float("inf")]),
        latency_s=rng.choice([0.0, 0.0, 2.0**-7]),
        discipline=rng.choice(["fifo", "fair"]),
        links=rng.choice(["shared", "pair"]),
        overlap_layers=rng.choice([0, 0, 4]),
    )
    return (requests, flags, len(roles), rng.choice(ROUTERS), costs), rules
