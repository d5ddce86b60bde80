// Recurrences (`ir/ops/state.py` says what they compute). A thread goes through a sequence's tokens, one
// after the other, for its channels: a row's bits depend on the tokens before it alone, however the sequence
// is cut. Grid: channels or heads, sequences. What a thread has of the state stands in registers where it is
// not too much.

constexpr int HELD = 128;

struct Tokens {
  int first, last, slot;
  bool fresh;  // nothing of the sequence was computed before
};

DEVICE Tokens tokens_of(const int* state_slot, const int* query_start, const int* context_len) {
  int b = blockIdx.y, first = query_start[b], last = query_start[b + 1];
  return {first, last, state_slot[b], context_len[b] == last - first};
}

template <class P>
DEVICE void causal_conv1d(const float* x, const float* weight, const float* bias, float* state,
                          const int* state_slot, const int* query_start, const int* context_len, float* out) {
  constexpr int C = P::channels, W = P::width;
  Tokens own = tokens_of(state_slot, query_start, context_len);
  int c = blockIdx.x * P::threads + threadIdx.x;
  if (own.first == own.last || c >= C) return;
  float* kept = state + (i64)own.slot * (W - 1) * C + c;
  float seen[W], filter[W];
#pragma unroll
  for (int w = 0; w < W; w++) {
    filter[w] = weight[w * C + c];
    seen[w] = w == 0 || own.fresh ? 0.0f : kept[(w - 1) * C];
  }
  for (int t = own.first; t < own.last; t++) {
    float y = P::bias ? bias[c] : 0.0f;
#pragma unroll
    for (int w = 0; w < W; w++) {
      seen[w] = w + 1 < W ? seen[w + 1 < W ? w + 1 : w] : x[(i64)t * P::x_stride + P::x_first + c];
      y = fmaf(filter[w], seen[w], y);
    }
    if constexpr (P::activates) y = activated<P::activation>(y);
    out[(i64)t * C + c] = y;
  }
#pragma unroll
  for (int w = 1; w < W; w++) kept[(w - 1) * C] = seen[w];
}

template <class P>
DEVICE void linear_recurrence(const float* x, const float* a, float* state, const int* state_slot,
                              const int* query_start, const int* context_len, float* out) {
  constexpr int C = P::channels;
  Tokens own = tokens_of(state_slot, query_start, context_len);
  int c = blockIdx.x * P::threads + threadIdx.x;
  if (own.first == own.last || c >= C) return;
  float h = own.fresh ? 0.0f : state[(i64)own.slot * C + c];
  for (int t = own.first; t < own.last; t++) {
    h = fmaf(a[(i64)t * P::a_stride + P::a_first + c], h, x[(i64)t * P::x_stride + P::x_first + c]);
    out[(i64)t * C + c] = h;
  }
  state[(i64)own.slot * C + c] = h;
}

template <class P>
DEVICE void wkv(const float* k, const float* v, const float* decay, const float* first, float* state,
                const int* state_slot, const int* query_start, const int* context_len, float* out) {
  constexpr int C = P::channels;
  Tokens own = tokens_of(state_slot, query_start, context_len);
  int c = blockIdx.x * P::threads + threadIdx.x;
  if (own.first == own.last || c >= C) return;
  float* kept = state + (i64)own.slot * 3 * C + c;
  float top = own.fresh ? 0.0f : kept[0], below = own.fresh ? 0.0f : kept[C];
  float largest = below > 0.0f ? kept[2 * C] : -1e38f;
  for (int t = own.first; t < own.last; t++) {
    float key = k[(i64)t * P::k_stride + P::k_first + c], value = v[(i64)t * P::v_stride + P::v_first + c];
    float now = fmaxf(largest, first[c] + key);
    float before = expf(largest - now), add = expf(first[c] + key - now);
    out[(i64)t * C + c] = fmaf(before, top, add * value) / fmaf(before, below, add);
    now = fmaxf(largest + decay[c], key);
    before = expf(largest + decay[c] - now), add = expf(key - now);
    top = fmaf(before, top, add * value), below = fmaf(before, below, add), largest = now;
  }
  kept[0] = top, kept[C] = below, kept[2 * C] = largest;
}

// Column `at` of a state [N, stride], in registers while it is worked on.
template <int N>
struct Column {
  static constexpr bool IN_REGISTERS = N <= HELD;
  float held[IN_REGISTERS ? N : 1];
  float* kept;
  int stride;

  DEVICE_MEMBER Column(float* column, int apart, bool fresh) : kept(column), stride(apart) {
#pragma unroll
    for (int n = 0; n < N; n++) {
      float value = fresh ? 0.0f : kept[n * stride];
      if constexpr (IN_REGISTERS) held[n] = value;
      else kept[n * stride] = value;
    }
  }
  DEVICE_MEMBER float& operator[](int n) {
    if constexpr (IN_REGISTERS) return held[n];
    return kept[n * stride];
  }
  DEVICE_MEMBER void keep() {
    if constexpr (IN_REGISTERS)
#pragma unroll
      for (int n = 0; n < N; n++) kept[n * stride] = held[n];
  }
};

