// Kernels that go over rows or elements: norms, rotary embedding, gates, gathers, the cache's writes.
// `source` in the host's words: a head stands in columns of a wider row, `STRIDE` apart from row to row and
// from column `FIRST` on.

template <class P>
DEVICE void rms_norm(const float* x, const float* weight, float* out) {
  constexpr int WIDTH = P::width, HEADS = P::heads;
  i64 row = blockIdx.x;
  const float* from = x + row / HEADS * P::stride + P::first + row % HEADS * WIDTH;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < WIDTH; i += P::threads) sum = fmaf(from[i], from[i], sum);
  float factor = 1.0f / sqrtf(reduced<P::threads, false>(sum) / WIDTH + P::eps);
  for (int i = threadIdx.x; i < WIDTH; i += P::threads)
    out[row * WIDTH + i] = from[i] * factor * (P::weight ? weight[i] : 1.0f);
}

template <class P>
DEVICE void layer_norm(const float* x, const float* weight, const float* bias, float* out) {
  constexpr int WIDTH = P::width;
  i64 row = blockIdx.x;
  const float* from = x + row * WIDTH;
  float sum = 0.0f, squares = 0.0f;
  for (int i = threadIdx.x; i < WIDTH; i += P::threads) sum += from[i];
  float mean = reduced<P::threads, false>(sum) / WIDTH;
  for (int i = threadIdx.x; i < WIDTH; i += P::threads)
    squares = fmaf(from[i] - mean, from[i] - mean, squares);
  float factor = 1.0f / sqrtf(reduced<P::threads, false>(squares) / WIDTH + P::eps);
  for (int i = threadIdx.x; i < WIDTH; i += P::threads)
    out[row * WIDTH + i] =
        (from[i] - mean) * factor * (P::weight ? weight[i] : 1.0f) + (P::bias ? bias[i] : 0.0f);
}

template <class P>
DEVICE void rope(const float* x, const float* cosines, const float* sines, float* out, int tokens) {
  constexpr int D = P::head_dim, R = P::rotary_dim, ROW = P::heads * D;
  i64 at = (i64)blockIdx.x * P::threads + threadIdx.x;
  if (at >= (i64)tokens * ROW) return;
  i64 token = at / ROW;
  int column = at % ROW, i = column % D;
  const float* head = x + token * P::stride + P::first + column / D * D;
  if (i >= R) {
    out[at] = head[i];
    return;
  }
  bool second = P::interleaved ? i % 2 : i >= R / 2;
  int other = P::interleaved ? i ^ 1 : second ? i - R / 2 : i + R / 2;
  float turned = second ? head[other] : -head[other];
  out[at] = fmaf(head[i], cosines[token * R + i], turned * sines[token * R + i]);
}

template <class P>
DEVICE void gated_mlp(const float* gate_up, float* out, int tokens) {
  i64 at = (i64)blockIdx.x * P::threads + threadIdx.x;
  if (at >= (i64)tokens * P::width) return;
  const float* row = gate_up + at / P::width * 2 * P::width + at % P::width;
  out[at] = activated<P::activation>(row[0]) * row[P::width];
}

template <class P>
DEVICE void activation(const float* x, float* out, int tokens) {
  i64 at = (i64)blockIdx.x * P::threads + threadIdx.x;
  if (at < (i64)tokens * P::width) out[at] = activated<P::activation>(x[at]);
}

// Rows of a table that lies row by row. An index beyond its ends is held to them, as on the CPU.
template <class P>
DEVICE void gather_rows(const int* index, const void* table, float* out, int rows) {
  int row = min(max(index[blockIdx.x], 0), rows - 1);
  for (int i = threadIdx.x; i < P::width; i += P::threads)
    out[(i64)blockIdx.x * P::width + i] = load<P::kind>(table, (i64)row * P::width + i);
}

// k, v [T, heads, D] into pages [2, N, heads, page_size, D], for int8 [.., D + 4]: codes, then their scale.
// A block writes one head of a token, key and value.
template <class P>
DEVICE void append_kv(const float* k, const float* v, const int* slot_mapping, void* pages, i64 num_pages) {
  constexpr int D = P::head_dim, WIDE = P::kind == INT8 ? D + 4 : D;
  int token = blockIdx.x, head = blockIdx.y;
  i64 slot = slot_mapping[token];
  if (slot < 0) return;
  for (int which = 0; which < 2; which++) {
    const float* from =
        which ? v + (i64)token * P::v_stride + P::v_first : k + (i64)token * P::k_stride + P::k_first;
    from += head * D;
    i64 page = which * num_pages + slot / P::page_size;
    i64 to = ((page * P::heads + head) * P::page_size + slot % P::page_size) * WIDE;
    if constexpr (P::kind != INT8) {
      for (int i = threadIdx.x; i < D; i += P::threads) store<P::kind>(pages, to + i, from[i]);
    } else {
      float largest = 0.0f, strange = 0.0f;
      for (int i = threadIdx.x; i < D; i += P::threads) {
        largest = fmaxf(largest, fabsf(from[i]));
        strange = fmaxf(strange, fabsf(from[i]) <= 3.4028235e38f ? 0.0f : 1.0f);
      }
      largest = reduced<P::threads, true>(largest);
      strange = reduced<P::threads, true>(strange);
      bool scaled = largest >= 1e-30f && strange == 0.0f;
      float inverse = scaled ? __fdiv_rn(127.0f, largest) : 0.0f;
      for (int i = threadIdx.x; i < D; i += P::threads)
        ((i8*)pages)[to + i] = scaled ? (i8)rintf(fminf(fmaxf(from[i] * inverse, -127.0f), 127.0f)) : 0;
      float scale = strange != 0.0f ? __int_as_float(0x7fc00000) : scaled ? __fdiv_rn(largest, 127.0f) : 0.0f;
      if (threadIdx.x < 4)
        ((u8*)pages)[to + D + threadIdx.x] = (u8)(__float_as_uint(scale) >> 8 * threadIdx.x);
    }
  }
}
