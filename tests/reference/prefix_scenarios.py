"""Random prompts that share prefixes, for the reference simulator and for whoever is compared with it."""

import random
from collections.abc import Sequence
from itertools import count

from .simulator import Flags, Request, preset

CACHING = ("vllm-v1", "vllm-v1-async", "vllm-v1-priority")
"""Presets that may cache prefixes."""


def random_prefixes(
    rng: random.Random, num_requests: int, block_size: int, prompts: Sequence[int]
) -> list[tuple[int, ...]]:
    """Hashes of the leading full blocks of each prompt, drawn as a random tree in the order given.

    A prompt is new, or starts with one of a few system prompts, or with all the full blocks of an earlier prompt
    (its next turn; its twin, where lengths agree), or parts from an earlier one at any block; it never has more
    hashes than full blocks. Some hashes recur behind other parents, and some prompts have no hash for their tail.
    """
    assert len(prompts) == num_requests
    fresh = count(100)
    full_blocks = [int(prompt) // block_size for prompt in prompts]

    def extend(chain: tuple[int, ...], blocks: int) -> tuple[int, ...]:
        more = (rng.randrange(4) if rng.random() < 0.2 else next(fresh) for _ in range(blocks - len(chain)))
        return (*chain, *more)

    longest = max(full_blocks, default=0)
    systems = [extend((), rng.randint(0, longest)) for _ in range(rng.randint(1, 3))]
    chains: list[tuple[int, ...]] = []
    for number, blocks in enumerate(full_blocks):
        kind = rng.choice(["new", "system", "turn", "twin", "branch"])
        shared: tuple[int, ...] = ()
        if kind == "system":
            shared = rng.choice(systems)
        elif kind != "new" and chains:
            parents = list(range(number))
            if kind == "twin":
                parents = [i for i in parents if prompts[i] == prompts[number]] or parents
            shared = chains[rng.choice(parents)]
            if kind == "branch":
                shared = shared[: rng.randint(0, len(shared))]
        chain = extend(shared[:blocks], blocks)
        if rng.random() < 0.1:
            chain = chain[: rng.randint(0, blocks)]
        chains.append(chain)
    return chains


def random_prompts(rng: random.Random, num_requests: int, block_size: int, longest: int) -> list[int]:
    """Prompt lengths: any, exact blocks, the token before and behind them, those of an earlier one, a bit longer."""
    prompts: list[int] = []
    for _ in range(num_requests):
        kind = rng.choice(["any", "blocks", "same", "longer"])
        tokens = rng.randint(1, longest)
        if kind == "blocks":
            tokens = tokens // block_size * block_size + rng.choice([-1, 0, 0, 1])
        elif prompts and kind != "any":
            tokens = rng.choice(prompts) + (kind == "longer") * rng.randint(1, 3 * block_size)
        prompts.append(min(max(tokens, 1), longest))
    return prompts


def random_prefix_scenario(name: str, seed: int) -> tuple[list[Request], Flags, int, str]:
    """Requests, flags with caching, number of instances and router of a scenario that fits its pool, just."""
    rng = random.Random(f"prefixes {name} {seed}")
    block_size, num_requests = rng.choice([1, 2, 4, 8]), rng.randint(1, 24)
    horizon = rng.choice([0, 64, 512, 2048])
    prompts = random_prompts(rng, num_requests, block_size, rng.choice([8, 24, 64]))
    outputs = [rng.randint(1, rng.choice([3, 24])) for _ in prompts]
    arrivals = sorted(rng.randint(0, horizon) / 2**10 for _ in prompts)
    prefixes = random_prefixes(rng, num_requests, block_size, prompts)
    requests = [
        Request(
            id=i,
            arrival_s=arrivals[i],
            prompt=prompts[i],
            output=outputs[i],
            priority=rng.randint(0, 2),
            uniforms=(rng.random(), rng.random()),
            prefix_hashes=prefixes[i],
        )
        for i in range(num_requests)
    ]
    smallest = -(-max(p + o for p, o in zip(prompts, outputs, strict=True)) // block_size)
    max_num_seqs = rng.randint(1, 8)
    flags = preset(
        name,
        prefix_caching=True,
        block_size=block_size,
        num_blocks=smallest + rng.randint(0, 2 * smallest),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=rng.randint(max_num_seqs, 40),
    )
    router = rng.choice(["round_robin", "random", "least_outstanding", "power_of_two", "least_kv"])
    return requests, flags, rng.randint(1, 3), router
