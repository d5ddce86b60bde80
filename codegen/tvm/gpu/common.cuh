// What several kernels use.

#ifdef LLMC_EMULATED
#define DEVICE_MEMBER
#else
#define DEVICE_MEMBER __device__ __forceinline__
#endif

#define NONE (-__int_as_float(0x7f800000))

enum Kind { FLOAT32, FLOAT16, BFLOAT16, INT8, FLOAT8 };

// Two numbers of float8_e4m3fn in bits 0 to 7 and 16 to 23 as two of float16, times 2^-8: that is what
// their exponents say there, in numbers below the normal ones too. Only NaN, all ones, would be a number
// there: the sum is 0x4000 for it, the exponent's bit that is missing.
DEVICE u32 float8_to_half2(u32 two) {
  u32 size = (two & 0x007f007f) << 7;
  return (two & 0x00800080) << 8 | size | ((size + 0x00800080) & 0x40004000);
}

// To the nearest, ties to even, no further than the largest number; NaN stays one.
DEVICE u8 float_to_float8(float f) {
  u32 bits = __float_as_uint(f), sign = bits >> 24 & 0x80, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return (u8)(sign | 0x7f);
  if (size > 0x43e00000) size = 0x43e00000;  // 448
  // Below the normal numbers: multiples of 2^-9, which is what the last bit of 2^14 + x is worth.
  if (size < 0x3c800000) return (u8)(sign | (__float_as_uint(__uint_as_float(size) + 16384.0f) & 15));
  return (u8)(sign | ((size + (size >> 20 & 1) + 0x7ffff >> 20) - (127 - 7 << 3)));
}

template <int KIND>
DEVICE float load(const void* data, i64 at) {
  if constexpr (KIND == FLOAT32) return ((const float*)data)[at];
  if constexpr (KIND == FLOAT16) return half_to_float(((const u16*)data)[at]);
  if constexpr (KIND == BFLOAT16) return bfloat_to_float(((const u16*)data)[at]);
  if constexpr (KIND == FLOAT8)
    return half_to_float((u16)float8_to_half2(((const u8*)data)[at])) * 256.0f;
  return (float)((const i8*)data)[at];
}

template <int KIND>
DEVICE void store(void* data, i64 at, float value) {
  if constexpr (KIND == FLOAT32) ((float*)data)[at] = value;
  if constexpr (KIND == FLOAT16) ((u16*)data)[at] = float_to_half(value);
  if constexpr (KIND == BFLOAT16) ((u16*)data)[at] = float_to_bfloat(value);
  if constexpr (KIND == FLOAT8) ((u8*)data)[at] = float_to_float8(value);
}

// What the text that TVM writes counts on, which is otherwise in headers of CUDA.
#define CUDART_INF_F __int_as_float(0x7f800000)
#define CUDART_NAN_F __int_as_float(0x7fffffff)

struct half {
  u16 bits;
  half() = default;
  DEVICE_MEMBER half(float value) : bits(float_to_half(value)) {}
  DEVICE_MEMBER operator float() const { return half_to_float(bits); }
};

struct nv_bfloat16 {
  u16 bits;
  nv_bfloat16() = default;
  DEVICE_MEMBER nv_bfloat16(float value) : bits(float_to_bfloat(value)) {}
  DEVICE_MEMBER operator float() const { return bfloat_to_float(bits); }
};

// Sums and maxima over the threads of a block, in an order that its size alone decides.
template <int THREADS, bool MAX>
DEVICE float reduced(float value) {
  __shared__ float parts[THREADS / 32];
  for (int step = 16; step > 0; step /= 2) {
    float other = __shfl_xor_sync(0xffffffffu, value, step);
    value = MAX ? fmaxf(value, other) : value + other;
  }
  __syncthreads();  // the parts of the sum before have been read
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  value = parts[0];
  for (int i = 1; i < THREADS / 32; i++) value = MAX ? fmaxf(value, parts[i]) : value + parts[i];
  return value;
}

// The sequence that owns a row of a ragged batch: the last b with query_start[b] <= row.
DEVICE int sequence_of(const int* query_start, int sequences, int row) {
  int low = 0, high = sequences - 1;
  while (low < high) {
    int middle = (low + high + 1) / 2;
    if (query_start[middle] <= row) low = middle;
    else high = middle - 1;
  }
  return low;
}

enum Activation { SILU, GELU, GELU_TANH, RELU, SIGMOID };

template <int NAME>
DEVICE float activated(float x) {
  if constexpr (NAME == SILU) return x / (1.0f + expf(-x));
  if constexpr (NAME == GELU) return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
  if constexpr (NAME == GELU_TANH)
    return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
  if constexpr (NAME == RELU) return x > 0.0f || x != x ? x : 0.0f;
  return 1.0f / (1.0f + expf(-x));
}
