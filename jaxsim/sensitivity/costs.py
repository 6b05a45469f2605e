"""The cost model of a run as a function of its parameters, and what its records take as a function of that.

    parameters -> tables -> seconds of records        forward: tangents along it; reverse: cotangents back

The loop reads tables, so derivatives go through them. A roofline has some eighty parameters and one set of tables, so
the derivatives of the tables by all of them are made once (`CostModel.jacobian`, forward mode) and serve both
directions: a tangent of parameters is multiplied in on the way to the records, cotangents of the tables, which come
from one batched reverse pass over the records, on the way back. In float64, whatever the loop had.

Fields that are no parameters themselves (`device.numbers.*`, coefficients of `cost.decode`) change several of them:
how much is a central difference of the parameters, which are made from them in closed form. Costs of other kinds
(profiled, hybrid) have tables and no parameters here; there the difference is of the tables, in float32.

Seconds are homogeneous: with all fixed seconds times s and all rates divided by s every iteration takes s times as
long. So the seconds of an iteration are, exactly, the sum over resources of what it would change by with that resource
(Euler's theorem): `RESOURCES` are the classes of parameters that are seconds or rates.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxsim._core.errors import InputError
from jaxsim._core.precision import enable_x64
from jaxsim.cost.base import AbstractIterationCost, BatchStats
from jaxsim.cost.fitted import FittedCost, fitted
from jaxsim.cost.rank import CUDA_GRAPHS, Roofline
from jaxsim.cost.roofline import LAUNCHES, LINKS, override_places
from jaxsim.engine import lower, tape
from jaxsim.engine.lower.hybrid import price
from jaxsim.engine.outcomes import Lane
from jaxsim.engine.tape import Following, Tape
from jaxsim.sensitivity.fields import field_of, with_value
from jaxsim.spec import scenario as spec
from jaxsim.spec.scenario import RooflineCost, Scenario

STEP, TABLE_STEP = 1e-4, 1e-2
"""Relative steps of central differences: of parameters in float64, of tables in float32."""

HBM, TENSOR_CORES, NETWORK, HOST, FLOORS = "HBM", "tensor cores", "network", "host", "kernel floors"
RESOURCES = (HBM, TENSOR_CORES, NETWORK, HOST, FLOORS)
"""Of a roofline: bandwidth of device memory; peaks of arithmetic; links and their latencies; seconds of the host;
fixed seconds of kernels, and those of a tile or an item, which no peak shortens."""

FITTED_RESOURCES = {"a": "constant", "b": "prompt tokens", "c": "context", "d": "sequences", "e": "prompt pairs"}
"""Of fitted coefficients."""

_OF_NETWORK = ("all_reduce", "all_gather", "exchange_gather", "reduce_scatter", "all_to_all", "hop", "tensor_scatter",
               "deep_ep", "shards", "passing", "pass_bytes_per_s", *LINKS)
_OF_HOST = ("host_step_s", "host_sequence_s", "async_step_s", *LAUNCHES)


class CostModel(NamedTuple):
    """Of one scenario.

    tables: what the loop reads, in float64. names, values: of parameters; a name is that of `cost.overrides` or of the
    section of fitted coefficients, or the path of a leaf that has none. resource: of each, None where it is neither
    seconds nor a rate (shares, exponents); degree: 1 of seconds, -1 of rates, 0 of others. jacobian: of the floats of
    the tables, a last axis of parameters. places: of a name of `cost.overrides`, which parameters it stands for. All
    but the tables are None for kinds of cost without parameters.
    """

    tables: AbstractIterationCost
    names: tuple[str, ...] | None = None
    values: Float[np.ndarray, " parameters"] | None = None
    resource: tuple[str | None, ...] | None = None
    degree: Float[np.ndarray, " parameters"] | None = None
    jacobian: PyTree | None = None
    places: dict[str, list[int]] | None = None

    @property
    def partial(self) -> tuple[str, ...]:
        """Names whose leaf is not all that follows from them: where a load balancer has placed experts, what that
        leaves follows from their popularity too."""
        return ("expert_skew",) if "expert_share" in self.names else ()

    def by_name(self, by_leaf: Float[np.ndarray, "rows parameters"]) -> dict[str, Float[np.ndarray, " rows"]]:
        """Elasticities by leaf as elasticities by name: of `cost.overrides` all that it stands for in proportion, so
        that a leaf may be in several; leaves without such a name, and coefficients, by their own."""
        of = {name: [k] for k, name in enumerate(self.names)} | {k: v for k, v in self.places.items() if v}
        return {name: by_leaf[:, places].sum(axis=1) for name, places in of.items() if name not in self.partial}

    @property
    def resources(self) -> tuple[str, ...]:
        """Those that its parameters are of, in the usual order."""
        usual = (*RESOURCES, *FITTED_RESOURCES.values())
        return tuple(name for name in usual if name in self.resource)

    def directions(self) -> Float[np.ndarray, "parameters resources"]:
        """Parameters with the seconds of one resource a unit longer, in shares of what they are."""
        mine = np.array([[name == one for one in self.resources] for name in self.resource], float)
        return mine * (self.degree * self.values)[:, None]

    def tangents(self, directions: Float[np.ndarray, "parameters rows"]) -> PyTree:
        """Of the tables, for changes of the parameters; rows in front."""
        return jax.tree.map(lambda j: np.moveaxis(j @ directions, -1, 0), self.jacobian)


def cost_model(made: Lane, scenario: Scenario) -> CostModel:
    """The cost model of a run, with derivatives of its tables by all parameters."""
    if isinstance(scenario.cost, spec.FittedCost):
        return _of_fitted(scenario)
    if not isinstance(scenario.cost, RooflineCost) or made.system.hybrid is not None:
        # In float64, where guards against division by nothing have derivatives.
        return CostModel(jax.tree.map(lambda x: x.astype(np.float64) if eqx.is_inexact_array(x) else x,
                                      _tables(made, scenario)))
    scheduler = made.system.scheduler
    sizes = scheduler.most_tokens(made.dims.num_slots, made.longest), made.dims.num_slots
    with enable_x64(True):
        model = _roofline(made, scenario)
        leaves, structure = jax.tree.flatten(model)
        numbers = tuple(leaf.item() for leaf in leaves)
        tables, jacobian = _known(structure, numbers, *sizes, CUDA_GRAPHS[scheduler.cudagraph_mode],
                                  scheduler.async_scheduling)
    paths, values = _leaves(structure, numbers)
    index = {path: k for k, path in enumerate(paths)}
    overrides = override_places(model, scenario.cost.overrides)
    # A leaf is called by the name that stands for the fewest.
    own = {}
    for name, places in sorted(overrides.items(), key=lambda item: len(item[1])):
        for place in places:
            own.setdefault(place, name)
    degree = np.array([-1.0 if path[-1].endswith(("flops", "bytes_per_s")) else float(path[-1].endswith("_s"))
                       for path in paths])
    return CostModel(tables, tuple(own.get(path, ".".join(path)) for path in paths), values,
                     tuple(_resource(path) if d else None for path, d in zip(paths, degree, strict=True)), degree,
                     jacobian, {name: [index[place] for place in places] for name, places in overrides.items()})


def _resource(path: tuple[str, ...]) -> str:
    """Of a parameter that is seconds or a rate."""
    if path == ("memory_bytes_per_s",):
        return HBM
    if path[-1].endswith("flops"):
        return TENSOR_CORES
    if path[0] in _OF_NETWORK:
        return NETWORK
    return HOST if path[0] in _OF_HOST else FLOORS


def _roofline(made: Lane, scenario: Scenario) -> Roofline:
    system = made.system
    return price(scenario, system.scheduler, system.model, system.device, system.plan)


def _numbers(model: Roofline) -> Float[np.ndarray, " parameters"]:
    return np.array([leaf.item() for leaf in jax.tree.leaves(model) if eqx.is_inexact_array(leaf)])


def _leaves(structure, numbers: Sequence[float | int]
            ) -> tuple[list[tuple[str, ...]], Float[np.ndarray, " parameters"]]:
    """Of the leaves of a roofline the parameters, which are no integers: their paths, and the numbers."""
    found = [(tuple(key.name for key in path), number)
             for path, number in jax.tree_util.tree_flatten_with_path(structure.unflatten(numbers))[0]
             if isinstance(number, float)]
    return [path for path, _ in found], np.array([value for _, value in found])


@functools.lru_cache(maxsize=32)
def _known(structure, numbers: tuple[float | int, ...], *options) -> tuple[AbstractIterationCost, PyTree]:
    """The same of a roofline's leaves, made once for all scenarios with the same costs."""
    model = structure.unflatten([jnp.asarray(x, jnp.int32 if isinstance(x, int) else float) for x in numbers])
    tables, jacobian = jax.device_get(_tabulated(model, *options))
    # Contiguous, as products with it want it.
    return tables, jax.tree.map(np.ascontiguousarray, jacobian)


