"""From scenarios to the runs of a tile: what scenarios have in common is derived once.

Thousands of scenarios of a study share a few systems, cost tables and draws. Each is made the first time it is needed,
known by the fields it depends on, and kept.
"""

import dataclasses
import functools
import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import jax
import msgspec
import numpy as np

from jaxsim._core.errors import InputError
from jaxsim.engine import lower, simulate
from jaxsim.engine.common import Params
from jaxsim.spec.cluster import TransferSection
from jaxsim.spec.dims import Dims
from jaxsim.spec.presets import Scheduler
from jaxsim.spec.scenario import FittedCost, ProfiledCost, Scenario, with_paths
from jaxsim.workload.arrivals import round_to_grid
from jaxsim.workload.workload import Workload

LADDER = 64
"""Slots are padded to the most of their group, or that divided by a power of this."""

KEPT = 2048
"""Draws, tables and parameters that are kept for other scenarios; the oldest make room."""

_SECTIONS = ("model", "device", "engine", "cluster", "workload", "slo", "cost")

_LABELS = ("preset", "version", "kv_rule", "host")
"""Of a scheduler: they choose numbers, not programs."""

_STRETCHED = ("poisson", "gamma", "weibull", "deterministic", "azure-conv-2023", "azure-code-2023")
"""Workloads that another rate only stretches."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """What decides the compiled program of a scenario, and how much room it takes in it.

    key: static choices. schedulers: of all pools. slots; longest: tokens of a request; longest_output: of an answer.
    work: in requests, or about so. requests: of all seeds. dims: sizes of a run's arrays.
    last_s: the last arrival at one request a second, where another rate only stretches.
    """

    key: Hashable
    num_requests: int
    slots: int
    schedulers: tuple[Scheduler, ...]
    longest: int
    longest_output: int
    work: float
    requests: int
    dims: Dims
    last_s: float


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One scenario under one seed, ready for the engine.

    params and workload are shared between runs; arrival_s: of this one. max_steps: its bound.
    """

    scenario: Scenario
    system: lower.System
    params: Params
    workload: Workload
    prefixes: lower.Prefixes | None
    arrival_s: np.ndarray
    max_steps: int
    front_end_s: float
    patience: np.ndarray | None = None


class Store:
    """Values by key, the latest used are kept; a refusal is kept as well."""

    def __init__(self, size: int = KEPT):
        """`size`: how many."""
        self._size, self._kept, self._lock = size, OrderedDict(), threading.RLock()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value of a key, made if need be. Raises what `make` raised."""
        # Tiles are prepared in several threads, and no two should make the same thing.
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            else:
                try:
                    self._kept[key] = make()
                except InputError as error:
                    self._kept[key] = error
                if len(self._kept) > self._size:
                    self._kept.popitem(last=False)
            found = self._kept[key]
        if isinstance(found, InputError):
            raise found
        return found


def _is_stretched(scenario: Scenario) -> bool:
    w = scenario.workload
    # The order of deadlines is another at every rate.
    return (w.kind in _STRETCHED and w.rate_rps is not None and not w.has_sessions
            and scenario.engine.scheduling_policy not in ("edf", "least_slack"))


def stamps(scenario: Scenario) -> list[str]:
    """Hashes of the content of the files that a scenario names, as far as they can be read."""
    model, w, preset = scenario.model, scenario.workload, scenario.engine.preset
    paths = [model and model.config, w.trace, w.lengths_from, preset if preset.endswith(".toml") else None,
             getattr(scenario.cost, "path", None)]
    return [digest(str(path)) for path in paths if path]


def anywhere(scenario: Scenario) -> Any:
    """What a scenario is wherever its files lie: each is known by its content, or its path if it cannot be read."""
    return with_paths(msgspec.to_builtins(scenario), known) if any(stamps(scenario)) else scenario


def known(path: str) -> str:
    """A file by its content, or its path if it cannot be read."""
    return digest(path) or path


def digest(path: str) -> str:
    """Hash of a file's content; "" if it cannot be read."""
    place = Path(path)
    place = place / "config.json" if place.is_dir() else place
    try:
        about = place.stat()
        return _content(str(place.absolute()), about.st_size, about.st_mtime_ns, about.st_ino)
    except (OSError, ValueError):
        return ""


