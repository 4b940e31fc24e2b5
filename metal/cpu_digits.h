// The products of cpu_quantized.h on x86-64 with AVX-512 VNNI, for weights of 4 and 8 bits: four times as many
// multiplications an instruction as of floats, since it multiplies bytes and adds in 32 bits, exactly.
//
// x becomes whole numbers: in each group of weights multiples of a step, a fraction of the group's largest number. Of
// each number its DIGITS digits of base 256 are multiplied, one after the other. Three keep as much of x as the largest
// number's float does; two, for scales of 16 bits, more than 16 bits of x would. 32 bits hold their sum exactly (three
// and weights of 8 bits: that of the first two, to which the lowest digit's is added as a float).

#if LANES == 16 && defined(__AVX512BW__)
#define PARARNN_DIGITS __attribute__((target("avx512vnni")))

namespace pararnn {

template <int BITS, int GROUP, int DIGITS>
struct Digits : Quantized<BITS, GROUP> {
  typedef Quantized<BITS, GROUP> Base;
  static constexpr int VALUES = Base::VALUES, BLOCK = Base::BLOCK;
  static constexpr int BYTES = 64;
  static constexpr bool ALONE = BITS == 8 && DIGITS == 3;  // the lowest digit, in a sum of its own
  static constexpr int A_BYTE = 8 / BITS;                  // weights in it
  static constexpr int X_BLOCK = DIGITS * BLOCK / 4;       // digits as floats
  // The largest number in steps: digits of -128 to 127 hold it, whatever is lost in 1 / step.
  static constexpr float MOST = DIGITS == 3 ? 8.355e6f : 3.2638e4f;
  // A group without a larger number counts as 0: its step would be denormal.
  static constexpr float LEAST = 1e-30f;

  // What a product reads of one x: its digits, block after block, its sums over groups, and each group's step.
  static int64_t arranged_size(int64_t width) {
    return Base::blocks(width) * X_BLOCK + 2 * Base::padded_groups(width);
  }

  static void arrange(const float* x, int64_t width, float* to) {
    const int64_t groups = width / GROUP;
    float* sums = to + Base::blocks(width) * X_BLOCK;
    float* steps = sums + Base::padded_groups(width);
    for (int64_t g = 0; g < groups; ++g) {
      const float step = step_of(x + g * GROUP);
      // What the digits say is summed, not x: so what they leave out meets the weights less their bias's mean.
      __m512i sum = _mm512_setzero_si512();
      for (int i = 0; i < GROUP; i += LANES) {
        sum = _mm512_add_epi32(sum, number_of(load(x + g * GROUP + i, LANES).v, per_step(step)));
      }
      steps[g] = step;
      sums[g] = step * float(_mm512_reduce_add_epi32(sum));
    }
    Base::pad(sums, width);
    Base::pad(steps, width);
    for (int64_t first = 0; first < width; first += BLOCK, to += X_BLOCK) {
      // Byte 4 lane + i of a vector: the weights A_BYTE (4 lane + i) on, of which `s` is at a time.
      for (int s = 0; s < A_BYTE; ++s) {
        for (int part = 0; part < BYTES / LANES; ++part) {
          const int64_t from = first + part * LANES * A_BYTE + s;
          Floats v;
          for (int i = 0; i < LANES; ++i) v[i] = from + i * A_BYTE < width ? x[from + i * A_BYTE] : 0.0f;
          const int64_t group = (first + part * LANES * A_BYTE) / GROUP;
          __m512i number = number_of(v, group < groups ? per_step(steps[group]) : 0.0f);
          for (int digit = DIGITS - 1; digit >= 0; --digit) {  // the lowest first
            const __m128i low = _mm512_cvtepi32_epi8(number);
            memcpy(reinterpret_cast<char*>(to) + (digit * A_BYTE + s) * BYTES + part * LANES, &low, sizeof low);
            number = _mm512_srai_epi32(_mm512_sub_epi32(number, _mm512_cvtepi8_epi32(low)), 8);
          }
        }
      }
    }
  }

  // 0: nothing is there, or nothing that is finite
  static float per_step(float step) { return step > 0.0f && step < INFINITY ? 1.0f / step : 0.0f; }

  static __m512i number_of(Floats x, float per_step) {
    return _mm512_cvtps_epi32((__m512)(per_step > 0.0f ? x * per_step : Floats{}));
  }

  // Of a group; NaN if one of its numbers is that or infinite.
  static float step_of(const float* x) {
    Floats most{}, sum{};
    for (int i = 0; i < GROUP; i += LANES) {
      const Vec v = load(x + i, LANES), size = metal::fabs(v);
      most = size.v > most ? size.v : most;
      sum += v.v - v.v;  // not a number where v is none or infinite
    }
    float largest = sum_of(sum);
    for (int i = 0; i < LANES; ++i) largest = most[i] > largest ? most[i] : largest;
    return largest < LEAST ? 0.0f : largest / MOST;
  }

