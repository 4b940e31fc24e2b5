// Products with quantized matrices as a library of their own, so that a cell's token (cpu_token.cpp) is compiled without
// them; comes after cpu.h, cpu_linear.h, cpu_quantized.h and cpu_digits.h. PARARNN_FORMATS(F) lists the formats as
// F(bits, group).

namespace pararnn {
namespace {  // else the linker would take `all` of another library, which was loaded for other formats, for this one's

template <typename Form, typename T>
PackedProduct<T> products_of() {
  return {Form::arranged_size, Form::arrange, Form::template product_rows<T, Form>};
}

// By what this processor has: a library for a level of x86-64 asks for no more than that level.
template <int BITS, int GROUP, typename T>
PackedProduct<T> fastest() {
#ifdef PARARNN_DIGITS
  if constexpr (BITS == 4 || BITS == 8) {
    constexpr int DIGITS = sizeof(T) == sizeof(float) ? 3 : 2;
    if (__builtin_cpu_supports("avx512vnni")) return products_of<Digits<BITS, GROUP, DIGITS>, T>();
  }
#endif
  return products_of<Quantized<BITS, GROUP>, T>();
}

template <typename T>
const PackedProduct<T>* packed_product(int64_t bits, int64_t group) {
#define PARARNN_PRODUCT(BITS, GROUP)                               \
  if (bits == BITS && group == GROUP) {                            \
    static const PackedProduct<T> all = fastest<BITS, GROUP, T>(); \
    return &all;                                                   \
  }
  PARARNN_FORMATS(PARARNN_PRODUCT)
#undef PARARNN_PRODUCT
  return nullptr;
}

}  // namespace
}  // namespace pararnn

// The products of a format for scales of a dtype; null where there is no code for it.
extern "C" const void* packed_float32(int64_t bits, int64_t group) {
  return pararnn::packed_product<float>(bits, group);
}
extern "C" const void* packed_float16(int64_t bits, int64_t group) {
  return pararnn::packed_product<pararnn::Float16>(bits, group);
}
extern "C" const void* packed_bfloat16(int64_t bits, int64_t group) {
  return pararnn::packed_product<pararnn::Bfloat16>(bits, group);
}