@eqx.filter_jit
def _tabulated(model: Roofline, most_tokens: int, num_slots: int, cuda_graphs: bool | str, async_scheduling: bool
               ) -> tuple[AbstractIterationCost, PyTree]:
    """Tables, and their derivatives by all numbers of the roofline, a last axis of these."""
    numbers, rest = eqx.partition(model, eqx.is_inexact_array)
    leaves, structure = jax.tree.flatten(numbers)

    def tables(values):
        own = eqx.combine(structure.unflatten(list(values)), rest)
        made = own.tables(most_tokens, num_slots, cuda_graphs=cuda_graphs, async_scheduling=async_scheduling)
        return eqx.filter(made, eqx.is_inexact_array), made

    jacobian, made = jax.jacfwd(tables, has_aux=True)(jnp.stack(leaves))
    return made, jacobian


def _of_fitted(scenario: Scenario) -> CostModel:
    made = _coefficients(scenario)
    names = [f"{kind}.{letter}" if made.shape[1] == 1 else f"{kind}.{piece}.{letter}"
             for kind in ("prefill", "decode", "mixed") for piece in range(made.shape[1]) for letter in "abcde"]
    tables = FittedCost(made, None, np.asarray(_fitted(scenario).thresholds), None)
    jacobian = eqx.filter(eqx.tree_at(lambda t: t.coefficients, tables, np.eye(made.size).reshape(*made.shape, -1)),
                          eqx.is_inexact_array)
    return CostModel(tables, tuple(names), made.ravel(), tuple(FITTED_RESOURCES[name[-1]] for name in names),
                     np.ones(made.size), jacobian, {})


