// Matrix-vector products on a CPU with weights of 2 to 8 bits, packed as MLX's affine quantization packs them;
// comes after cpu_linear.h.
//
// A row is one stream of bits, the lowest first; each GROUP of its weights has a scale and a bias, weight = scale *
// q + bias. A lane owns as many words as hold whole numbers, so that one shift serves a whole vector; x is put in the
// order that follows, once for all rows. The bias needs no more of x than its sum over each group.

#include <type_traits>
#include <utility>

namespace pararnn {

#define MATRIX_FIELDS(FIELD)                                                           \
  FIELD(const void*, weight) /* rows of numbers; with bits, of words of packed ones */ \
  FIELD(const void*, scales) /* of each row one a group */                             \
  FIELD(const void*, biases) /* the same */                                            \
  FIELD(int64_t, bits)       /* of a packed weight; 0: not quantized */                \
  FIELD(int64_t, group)      /* weights that share a scale and a bias */
PARARNN_STRUCT(Matrix, MATRIX_FIELDS)

inline float sum_of(Vec x) {
  typedef float Four __attribute__((vector_size(16)));
  Four parts[LANES / 4];
  memcpy(parts, &x, sizeof parts);
  for (int i = 1; i < LANES / 4; ++i) parts[0] += parts[i];
  return (parts[0][0] + parts[0][1]) + (parts[0][2] + parts[0][3]);
}

// from[0] in the first EACH lanes, from[1] in the next, and so on; there are `count` of them.
template <int EACH, typename T, int... LANE>
inline Vec repeated(const T* from, int count, std::integer_sequence<int, LANE...>) {
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int16_t> Raw;
  typedef Raw Raws __attribute__((vector_size(LANES * sizeof(Raw))));
  constexpr Raws PLACE = {LANE / EACH...};
  Raws all{};
  for (int i = 0; i < LANES / EACH; ++i) {
    if (i >= count) break;
    Raw one;
    memcpy(&one, from + i, sizeof one);
    all = PLACE >= Raw(i) ? one - Raws{} : all;
  }
  return load(reinterpret_cast<const T*>(&all), LANES);
}

template <int BITS, int GROUP>
struct Quantized {
  static constexpr int WORDS = 32 % BITS == 0 ? 1 : BITS == 6 ? 3 : BITS;  // a lane's
  static constexpr int VALUES = 32 * WORDS / BITS;                         // in them
  static constexpr int BLOCK = VALUES * LANES;
  static constexpr int LANES_A_GROUP = GROUP / VALUES;
  // A row of each of so many parts of a matrix at once: as many streams from memory hide more of its latency than one.
  static constexpr int PARTS = 4, AHEAD = 2;
  static constexpr int COLUMNS_AT_ONCE = 4;

  static int64_t blocks(int64_t width) { return (width + BLOCK - 1) / BLOCK; }

  static int64_t padded_groups(int64_t width) { return (width / GROUP + LANES - 1) / LANES * LANES; }

  // What a product reads of one x: its numbers in order, 0 after the last, and their sums over groups.
  static int64_t arranged_size(int64_t width) { return blocks(width) * BLOCK + padded_groups(width); }

  static void arrange(const float* x, int64_t width, float* to) {
    for (int64_t first = 0; first < width; first += BLOCK, to += BLOCK) {
      for (int s = 0; s < VALUES; ++s) {
        for (int lane = 0; lane < LANES; ++lane) {
          const int64_t i = first + lane * VALUES + s;
          to[s * LANES + lane] = i < width ? x[i] : 0.0f;
        }
      }
    }
    for (int64_t g = 0; g < width / GROUP; ++g) {
      Vec sum(0.0f);
      vectors(GROUP, [&](int64_t i, int n) { sum = sum + load(x + g * GROUP + i, n); });
      to[g] = sum_of(sum);
    }
    pad(to, width);
  }

  // Sums over no group are read with biases of 0: no older NaN may stand there.
  static void pad(float* sums, int64_t width) {
    for (int64_t g = width / GROUP; g % LANES; ++g) sums[g] = 0.0f;
  }

  // the words of `lanes` lanes, 0 in the others
  static void load_words(const uint32_t* from, int lanes, Words* to) {
    if (WORDS == 1) {
      to[0] = load_lanes<Words>(from, lanes);
    } else {
      for (int word = 0; word < WORDS; ++word) {
        to[word] = Words{};
        for (int lane = 0; lane < lanes; ++lane) to[word][lane] = from[lane * WORDS + word];
      }
    }
  }