@functools.lru_cache(maxsize=1024)
def _content(path: str, *_: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _beside_workload(scenario: Scenario) -> tuple:
    """What a workload depends on outside its section: the order of the queue, and variants of instances."""
    policy, variants = scenario.engine.scheduling_policy, scenario.cluster.variants
    more = () if variants is None else ("variants", variants)
    if policy == "sjf":
        return (policy, *more)
    if policy in ("edf", "least_slack", "lrs", "lars"):
        engine = scenario.engine
        return (policy, scenario.slo, engine.deadline_work_factor is None, (engine.max_num_partial_prefills or 1) > 1,
                *more)
    return more


def _bytes(*parts: Any) -> bytes:
    return msgspec.msgpack.encode(parts)


class Lanes:
    """Makes shapes and runs of scenarios."""

    def __init__(self):
        self._systems, self._draws, self._costs, self._params = Store(), Store(512), Store(256), Store()
        self._units, self._sections = Store(), Store()
        self._shapes, self._prefixes, self._kinds = Store(1 << 16), Store(512), Store()

    # What scenarios share

    def shared(self, scenario: Scenario) -> Scenario:
        """The same; sections equal to those of another scenario are that one's, so that a million take less memory."""
        mine = {name: getattr(scenario, name) for name in _SECTIONS}
        return msgspec.structs.replace(scenario, **{
            name: self._sections.get(_bytes(name, section), lambda section=section: section)
            for name, section in mine.items() if section is not None})

    def system(self, scenario: Scenario) -> lower.System:
        """Raises `InputError` for what does not go together."""
        return self._systems.get(self._system_key(scenario), lambda: lower.resolve_system(scenario))

    def _system_key(self, s: Scenario) -> bytes:
        # The token cap of streamed weights comes from the cost, and pools carry theirs along; what was not measured
        # with a profile comes from its kind.
        is_kind = s.engine.hybrid is None and not s.cluster.pools
        cost = s.cost.__struct_config__.tag if is_kind else s.cost
        return _bytes(s.model, s.device, s.engine, s.cluster, cost, stamps(s))

    def workload(self, scenario: Scenario, seed: int) -> Workload:
        """The draws; at one request a second where another rate only stretches them."""
        if _is_stretched(scenario):
            unit = msgspec.structs.replace(scenario.workload, rate_rps=1.0)
            scenario = msgspec.structs.replace(scenario, workload=unit)
        return self._draws.get(self._draws_key(scenario, seed), lambda: lower.make_workload(scenario, seed))

    def _draws_key(self, s: Scenario, seed: int) -> bytes:
        w = s.workload
        if _is_stretched(s):
            w = msgspec.structs.replace(w, rate_rps=1.0, seed=0)
        return _bytes(w, seed, s.num_requests, stamps(s), *_beside_workload(s))

    def arrivals(self, scenario: Scenario, workload: Workload) -> np.ndarray:
        """Of a run with these draws."""
        w = scenario.workload
        if not _is_stretched(scenario):
            return workload.arrival_s
        return round_to_grid(workload.unit_times / w.rate_rps)

    # Shapes

    def shape(self, scenario: Scenario) -> Shape:
        """Raises `InputError` for a scenario that cannot be simulated."""
        shape = self._shapes.get(self._unit_key(scenario), lambda: self._shape(scenario))
        rate = scenario.workload.rate_rps
        if _is_stretched(scenario) and not shape.last_s / rate <= lower.MAX_ARRIVAL_S:
            raise InputError("workload.rate_rps", rate, f"brings the last request after {shape.last_s / rate:.3g} s",
                             "raise it, or draw fewer requests")
        return shape

    def _unit_key(self, s: Scenario) -> bytes:
        """Of scenarios that differ in a rate that only stretches, and in how they are judged."""
        w = msgspec.structs.replace(s.workload, rate_rps=1.0) if _is_stretched(s) else s.workload
        return _bytes(s.model, s.device, s.engine, s.cluster, s.cost, w, s.num_seeds, stamps(s), *_beside_workload(s))

    def _shape(self, scenario: Scenario) -> Shape:
        system = self.system(scenario)
        s, most, longest, output, work, requests, last_s = system.scheduler, 0, 0, 0, 0.0, 0, 0.0
        for seed in scenario.seeds:
            workload = self.workload(scenario, seed)
            lower.check_requests(system, workload)
            lower.check_transfers(scenario, system, workload)
            lower.check_outages(scenario, system, workload)
            lower.make_patience(scenario, system, workload)
            last_s = max(last_s, float(workload.unit_times[-1]) if _is_stretched(scenario) else 0.0)
            most = max(most, lower.num_rows(scenario, system, workload))
            longest = max(longest, int((workload.input_tokens + workload.output_tokens).max()))
            output = max(output, int(workload.output_tokens.max()))
            requests += len(workload)
            work += len(workload) * (2.0 + float(workload.output_tokens.mean()) / 64)
        dims = simulate.dims_of(scenario, system, most)
        dims = simulate.with_tenants(dims, system, [self.workload(scenario, seed) for seed in scenario.seeds])
        lower.check_counters(dims, [self.workload(scenario, seed) for seed in scenario.seeds])
        for seed in scenario.seeds:
            lower.check_sums(dims, system, self.workload(scenario, seed))
        self._check_target(scenario, system)
        statics = tuple(getattr(s, name) for name in s.__struct_fields__
                        if isinstance(getattr(s, name), (str, bool)) and name not in _LABELS
                        # A number, where prompts are partly computed side by side.
                        and not (name == "order" and dims.num_partial > 1))
        key = (statics, s.decode_context_limit is not None, scenario.cluster.router,
               tuple(sorted(scenario.cluster.router_weights)), scenario.workload.kind == "closed-loop",
               scenario.workload.has_sessions, _of_roles(scenario, system), _of_migration(scenario),
               self._cost_kind(scenario, system),
               scenario.engine.enable_prefix_caching, bool(scenario.engine.swap and scenario.engine.swap.redraw),
               scenario.engine.offload is not None, scenario.engine.context_reuse is not None,
               scenario.engine.target_batch_time_ms is not None,
               _of_remote_store(scenario),
               dataclasses.replace(dims, num_slots=0))
        schedulers = tuple(pool.system.scheduler for pool in system.pools) or (s,)
        return Shape(key, dims.num_requests, dims.num_slots, schedulers, longest, output, work, requests, dims, last_s)

    def _check_target(self, scenario: Scenario, system: lower.System) -> None:
        """Here, where a point is refused alone, and not with those that share its program. Raises `InputError`."""
        if scenario.engine.target_batch_time_ms is None:
            return
        key = _bytes("target", self._system_key(scenario), scenario.cost)
        # Tables of a few sequences: what is asked of them is a chunk alone.
        self._kinds.get(key, lambda: lower.check_target(scenario, lower.make_cost(
            scenario, system, 8, 64, max_tokens=scenario.engine.min_chunk_tokens)))

    def _cost_kind(self, scenario: Scenario, system: lower.System) -> Hashable:
        """The structure of the cost tables, apart from their sizes."""
        cost, engine = scenario.cost, scenario.engine

        def structure() -> Hashable:
            tables = jax.eval_shape(lambda: lower.make_cost(scenario, system, 8, 64))
            leaves, tree = jax.tree.flatten(tables)
            return tree, tuple(leaf.shape for leaf in leaves) if isinstance(cost, FittedCost) else ()

        if system.pools:
            key = _bytes("pools", self._system_key(scenario), cost)
            return self._kinds.get(key, structure)
        if isinstance(cost, ProfiledCost):
            # Read and fitted to the model here, so that what is wrong with it is known before anything runs.
            key = _bytes("profiled", self._system_key(scenario), cost)
            return "profiled", cost.path, self._kinds.get(key, lambda: bool(lower.make_cost(scenario, system, 8, 64)))
        if isinstance(cost, FittedCost):
            return self._kinds.get(_bytes(cost), structure)
        # Numbers do not change it; those that are none are looked at one by one.
        values = [v for v in cost.overrides.values() if not v > 0]
        key = _bytes(scenario.model, scenario.device, engine.dtype, engine.kv_cache_dtype, engine.moe_backend,
                     engine.enforce_eager, engine.hybrid, system.plan, cost.host, cost.distinct_experts,
                     sorted(cost.overrides), cost.split_kv, cost.expert_load, values, stamps(scenario))
        return self._kinds.get(key, structure)

    # Runs

    def runs(self, scenario: Scenario, slots: int, tokens: int, longest: int) -> tuple[Dims, list[Run]]:
        """The runs of a scenario with room for so many slots, tokens of an iteration and of a request."""
        sizes = slots, tokens, longest
        dims, alike = self._units.get((self._unit_key(scenario), sizes), lambda: self._runs(scenario, *sizes))
        found = [dataclasses.replace(run, scenario=scenario, arrival_s=self.arrivals(scenario, run.workload))
                 for run in alike]
        if simulate.looks_a_second(scenario, dims):
            # Controllers look for as long as requests come, which another rate stretches.
            found = [dataclasses.replace(run, max_steps=simulate.most_steps(
                scenario, dims, run.workload, float(run.arrival_s[-1]))) for run in found]
        return dims, found

    def _runs(self, scenario: Scenario, slots: int, tokens: int, longest: int) -> tuple[Dims, list[Run]]:
        system = self.system(scenario)
        workloads = [self.workload(scenario, seed) for seed in scenario.seeds]
        dims = dataclasses.replace(simulate.dims_of(scenario, system, max(
            lower.num_rows(scenario, system, workload) for workload in workloads)), num_slots=slots)
        prefixes: list[lower.Prefixes | None] = [None] * len(workloads)
        if scenario.engine.enable_prefix_caching:
            block = system.scheduler.block_size
            prefixes = [self._prefixes.get((self._draws_key(scenario, seed), block),
                                           lambda w=w: lower.shared_prefixes(w, block))
                        for seed, w in zip(scenario.seeds, workloads, strict=True)]
            dims = simulate.with_prefixes(dims, prefixes)
        dims = simulate.with_offload(dims, scenario, system, workloads, prefixes)
        dims = simulate.with_tenants(dims, system, workloads)
        lower.check_counters(dims, workloads)
        key = _bytes(scenario.model, scenario.device, scenario.engine, scenario.cluster.pools, scenario.cluster.encode,
                     scenario.cost, stamps(scenario)), (
            slots, tokens, longest)
        cost = self._costs.get(key, lambda: jax.device_get(
            lower.make_cost(scenario, system, slots, longest, max_tokens=tokens)))
        w = scenario.workload
        closed = (w.concurrency, w.think_s) if w.kind == "closed-loop" else None
        key = *key, _bytes(scenario.cluster, closed, w.has_sessions, w.client, w.has_deadlines, w.images)
        params = self._params.get(key, lambda: lower.make_params(scenario, system, cost, 0, longest=longest))
        front_end_s = lower.front_end_s(scenario, system)
        if dims.num_tenants:
            many = [lower.with_counters(params, scenario, system, workload, dims) for workload in workloads]
        else:
            many = [params] * len(workloads)
        many = [lower.with_failures(one, scenario, dims, seed) for one, seed in zip(many, scenario.seeds, strict=True)]
        return dims, [Run(scenario, system, params, workload, prefix, workload.arrival_s,
                          simulate.most_steps(scenario, dims, workload), front_end_s,
                          lower.make_patience(scenario, system, workload))
                      for params, workload, prefix in zip(many, workloads, prefixes, strict=True)]


def _of_roles(scenario: Scenario, system: lower.System) -> Hashable:
    """What pools choose of the program: how many kinds there are, and the router of the decode engines."""
    transfer = scenario.cluster.transfer or TransferSection()
    return (len(lower.kinds_of_pools(system)), system.has_roles, transfer.router,
            tuple(sorted(transfer.router_weights)),
            scenario.cluster.encode and scenario.cluster.encode.router,
            len(system.pools) if scenario.cluster.links else 0) if system.pools else None


def _of_migration(scenario: Scenario) -> Hashable:
    """What the controller of migrations chooses of the program, and how many instances a router chooses from."""
    cluster = scenario.cluster
    return (cluster.migration and (cluster.migration.metric, cluster.migration.choice),
            cluster.router_weights.get("top_k"))


def _of_remote_store(scenario: Scenario) -> Hashable:
    """What a store that instances share chooses of the program."""
    given = scenario.cluster.remote_store
    return given is not None and (True, given.egress_gb_per_s is not None)


def ladder(slots: list[int]) -> list[int]:
    """The padded size of each: the largest, or that divided by a power of `LADDER`."""
    top = max(slots)
    return [max(top // LADDER ** int(math.log(top / n, LADDER) + 1e-9), n) for n in slots]
