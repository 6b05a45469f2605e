"""A scenario as named numbers, and what it does in its steady state as a smooth function of all of them.

    deployed = deployment(Scenario.named("default"))
    deployed.numbers                                        # {"kernels.memory_bytes_per_s": 3.35e12, ...}
    jax.grad(lambda n: deployed.measures(n).tpot_s)(deployed.numbers)
    deployed.elasticities("energy_j_per_output_token")      # percent for a percent, by every number

Every operator's constants, the device's rates, the scheduler's limits, the load's rate and moments, power and price are
numbers; latencies are those of `steady_state`, so fixed points have the derivative of their equation. Forward and
reverse mode, `vmap`, and any optimiser of pytrees (optax) go through `measures`.

    power    devices (idle + (busy - idle) utilisation)                 watts, as runs have it (`jaxsim.metrics.power`)
    energy   power / output tokens a second                             joules a token
    cost     devices x price / output tokens a second                   dollars a million tokens

Where several terms tie (a roof that is just saturated, a limit that just binds) the derivative is that of one side, or
between both. Beyond the capacity TTFT is infinite, with derivatives of zero; what does not depend on waiting is that of
a system that is just full.

Known gaps: those of `steady_state`. KV capacity and number formats are numbers of their own here: more memory does not
make more `executor.kv_tokens` by itself. Whole numbers (multiprocessors, layers) are structure.
"""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsim._core.errors import InputError, suggest
from jaxsim.analytic.lower import executor_of, load_of_scenario
from jaxsim.analytic.steady import Executor, steady_state
from jaxsim.analytic.workload import Load
from jaxsim.cost.base import AbstractIterationCost
from jaxsim.cost.rank import CUDA_GRAPHS, Roofline
from jaxsim.engine import lower
from jaxsim.engine.lower.hybrid import price
from jaxsim.spec.scenario import RooflineCost, Scenario

Numbers = dict[str, Float[Array, "*shape"]]
"""By dotted name; scalars, but for tables of costs that are no roofline."""


NEEDED = {"usd_per_million_output_tokens": {"power.usd_per_h": "usd_per_h"},
          **dict.fromkeys(("power_w", "energy_j_per_output_token"), {"power.idle_w": "power"})}
"""Numbers of a device that not every device has, by measure, and their fields."""


class Power(eqx.Module):
    """Of one device: watts without and with an iteration in flight, dollars an hour; NaN where not known.

    devices: of the whole cluster.
    """

    idle_w: Float[Array, ""]
    busy_w: Float[Array, ""]
    usd_per_h: Float[Array, ""]
    devices: Float[Array, ""]


class Measures(NamedTuple):
    """Steady means over requests and time, of the whole cluster.

    ttft_s, tpot_s, e2e_s: seconds. running: sequences that decode. utilisation: of an executor's time. kv_share: of
    its pool. capacity_rps: requests/s that can be served. output_tokens_per_s: made. power_w, energy_j_per_output_token
    and usd_per_million_output_tokens: NaN where the device does not say, infinite a token where nothing arrives.
    """

    ttft_s: Float[Array, ""]
    tpot_s: Float[Array, ""]
    e2e_s: Float[Array, ""]
    running: Float[Array, ""]
    utilisation: Float[Array, ""]
    kv_share: Float[Array, ""]
    capacity_rps: Float[Array, ""]
    output_tokens_per_s: Float[Array, ""]
    power_w: Float[Array, ""]
    energy_j_per_output_token: Float[Array, ""]
    usd_per_million_output_tokens: Float[Array, ""]


class _Parts(eqx.Module):
    """What the numbers are the leaves of; the executor's own cost is made of `kernels`."""

    kernels: Roofline | AbstractIterationCost
    executor: Executor
    load: Load
    power: Power


