"""A workload as the loop reads it."""

from dataclasses import replace
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxsim.kernels import clock
from jaxsim.kernels.clock import Time
from jaxsim.kernels.timers import NEVER

PROMPT, OUTPUT, MAX_TOKENS, PLACE = range(4)
"""Columns of `Requests.table`."""

PARENT, FIRST_PART, PARTS, TILES = range(4)
"""Columns of `Requests.images`."""


class Requests(eqx.Module):
    """Requests sorted by arrival, padded, with one scratch row at the end.

    table: prompt, output, max_tokens and place in the order of (key, arrival) that a sorted waiting queue goes by;
    by_place: requests in that order; arrival: epoch, hi and lo of this request's arrival, then of the next one's;
    uniforms: the routers' random numbers; count: requests that are real. paths, bounds: of each prompt, the segments
    it shares with others from its start on (then the null segment), and in blocks where they begin and the last ends.
    successor, think: of sessions, the turn that follows each answer (-1: none), and the time from the answer before it
    to each turn, in whole seconds (-1 for a first turn, which has its own arrival) and ticks of the clock's grid;
    `paths` then go on through the answers. patience: of clients, how long they wait after every sending, in whole
    seconds and ticks; if that is for the first token only, how much longer for the last (-1: it is for the last).
    images: of requests with images (0 of all others but for the first column) whose part it is (-1: a request of its
    own), its first part and their number where others encode them, tiles; a part is a row behind all requests, of as
    many blocks as tiles. order: rows in the order they arrive, then the scratch row; a request with parts does not.
    home, noise: for routers that ask, the instance that a hash of each request falls to, and a draw from Gumbel's law
    for every instance. is_urgent: whether its priority is below 0, where that is asked. tenant: of each, with virtual
    token counters. before: of each turn the one before it in its session, which it begins with (-1: none), where that
    may be kept. slack: with the order of least slack, columns as in `jaxsim.engine.slack`. variant: that each is for,
    where instances serve several. limit: from each arrival to where it is due, less what goes with its work, where
    several prompts are partly computed, in parts as of `jaxsim.policy.partial_prefills`.
    """

    table: Int[Array, "rows 4"]
    by_place: Int[Array, " rows"]
    arrival: Float[Array, "rows 6"]
    uniforms: Float[Array, "rows 2"]
    count: Int[Array, ""]
    paths: Int[Array, "rows path"] | None = None
    bounds: Int[Array, "rows path+1"] | None = None
    successor: Int[Array, " rows"] | None = None
    think: Int[Array, "rows 2"] | None = None
    is_urgent: Int[Array, " rows"] | None = None
    patience: Int[Array, "rows 4"] | None = None
    images: Int[Array, "rows 4"] | None = None
    order: Int[Array, " rows+1"] | None = None
    home: Int[Array, " rows"] | None = None
    noise: Float[Array, "rows instances"] | None = None
    tenant: Int[Array, " rows"] | None = None
    before: Int[Array, " rows"] | None = None
    slack: Int[Array, "rows 2"] | None = None
    variant: Int[Array, " rows"] | None = None
    limit: Int[Array, " rows"] | None = None

    def stretched(self, factor: Float[Array, ""]) -> "Requests":
        """With every arrival time multiplied by a factor, and rounded to the arrival grid."""
        of, hi, lo = self.arrival[:, :3].T
        is_real = ~jnp.isinf(hi)
        unknown_zero = self.count >> 31
        long = clock.two_product(of * clock.EPOCH_S, factor, unknown_zero)
        short = clock.two_product(jnp.where(is_real, hi, 0.0), factor, unknown_zero)
        epochs = jnp.floor(long.hi / clock.EPOCH_S)
        offset = clock.add(clock.two_sum(long.hi - epochs * clock.EPOCH_S, short.hi), Time(long.lo, short.lo))
        offset = clock.round_to_arrival_grid(clock.add(offset, lo * factor))
        more = jnp.floor(offset.hi / clock.EPOCH_S)
        offset = clock.add(offset, -more * clock.EPOCH_S)
        stamps = jnp.stack([epochs + more, jnp.where(is_real, offset.hi, jnp.inf), offset.lo], axis=1)
        last = jnp.array([[0.0, jnp.inf, 0.0]])
        return replace(self, arrival=jnp.hstack([stamps, jnp.vstack([stamps[1:], last])]))


