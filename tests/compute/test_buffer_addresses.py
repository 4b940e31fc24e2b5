"""Where Python's buffers stand: the CPU backend's C++ is given odd ones, by hypothesis."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from mlx_pararnn import get_cell
from mlx_pararnn.compute import cpu, cpu_token

pytestmark = pytest.mark.usefixtures("cpu_backend")


@pytest.fixture(scope="module")
def library():
    return cpu_token._library(get_cell("gru"), "float32")


@st.composite
def strided(draw):
    """An array of any type, read-only or not, and with any strides: from the end, with gaps, of 0."""
    dtype = draw(st.sampled_from(("?", "i1", "<f2", ">f4", "<i8", ">c16", "S5", "V3", "i4,f8")))
    shape = draw(arrays_of.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4))
    array = np.zeros(shape, dtype)
    how = draw(st.sampled_from(("as it is", "cut", "turned", "broadcast")))
    if how == "cut":
        array = array[draw(arrays_of.basic_indices(shape, allow_newaxis=True, allow_ellipsis=True))]
    elif how == "turned":
        array = array.transpose(draw(st.permutations(range(array.ndim))))
    elif how == "broadcast":
        array = np.broadcast_to(array, (draw(st.integers(1, 3)), *shape))
    array = np.asarray(array)
    if draw(st.booleans()):
        array.flags.writeable = False
    return array


@settings(max_examples=200, deadline=None)
@given(st.lists(strided(), max_size=12))
def test_each_is_where_it_is_or_is_not_row_contiguous(library, arrays):
    found = cpu.dense_addresses(library, arrays)
    for array, address in zip(arrays, found, strict=True):
        if array.size:
            assert address == (array.ctypes.data if array.flags.c_contiguous else None)
        else:  # there is nothing to read
            assert address in (array.ctypes.data, None)


@given(st.binary(min_size=1), st.integers(0, 3))
def test_other_buffers_are_let_go_also_where_one_is_none(library, content, place):
    growing, ended = bytearray(content), memoryview(content)
    ended.release()
    good = [growing, content, memoryview(content), mx.zeros(3)]
    assert all(cpu.dense_addresses(library, good))
    for bad, error in ((object(), TypeError), (ended, ValueError), (None, TypeError)):
        with pytest.raises(error):
            cpu.dense_addresses(library, [*good[:place], bad, *good[place:]])
    growing.append(1)  # BufferError while anyone holds it
