// Attention over the paged cache, as FlashAttention-2 orders it (Dao 2023), with split contexts
// (Flash-Decoding).
//
// A warp holds 16 rows: the query heads of a key head, for as many tokens as fit. It goes over the context by
// chunks of positions, and after each SPLIT of them adds what it found to what it had. With few tokens each
// split is a block of its own and `combine` adds; with many, a block goes over all. Where chunks and splits
// begin, the position in the sequence decides, and the arithmetic is the same word for word: so a token's
// result is the same bits alone, in a batch, whole or chunked. What a row may not see has probability 0 in
// it.

constexpr int SPLIT = 256, FETCHERS = 128;  // positions; threads of a block

struct Row {
  float most, sum;  // of scores, base 2; of 2^(score - most)
};

// Before and after are two parts of a row's context: factors by which both are multiplied.
DEVICE Row joined(Row before, Row after, float& keep, float& take) {
  float most = fmaxf(before.most, after.most);
  keep = before.most == NONE ? 0.0f : exp2_fast(before.most - most);
  take = after.most == NONE ? 0.0f : exp2_fast(after.most - most);
  return {most, __fmaf_rn(after.sum, take, __fmul_rn(before.sum, keep))};
}

DEVICE float added(float before, float after, float keep, float take) {
  return __fmaf_rn(after, take, __fmul_rn(before, keep));
}

// The whole context is known: sinks take weight and give nothing.
DEVICE float whole(Row row, const float* sinks, int head) {
  float keep = 1.0f, take;
  if (sinks) row = joined(row, {__fmul_rn(sinks[head], 1.4426950408889634f), 1.0f}, keep, take);
  return row.sum > 0.0f ? __fdiv_rn(keep, row.sum) : row.sum == 0.0f ? 0.0f : row.sum;
}

template <class P>
DEVICE int first_seen(int position) {
  return P::window ? max(0, position - P::window + 1) : 0;
}

// The end of what a query at a position sees of a context.
template <class P>
DEVICE int last_seen(int position, int context) {
  if (P::causal) return position + 1;
  return P::window ? min(context, position + P::window) : context;
}

// A chunk of keys or values [CHUNK, D] of positions from `at` on, as float16 in rows of D_PADDED + 8; zeros
// before `begin` and from `context` on: what stands there may be another sequence's, and 0 times infinity is
// no number.
template <class P>
DEVICE void fetch(u16* to, const void* pages, i64 plane, const int* table, int head, int at, int begin,
                  int context) {
  constexpr int D = P::head_dim, DP = P::padded, WIDE = P::kind == INT8 ? D + 4 : D;
  if constexpr (P::kind == FLOAT16 && D % 8 == 0) {
    for (int i = threadIdx.x; i < P::chunk * (DP / 8); i += FETCHERS) {
      int row = i / (DP / 8), column = i % (DP / 8) * 8, position = at + row;
      bool valid = position >= begin && position < context && column < D;
      i64 page = plane + (valid ? table[position / P::page_size] : 0);
      const u16* from =
          (const u16*)pages + ((page * P::kv_heads + head) * P::page_size + position % P::page_size) * D;
      copy_16(to + row * (DP + 8) + column, from + (valid ? column : 0), valid);
    }
  } else {
    for (int i = threadIdx.x; i < P::chunk * (DP / 8); i += FETCHERS) {
      int row = i / (DP / 8), column = i % (DP / 8) * 8, position = at + row;
      u32 pairs[4] = {};
      if (position >= begin && position < context) {
        i64 page = plane + table[position / P::page_size];
        i64 from = ((page * P::kv_heads + head) * P::page_size + position % P::page_size) * WIDE;
        float scale = 1.0f;
        if constexpr (P::kind == INT8) {
          const u8* bytes = (const u8*)pages + from + D;
          scale = __uint_as_float(bytes[0] | bytes[1] << 8 | bytes[2] << 16 | (u32)bytes[3] << 24);
        }
        if constexpr (P::kind == FLOAT8 && D % 8 == 0) {
          uint2 bytes = column < D ? *(const uint2*)((const u8*)pages + from + column) : uint2{0, 0};
#pragma unroll
          for (int c = 0; c < 4; c++) {
            u32 two = (c < 2 ? bytes.x : bytes.y) >> c % 2 * 16;
            pairs[c] = mul_half2(float8_to_half2((two & 0xff) | (two & 0xff00) << 8), 0x5c005c00);  // 256
          }
        } else {
          float eight[8];
#pragma unroll
          for (int c = 0; c < 8; c++) {
            eight[c] = column + c < D ? load<P::kind>(pages, from + column + c) : 0.0f;
            if constexpr (P::kind == INT8) eight[c] = column + c < D ? eight[c] * scale : 0.0f;
          }
#pragma unroll
          for (int c = 0; c < 4; c++) pairs[c] = pack_half2(eight[2 * c], eight[2 * c + 1]);
        }
      }
      *(uint4*)(to + row * (DP + 8) + column) = {pairs[0], pairs[1], pairs[2], pairs[3]};
    }
  }
}