class Deployment:
    """A scenario in closed form; `deployment` makes it.

    numbers: every traced number by name. Immutable: change a copy of the dictionary, and give it to `measures`.
    """

    def __init__(self, parts: _Parts, tables: dict[str, Any] | None):
        traced, self._rest = eqx.partition(parts, eqx.is_inexact_array)
        paths, self._structure = jax.tree.flatten_with_path(traced)
        self._tables = tables
        self.numbers: Numbers = {".".join(key.name for key in path): leaf for path, leaf in paths}

    def system(self, numbers: Numbers) -> tuple[Executor, Load, Power]:
        """The executor, its load and its power with these numbers; those that are left out keep their values. Raises
        `InputError` for a name that is none of `numbers`."""
        unknown = sorted(numbers.keys() - self.numbers.keys())
        if unknown:
            raise InputError("numbers", unknown[0], "is no number of this deployment",
                             suggest(unknown[0], self.numbers))
        leaves = [jnp.asarray(numbers.get(name, value)) for name, value in self.numbers.items()]
        parts = eqx.combine(self._structure.unflatten(leaves), self._rest)
        cost = parts.kernels if self._tables is None else parts.kernels.tabulate(**self._tables)
        executor = eqx.tree_at(lambda e: e.cost, parts.executor, cost, is_leaf=lambda x: x is None)
        return executor, parts.load, parts.power

    def measures(self, numbers: Numbers | None = None) -> Measures:
        """What it does with these numbers, as `system` takes them. Raises `InputError`."""
        executor, load, power = self.system({} if numbers is None else numbers)
        state = steady_state(executor, load)
        watts = power.devices * (power.idle_w + (power.busy_w - power.idle_w) * state.utilisation)
        tokens_per_s = state.output_tokens_per_s
        # Without arrivals nothing is made: the inner choice keeps the derivative finite.
        is_any = load.rate_rps > 0
        made = jnp.where(is_any, tokens_per_s, 1.0)

        def a_token(rate):
            return jnp.where(is_any, rate / made, jnp.inf)

        return Measures(
            state.ttft_s, state.tpot_s, state.e2e_s, state.running, state.utilisation, state.kv_share,
            state.capacity_rps, tokens_per_s, watts, a_token(watts),
            a_token(1e6 * power.devices * power.usd_per_h / 3600))

    def gradient(self, of: str, numbers: Numbers | None = None) -> tuple[float, Numbers]:
        """A measure and its derivatives by all numbers, in reverse mode. Raises `InputError` for a measure that is not
        known, or that the scenario's device has no numbers for."""
        if of not in Measures._fields:
            raise InputError("of", of, "is no measure of a steady state", suggest(of, Measures._fields))
        at = self.numbers | (numbers or {})
        for name, field in NEEDED.get(of, {}).items():
            if math.isnan(at[name]):
                raise InputError("of", of, f"has no value: device.{field} is not known",
                                 "give it in device.numbers, or ask for another measure")
        value, slopes = _gradient(self, of, at)
        return float(value), slopes

    def elasticities(self, of: str, numbers: Numbers | None = None) -> dict[str, float]:
        """Percent of a measure for a percent of each number, those that matter most first. Raises `InputError`."""
        value, slopes = self.gradient(of, numbers)
        at = self.numbers | (numbers or {})
        if not (math.isfinite(value) and value):
            remedy = ("raise workload.rate_rps above 0" if not at["load.rate_rps"] > 0 else
                      "lower workload.rate_rps below the capacity")
            raise InputError("of", of, f"is {value:g} here, which has no elasticity", f"{remedy}, or ask for gradient")
        # Of tables as a whole; what is without end, or not known, has no percents.
        found = {name: float(jnp.sum(jnp.where(jnp.isfinite(at[name]), slopes[name] * at[name], 0.0))) / value
                 for name in slopes}
        return dict(sorted(found.items(), key=lambda item: -abs(item[1])))


@eqx.filter_jit
def _gradient(deployed: Deployment, of: str, numbers: Numbers) -> tuple[Array, Numbers]:
    return jax.value_and_grad(lambda n: getattr(deployed.measures(n), of))(numbers)


def deployment(scenario: Scenario) -> Deployment:
    """The closed form of a scenario, with its numbers. Raises `InputError` for what has no closed form."""
    system = lower.resolve_system(scenario)
    executor, s = executor_of(scenario, system), system.scheduler
    kernels, tables = executor.cost, None
    if isinstance(scenario.cost, RooflineCost) and system.hybrid is None:
        kernels = price(scenario, s, system.model, system.device, system.plan)
        slots = executor.num_batches - 1
        tables = dict(max_tokens=s.most_tokens(slots, system.max_model_len), max_sequences=slots,
                      cuda_graphs=CUDA_GRAPHS[s.cudagraph_mode], async_scheduling=s.async_scheduling)
    device = system.device
    known = device.power if device is not None else None
    watts = (known.idle_w, known.at_work_w(device.clock)) if known else (math.nan, math.nan)
    usd_per_h = device.usd_per_h if device is not None and device.usd_per_h else math.nan
    power = Power(*(jnp.asarray(x, float) for x in (*watts, usd_per_h, scenario.num_devices)))
    bare = eqx.tree_at(lambda e: e.cost, executor, None)
    return Deployment(_Parts(kernels, bare, load_of_scenario(scenario), power), tables)