template <class P>
DEVICE void selective_scan(const float* x, const float* dt, const float* b, const float* c, const float* a,
                           const float* d, const float* dt_bias, float* state, const int* state_slot,
                           const int* query_start, const int* context_len, float* out) {
  constexpr int C = P::channels, N = P::elements;
  Tokens own = tokens_of(state_slot, query_start, context_len);
  int i = blockIdx.x * P::threads + threadIdx.x;
  if (own.first == own.last || i >= C) return;
  Column<N> h(state + (i64)own.slot * N * C + i, C, own.fresh);
  for (int t = own.first; t < own.last; t++) {
    float value = x[(i64)t * P::x_stride + P::x_first + i];
    float step = dt[(i64)t * P::dt_stride + P::dt_first + i] + (P::dt_bias ? dt_bias[i] : 0.0f);
    if (P::softplus_of_dt) step = step > 20.0f ? step : log1pf(expf(step));
    const float* left = b + (i64)t * P::b_stride + P::b_first;
    const float* right = c + (i64)t * P::c_stride + P::c_first;
    float y = 0.0f;
#pragma unroll
    for (int n = 0; n < N; n++) {
      h[n] = fmaf(expf(step * a[n * C + i]), h[n], step * value * left[n]);
      y = fmaf(right[n], h[n], y);
    }
    out[(i64)t * C + i] = P::d ? fmaf(d[i], value, y) : y;
  }
  h.keep();
}

template <class P>
DEVICE void ssd_scan(const float* x, const float* dt, const float* b, const float* c, const float* a,
                     const float* d, float* state, const int* state_slot, const int* query_start,
                     const int* context_len, float* out) {
  constexpr int H = P::heads, D = P::head_dim, N = P::elements;
  Tokens own = tokens_of(state_slot, query_start, context_len);
  int i = blockIdx.x * P::threads + threadIdx.x, head = i / D, p = i % D, group = head / (H / P::groups);
  if (own.first == own.last || i >= H * D) return;
  Column<N> h(state + ((i64)own.slot * H + head) * N * D + p, D, own.fresh);
  for (int t = own.first; t < own.last; t++) {
    float step = dt[(i64)t * P::dt_stride + P::dt_first + head],
          value = x[(i64)t * P::x_stride + P::x_first + i];
    float decay = expf(step * a[head]), scaled = step * value, y = 0.0f;
    const float* left = b + (i64)t * P::b_stride + P::b_first + group * N;
    const float* right = c + (i64)t * P::c_stride + P::c_first + group * N;
#pragma unroll
    for (int n = 0; n < N; n++) {
      h[n] = fmaf(decay, h[n], left[n] * scaled);
      y = fmaf(right[n], h[n], y);
    }
    out[(i64)t * H * D + i] = P::d ? fmaf(d[head], value, y) : y;
  }
  h.keep();
}

template <class P>
DEVICE void gated_delta_rule(const float* q, const float* k, const float* v, const float* g,
                             const float* beta, float* state, const int* state_slot, const int* query_start,
                             const int* context_len, float* out) {
  constexpr int H = P::heads, K = P::key_dim, V = P::value_dim;
  Tokens own = tokens_of(state_slot, query_start, context_len);
  int i = blockIdx.x * P::threads + threadIdx.x, head = i / V, of = head / (H / P::key_heads);
  if (own.first == own.last || i >= H * V) return;
  Column<K> h(state + ((i64)own.slot * H + head) * K * V + i % V, V, own.fresh);
  for (int t = own.first; t < own.last; t++) {
    const float* query = q + (i64)t * P::q_stride + P::q_first + of * K;
    const float* key = k + (i64)t * P::k_stride + P::k_first + of * K;
    const float* gates = g + (i64)t * P::g_stride + P::g_first + (P::by_element ? head * K : head);
    float known = 0.0f, y = 0.0f, decay = P::by_element ? 0.0f : expf(gates[0]);
#pragma unroll
    for (int n = 0; n < K; n++) {
      h[n] *= P::by_element ? expf(gates[n]) : decay;
      known = fmaf(key[n], h[n], known);
    }
    float fresh = beta[(i64)t * P::beta_stride + P::beta_first + head] *
                  (v[(i64)t * P::v_stride + P::v_first + i] - known);
#pragma unroll
    for (int n = 0; n < K; n++) {
      h[n] = fmaf(key[n], fresh, h[n]);
      y = fmaf(query[n], h[n], y);
    }
    out[(i64)t * H * V + i] = y * P::scale;
  }
  h.keep();
}
