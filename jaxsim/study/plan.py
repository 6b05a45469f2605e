"""Which scenarios of a study share a program, and the tiles they are cut into."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import msgspec

from jaxsim._core.errors import InputError
from jaxsim.engine.lower import counter_room
from jaxsim.engine.simulate import run_bytes
from jaxsim.spec.scenario import Scenario
from jaxsim.study.design import Point
from jaxsim.study.lanes import Lanes, Shape, anywhere, ladder, stamps
from jaxsim.study.study import Study
from jaxsim.study.tile import MULTIPLE

FORMAT = "jaxsim tile 2"
"""Changes when a tile's content changes its meaning."""

RUNS_A_TILE = 256
"""Enough lanes to fill vectors and to spread the cost of a step, few enough for the cache."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """Scenarios that are simulated in one batch.

    points: their places in the study. slots, tokens, longest, width: room in the program.
    run_bytes: memory of a run. program: tiles with the same number share a compiled program.
    """

    points: tuple[int, ...]
    scenarios: tuple[Scenario, ...]
    slots: int
    tokens: int
    longest: int
    width: int
    num_runs: int
    num_requests: int
    run_bytes: int
    work: float
    program: int

    def name(self, version: str) -> str:
        """Hash of everything that its result depends on."""
        files = [stamps(scenario) for scenario in self.scenarios]
        content = [FORMAT, version, jax.__version__, jax.default_backend(), files, self.points,
                   [anywhere(scenario) for scenario in self.scenarios],
                   self.slots, self.tokens, self.longest, self.width]
        return hashlib.sha256(msgspec.json.encode(content, order="deterministic")).hexdigest()[:32]


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A point that cannot be simulated."""

    point: int
    reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A study cut into tiles, the longest first, with the parameters of every point."""

    points: list[Point]
    num_seeds: dict[int, int]
    tiles: list[Tile]
    refusals: list[Refusal]
    num_programs: int

    @property
    def num_runs(self) -> int:
        """Scenarios times seeds."""
        return sum(tile.num_runs for tile in self.tiles)


def plan(study: Study, lanes: Lanes, points: Iterable[Point] | None = None, runs_a_tile: int = RUNS_A_TILE,
         on_point: Callable[[int], None] = lambda _: None) -> Plan:
    """Look at every scenario of a study. Raises `InputError` where the study itself is wrong.

    on_point: told how many points have been looked at.
    """
    listed = list(study.points() if points is None else points)
    if not listed:
        raise InputError("where", study.where, "leaves no point of the study", "loosen a condition")
    base = study.base_tree()
    made = (lambda point=point: study.scenario_at(point, base) for point in listed)
    return dataclasses.replace(plan_of(made, lanes, runs_a_tile, on_point), points=listed)


def plan_of(made: Iterable[Callable[[], Scenario]], lanes: Lanes, runs_a_tile: int = RUNS_A_TILE,
            on_point: Callable[[int], None] = lambda _: None) -> Plan:
    """The same for scenarios that `made` makes; what making one refuses is kept."""
    members: list[tuple[int, Scenario, Shape]] = []
    refusals, seeds = [], {}
    for index, make in enumerate(made):
        try:
            scenario = lanes.shared(make())
            seeds[index] = scenario.num_seeds
            members.append((index, scenario, lanes.shape(scenario)))
        except InputError as error:
            refusals.append(Refusal(index, str(error)))
        on_point(index + 1)
    groups: dict[Any, list[tuple[int, Scenario, Shape]]] = {}
    for member in members:
        groups.setdefault((member[2].key, member[2].num_requests), []).append(member)
    tiles, programs = [], 0
    for members in groups.values():
        padded = ladder([shape.slots for *_, shape in members])
        # Not where a long answer's counter would have no room beside so many slots.
        padded = [size if shape.longest_output <= counter_room(dataclasses.replace(shape.dims, num_slots=size))
                  else shape.slots for size, (*_, shape) in zip(padded, members, strict=True)]
        for slots in sorted(set(padded)):
            mine = [m for m, size in zip(members, padded, strict=True) if size == slots]
            tiles += _cut(mine, slots, runs_a_tile, programs)
            programs += 1
    # The longest first, so that none is left to run alone at the end.
    tiles.sort(key=lambda tile: (-tile.work, tile.points))
    return Plan([], seeds, tiles, sorted(refusals, key=lambda r: r.point), programs)


def _cut(members: Sequence[tuple[int, Scenario, Shape]], slots: int, runs_a_tile: int, program: int) -> list[Tile]:
    longest = max(shape.longest for *_, shape in members)
    tokens = max(s.most_tokens(slots, longest) for *_, shape in members for s in shape.schedulers)
    # A batch lasts as long as its longest scenario, so alike go together.
    ordered = sorted(members, key=lambda m: (-m[2].work, m[0]))
    most_seeds = max(scenario.num_seeds for _, scenario, _ in ordered)
    total = sum(scenario.num_seeds for _, scenario, _ in ordered)
    num_tiles = -(-total // max(runs_a_tile, most_seeds))
    # Equal tiles, so that none is mostly padding; a scenario's seeds stay together.
    width = -(-total // num_tiles)
    width = max(-(-width // most_seeds) * most_seeds, most_seeds)
    width = -(-width // MULTIPLE) * MULTIPLE
    tiles, current, count = [], [], 0
    for member in ordered:
        if current and count + member[1].num_seeds > width:
            tiles.append(_tile(current, slots, tokens, longest, width, program))
            current, count = [], 0
        current.append(member)
        count += member[1].num_seeds
    return [*tiles, _tile(current, slots, tokens, longest, width, program)]


def _tile(members, slots: int, tokens: int, longest: int, width: int, program: int) -> Tile:
    return Tile(tuple(index for index, *_ in members), tuple(scenario for _, scenario, _ in members), slots,
                tokens, longest, width, sum(scenario.num_seeds for _, scenario, _ in members),
                sum(shape.requests for *_, shape in members),
                run_bytes(dataclasses.replace(members[0][2].dims, num_slots=slots)),
                sum(shape.work for *_, shape in members), program)
