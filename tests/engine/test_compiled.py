"""What does not flicker: the compiled loop body. How many programs a study takes is in `test_programs`.

The text of the compiled program is read as computations of instructions; the inner loop's body is followed through
fusions and conditionals. XLA on CPU only: other backends schedule differently.
"""

import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxsim.engine import loop
from jaxsim.state.world import World
from tests.engine import cases as c
from tests.reference import simulator

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads the text of a CPU program")

TRANSCENDENTAL = {"exponential", "exponential-minus-one", "log", "log-plus-one", "sine", "cosine", "tan", "tanh",
                  "power", "logistic", "erf", "atan2", "cbrt"}

PASSING = {"parameter", "get-tuple-element", "tuple", "bitcast", "scatter", "dynamic-update-slice", "conditional",
           "while", "call", "optimization-barrier"}
"""Operations that may give a large array: they alias it, or write a few of its entries in place."""


@dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    op: str
    calls: tuple[str, ...]
    is_root: bool


def computations(text: str) -> dict[str, list[Instruction]]:
    """The computations of a compiled program's text."""
    found, current = {}, None
    for line in text.splitlines():
        head = re.match(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if head:
            current = found.setdefault(head[1], [])
        elif line.startswith("}"):
            current = None
        elif current is not None:
            match = re.match(r"\s*(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z\-]+)\(", line)
            if match is None:
                continue
            named = re.findall(r"(?:calls|to_apply|body|condition|\w+_computation)=%?([\w.\-]+)", line)
            for group in re.findall(r"branch_computations=\{([^}]*)\}", line):
                named += [name.strip().lstrip("%") for name in group.split(",")]
            current.append(Instruction(match[2], match[3], match[4], tuple(named), bool(match[1])))
    return found


def inner_body(found: dict[str, list[Instruction]]) -> str:
    """The body of the loop that holds no other loop; those inside kernels, which are called, do not count."""
    def has_loop(name):
        return any(i.op == "while" or (i.op != "call" and any(map(has_loop, i.calls))) for i in found[name])

    called = {inner for instructions in found.values() for i in instructions if i.op == "call" for inner in i.calls}
    in_kernels = {name for start in called for name, _, _ in reached(found, start)}
    bodies = {i.calls[-1] if has_loop(i.calls[0]) else max(i.calls, key=lambda n: len(found[n]))
              for name, instructions in found.items() if name not in in_kernels
              for i in instructions if i.op == "while"}
    innermost = [name for name in bodies if not has_loop(name)]
    return max(innermost, key=lambda name: len(found[name]))


def reached(found: dict[str, list[Instruction]], start: str) -> Iterator[tuple[str, bool, Instruction]]:
    """Instructions run by a computation: (computation, whether inside a fusion, instruction)."""
    seen, todo = set(), [(start, False)]
    while todo:
        name, is_fused = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for instruction in found[name]:
            yield name, is_fused, instruction
            todo += [(called, is_fused or instruction.op == "fusion") for called in instruction.calls]


def dimensions(shape: str) -> list[tuple[int, ...]]:
    """Sizes of an array, or of every array of a tuple, each in rising order: layouts may differ."""
    return [tuple(sorted(int(n) for n in sizes.split(",") if n)) for sizes in re.findall(r"\w+\[([\d,]*)\]", shape)]


def problems(text: str, large: set[tuple[int, ...]]) -> list[str]:
    """Copies of large arrays, and operations that must not be in the inner loop."""
    found = computations(text)
    wrong = []
    for name, is_fused, instruction in reached(found, inner_body(found)):
        if instruction.op in TRANSCENDENTAL:
            wrong.append(f"{instruction.op} in {name}")
        if is_fused or instruction.op in PASSING or not large.intersection(dimensions(instruction.shape)):
            continue
        root = next((i for called in instruction.calls for i in found[called] if i.is_root), None)
        if instruction.op != "fusion" or root is None or root.op not in PASSING:
            wrong.append(f"{instruction.op} gives {instruction.shape} in {name}")
    return wrong


def large_shapes(dims, lanes: int) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
    """Shapes of the world's arrays over requests or slots in a batch, and those of all others."""
    large, small = set(), set()

    def look(annotation, shaped):
        if shaped is None:
            return
        annotation = next(iter(typing.get_args(annotation)), annotation)  # optional ones
        if not hasattr(annotation, "dim_str"):
            for name, inner in annotation.__annotations__.items():
                if (annotation, name) != (World, "source"):
                    look(inner, getattr(shaped, name))
            return
        axes = annotation.dim_str.split()
        shape = tuple(sorted((lanes, *shaped.shape)))
        (large if {"rows", "slot_width", "items", "segments", "entries", "marks"} & set(axes) else small).add(shape)

    look(World, jax.eval_shape(lambda: c.w.initial_world(dims)))
    return large, small


@pytest.mark.parametrize("name", [
    pytest.param(name, id=f"{name}-3", marks=[] if name == "vllm-v1" else pytest.mark.slow)
    for name in c.PRESETS])
def test_the_loop_body_copies_nothing_large(name):
    """No copy of an array over requests or slots, no transcendental, in the body of the inner loop."""
    flags, dims = simulator.preset(name), c.dims_of(name, 3)
    large, small = large_shapes(dims, c.LANES)
    assert len(large) >= 5 and not large & small, "other sizes are needed to tell arrays apart by their shapes"
    arguments = c.inputs(c.draw_many(1, flags, dims), flags, dims, "mixed")
    text = loop.run.lower(dims, *arguments).compile().as_text()
    found = computations(text)
    body = {i.op for _, _, i in reached(found, inner_body(found))}
    assert {"scatter", "gather", "fusion"} <= body, "this is not the loop body"
    assert problems(text, large) == []
    # Phases and the aiming of writes are a kernel each; beside them only the writes, and what the loop itself needs.
    body = found[inner_body(found)]
    kernels = re.findall(r" call\(.*?to_apply=%?([a-z]+)\S*,.*xla_cpu_small_call", text)
    assert sorted(kernels) == ["aim", "aim", "step"], "aim once more behind the loop"
    assert sum(i.op == "call" for i in body) == 2
    assert sum(i.op not in ("parameter", "tuple", "get-tuple-element", "bitcast", "constant") for i in body) < 60


def toy(violation: str):
    """A loop over an array of 64 x 25 that writes an entry a lane and reads one, and may break a rule."""
    def body(carry):
        i, array, total = carry
        lane, at = jnp.arange(64), (i + jnp.arange(64)) % 25
        if violation == "dense":
            array = jnp.where(array > 0, array * 0.5, total[:, None])
        if violation == "exp":
            total = jnp.exp(total)
        new = array.at[lane, at].set(total)
        # Reading what was there before the write keeps the old array alive.
        seen = (array if violation == "copy" else new)[lane, (at + 1) % 25]
        return i + 1, new, total + seen

    start = (jnp.int32(0), jnp.zeros((64, 25)), jnp.ones(64))
    return jax.jit(lambda start: lax.while_loop(lambda carry: carry[0] < 100, body, start)).lower(start)


@pytest.mark.parametrize("violation, says", [("copy", "copy"), ("dense", "gives f32[64,25]"), ("exp", "exponential"),
                                             ("", None)])
def test_a_violation_is_found(violation, says):
    found = problems(toy(violation).compile().as_text(), {(25, 64)})
    assert (found == []) if says is None else any(says in line for line in found)