def _fitted(scenario: Scenario) -> FittedCost:
    return fitted(*(scenario.cost.rows(kind) for kind in ("prefill", "decode", "mixed")), exact=True)


def _coefficients(scenario: Scenario) -> Float[np.ndarray, "kinds pieces 5"]:
    """As they are written, in float64."""
    made = _fitted(scenario)
    return np.asarray(made.coefficients, np.float64) + np.asarray(made.remainders, np.float64)


def _tables(made: Lane, scenario: Scenario) -> AbstractIterationCost:
    return jax.device_get(lower.make_cost(scenario, made.system, made.dims.num_slots, made.longest))


# ---- fields


def changed(scenario: Scenario, name: str, factor: float) -> Scenario | None:
    """The scenario with a number times a factor; None where it has none of that name, or one that counts something.
    Raises `InputError` where what comes out is none."""
    try:
        field = field_of(scenario, name)
    except InputError:
        return None
    return None if field.is_whole else with_value(scenario, name, field.value * factor)


def neighbours(scenario: Scenario, name: str, step: float) -> list[tuple[Scenario, float]] | None:
    """Scenarios with a number a little larger or smaller, and what each weighs in the derivative by its logarithm: a
    central difference, or, where a number is at its highest, one from below of the same order. None where there is no
    such number. Raises `InputError` where neither side is there."""
    below = changed(scenario, name, 1 - step)
    if below is None:
        return None
    try:
        return [(changed(scenario, name, 1 + step), 0.5 / step), (below, -0.5 / step)]
    except InputError:
        further = changed(scenario, name, 1 - 2 * step)
        return [(scenario, 1.5 / step), (below, -2 / step), (further, 0.5 / step)]


def slope(weights: Sequence[float], values: Sequence[Any]) -> np.ndarray:
    """Of `neighbours`: the sum of weights times values; exactly zero where the values are all the same."""
    first, *others = (np.asarray(value, np.float64) for value in values)
    return sum(weight * (value - first) for weight, value in zip(weights[1:], others, strict=True))


def tangents(model: CostModel, made: Lane, scenario: Scenario, fields: Sequence[str]) -> dict[str, PyTree]:
    """Of the tables, by the logarithm of each field; those that change nothing of them are left out."""
    found, directions = {}, {}
    for field in fields:
        section, _, name = field.partition("overrides.")
        places = (model.places or {}).get(name)
        if section == "cost." and places and name not in model.partial:
            direction = np.zeros(len(model.values))
            direction[places] = model.values[places]
            directions[field] = direction
        elif field.startswith(("cost.", "device.")) and field != "cost.front_end_s":
            one = _difference(model, made, scenario, field)
            (directions if isinstance(one, np.ndarray) else found)[field] = one
    if directions:
        stacked = model.tangents(np.stack(list(directions.values()), axis=1))
        found |= {field: jax.tree.map(lambda t, row=row: t[row], stacked) for row, field in enumerate(directions)}
    return {field: one for field, one in found.items()
            if one is not None and any(np.any(leaf != 0) for leaf in jax.tree.leaves(one))}


