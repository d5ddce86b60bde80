// Mixtures of experts: pairs of a token and one of its k experts, brought together by expert
// (`kernels/moe.py` says what each step gives); the products are `product`'s.

// Of floats, in the order in which `top_k` takes them: NaN above all, 0 and -0 alike.
DEVICE int key_of(float x) {
  int bits = (int)__float_as_uint(x);
  if (x != x) return 0x7fffffff;
  return x == 0.0f ? 0 : bits < 0 ? bits ^ 0x7fffffff : bits;
}

// A warp a row: k times the largest that comes after the one before, by key and then by place.
template <class P>
DEVICE void top_k(const float* x, i64* out) {
  const float* row = x + (i64)blockIdx.x * P::width;
  int last = 0x7fffffff, place = -1;
  for (int j = 0; j < P::k; j++) {
    int best = (int)0x80000000, where = P::width;
    for (int i = threadIdx.x; i < P::width; i += 32) {
      int key = key_of(row[i]);
      bool left = key < last || (key == last && i > place);
      if (left && (key > best || (key == best && i < where))) best = key, where = i;
    }
    for (int step = 16; step > 0; step /= 2) {
      int key = (int)__float_as_uint(__shfl_xor_sync(0xffffffffu, __int_as_float(best), step));
      int at = (int)__float_as_uint(__shfl_xor_sync(0xffffffffu, __int_as_float(where), step));
      if (key > best || (key == best && at < where)) best = key, where = at;
    }
    last = best, place = where;
    if (threadIdx.x == 0) out[(i64)blockIdx.x * P::k + j] = where;
  }
}

// One block; a warp counts and places the pairs of its experts, in order, 32 at a time. `active` is what
// tvm-cpu's products ask for beside.
template <class P>
DEVICE void moe_rows(const int* __restrict__ indices, int* __restrict__ place, int* __restrict__ source,
                     int* offsets, int* active, int pairs) {
  __shared__ int counts[P::experts];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  auto chosen = [&](int e, int p) {
    return __ballot_sync(0xffffffffu, p < pairs && min(max(indices[p], 0), P::experts - 1) == e);
  };
  for (int e = warp; e < P::experts; e += P::threads / 32) {
    int count = 0;
    for (int p = 0; p < pairs; p += 32) count += __popc(chosen(e, p + lane));
    if (lane == 0) counts[e] = count;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int total = 0, some = 0;
    for (int e = 0; e < P::experts; e++) {
      offsets[e] = total;
      total += counts[e];
      if (counts[e]) active[1 + some++] = e;
    }
    offsets[P::experts] = total;
    active[0] = some;
  }
  for (int e = warp; e < P::experts; e += P::threads / 32) {
    int next = 0;
    for (int before = 0; before < e; before++) next += counts[before];
    for (int p = lane; p - lane < pairs; p += 32) {
      u32 mask = chosen(e, p);
      int at = next + __popc(mask & ((1u << lane) - 1));
      if (mask >> lane & 1) place[p] = at, source[at] = p;
      next += __popc(mask);
    }
  }
}

template <class P>
DEVICE void moe_gate(const float* products, const int* source, const int* indices, const float* bias,
                     float* out, int pairs) {
  i64 at = (i64)blockIdx.x * P::threads + threadIdx.x;
  if (at >= (i64)pairs * P::width) return;
  i64 row = at / P::width;
  int i = at % P::width;
  constexpr int wide = P::gated ? 2 * P::width : P::width, second = P::gated ? P::width : 0;
  float gate = products[row * wide + i], up = products[row * wide + second + i];
  if (P::bias) {
    int e = min(max(indices[source[row]], 0), P::experts - 1);
    gate += bias[(i64)e * wide + i], up += bias[(i64)e * wide + second + i];
  }
  if (P::limit > 0.0f) {
    if (!P::limits_active) gate = gate > P::limit ? P::limit : gate;
    up = up > P::limit ? P::limit : up < -P::limit ? -P::limit : up;
  }
  float active;
  if constexpr (P::swish) active = gate / (1.0f + expf(-P::alpha * gate));
  else active = activated<P::activation>(gate);
  if constexpr (P::squared) active *= active;
  if (P::limits_active && P::limit > 0.0f) active = active > P::limit ? P::limit : active;
  out[at] = P::gated ? active * (up + P::offset) : active;
}

template <class P>
DEVICE void moe_combine(const float* y, const int* place, const float* weights, const int* indices,
                        const float* bias, float* out) {
  i64 token = blockIdx.x;
  for (int i = threadIdx.x; i < P::width; i += P::threads) {
    float sum = 0.0f;
    for (int j = 0; j < P::top_k; j++) {
      i64 pair = token * P::top_k + j;
      float value = y[(i64)place[pair] * P::width + i];
      if (P::bias) value += bias[(i64)min(max(indices[pair], 0), P::experts - 1) * P::width + i];
      sum = fmaf(value, weights[pair], sum);
    }
    out[token * P::width + i] = sum;
  }
}
