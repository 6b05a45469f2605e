"""Linked queues and lists against Python lists."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsim.kernels import queues

ITEMS = 12
SEEDS = settings(max_examples=40, deadline=None, derandomize=True)


def write(links, link):
    links = np.array(links)
    links[int(link[0])] = int(link[1])
    return links


def forward(front, links, length):
    items, item = [], int(front)
    for _ in range(length):
        items.append(item)
        item = int(links[item])
    return items


push_back, push_front = (jax.jit(partial(f, nowhere=ITEMS)) for f in (queues.push_back, queues.push_front))
pop_front = jax.jit(queues.pop_front)


@SEEDS
@given(st.lists(st.tuples(st.sampled_from(["back", "front", "pop"]), st.booleans()), max_size=60))
def test_a_queue_is_a_list(operations):
    """Also what is not meant: it changes nothing but the spare link."""
    links, want, spare = np.full(ITEMS + 1, -7), [], list(range(ITEMS))
    queue = queues.Queue(*(jnp.int32(x) for x in (3, 5, 0)))
    for kind, is_meant in operations:
        if kind == "pop":
            is_meant = is_meant and bool(want)
            following = links[int(queue.front)]
            queue = pop_front(queue, jnp.int32(following), jnp.bool_(is_meant))
            if is_meant:
                spare.append(want.pop(0))
        elif spare:
            item = spare[0]
            push = push_back if kind == "back" else push_front
            queue, link = push(queue, jnp.int32(item), jnp.bool_(is_meant))
            links = write(links, link)
            if is_meant:
                spare.pop(0)
                want.insert(0 if kind == "front" else len(want), item)
        assert int(queue.length) == len(want)
        assert forward(queue.front, links, len(want)) == want
        if want:
            assert int(queue.back) == want[-1]


remove = jax.jit(partial(queues.remove, nowhere=ITEMS))


@settings(SEEDS, max_examples=20)
@given(st.integers(0, 2**32))
def test_who_waits_may_leave_from_anywhere(seed):
    """A queue linked both ways, by the mirror images of its links; what is not meant changes nothing."""
    rng = np.random.default_rng(seed)
    ahead, back, want = np.full(ITEMS + 1, -7), np.full(ITEMS + 1, -7), []
    queue, seen = queues.Queue(*(jnp.int32(x) for x in (3, 5, 0))), set()
    for _ in range(120):
        item, is_meant = int(rng.integers(ITEMS)), bool(rng.random() < 0.8)
        if item in want:
            if want[0] == item and rng.random() < 0.3:
                queue, link = pop_front(queue, jnp.int32(ahead[item]), jnp.bool_(is_meant)), (ITEMS, 0)
            else:
                queue, link = remove(queue, jnp.int32(item), jnp.int32(back[item]), jnp.int32(ahead[item]),
                                     jnp.bool_(is_meant))
                seen.add((want[0] == item, want[-1] == item))
            if is_meant:
                want.remove(item)
        else:
            at_back = rng.random() < 0.7
            queue, link = (push_back if at_back else push_front)(queue, jnp.int32(item), jnp.bool_(is_meant))
            if is_meant:
                want.insert(len(want) if at_back else 0, item)
        link = tuple(jnp.int32(x) for x in link)
        ahead, back = write(ahead, link), write(back, queues.mirrored(link, ITEMS))
        assert int(queue.length) == len(want) and forward(queue.front, ahead, len(want)) == want
        assert not want or (int(queue.back) == want[-1] and forward(queue.back, back, len(want)) == want[::-1])
    assert {(False, False), (True, False), (False, True)} <= seen


append, unlink = (jax.jit(partial(f, nowhere=ITEMS)) for f in (queues.append, queues.unlink))


@settings(SEEDS, max_examples=20)
@given(st.integers(0, 2**32))
def test_a_list_linked_both_ways(seed):
    """Followed from its tail, which is how the last admitted is found after others have left.

    Items leave from anywhere and come back, with what their links said before.
    """
    rng = np.random.default_rng(seed)
    previous, following, want = np.full(ITEMS + 1, ITEMS), np.full(ITEMS + 1, ITEMS), []
    tail = jnp.int32(ITEMS)
    for _ in range(100):
        item, is_meant = int(rng.integers(ITEMS)), rng.random() < 0.8
        if item not in want:
            tail, back, ahead = append(tail, jnp.int32(item), jnp.bool_(is_meant))
            want += [item] if is_meant else []
        else:
            tail, back, ahead = unlink(tail, jnp.int32(item), jnp.int32(previous[item]),
                                       jnp.int32(following[item]), jnp.bool_(is_meant))
            if is_meant:
                want.remove(item)
        previous, following = write(previous, back), write(following, ahead)
        assert int(tail) == (want[-1] if want else ITEMS)
        assert forward(tail, previous, len(want)) == want[::-1]
        assert not want or forward(want[0], following, len(want)) == want