// q [T, H, D] float32; pages [2, N, kv_heads, page_size, D]; out [T, H, D] float32. Grid: tiles of rows,
// heads of the cache by tiles of 16 of their query heads, splits. SPLITS: partial results go to `part`
// [splits, T, H, D] and `rows` [splits, T, H].
template <class P, bool SPLITS>
DEVICE void attend(const float* q, const void* pages, const int* query_start, const int* context_len,
                   const int* block_table, const float* sinks, const float* slopes, const float* distances,
                   float* out, float* part, Row* rows, int tokens, int sequences, int columns, i64 num_pages) {
  constexpr int D = P::head_dim, DP = P::padded, H = P::heads, GROUP = H / P::kv_heads, CHUNK = P::chunk;
  constexpr int HEADS = GROUP < 16 ? GROUP : 16, HEAD_TILES = (GROUP + 15) / 16, TOKENS = 16 / HEADS;
  extern __shared__ __align__(16) u16 shared[];
  u16* keys = shared;  // two chunks each
  u16* values = shared + 2 * CHUNK * (DP + 8);
  static_assert(P::split == SPLIT, "the host counts splits too");
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;

  // Which sequence this tile is of: tiles stand one after the other, sequence by sequence.
  int tile = blockIdx.x, sequence = 0, first = 0, count = 0;
  for (; sequence < sequences; sequence++) {
    first = query_start[sequence];
    count = query_start[sequence + 1] - first;
    int own = (count + TOKENS * P::warps - 1) / (TOKENS * P::warps);
    if (tile < own) break;
    tile -= own;
  }
  if (sequence == sequences) return;
  int context = context_len[sequence];
  const int* table = block_table + (i64)sequence * columns;
  int kv_head = blockIdx.y / HEAD_TILES, head_tile = blockIdx.y % HEAD_TILES;
  int base = context - count + tile * (TOKENS * P::warps);  // the position of the block's first token
  int last = min(base + TOKENS * P::warps, context) - 1;
  int begin = first_seen<P>(base), end = last_seen<P>(last, context);
  if constexpr (SPLITS) {
    begin = max(begin, (int)blockIdx.z * SPLIT);
    end = min(end, ((int)blockIdx.z + 1) * SPLIT);
    if (begin >= end) return;
  }

  // All warps fetch; those that have rows compute.
  bool works = warp < P::warps && (tile * P::warps + warp) * TOKENS < count;
  // The two rows of this lane, g and g + 8: their token, head and position; a row beyond the tile is no row.
  int token[2], head[2], position[2];
  bool real[2];
  float slope[2] = {};
  for (int i = 0; i < 2; i++) {
    int row = g + 8 * i, within = (tile * P::warps + warp) * TOKENS + row / HEADS,
        of = head_tile * 16 + row % HEADS;
    real[i] = works && row < TOKENS * HEADS && within < count && of < GROUP;
    token[i] = real[i] ? first + within : first;
    head[i] = kv_head * GROUP + (real[i] ? of : 0);
    position[i] = context - count + (real[i] ? within : 0);
    if (P::slopes) slope[i] = __fmul_rn(slopes[head[i]], 1.4426950408889634f);
  }
  u32 query[DP / 16][4];
#pragma unroll
  for (int j = 0; j < DP / 16; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int r = i % 2, d = 16 * j + 2 * t + i / 2 * 8;
      const float* from = q + ((i64)token[r] * H + head[r]) * D + d;
      query[j][i] = pack_half2(real[r] && d < D ? from[0] : 0.0f, real[r] && d + 1 < D ? from[1] : 0.0f);
    }

  Row before[2] = {{NONE, 0.0f}, {NONE, 0.0f}}, now[2];
  float acc[DP / 8][4];
  int chunk = begin / CHUNK, chunks = (end + CHUNK - 1) / CHUNK;
  auto bring = [&](int c) {
    u16* k = keys + c % 2 * CHUNK * (DP + 8);
    u16* v = values + c % 2 * CHUNK * (DP + 8);
    fetch<P>(k, pages, 0, table, kv_head, c * CHUNK, begin, context);
    fetch<P>(v, pages, num_pages, table, kv_head, c * CHUNK, begin, context);
    commit_copies();
  };
  bring(chunk);
  bool starts = true;
#pragma unroll 1
  for (; chunk < chunks; chunk++) {
    if (chunk + 1 < chunks) bring(chunk + 1);
    else commit_copies();
    await_copies<1>();
    __syncthreads();
    const u16* k = keys + chunk % 2 * CHUNK * (DP + 8);
    const u16* v = values + chunk % 2 * CHUNK * (DP + 8);
    bool ends = (chunk + 1) * CHUNK % SPLIT == 0 || chunk + 1 == chunks;
    if (!works) {
      __syncthreads();
      continue;
    }
    if (starts) {
      for (int i = 0; i < 2; i++) now[i] = {NONE, 0.0f};
#pragma unroll
      for (int j = 0; j < DP / 8; j++) acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0.0f;
    }

    float score[CHUNK / 8][4] = {};
#pragma unroll
    for (int n = 0; n < CHUNK / 16; n++)
#pragma unroll
      for (int j = 0; j < DP / 16; j++) {
        u32 b[4];
        load_matrices(b, k + (16 * n + lane / 16 * 8 + lane % 8) * (DP + 8) + 16 * j + lane / 8 % 2 * 8);
        multiply(score[2 * n], query[j], b[0], b[1]);
        multiply(score[2 * n + 1], query[j], b[2], b[3]);
      }
    float most[2] = {NONE, NONE};
#pragma unroll
    for (int n = 0; n < CHUNK / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int r = i / 2, at = chunk * CHUNK + 8 * n + 2 * t + i % 2;
        float s = score[n][i];
        if (P::softcap > 0.0f)
          s = __fmul_rn(P::softcap * 1.4426950408889634f, tanhf(s * (P::scale / P::softcap)));
        else s = __fmul_rn(s, P::scale * 1.4426950408889634f);
        if (P::slopes) s = __fmaf_rn(slope[r], (float)(at - position[r]), s);
        if (P::distances > 0) {
          int from = min(max(P::distances / 2 + at - position[r], 0), P::distances - 1);
          s = __fmaf_rn(distances[(i64)head[r] * P::distances + from], 1.4426950408889634f, s);
        }
        bool seen = at >= first_seen<P>(position[r]) && at < last_seen<P>(position[r], context);
        score[n][i] = seen ? s : NONE;
        // A NaN is no maximum; it stays in the row's sum.
        most[r] = fmaxf(most[r], score[n][i]);
      }
    float keep[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      most[r] = fmaxf(most[r], __shfl_xor_sync(0xffffffffu, most[r], 1));
      most[r] = fmaxf(most[r], __shfl_xor_sync(0xffffffffu, most[r], 2));
      most[r] = fmaxf(most[r], now[r].most);
      keep[r] = now[r].most == NONE ? 0.0f : exp2_fast(now[r].most - most[r]);
      now[r] = {most[r], __fmul_rn(now[r].sum, keep[r])};
    }
#pragma unroll
    for (int j = 0; j < DP / 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) acc[j][i] = __fmul_rn(acc[j][i], keep[i / 2]);
    float sums[2] = {};
#pragma unroll
    for (int n = 0; n < CHUNK / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int r = i / 2;
        score[n][i] = score[n][i] == NONE ? 0.0f : exp2_fast(score[n][i] - most[r]);
        sums[r] += score[n][i];
      }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      sums[r] += __shfl_xor_sync(0xffffffffu, sums[r], 1);
      sums[r] += __shfl_xor_sync(0xffffffffu, sums[r], 2);
      now[r].sum += sums[r];
    }
#pragma unroll
    for (int n = 0; n < CHUNK / 16; n++) {
      u32 a[4];
#pragma unroll
      for (int i = 0; i < 4; i++)
        a[i] = pack_half2(score[2 * n + i / 2][i % 2 * 2], score[2 * n + i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int j = 0; j < DP / 16; j++) {
        u32 b[4];
        load_transposed(b, v + (16 * n + lane / 8 % 2 * 8 + lane % 8) * (DP + 8) + 16 * j + lane / 16 * 8);
        multiply(acc[2 * j], a, b[0], b[1]);
        multiply(acc[2 * j + 1], a, b[2], b[3]);
      }
    }
    __syncthreads();  // the chunk has been read, and may be written over

    starts = ends;
    if (!ends) continue;
    if constexpr (SPLITS) {
      for (int i = 0; i < 2; i++)
        if (real[i] && t == 0) rows[((i64)blockIdx.z * tokens + token[i]) * H + head[i]] = now[i];
    }
    float take[2], held[2];
    if constexpr (!SPLITS)
      for (int i = 0; i < 2; i++) before[i] = joined(before[i], now[i], held[i], take[i]);
    bool alone = chunk * CHUNK / SPLIT == begin / SPLIT;
#pragma unroll
    for (int j = 0; j < DP / 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int r = i / 2, d = 8 * j + 2 * t + i % 2;
        if (!real[r] || d >= D) continue;
        i64 at = ((i64)token[r] * H + head[r]) * D + d;
        if constexpr (SPLITS) part[(i64)blockIdx.z * tokens * H * D + at] = acc[j][i];
        else out[at] = added(alone ? 0.0f : out[at], acc[j][i], held[r], take[r]);
      }
  }
  if constexpr (!SPLITS) {
    for (int r = 0; r < 2; r++) {
      float factor = whole(before[r], P::sinks ? sinks : nullptr, head[r]);
      if (!real[r]) continue;
      for (int d = 2 * t; d < D; d += 8)
        for (int i = 0; i < 2; i++)
          if (d + i < D) {
            i64 at = ((i64)token[r] * H + head[r]) * D + d + i;
            out[at] = __fmul_rn(out[at], factor);
          }
    }
  }
}

// Adds the splits of a token's head, in order. A block a token and head.
template <class P>
DEVICE void combine(const int* query_start, const int* context_len, const float* sinks, float* out,
                    const float* part, const Row* rows, int tokens, int sequences) {
  constexpr int D = P::head_dim, H = P::heads;
  int token = blockIdx.x, head = blockIdx.y, sequence = sequence_of(query_start, sequences, token);
  int context = context_len[sequence], position = context - (query_start[sequence + 1] - token);
  int begin = first_seen<P>(position), end = last_seen<P>(position, context);
  for (int d = threadIdx.x; d < D; d += P::adders) {
    Row before = {NONE, 0.0f};
    float sum = 0.0f, keep, take;
    for (int split = begin / SPLIT; split * SPLIT < end; split++) {
      i64 at = ((i64)split * tokens + token) * H + head;
      before = joined(before, rows[at], keep, take);
      sum = added(sum, part[at * D + d], keep, take);
    }
    out[((i64)token * H + head) * D + d] = __fmul_rn(sum, whole(before, P::sinks ? sinks : nullptr, head));
  }
}
