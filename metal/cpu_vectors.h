// Several vectors in place of one: a cell whose every `float` is read as `VecGroup` takes them all through a step.
// A step is a chain of a hundred instructions that wait for each other, longer than what a core looks ahead;
// here those of independent vectors stand side by side. Comes after cpu.h and before the cell.

namespace pararnn {

constexpr int GROUP = 4;

struct VecGroup {
  Vec v[GROUP];
  VecGroup() = default;
  VecGroup(float all) {
    for (int i = 0; i < GROUP; ++i) v[i] = all;
  }
};

struct MaskGroup {
  Mask v[GROUP];
};

template <typename To = VecGroup, typename Function, typename... From>
inline To each(const Function& function, const From&... from) {
  To to;
  for (int i = 0; i < GROUP; ++i) to.v[i] = function(from.v[i]...);
  return to;
}

inline VecGroup operator+(VecGroup a, VecGroup b) {
  return each([](Vec x, Vec y) { return x + y; }, a, b);
}
inline VecGroup operator-(VecGroup a, VecGroup b) {
  return each([](Vec x, Vec y) { return x - y; }, a, b);
}
inline VecGroup operator*(VecGroup a, VecGroup b) {
  return each([](Vec x, Vec y) { return x * y; }, a, b);
}
inline VecGroup operator/(VecGroup a, VecGroup b) {
  return each([](Vec x, Vec y) { return x / y; }, a, b);
}
inline VecGroup operator-(VecGroup a) {
  return each([](Vec x) { return -x; }, a);
}
inline MaskGroup operator>(VecGroup a, VecGroup b) {
  return each<MaskGroup>([](Vec x, Vec y) { return x > y; }, a, b);
}
inline MaskGroup operator<(VecGroup a, VecGroup b) {
  return each<MaskGroup>([](Vec x, Vec y) { return x < y; }, a, b);
}
inline MaskGroup operator>=(VecGroup a, VecGroup b) {
  return each<MaskGroup>([](Vec x, Vec y) { return x >= y; }, a, b);
}
inline MaskGroup operator<=(VecGroup a, VecGroup b) {
  return each<MaskGroup>([](Vec x, Vec y) { return x <= y; }, a, b);
}
inline VecGroup choose(MaskGroup condition, VecGroup a, VecGroup b) {
  return each([](Mask m, Vec x, Vec y) { return choose(m, x, y); }, condition, a, b);
}

}  // namespace pararnn

namespace metal {

using pararnn::VecGroup;

inline VecGroup fabs(VecGroup x) {
  return pararnn::each([](Vec y) { return fabs(y); }, x);
}

namespace precise {

inline VecGroup exp(VecGroup x) {
  return pararnn::each([](Vec y) { return exp(y); }, x);
}
inline VecGroup tanh(VecGroup x) {
  return pararnn::each([](Vec y) { return tanh(y); }, x);
}
inline VecGroup log(VecGroup x) {
  return pararnn::each([](Vec y) { return log(y); }, x);
}
inline VecGroup sqrt(VecGroup x) {
  return pararnn::each([](Vec y) { return sqrt(y); }, x);
}

}  // namespace precise
}  // namespace metal
