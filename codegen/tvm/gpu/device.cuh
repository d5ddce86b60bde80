// What the kernels say in PTX, and nothing else: numbers of 16 bits, tensor cores, copies that run beside the
// program. Everything above is plain C++, so that a test can put other definitions in this file's place and
// run the kernels without a GPU. No header of CUDA is read: NVRTC comes without them.
//
// PTX ISA, "Warp Level Matrix Instructions" and "Data Movement and Conversion Instructions".

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef signed char i8;

#ifdef __CUDACC_RTC__
typedef i8 int8_t;
typedef u8 uint8_t;
typedef short int16_t;
typedef u16 uint16_t;
typedef int int32_t;
typedef u32 uint32_t;
typedef i64 int64_t;
typedef unsigned long long uint64_t;
#else
#include <stdint.h>
#endif

#define DEVICE static __device__ __forceinline__
#define KERNEL extern "C" __global__ void

// -- numbers of 16 bits, as their bits ---------------------------------------------------------------------
DEVICE float half_to_float(u16 h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}

DEVICE u16 float_to_half(float f) {
  u16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}

// Two numbers in a register, the first in its low half.
DEVICE u32 pack_half2(float low, float high) {
  u32 h;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(h) : "f"(high), "f"(low));
  return h;
}

DEVICE u32 sub_half2(u32 a, u32 b) {
  u32 d;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

DEVICE u32 mul_half2(u32 a, u32 b) {
  u32 d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

DEVICE float bfloat_to_float(u16 b) { return __uint_as_float((u32)b << 16); }

DEVICE u16 float_to_bfloat(float f) {
  u16 b;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(b) : "f"(f));
  return b;
}

// 2^x, to some 2^-22 of the result.
DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// -- 16 bytes at an address that is a multiple of 16 ---------------------------------------------------------
DEVICE uint4 load_16(const void* from) { return *(const uint4*)from; }

DEVICE void store_16(void* to, uint4 four) { *(uint4*)to = four; }

// -- tensor cores ------------------------------------------------------------------------------------------
// c [16, 8] += a [16, 16] · b [16, 8]: float16 times float16, added as float32. With g = lane / 4 and
// t = lane % 4, a lane holds a[g][2t, +1], a[g + 8][2t, +1], a[g][2t + 8, +9], a[g + 8][2t + 8, +9];
// b[2t, +1][g], b[2t + 8, +9][g]; c[g][2t, +1], c[g + 8][2t, +1].
DEVICE void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four matrices [8, 8] of 16-bit numbers: lane l names the address of row l % 8 of matrix l / 8, and gets
// elements [g][2t, +1] of each, or, transposed, [2t, +1][g].
DEVICE void load_matrices(u32 (&r)[4], const void* row) {
  u32 address = (u32)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

DEVICE void load_transposed(u32 (&r)[4], const void* row) {
  u32 address = (u32)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// -- copies from global to shared memory, 16 bytes a lane
// ---------------------------------------------------- Where `valid` is false nothing is read and zeros are
// written.
DEVICE void copy_16(void* to, const void* from, bool valid) {
  u32 address = (u32)__cvta_generic_to_shared(to);
  int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes)
               : "memory");
}

DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// All but the last `LEFT` groups have arrived; other threads' after a barrier.
template <int LEFT>
DEVICE void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}
