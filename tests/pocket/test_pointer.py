import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_pararnn.pocket.pointer import PointerMemory

EDGE = 999


def test_reading_moving_and_appending():
    memory = PointerMemory([7, 8], EDGE)
    assert memory.read(1) == 7
    memory.move(1, 1)
    memory.move(1, 1)
    assert memory.read(1) == EDGE
    memory.append(9)
    assert memory.read(1) == 9
    assert memory.read(2) == 7
    memory.jump_to_last(4)
    memory.append(10)
    assert memory.read(4) == 9


@given(st.lists(st.integers(0, 300), max_size=5), st.lists(st.sampled_from([-1, 1]), max_size=30))
def test_a_pointer_stays_within_one_entry_of_the_memory(entries, steps):
    memory, at = PointerMemory(entries, EDGE), 0
    for step in steps:
        memory.move(2, step)
        at = max(-1, min(len(entries), at + step))
        assert memory.read(2) == (entries[at] if 0 <= at < len(entries) else EDGE)


def test_an_empty_memory_reads_the_edge():
    memory = PointerMemory([], EDGE)
    memory.jump_to_last(1)
    assert memory.read(1) == EDGE


@pytest.mark.parametrize("pointer", [0, 5, -1])
def test_a_pointer_that_is_not_there(pointer):
    with pytest.raises(IndexError, match=f"there is no pointer {pointer}; they are numbered 1 to 4"):
        PointerMemory([1], EDGE).read(pointer)