  // the lanes' numbers S
  template <int S>
  static Floats value(const Words* words) {
    constexpr int WORD = S * BITS / 32, SHIFT = S * BITS % 32;
    Words bits = words[WORD] >> SHIFT;
    if constexpr (SHIFT + BITS > 32) bits |= words[WORD + 1] << (32 - SHIFT);
#if LANES == 16 && defined(__AVX512F__)
    if constexpr (BITS <= 4) {  // one instruction for two: a place in a table of 16 is the lowest four bits
      constexpr int MASK = (1 << BITS) - 1;
      constexpr Floats NUMBERS = {0 & MASK,  1 & MASK,  2 & MASK,  3 & MASK, 4 & MASK,  5 & MASK,
                                  6 & MASK,  7 & MASK,  8 & MASK,  9 & MASK, 10 & MASK, 11 & MASK,
                                  12 & MASK, 13 & MASK, 14 & MASK, 15 & MASK};
      return (Floats)_mm512_permutexvar_ps((__m512i)bits, (__m512)NUMBERS);
    }
#endif
    if constexpr (SHIFT + BITS != 32) bits &= (1u << BITS) - 1;
    return __builtin_convertvector((Bits)bits, Floats);  // signed, which more machines convert
  }

  template <typename T>
  static Vec scales_of(const T* scales, int lanes) {
    constexpr int EACH = LANES_A_GROUP < LANES ? LANES_A_GROUP : LANES;
    const int groups = (lanes + EACH - 1) / EACH;
    return repeated<EACH>(scales, groups, std::make_integer_sequence<int, LANES>{});
  }

  // Brings what comes AHEAD rows later into the cache.
  static void fetch(const uint32_t* at, int64_t row_words) { __builtin_prefetch(at + AHEAD * row_words, 0, 3); }

  // sums[r][c] += what the block at number i of the rows r comes to with the columns c
  template <int ROWS, int COLUMNS, typename T, int... S>
  static void add_block(const uint32_t* const* rows,
                        const T* const* scales,
                        const float* x,
                        int64_t x_stride,
                        int64_t i,
                        int lanes,
                        Vec (*sums)[COLUMNS],
                        std::integer_sequence<int, S...>) {
    for (int r = 0; r < ROWS; ++r) {
      Words words[WORDS];
      load_words(rows[r] + i / VALUES * WORDS, lanes, words);
      Floats dots[COLUMNS] = {};
      const auto add = [&](Floats m, const float* at) {
        for (int c = 0; c < COLUMNS; ++c) dots[c] = dots[c] + m * load(at + c * x_stride, LANES).v;
      };
      (add(value<S>(words), x + i + S * LANES), ...);
      const Vec scale = scales_of(scales[r] + i / GROUP, lanes);
      for (int c = 0; c < COLUMNS; ++c) sums[r][c].v = sums[r][c].v + scale.v * dots[c];
    }
  }

  // y[c * y_stride + r * apart] = row r * apart times the arranged x at c * x_stride
  template <int ROWS, int COLUMNS, typename T>
  static void dot_products(const uint32_t* weight,
                           const T* scales,
                           const T* biases,
                           int64_t apart,
                           const float* x,
                           int64_t x_stride,
                           int64_t width,
                           float* y,
                           int64_t y_stride) {
    const int64_t row_words = width / 32 * BITS, groups = width / GROUP;
    const uint32_t* rows[ROWS];
    const T* row_scales[ROWS];
    Vec sums[ROWS][COLUMNS];
    for (int r = 0; r < ROWS; ++r) {
      rows[r] = weight + r * apart * row_words, row_scales[r] = scales + r * apart * groups;
      for (int c = 0; c < COLUMNS; ++c) sums[r][c] = Vec(0.0f);
    }
    constexpr auto EACH = std::make_integer_sequence<int, VALUES>{};
    int64_t i = 0;
    for (; i + BLOCK <= width; i += BLOCK) {
      for (int r = 0; r < ROWS; ++r) fetch(rows[r] + i / VALUES * WORDS, row_words);
      add_block<ROWS, COLUMNS>(rows, row_scales, x, x_stride, i, LANES, sums, EACH);
    }
    if (i < width)
      add_block<ROWS, COLUMNS>(rows, row_scales, x, x_stride, i, int((width - i) / VALUES), sums, EACH);
    finish<ROWS, COLUMNS>(sums, biases, groups, apart, x + blocks(width) * BLOCK, x_stride, y, y_stride);
  }

