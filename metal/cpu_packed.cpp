// Products with quantized matrices as a library of their own, so that a cell's token (cpu_token.cpp) is compiled without
// them; comes after cpu.h, cpu_linear.h and cpu_quantized.h. PARARNN_FORMATS(F) lists the formats as F(bits, group).

namespace pararnn {
namespace {  // else the linker would take `all` of another library, which was loaded for other formats, for this one's

template <typename T>
const PackedProduct<T>* packed_product(int64_t bits, int64_t group) {
#define PARARNN_PRODUCT(BITS, GROUP)                                                                          \
  if (bits == BITS && group == GROUP) {                                                                       \
    static const PackedProduct<T> all{Quantized<BITS, GROUP>::arranged_size, Quantized<BITS, GROUP>::arrange, \
                                      Quantized<BITS, GROUP>::template product_rows<T>};                      \
    return &all;                                                                                              \
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
