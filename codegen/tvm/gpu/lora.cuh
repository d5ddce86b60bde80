// Low-rank changes of linear layers, each row its own (ir/ops/lora.py has the layout): y += B (scale · A x).
// Two launches, A x by blocks of 16 ranks, then B; between them lies `held` [rows, parts, splits, 16 · blocks].
//
// Few rows: each has blocks of its own, for as many adapters as there are rows (Chen et al., "Punica: Multi-
// Tenant LoRA Serving", MLSys 2024, section 4; Sheng et al., "S-LoRA", MLSys 2024, section 5). More of them go
// by tiles, in which neighbours of one adapter (a prompt's tokens) share what is read of its factors. A row's
// sums run in an order that K and its own adapter's rank decide, whatever stands beside it, however many
// slots there are and how large the largest rank is.

constexpr int LORA_ROWS = 8;  // of a tile: `lora_summed` leaves each lane one of them

// Factors at .. at + 3, `at` a multiple of 4.
template <int KIND>
DEVICE void load_factors(float (&v)[4], const void* data, i64 at) {
  if constexpr (KIND == FLOAT32) {
    uint4 four = load_16((const float*)data + at);
    v[0] = __uint_as_float(four.x), v[1] = __uint_as_float(four.y);
    v[2] = __uint_as_float(four.z), v[3] = __uint_as_float(four.w);
  } else {
    // A byte plus 128 in the low bits of 2^23 is exactly 2^23 + 128 more than the signed one.
    u32 four = *(const u32*)((const u8*)data + at) ^ 0x80808080u;
#pragma unroll
    for (int i = 0; i < 4; i++)
      v[i] = __uint_as_float(__byte_perm(four, 0x4b000000u, 0x7440 + i)) - 8388736.0f;
  }
}

// The first row after `first` that has another adapter, `end` at most.
DEVICE int lora_run(const int* adapter, int first, int end) {
  int next = first + 1;
  while (next < end && adapter[next] == adapter[first]) next++;
  return next;
}

// Sums over the lanes of equal lane % 4, by pairs: 4 apart, then 8, then 16. Of one row all lanes have them
// then, of eight rows each lane those of its own, which is returned. The pairs are the same for both.
template <int ROWS>
DEVICE int lora_summed(float (&sum)[ROWS][4]) {
  static_assert(ROWS == 1 || ROWS == LORA_ROWS, "a row for each of the lanes that are added");
  int lane = threadIdx.x % 32, row = 0;
#pragma unroll
  for (int step = 4, half = ROWS / 2; step <= 16; step *= 2, half /= 2) {
    bool upper = ROWS > 1 && lane & step;
    if (upper) row += half;
#pragma unroll
    for (int i = 0; i < max(half, 1); i++)
#pragma unroll
      for (int c = 0; c < 4; c++) {
        float& other = sum[ROWS > 1 ? i + half : 0][c];
        float kept = upper ? other : sum[i][c], sent = upper ? sum[i][c] : other;
        sum[i][c] = kept + __shfl_xor_sync(0xffffffffu, sent, step);
      }
  }
  return row;
}

// One split of A x for `count` rows of one adapter, up to ROWS, into `parts` of this warp. A lane has four
// columns of x and four ranks; `block` is the number of the 16 ranks in all of a.
template <class P, int ROWS>
DEVICE void lora_down_rows(const float* x, const void* a, i64 block, int first, int count,
                           float (*parts)[16]) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quarter = lane % 4;
  int stop = min((int)(blockIdx.z + 1) * P::columns, P::k);
  float sum[ROWS][4] = {};
#pragma unroll 2
  for (int k = blockIdx.z * P::columns + 32 * warp + lane / 4 * 4; k < stop; k += P::threads) {
    float w[4][4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (P::k % 4 == 0 || k + j < P::k)
        load_factors<P::kind>(w[j], a, (block * P::k + k + j) * 16 + 4 * quarter);
      else w[j][0] = w[j][1] = w[j][2] = w[j][3] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      const float* from = x + (i64)(first + min(i, count - 1)) * P::k + k;
      float v[4];
      if constexpr (P::k % 4 == 0) {
        load_factors<FLOAT32>(v, from, 0);
      } else {
#pragma unroll
        for (int j = 0; j < 4; j++) v[j] = k + j < P::k ? from[j] : 0.0f;
      }
#pragma unroll
      for (int j = 0; j < 4; j++)
#pragma unroll
        for (int c = 0; c < 4; c++) sum[i][c] = fmaf(v[j], w[j][c], sum[i][c]);
    }
  }
  int row = lora_summed<ROWS>(sum);
  if (ROWS == 1 && lane >= 4) return;
#pragma unroll
  for (int c = 0; c < 4; c++) parts[row][4 * quarter + c] = sum[0][c];
}

