// Stands where codegen/tvm/gpu/device.cuh stands: the kernels as a program of this processor. The threads of
// a block are contexts that take turns; what lanes do together waits until all have come. Copies to shared
// memory arrive when they are waited for and not before, so that a missing wait shows.
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef signed char i8;
#define LLMC_EMULATED
#define __global__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static
#define __restrict__
#define DEVICE static inline
#define KERNEL extern "C" void

struct dim3_ {
  int x = 1, y = 1, z = 1;
};
struct uint4 {
  u32 x, y, z, w;
};
struct uint2 {
  u32 x, y;
};

namespace emulated {
struct Copy {
  void* to;
  const void* from;
  bool valid;
};
struct Barrier {
  int size = 0, come = 0, turn = 0;
};
struct Warp {
  Barrier barrier;
  u32 slots[32][8];
  const void* rows[32];
};
struct Thread {
  ucontext_t context;
  dim3_ at;
  bool done = false, held = false;  // by a barrier of the block
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
};
static dim3_ block_at, block_size;
static std::vector<Thread> threads;
static std::vector<Warp> warps;
static Barrier all;
static ucontext_t scheduler;
static int current;
static char* dynamic_shared;

static void pause() { swapcontext(&threads[current].context, &scheduler); }
static void wait(Barrier& b) {
  int turn = b.turn;
  if (++b.come == b.size) {
    b.come = 0;
    b.turn++;
    return;
  }
  threads[current].held = &b == &all;
  while (b.turn == turn) pause();
  threads[current].held = false;
}
static Warp& warp() { return warps[current / 32]; }
static int lane() { return current % 32; }
}  // namespace emulated

#define threadIdx (emulated::threads[emulated::current].at)
#define blockIdx emulated::block_at

static inline void __syncthreads() { emulated::wait(emulated::all); }
static inline float __uint_as_float(u32 u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline u32 __float_as_uint(float f) {
  u32 u;
  memcpy(&u, &f, 4);
  return u;
}
static inline float __int_as_float(int i) { return __uint_as_float((u32)i); }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }
static inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
  u32 r = 0;
  u8 bytes[8];
  memcpy(bytes, &a, 4), memcpy(bytes + 4, &b, 4);
  for (int i = 0; i < 4; i++) r |= (u32)bytes[selector >> 4 * i & 7] << 8 * i;
  return r;
}
static inline float __shfl_xor_sync(u32, float value, int mask) {
  emulated::Warp& w = emulated::warp();
  w.slots[emulated::lane()][0] = __float_as_uint(value);
  emulated::wait(w.barrier);
  float other = __uint_as_float(w.slots[emulated::lane() ^ mask][0]);
  emulated::wait(w.barrier);
  return other;
}

static inline u32 __ballot_sync(u32, bool set) {
  emulated::Warp& w = emulated::warp();
  w.slots[emulated::lane()][0] = set;
  emulated::wait(w.barrier);
  u32 mask = 0;
  for (int i = 0; i < 32; i++) mask |= w.slots[i][0] << i;
  emulated::wait(w.barrier);
  return mask;
}
static inline int __popc(u32 mask) { return __builtin_popcount(mask); }

DEVICE float half_to_float(u16 h) {
  _Float16 f;
  memcpy(&f, &h, 2);
  return (float)f;
}
DEVICE u16 float_to_half(float f) {
  _Float16 h = (_Float16)f;
  u16 u;
  memcpy(&u, &h, 2);
  return u;
}
DEVICE u32 pack_half2(float low, float high) { return float_to_half(low) | (u32)float_to_half(high) << 16; }
DEVICE u32 sub_half2(u32 a, u32 b) {
  return pack_half2(half_to_float(a) - half_to_float(b), half_to_float(a >> 16) - half_to_float(b >> 16));
}
DEVICE u32 mul_half2(u32 a, u32 b) {
  return pack_half2(half_to_float(a) * half_to_float(b), half_to_float(a >> 16) * half_to_float(b >> 16));
}
DEVICE float bfloat_to_float(u16 b) { return __uint_as_float((u32)b << 16); }
DEVICE u16 float_to_bfloat(float f) {
  u32 u = __float_as_uint(f);
  if (f != f) return 0x7fff;
  return (u16)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
DEVICE float exp2_fast(float x) { return exp2f(x); }

static inline void check_16(const void* address) {
  if ((uintptr_t)address % 16) {
    fprintf(stderr, "16 bytes at an address that is not aligned\n");
    abort();
  }
}
DEVICE uint4 load_16(const void* from) {
  check_16(from);
  return *(const uint4*)from;
}
DEVICE void store_16(void* to, uint4 four) {
  check_16(to);
  *(uint4*)to = four;
}

DEVICE void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  emulated::Warp& w = emulated::warp();
  int lane = emulated::lane(), g = lane / 4, t = lane % 4;
  u32* own = w.slots[lane];
  for (int i = 0; i < 4; i++) own[i] = a[i];
  own[4] = b0, own[5] = b1;
  emulated::wait(w.barrier);
  for (int i = 0; i < 4; i++) {
    int row = g + i / 2 * 8, column = 2 * t + i % 2;
    for (int k = 0; k < 16; k++) {
      u32 left = w.slots[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
      u32 right = w.slots[column * 4 + k % 8 / 2][4 + k / 8];
      c[i] = fmaf(half_to_float(left >> k % 2 * 16), half_to_float(right >> k % 2 * 16), c[i]);
    }
  }
  emulated::wait(w.barrier);
}

static inline void load_rows(u32 (&r)[4], const void* row, bool transposed) {
  emulated::Warp& w = emulated::warp();
  int lane = emulated::lane(), g = lane / 4, t = lane % 4;
  if ((uintptr_t)row % 16) {
    fprintf(stderr, "ldmatrix: a row is not aligned\n");
    abort();
  }
  w.rows[lane] = row;
  emulated::wait(w.barrier);
  for (int m = 0; m < 4; m++) {
    u16 pair[2];
    for (int i = 0; i < 2; i++)
      pair[i] = transposed ? ((const u16*)w.rows[8 * m + 2 * t + i])[g]
                           : ((const u16*)w.rows[8 * m + g])[2 * t + i];
    r[m] = pair[0] | (u32)pair[1] << 16;
  }
  emulated::wait(w.barrier);
}
DEVICE void load_matrices(u32 (&r)[4], const void* row) { load_rows(r, row, false); }
DEVICE void load_transposed(u32 (&r)[4], const void* row) { load_rows(r, row, true); }

DEVICE void copy_16(void* to, const void* from, bool valid) {
  if ((uintptr_t)to % 16 || (valid && (uintptr_t)from % 16)) {
    fprintf(stderr, "cp.async: not aligned\n");
    abort();
  }
  emulated::threads[emulated::current].open.push_back({to, from, valid});
}
DEVICE void commit_copies() {
  auto& own = emulated::threads[emulated::current];
  own.groups.push_back(own.open);
  own.open.clear();
}
template <int LEFT>
DEVICE void await_copies() {
  auto& groups = emulated::threads[emulated::current].groups;
  while ((int)groups.size() > LEFT) {
    for (auto& copy : groups.front()) {
      if (copy.valid) memcpy(copy.to, copy.from, 16);
      else memset(copy.to, 0, 16);
    }
    groups.erase(groups.begin());
  }
}