def pack_requests(arrival_s: Float[np.ndarray, " requests"], input_tokens: Int[np.ndarray, " requests"],
                  output_tokens: Int[np.ndarray, " requests"], max_tokens: Int[np.ndarray, " requests"] | None = None,
                  uniforms: Float[np.ndarray, "requests 2"] | None = None, num_requests: int | None = None,
                  priority: Int[np.ndarray, " requests"] | None = None,
                  paths: Int[np.ndarray, "requests path"] | None = None,
                  bounds: Int[np.ndarray, "requests path+1"] | None = None, num_segments: int = 0,
                  successor: Int[np.ndarray, " requests"] | None = None,
                  think_s: Float[np.ndarray, " requests"] | None = None,
                  patience: Int[np.ndarray, "requests 4"] | None = None,
                  images: "Images | None" = None,
                  home: Int[np.ndarray, " requests"] | None = None,
                  noise: Float[np.ndarray, "requests instances"] | None = None,
                  is_urgent: Bool[np.ndarray, " requests"] | None = None,
                  tenant: Int[np.ndarray, " requests"] | None = None, keeps_turns: bool = False,
                  slack: Int[np.ndarray, "requests 2"] | None = None,
                  variant: Int[np.ndarray, " requests"] | None = None,
                  limit: Int[np.ndarray, " requests"] | None = None) -> Requests:
    """Host arrays to `Requests`, padded to `num_requests` (and one scratch row), as NumPy leaves.

    arrival_s: seconds, sorted, float64; rounded to the arrival grid. Lengths are tokens.
    priority: the key of a sorted waiting queue, smaller is more urgent. tenant: with virtual token counters. paths,
    bounds: of prompts through shared segments (-1: none), of which there is room for `num_segments`. successor,
    think_s: of sessions, the turn behind each (-1: none), and the time between the answer before it and each, on the
    arrival grid. patience: as `jaxsim.policy.clients.patience` makes it. images: of requests with images; their parts
    are rows behind. home, noise, is_urgent, slack, variant, limit: as in `Requests`. keeps_turns: note the turn
    before each, where that is long enough to begin with it.
    """
    count = len(arrival_s)
    rows = (num_requests or count) + 1
    arrival_s = clock.round_arrivals_reference(arrival_s)
    table = np.ones((rows, 4), np.int32)
    by_place = np.arange(rows, dtype=np.int32)
    by_place[:count] = np.argsort(np.zeros(count) if priority is None else priority, kind="stable")
    table[by_place, PLACE] = np.arange(rows)
    table[:count, PROMPT] = input_tokens
    table[:count, OUTPUT] = output_tokens
    table[:count, MAX_TOKENS] = output_tokens if max_tokens is None else max_tokens
    arrival = np.zeros((rows + 1, 3), np.float32)
    arrival[count:, 1] = np.inf
    arrival[:count] = np.stack(clock.split_reference(arrival_s), axis=1)
    arrival = np.hstack([arrival[:-1], arrival[1:]])
    padded = np.zeros((rows, 2), np.float32)
    if uniforms is not None:
        padded[:count] = uniforms
    if paths is not None:
        behind = rows - count
        paths = np.pad(np.where(paths < 0, num_segments, paths), ((0, behind), (0, 0)), constant_values=num_segments)
        bounds = np.pad(bounds, ((0, behind), (0, 0)))
        paths, bounds = paths.astype(np.int32), bounds.astype(np.int32)
    before = None
    if keeps_turns:
        before = np.full(rows, -1, np.int32)
        begun = np.flatnonzero(successor >= 0)
        follows = successor[begun]
        is_whole = input_tokens[follows] >= np.asarray(input_tokens)[begun] + np.asarray(output_tokens)[begun]
        before[follows[is_whole]] = begun[is_whole]
    think = None
    if successor is not None:
        think = np.zeros((rows, 2), np.int32)
        ticks = np.rint(clock.round_arrivals_reference(think_s) / clock.GRID_S).astype(np.int64)
        think[:count] = np.stack(np.divmod(ticks, round(1 / clock.GRID_S)), axis=1)
        think[:count][~np.isin(np.arange(count), successor)] = -1, 0
        successor = np.pad(successor, (0, rows - count), constant_values=-1).astype(np.int32)
    if is_urgent is not None:
        is_urgent = np.pad(is_urgent, (0, rows - count)).astype(np.int32)
    if patience is not None:
        patience = np.pad(patience, ((0, rows - count), (0, 0)), constant_values=NEVER.seconds).astype(np.int32)
    if home is not None:
        home = np.pad(home, (0, rows - count)).astype(np.int32)
    if noise is not None:
        noise = np.pad(noise, ((0, rows - count), (0, 0))).astype(np.float32)
    if tenant is not None:
        tenant = np.pad(tenant, (0, rows - count)).astype(np.int32)
    if variant is not None:
        variant = np.pad(variant, (0, rows - count)).astype(np.int32)
    packed = Requests(table, by_place, arrival, padded, np.int32(count), paths, bounds, successor, think,
                      patience=patience, home=home, noise=noise, is_urgent=is_urgent, tenant=tenant, before=before,
                      variant=variant,
                      limit=None if limit is None else np.pad(limit, (0, rows - count)).astype(np.int32),
                      slack=None if slack is None else np.pad(slack, ((0, rows - count), (0, 0))).astype(np.int32))
    return packed if images is None else images.put_in(packed)