// held = scale · A x: blockIdx.x a tile of rows, .y a part and 16 of its ranks, .z columns of x.
template <class P, int ROWS>
DEVICE void lora_down(const float* __restrict__ x, const int* __restrict__ adapter,
                      const int* __restrict__ rank, const float* __restrict__ scale,
                      const void* __restrict__ a, float* __restrict__ held, int rows, int blocks) {
  constexpr int WARPS = P::threads / 32;
  __shared__ float parts[WARPS][ROWS][16];
  int part = blockIdx.y / blocks, own = blockIdx.y % blocks, warp = threadIdx.x / 32;
  int first = blockIdx.x * ROWS, end = min(first + ROWS, rows);
  for (int next; first < end; first = next) {  // all threads of the block alike
    next = lora_run(adapter, first, end);
    int slot = adapter[first], count = next - first;
    if (slot < 0 || rank[slot * P::parts + part] <= 16 * own) continue;
    i64 block = ((i64)slot * P::parts + part) * blocks + own;
    if (count == 1) lora_down_rows<P, 1>(x, a, block, first, 1, parts[warp]);
    else lora_down_rows<P, ROWS>(x, a, block, first, count, parts[warp]);
    __syncthreads();
    for (int at = threadIdx.x; at < 16 * count; at += P::threads) {
      int row = at / 16, r = at % 16;
      float total = parts[0][row][r];
#pragma unroll
      for (int w = 1; w < WARPS; w++) total += parts[w][row][r];
      i64 place = (((i64)(first + row) * P::parts + part) * P::splits + blockIdx.z) * 16 * blocks;
      held[place + 16 * own + r] = __fmul_rn(total, scale[block * 16 + r]);
    }
    __syncthreads();  // the parts have been read
  }
}

// y += B h for `count` rows of one adapter, up to ROWS, and four columns from `column` on of a part that has
// `width`. h [rank][TILE]; y: that part of the first row; `block`: the first row, in all of b, of the column's
// 16 neighbours.
template <class P, int ROWS, int TILE>
DEVICE void lora_up_rows(const float (*h)[TILE], const void* b, i64 block, int rank, float* y, int column,
                         int width, int count) {
  float sum[ROWS][4] = {};
#pragma unroll 4
  for (int r = 0; r < rank; r++) {
    float w[4];
    load_factors<P::kind>(w, b, (block + r) * 16 + column % 16);
#pragma unroll
    for (int i = 0; i < ROWS; i++)
#pragma unroll
      for (int c = 0; c < 4; c++) sum[i][c] = fmaf(h[r][i], w[c], sum[i][c]);
  }
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    if (i >= count) break;
    float* to = y + (i64)i * P::n + column;
    if constexpr (P::whole) {
      float old[4];
      load_factors<FLOAT32>(old, to, 0);
      uint4 four = {__float_as_uint(old[0] + sum[i][0]), __float_as_uint(old[1] + sum[i][1]),
                    __float_as_uint(old[2] + sum[i][2]), __float_as_uint(old[3] + sum[i][3])};
      store_16(to, four);
    } else {
#pragma unroll
      for (int c = 0; c < 4; c++)
        if (column + c < width) to[c] += sum[i][c];
    }
  }
}

// y += B held: blockIdx.x a tile of rows, .y P::threads / 4 blocks of 16 columns of a part.
template <class P, int ROWS>
DEVICE void lora_up(const int* __restrict__ adapter, const int* __restrict__ rank,
                    const void* __restrict__ b, const float* __restrict__ held, float* __restrict__ y,
                    int rows, int blocks) {
  __shared__ __align__(16) float h[P::most_rank][ROWS];
  int group = blockIdx.y, part = 0, start = 0, before = 0;
  for (; part + 1 < P::parts; part++) {
    int width = P::width(part), groups = (width + 4 * P::threads - 1) / (4 * P::threads);
    if (group < groups) break;
    group -= groups, start += width, before += (width + 15) / 16;
  }
  int width = P::width(part), column = 4 * (group * P::threads + (int)threadIdx.x);
  int first = blockIdx.x * ROWS, end = min(first + ROWS, rows);
  for (int next; first < end; first = next) {  // all threads of the block alike
    next = lora_run(adapter, first, end);
    int slot = adapter[first], count = next - first;
    int own = slot < 0 ? 0 : rank[slot * P::parts + part];
    if (own <= 0) continue;
    __syncthreads();  // what h held has been read
    for (int at = threadIdx.x; at < count * own; at += P::threads) {
      int row = at / own, r = at % own;
      const float* from = held + ((i64)(first + row) * P::parts + part) * P::splits * 16 * blocks + r;
      float total = from[0];
#pragma unroll
      for (int s = 1; s < P::splits; s++) total += from[s * 16 * blocks];
      h[r][row] = total;
    }
    __syncthreads();
    if (column >= width) continue;
    i64 block = ((i64)slot * P::column_blocks + before + column / 16) * 16 * blocks;
    float* to = y + (i64)first * P::n + start;
    if (count == 1) lora_up_rows<P, 1, ROWS>(h, b, block, own, to, column, width, 1);
    else lora_up_rows<P, ROWS, ROWS>(h, b, block, own, to, column, width, count);
  }
}
