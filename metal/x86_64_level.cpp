// Which microarchitecture level of x86-64 this processor has, 1 to 4, by cpuid, and by whether the system keeps the
// registers of its vector unit. A wheel brings the CPU backend compiled for several (mlx_pararnn/compute/prebuilt.py).

extern "C" int x86_64_level() {
  if (__builtin_cpu_supports("x86-64-v4")) return 4;
  if (__builtin_cpu_supports("x86-64-v3")) return 3;
  return __builtin_cpu_supports("x86-64-v2") ? 2 : 1;
}