class Images(NamedTuple):
    """Images of requests on the host, with what encodes them.

    tiles: of each request, of all of its images; part_of, part_tiles: of each part, whose it is (rising) and its
    tiles; none where those that compute prompts encode. block_size: of the loop, in which a tile is a block.
    """

    tiles: Int[np.ndarray, " requests"]
    part_of: Int[np.ndarray, " parts"]
    part_tiles: Int[np.ndarray, " parts"]
    block_size: int = 1

    def put_in(self, packed: Requests) -> Requests:
        """Requests, padded for the parts as well, with these."""
        count, rows, num_parts = int(packed.count), len(packed.table), len(self.part_of)
        images = np.zeros((rows, 4), np.int32)
        images[:, PARENT] = -1
        images[:count, TILES] = self.tiles
        parts = np.arange(count, count + num_parts)
        images[parts, PARENT], images[parts, TILES] = self.part_of, self.part_tiles
        numbers = np.bincount(self.part_of, minlength=count)
        images[:count, PARTS] = numbers
        images[:count, FIRST_PART] = np.where(numbers > 0, count + np.cumsum(numbers) - numbers, 0)
        table, uniforms = packed.table.copy(), packed.uniforms.copy()
        table[parts, PROMPT] = self.part_tiles * self.block_size
        # A token there, and more to come elsewhere.
        table[parts, OUTPUT] = table[parts, MAX_TOKENS] = 2
        uniforms[parts] = uniforms[self.part_of]
        # Parts one after the other in the place of their request, whose rows are sorted by arrival.
        coming = np.concatenate([np.flatnonzero(numbers == 0), parts])
        place = np.concatenate([np.flatnonzero(numbers == 0), self.part_of])
        order = np.full(rows + 1, rows - 1, np.int32)
        order[:len(coming)] = coming[np.argsort(place, kind="stable")]
        return replace(packed, table=table, uniforms=uniforms, images=images, order=order)