def _difference(model: CostModel, made: Lane, scenario: Scenario, field: str) -> Any:
    """Of the parameters, or where there are none of the tables, by the logarithm of a field; None where it has no
    number, or not one that can be changed."""
    is_fitted, step = isinstance(scenario.cost, spec.FittedCost), TABLE_STEP if model.names is None else STEP
    try:
        near = neighbours(scenario, field, step)
        if near is None:
            return None
        if is_fitted:
            ends = [_coefficients(one).ravel() for one, _ in near]
        elif model.names is not None:
            with enable_x64(True):
                ends = [_numbers(_roofline(_resolved(made, one), one)) for one, _ in near]
        else:
            ends = [eqx.filter(_tables(_resolved(made, one), one), eqx.is_inexact_array) for one, _ in near]
    except InputError:
        return None
    return jax.tree.map(lambda *values: slope([weight for _, weight in near], values), *ends)


def _resolved(made: Lane, scenario: Scenario) -> Lane:
    """The same run of another system."""
    return dataclasses.replace(made, system=lower.resolve_system(scenario))


# ---- records


def asked_of(tapes: Sequence[Tape], record: np.ndarray) -> tuple[BatchStats, Following]:
    """What the cost model was asked about records; record: rows of tapes one after the other."""
    def whole(*leaves):
        return np.concatenate([leaf[:int(tape.count)] for leaf, tape in zip(leaves, tapes, strict=True)])[record]

    return jax.tree.map(whole, *((tape.stats, tape.following) for tape in tapes))


def joined(parts: Sequence[tuple[BatchStats, Following]]) -> tuple[tuple[BatchStats, Following], int]:
    """Of several runs one after the other, padded to one of few sizes; and how many there are."""
    count = sum(len(stats.num_decode) for stats, _ in parts)
    size = max(-(-count // (step := 1 << max(count.bit_length() - 3, 6))) * step, step)

    def whole(*arrays):
        # Padding repeats the first: any record will do, and it has a price.
        return np.concatenate([*arrays, np.repeat(arrays[0][:1], size - count, axis=0)])

    return jax.tree.map(whole, *parts), count


def _atoms(cost: AbstractIterationCost, asked: tuple[BatchStats, Following]) -> Float[Array, "records 3"]:
    """First, pace and growth of records."""
    return jax.vmap(lambda stats, following: jnp.stack(tape.priced(cost, stats, following)))(*asked)


@eqx.filter_jit
def _forward(floats, rest, asked, tangents):
    def priced(floats):
        return _atoms(eqx.combine(floats, rest), asked)

    return jax.vmap(lambda tangent: jax.jvp(priced, (floats,), (tangent,))[1])(tangents)


@eqx.filter_jit
def _reverse(floats, rest, asked, cotangents):
    _, pull = jax.vjp(lambda floats: _atoms(eqx.combine(floats, rest), asked), floats)
    return jax.vmap(lambda cotangent: pull(cotangent)[0])(cotangents)


def forward(cost: AbstractIterationCost, asked: tuple[BatchStats, Following], tangents: PyTree
            ) -> Float[np.ndarray, "rows records 3"]:
    """What the atoms of records change by, for changes of the tables, rows in front: forward mode, all at once."""
    with enable_x64(True):
        floats, rest = eqx.partition(jax.tree.map(jnp.asarray, cost), eqx.is_inexact_array)
        return np.asarray(_forward(floats, rest, asked, jax.tree.map(lambda t, f: jnp.asarray(t, f.dtype), tangents,
                                                                     floats)))


def reverse(model: CostModel, asked: tuple[BatchStats, Following], cotangents: Float[np.ndarray, "rows records 3"]
            ) -> Float[np.ndarray, "rows parameters"]:
    """Derivatives by all parameters of sums over atoms: one batched reverse pass over the records, then one product
    with the derivatives of the tables."""
    with enable_x64(True):
        floats, rest = eqx.partition(jax.tree.map(jnp.asarray, model.tables), eqx.is_inexact_array)
        pulled = jax.device_get(_reverse(floats, rest, asked, jnp.asarray(cotangents)))
    # A small product: threads of a matrix library would take longer to meet than to multiply.
    return sum(np.einsum("mt,tp->mp", leaf.reshape(len(leaf), -1), j.reshape(-1, j.shape[-1])) for leaf, j in zip(
        jax.tree.leaves(pulled), jax.tree.leaves(model.jacobian), strict=True))
