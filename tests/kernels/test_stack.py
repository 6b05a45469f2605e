"""A stack of free places against a Python list."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsim.kernels import stack

PLACES, WIDTH = 6, 16


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 200), st.integers(0, 70))
def test_a_full_stack_gives_the_places_in_order(num_places, spare):
    row = stack.full(num_places, num_places + spare)
    assert row.dtype == np.int32 and row.shape == (num_places + spare,)
    taken = [int(stack.top(lambda at: row[int(at)], np.int32(size))) for size in range(num_places, 0, -1)]
    assert taken == list(range(num_places))


def test_the_top_of_an_empty_stack_is_an_entry():
    assert int(stack.top(lambda at: at, np.int32(0))) == 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, PLACES - 1)), max_size=40))
def test_a_stack_is_a_list(operations):
    """The lowest places first, then the last returned."""
    row, free, taken = np.array(stack.full(PLACES, WIDTH)), list(range(PLACES - 1, -1, -1)), []
    for is_taking, which in operations:
        if is_taking and free:
            place = int(stack.top(lambda at: row[int(at)], np.int32(len(free))))
            assert place == free.pop()
            taken.append(place)
        elif not is_taking and taken:
            place = taken.pop(which % len(taken))
            row[int(stack.push_at(np.int32(len(free)), np.bool_(True), WIDTH - 1))] = place
            free.append(place)
        # What is not meant lands in the spare entry.
        assert int(stack.push_at(np.int32(len(free)), np.bool_(False), WIDTH - 1)) == WIDTH - 1
    assert row[:len(free)].tolist() == free
