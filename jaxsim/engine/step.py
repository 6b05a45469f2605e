"""One step of every scenario: gather what one event touches, fire the phases in order, say what to write back.

A step takes the earliest event (an iteration's end, an arrival, or a scheduling pass still under way), works on
that executor alone, and fires each phase at most once: enqueue one arrival, settle the iteration that ended, retire
one sequence, and, in the pass, preempt one victim or place one prompt, then start the next iteration. Work in bulk
is several steps at the same instant. An arrival at a busy executor and the end of the iteration it must wait for are
one step, if no other arrival comes between. The phases are written for one scenario.
"""

from dataclasses import replace
from functools import partial

import jax

from jaxsim.engine import phases, role_switching
from jaxsim.engine.common import Context, Params
from jaxsim.engine.note import note
from jaxsim.engine.touched import Touched
from jaxsim.engine.writes import Writes, apply, recall
from jaxsim.kernels import packed
from jaxsim.kernels.fence import kernel, stage
from jaxsim.spec.dims import Dims
from jaxsim.state.requests import Requests
from jaxsim.state.world import World


def step(dims: Dims, packing: packed.Packing, params: Params, requests: Requests, world: World, writes
         ) -> tuple[World, tuple]:
    """Advance every scenario of a batch by one step; one with nothing left to do steps to itself.

    writes: of the step before, packed. Returns the world with them, its scalars advanced, and what to write next.
    """
    def vmapped(phase, world, t):
        return jax.vmap(lambda *args: phase(context_of(dims, *args), args[3]))(params, requests, world, t)

    def first(_):
        return vmapped(phases.look, jax.vmap(recall)(world, packing.unpack(writes)), None)

    def last(t):
        progress, to_write = vmapped(note, world, t)
        return progress, packing.pack(to_write)

    def whole():
        t = stage(first, None, "look")
        for phase in PHASES:
            t = stage(partial(vmapped, phase, world), t, phase.__name__)
        return stage(last, t, "note")

    world = apply(dims, world, packing, writes)
    progress, to_write = kernel(whole, "step")
    return replace(world, **progress), to_write


def context_of(dims: Dims, params: Params, requests: Requests, world: World, t: Touched | None) -> Context:
    """What a phase reads, with the group of the executor that the step is about."""
    if dims.has_role_switching:
        params = role_switching.as_of_now(params, world)
    return Context(dims, params, requests, world, None if t is None else params.group(t.event.executor))


def writes_of_a_step(dims: Dims, params: Params, requests: Requests, world: World) -> Writes:
    """What a step of one scenario would write: shapes, nothing is computed."""
    def plain(params, requests, world):
        t = None
        for phase in (phases.look, *PHASES):
            t = phase(context_of(dims, params, requests, world, t), t)
        return note(context_of(dims, params, requests, world, t), t)[1]

    def one(tree):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), tree)

    return jax.eval_shape(plain, one(params), one(requests), one(world))


PHASES = (
    phases.receive, phases.open_door, phases.give_up, phases.settle, phases.retire, phases.open_pass, phases.look_up,
    phases.fill, phases.price, phases.launch)
"""In this order between `phases.look` and `note`."""