  // sums[r][c] += what the block of `lanes` lanes at number i of the rows r comes to with the columns c; `factors` are
  // scale times step of the LANES groups that the block's are among
  template <int ROWS, int COLUMNS>
  PARARNN_DIGITS static inline void add_block(const uint32_t* weight,
                                              int64_t row_words,
                                              int64_t apart,
                                              const float* x,
                                              int64_t x_stride,
                                              const __m512 (*factors)[COLUMNS],
                                              int64_t i,
                                              int lanes,
                                              Vec (*sums)[COLUMNS]) {
    constexpr int EACH = Base::LANES_A_GROUP < LANES ? Base::LANES_A_GROUP : LANES;
    constexpr Bits FIRST = {0 / EACH, 1 / EACH, 2 / EACH,  3 / EACH,  4 / EACH,  5 / EACH,  6 / EACH,  7 / EACH,
                            8 / EACH, 9 / EACH, 10 / EACH, 11 / EACH, 12 / EACH, 13 / EACH, 14 / EACH, 15 / EACH};
    const __m512i places = (__m512i)(FIRST + int32_t(i / GROUP));  // of the lanes' factors, modulo LANES
    weight += i / VALUES, x += i / BLOCK * X_BLOCK;
    const __m512i low = _mm512_set1_epi8(15);
    for (int r = 0; r < ROWS; ++r) {
      const uint32_t* row = weight + r * apart * row_words;
      Base::fetch(row, row_words);
      Words words;
      Base::load_words(row, lanes, &words);
      __m512i weights[A_BYTE] = {(__m512i)words};
      if (BITS == 4) {
        weights[A_BYTE - 1] = _mm512_and_si512(_mm512_srli_epi32(weights[0], 4), low);
        weights[0] = _mm512_and_si512(weights[0], low);
      }
      for (int c = 0; c < COLUMNS; ++c) {
        const float* digits = x + c * x_stride;
        __m512i total = _mm512_setzero_si512(), lowest = total;
        for (int digit = 0; digit < DIGITS; ++digit) {
          __m512i& sum = ALONE && digit == DIGITS - 1 ? lowest : total;
          sum = _mm512_slli_epi32(sum, 8);
          for (int s = 0; s < A_BYTE; ++s) {
            const __m512i of_x = _mm512_loadu_si512(digits + (digit * A_BYTE + s) * (BYTES / 4));
            sum = _mm512_dpbusd_epi32(sum, weights[s], of_x);
          }
        }
        __m512 product = _mm512_cvtepi32_ps(total);
        if (ALONE) product = _mm512_fmadd_ps(product, _mm512_set1_ps(256), _mm512_cvtepi32_ps(lowest));
        const __m512 factor = _mm512_permutexvar_ps(places, factors[r][c]);
        sums[r][c].v = sums[r][c].v + (Floats)factor * (Floats)product;
      }
    }
  }

  // as Quantized::dot_products
  template <int ROWS, int COLUMNS, typename T>
  PARARNN_DIGITS static void dot_products(const uint32_t* weight,
                                          const T* scales,
                                          const T* biases,
                                          int64_t apart,
                                          const float* x,
                                          int64_t x_stride,
                                          int64_t width,
                                          float* y,
                                          int64_t y_stride) {
    const int64_t row_words = width / 32 * BITS, groups = width / GROUP;
    const float *group_sums = x + Base::blocks(width) * X_BLOCK, *steps = group_sums + Base::padded_groups(width);
    Vec sums[ROWS][COLUMNS];
    for (int r = 0; r < ROWS; ++r) {
      for (int c = 0; c < COLUMNS; ++c) sums[r][c] = Vec(0.0f);
    }
    for (int64_t g = 0; g < groups; g += LANES) {
      const int n = groups - g < LANES ? int(groups - g) : LANES;
      __m512 factors[ROWS][COLUMNS];
      for (int r = 0; r < ROWS; ++r) {
        const Vec scale = load(scales + r * apart * groups + g, n);
        for (int c = 0; c < COLUMNS; ++c) {
          factors[r][c] = (__m512)(scale * load(steps + c * x_stride + g, LANES)).v;
        }
      }
      int64_t i = g * GROUP;
      const int64_t end = i + n * GROUP;
      for (; i + BLOCK <= end; i += BLOCK) {
        add_block<ROWS, COLUMNS>(weight, row_words, apart, x, x_stride, factors, i, LANES, sums);
      }
      if (i < end) {
        const int lanes = int((end - i) / VALUES);
        add_block<ROWS, COLUMNS>(weight, row_words, apart, x, x_stride, factors, i, lanes, sums);
      }
    }
    Base::template finish<ROWS, COLUMNS>(sums, biases, groups, apart, group_sums, x_stride, y, y_stride);
  }
};

}  // namespace pararnn
#endif
