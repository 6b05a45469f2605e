"""How long a tornado of a study takes: 20 numbers x 100 scenarios x 1,000 requests x 8 seeds, both sides of each.

    python -m benchmarks.sensitivity [--scenarios 100] [--seeds 8] [--requests 1000] [--metrics p99_ttft_ms] [--direct]

Prints seconds of the wall and of the processors, with the compilation. Beside them those of the same scenarios without
any derivative, compiled before: what a lane more of every scenario costs is about that, and 20 numbers are 40 more for
one kind of metric, 80 where means and percentiles are mixed, as `--metrics default` does. --direct: derivatives at the
fixed schedule too, which records one more run of every scenario and seed.
"""

import argparse
import json
import os
import time

import jaxsim
from jaxsim.engine import loop
from jaxsim.study.lanes import Lanes
from jaxsim.study.plan import plan
from jaxsim.study.runner import rows_of
from jaxsim.study.study import Study

OVERRIDES = ("peak_flops", "attention_flops", "memory_bytes_per_s", "gemm_efficiency", "gemm_read_efficiency",
             "gemm_floor_s", "decode_read_efficiency", "decode_item_s", "decode_floor_s", "prefill_efficiency",
             "prefill_item_s", "elementwise_efficiency", "elementwise_floor_s", "host_step_s", "host_sequence_s")
FIELDS = ("workload.rate_rps", "engine.max_num_seqs", "engine.max_num_batched_tokens", "engine.gpu_memory_utilization",
          "cost.front_end_s", *(f"cost.overrides.{name}" for name in OVERRIDES))
MOST_LIMITS = 5


def study(num_scenarios: int, num_requests: int, num_seeds: int) -> Study:
    """Rates x token budgets of a chat service on one H100."""
    limits = min(num_scenarios, MOST_LIMITS)
    base = {"schema_version": 1, "model": {"name": "llama-3.1-8b"}, "device": {"name": "h100"},
            "engine": {"max_num_seqs": 200}, "workload": {
                "kind": "azure-conv-2023", "rate_rps": 4.0, "num_requests": num_requests}}
    return Study.from_dict({"schema_version": 1, "scenario": base, "num_seeds": num_seeds, "axes": {
        "workload.rate_rps": {"from": 2, "to": 14, "num": max(num_scenarios // limits, 1), "scale": "log"},
        "engine.max_num_batched_tokens": [1000, 1500, 2000, 4000, 8000][:limits]}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("scenarios", 100), ("seeds", 8), ("requests", 1000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--metrics", default="p99_ttft_ms", help="with commas, or default")
    parser.add_argument("--direct", action="store_true")
    options = parser.parse_args()
    given = study(options.scenarios, options.requests, options.seeds)

    def timed(what):
        wall, cpu = time.perf_counter(), time.process_time()
        found = what()
        return found, round(time.perf_counter() - wall, 1), round(time.process_time() - cpu, 1)

    metrics = None if options.metrics == "default" else options.metrics.split(",")

    def derive():
        return jaxsim.sensitivity(given, FIELDS, metrics, num_seeds=options.seeds, direct=options.direct)

    programs = loop.run._cache_size()
    found, wall_s, cpu_s = timed(derive)
    compiled = loop.run._cache_size() - programs
    rows_of(plan(given, Lanes()).tiles)
    _, plain_wall_s, plain_cpu_s = timed(lambda: rows_of(plan(given, Lanes()).tiles))
    print(json.dumps({
        "scenarios": len(found.scenarios), "metrics": found.metrics, "direct": options.direct,
        "numbers": len(FIELDS), "requests": options.requests,
        "seeds": options.seeds, "rows": len(found.rows), "runs": found.num_runs, "programs": found.programs,
        "compiled": compiled, "wall_s": wall_s, "cpu_s": cpu_s, "plain_wall_s": plain_wall_s,
        "plain_cpu_s": plain_cpu_s, "lanes_worth": round(cpu_s / plain_cpu_s, 1),
        "processors": len(os.sched_getaffinity(0)),
        "requests_per_cpu_s": round(found.num_runs * options.requests / cpu_s),
        "load_average": [round(x, 1) for x in os.getloadavg()]}, indent=2))


if __name__ == "__main__":
    main()
