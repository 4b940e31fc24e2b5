// Where the numbers of Python's arrays stand, of many at once: asked one by one from Python that takes longer than
// a token of a small model. Nothing of Python is included or linked: it hands its two functions over.

namespace pararnn {

// Py_buffer of Python's stable ABI (3.11).
struct PyBuffer {
  void* data;
  void* object;
  ssize_t bytes, itemsize;
  int readonly, axes;
  char* format;
  ssize_t *shape, *strides, *suboffsets;
  void* internal;
};

struct PyBufferFunctions {
  int (*get)(void* object, PyBuffer* buffer, int flags);
  void (*release)(PyBuffer* buffer);
};

}  // namespace pararnn

// The address of each array that is row contiguous, else null. False, and Python has an exception, if an object is none.
extern "C" int buffer_addresses(const pararnn::PyBufferFunctions* python,
                                void* const* arrays,
                                int64_t count,
                                void** addresses) {
  constexpr int STRIDES = 0x0018;  // PyBUF_STRIDES
  for (int64_t i = 0; i < count; ++i) {
    pararnn::PyBuffer buffer;
    if (python->get(arrays[i], &buffer, STRIDES)) return 0;
    bool dense = true;
    ssize_t stride = buffer.itemsize;
    for (int axis = buffer.axes; axis-- > 0; stride *= buffer.shape[axis]) {
      dense = dense && (buffer.strides[axis] == stride || buffer.shape[axis] == 1);
    }
    addresses[i] = dense ? buffer.data : nullptr;
    python->release(&buffer);
  }
  return 1;
}