  // Adds what the biases come to with x's sums over groups; then each row's lanes.
  template <int ROWS, int COLUMNS, typename T>
  static void finish(Vec (*sums)[COLUMNS],
                     const T* biases,
                     int64_t groups,
                     int64_t apart,
                     const float* group_sums,
                     int64_t x_stride,
                     float* y,
                     int64_t y_stride) {
    for (int r = 0; r < ROWS; ++r) {
      vectors(groups, [&](int64_t g, int n) {
        const Floats bias = load(biases + r * apart * groups + g, n).v;
        for (int c = 0; c < COLUMNS; ++c) {
          sums[r][c].v = sums[r][c].v + bias * load(group_sums + c * x_stride + g, LANES).v;
        }
      });
      for (int c = 0; c < COLUMNS; ++c) y[c * y_stride + r * apart] = sum_of(sums[r][c]);
    }
  }

  // y[b * y_stride + begin ... end) = rows of a matrix, `first` being the one for y[0], times x[b], arranged at
  // b * x_stride, as `Form` arranges it
  template <typename T, typename Form = Quantized>
  static void product_rows(const Matrix& matrix,
                           int64_t first,
                           const float* x,
                           int64_t x_stride,
                           int64_t width,
                           int64_t B,
                           float* y,
                           int64_t y_stride,
                           int64_t begin,
                           int64_t end) {
    const int64_t groups = width / GROUP, part = (end - begin) / PARTS;
    const auto multiply = [&](int64_t row, auto rows) {
      const int64_t place = first + row;
      const uint32_t* weight = static_cast<const uint32_t*>(matrix.weight) + place * (width / 32 * BITS);
      const T* scales = static_cast<const T*>(matrix.scales) + place * groups;
      const T* biases = static_cast<const T*>(matrix.biases) + place * groups;
      constexpr int ROWS = decltype(rows)::value;
      const auto columns = [&](int64_t b, auto count) {
        constexpr int COLUMNS = decltype(count)::value;
        Form::template dot_products<ROWS, COLUMNS>(weight, scales, biases, part, x + b * x_stride, x_stride,
                                                   width, y + b * y_stride + row, y_stride);
      };
      int64_t b = 0;
      for (; b + COLUMNS_AT_ONCE <= B; b += COLUMNS_AT_ONCE) {
        columns(b, std::integral_constant<int, COLUMNS_AT_ONCE>{});
      }
      for (; b < B; ++b) columns(b, std::integral_constant<int, 1>{});
    };
    for (int64_t row = begin; row < begin + part; ++row) multiply(row, std::integral_constant<int, PARTS>{});
    for (int64_t row = begin + PARTS * part; row < end; ++row) multiply(row, std::integral_constant<int, 1>{});
  }
};

// The products of one format with scales of type T, as functions: another library has them (cpu_packed.cpp).
template <typename T>
struct PackedProduct {
  int64_t (*arranged_size)(int64_t width);
  void (*arrange)(const float* x, int64_t width, float* to);
  decltype(&Quantized<4, 64>::product_rows<T>) product_rows;
};

// One weight: of a row of `width` ones, the one at number i.
template <typename T>
inline float unpacked(const Matrix& matrix, int64_t width, int64_t row, int64_t i) {
  const int64_t bit = i * matrix.bits, place = row * (width / matrix.group) + i / matrix.group;
  const uint32_t* words =
      static_cast<const uint32_t*>(matrix.weight) + row * (width / 32 * matrix.bits) + bit / 32;
  uint64_t q = words[0];
  if (bit % 32 + matrix.bits > 32) q |= uint64_t(words[1]) << 32;
  q = (q >> (bit % 32)) & ((1u << matrix.bits) - 1);
  const auto number = [&](const void* from) { return load(static_cast<const T*>(from) + place, 1).v[0]; };
  return number(matrix.scales) * float(q) + number(matrix.biases);
}

}  // namespace pararnn
