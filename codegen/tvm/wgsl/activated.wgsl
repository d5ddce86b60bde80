#include functions

fn activated(x: f32) -> f32 {
#if ACTIVATION == silu
  return x / (1.0 + exp(-x));
#endif
#if ACTIVATION == gelu
  return 0.5 * x * (1.0 + erf_of(x * 0.70710678118654752));
#endif
#if ACTIVATION == gelu_tanh
  return 0.5 * x * (1.0 + safe_tanh(0.79788456080286536 * fma(0.044715 * x * x, x, x)));
#endif
#if ACTIVATION == relu
  return select(0.0, x, x > 0.0 || (bitcast<u32>(x) & 0x7fffffff) > 0x7f800000);  // NaN stays one
#endif
#if ACTIVATION == sigmoid
  return 1.0 / (1.0 + exp(-x));
#endif
}
