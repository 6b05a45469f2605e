"""A router learned inside one jit: evolution strategies over whole episodes of the simulator.

Four replicas serve short questions and long documents. A document's prompt takes a replica many iterations, and every
question that meets it there waits. The router is `jaxsim.policy.routing.Linear`: at each arrival it takes the replica
with the lowest sum of a bias and of outstanding requests, waiting requests, used KV blocks and prompt length, each with
a weight of that replica. These weights are learned from nothing but the share of requests that meet the scenario's
limits; they begin as least-outstanding routing. Seeds that training never saw judge it, beside fixed routers.

    python examples/learned_router.py [generations]
"""

import sys
import time
from functools import partial

import jax
import jax.numpy as jnp

from jaxsim import Environment, Scenario
from jaxsim.engine.environment import Action
from jaxsim.policy.routing import Linear, RoundRobin

REPLICAS, TICK_S = 4, 5.0
PAIRS, SEEDS_A_GENERATION, SPREAD, RATE = 8, 4, 1.0, 0.5
"""Of the search: pairs of opposite trials and workloads in a generation, standard deviation of a trial, step."""


def scenario(num_requests: int = 192) -> Scenario:
    """Llama-3.1-8B on four H100s: nine in ten prompts have 64 to 512 tokens, the others about 12,000."""
    return Scenario.from_dict({
        "schema_version": 1, "num_seeds": 1, "model": {"name": "llama-3.1-8b"}, "device": {"name": "h100"},
        "engine": {"max_num_seqs": 64, "max_num_batched_tokens": 2048, "max_model_len": 16384},
        "cluster": {"replicas": REPLICAS},
        "workload": {"kind": "poisson", "rate_rps": 20.0, "num_requests": num_requests,
                     "input": {"kind": "quantiles", "levels": [0.0, 0.9, 0.901, 1.0],
                               "tokens": [64, 512, 11000, 13000]},
                     "output": {"kind": "uniform", "min_tokens": 20, "max_tokens": 200}},
        "slo": {"ttft_ms": 150.0, "tpot_ms": 40.0}})


def router(weights) -> Linear:
    """The router of a vector of five numbers a replica, differences from least-outstanding routing."""
    load, queue, kv, prompt, bias = weights.reshape(5, REPLICAS)
    return Linear(1.0 + load, queue, 10.0 * kv, prompt, bias)


def attained(env: Environment, num_ticks: int, requests, routing):
    """Share of an episode's requests within the limits; NaN if it was not over after `num_ticks`."""
    state, _ = env.reset(requests)

    def tick(state, _):
        state, _, outcome, is_done = env.step(state, Action(routing))
        return state, (outcome.attained.sum(), is_done)

    _, (counts, is_done) = jax.lax.scan(tick, state, length=num_ticks)
    return jnp.where(is_done[-1], counts.sum() / requests.count, jnp.nan)


@partial(jax.jit, static_argnums=(0, 1, 2))
def train(env: Environment, num_ticks: int, generations: int, workloads, key):
    """Weights after every generation, and the mean share that its trials attained."""
    num_seeds = workloads.count.shape[0]

    def episode(weights, requests):
        return attained(env, num_ticks, requests, router(weights))

    def generation(weights, key):
        chosen, trials = jax.random.split(key)
        index = jax.random.choice(chosen, num_seeds, (SEEDS_A_GENERATION,), replace=False)
        noise = jax.random.normal(trials, (PAIRS, weights.size))
        noise = jnp.concatenate([noise, -noise])
        requests = jax.tree.map(lambda x: x[index], workloads)
        shares = jax.vmap(jax.vmap(episode, (None, 0)), (0, None))(weights + SPREAD * noise, requests).mean(axis=1)
        # By rank: neither scale nor outliers of the shares matter.
        rank = jnp.argsort(jnp.argsort(shares)) / (2 * PAIRS - 1) - 0.5
        weights = weights + RATE * rank @ noise / (PAIRS * SPREAD)
        return weights, (weights, shares.mean())

    return jax.lax.scan(generation, jnp.zeros(5 * REPLICAS), jax.random.split(key, generations))[1]


@partial(jax.jit, static_argnums=(0, 1))
def judge(env: Environment, num_ticks: int, workloads, routing):
    """Share attained on every workload."""
    return jax.vmap(lambda requests: attained(env, num_ticks, requests, routing))(workloads)


def main(generations: int = 60, num_requests: int = 192, num_ticks: int = 6, train_seeds: int = 64,
         test_seeds: int = 64, log=print) -> dict:
    """Train, and judge on held-out seeds. Returns the mean share attained by each router."""
    described = scenario(num_requests)
    env = Environment(described, TICK_S, routing=router(jnp.zeros(5 * REPLICAS)))
    started = time.perf_counter()
    weights, curve = jax.block_until_ready(train(
        env, num_ticks, generations, env.requests(range(train_seeds)), jax.random.key(0)))
    log(f"trained in {time.perf_counter() - started:.0f} s, compiling included; share attained by the trials of a"
        " generation:")
    every = max(generations // 10, 1)
    for i in range(0, generations, every):
        log(f"  {i:4d}  {float(curve[i:i + every].mean()):.3f}  " + "#" * round(50 * float(curve[i:i + every].mean())))
    held_out = env.requests(range(10_000, 10_000 + test_seeds))
    fixed = Environment(described, TICK_S, routing=RoundRobin())
    shares = {"learned": judge(env, num_ticks, held_out, router(weights[-every:].mean(axis=0))),
              "RoundRobin": judge(fixed, num_ticks, held_out, RoundRobin()),
              "LeastOutstanding": judge(env, num_ticks, held_out, router(jnp.zeros(5 * REPLICAS)))}
    log(f"held-out share within TTFT 150 ms and TPOT 40 ms, {test_seeds} seeds:")
    for name, share in shares.items():
        log(f"  {name:<17} {float(share.mean()):.3f} +- {float(1.96 * share.std(ddof=1) / test_seeds**0.5):.3f}")
    gain = shares["learned"] - shares["LeastOutstanding"]
    log(f"  learned - LeastOutstanding, seed by seed: {float(gain.mean()):+.3f} +-"
        f" {float(1.96 * gain.std(ddof=1) / test_seeds**0.5):.3f}")
    return {name: float(share.mean()) for name, share in shares.items()}


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
