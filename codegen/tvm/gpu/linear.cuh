// Products by weights [N, K], of 4, 8 or 16 bits each, on tensor cores. One kernel for one token and for a
// thousand: the weights are the left operand (16 rows of N), tokens stand in the 8 columns of the right one,
// so that a step of few tokens reads each weight once and wastes nothing but multiplications.
//
// Weights lie in the order in which lanes want them (layout.py): tiles of 16 rows, units of 64 columns; a
// lane loads 16 bytes, and they are its operands of the next steps. Columns of a span (16, 32 or 64, within a
// group of one scale) are dealt to lanes by runs, so that a lane's tokens are runs of memory as well.
//
// Codes are whole numbers and exact in float16; scales are applied to sums, in float32. Tokens are halves of
// x / factor, a power of two for each token: nothing overflows (`to_half`). The warps of a block share out
// the columns, always alike, and their sums are added in order: a token's result is the same bits in any
// batch.

constexpr int UNIT = 64;

template <class P>
DEVICE void to_half(const float* x, u16* halves, float* factors, float* sums) {
  constexpr int K = P::k;
  i64 row = blockIdx.x;
  float largest = 0.0f;
  for (int i = threadIdx.x; i < K; i += P::threads) largest = fmaxf(largest, fabsf(x[row * K + i]));
  largest = reduced<P::threads, true>(largest);
  int exponent = (int)(__float_as_uint(largest) >> 23) - 127;
  bool usual = exponent > -100 && exponent < 100;
  float factor = usual ? __uint_as_float((u32)(exponent - 8 + 127) << 23) : 1.0f;  // |x / factor| < 2^9
  float inverse = 1.0f / factor;
  for (int i = threadIdx.x; i < P::k_padded; i += P::threads)
    halves[row * P::k_padded + i] = i < K ? float_to_half(x[row * K + i] * inverse) : 0;
  if (threadIdx.x == 0) factors[row] = factor;
  if constexpr (P::minimum) {
    __syncthreads();
    for (int group = threadIdx.x; group < P::groups; group += P::threads) {
      float sum = 0.0f;
      for (int i = group * P::group_size; i < min(K, (group + 1) * P::group_size); i++)
        sum += half_to_float(halves[row * P::k_padded + i]);
      sums[row * P::groups + group] = sum;
    }
  }
}

// -- weights
// ------------------------------------------------------------------------------------------------- The code
// of row n and column k, or the bits of a float16.
template <class P>
DEVICE u32 code_at(const void* codes, int n, int k) {
  constexpr int S = P::span;
  int row = n % 16, at = k % UNIT, within = at % S, run = within % (S / 4);
  int step = at / S * (S / 16) + run / 4, i = run % 4;
  int lane = row % 8 * 4 + within / (S / 4), half = i % 2, operand = i / 2 * 2 + row / 8;
  i64 unit = (i64)(n / 16) * (P::k_padded / UNIT) + k / UNIT;
  const u8* bytes = (const u8*)codes;
  if constexpr (P::bits == 4) {
    const u8* word = bytes + (unit * 32 + lane) * 16 + step * 4;
    if constexpr (P::book) return word[operand] >> 4 * half & 15;
    return *(const u32*)word >> 16 * half + 4 * operand & 15;
  }
  if constexpr (P::bits == 8)
    return bytes[((unit * 2 + step / 2) * 32 + lane) * 16 + step % 2 * 8 + operand * 2 + half];
  return ((const u16*)codes)[((unit * 4 + step) * 32 + lane) * 8 + operand * 2 + half];
}

// A number of 16 bits in both halves of a register.
DEVICE u32 twice(u32 bits) { return bits | bits << 16; }

// The left operand of a step: v are a lane's 16 bytes with it; `low` and `high` are 1024 + zero point of rows
// g and g + 8. Bits of a code below those of 1024 make 1024 + code.
template <class P>
DEVICE void operand(u32 (&a)[4], const uint4* v, int step, u32 low, u32 high, const u32* book) {
  if constexpr (P::bits == 16) {
    a[0] = v[step].x, a[1] = v[step].y, a[2] = v[step].z, a[3] = v[step].w;
  } else if constexpr (P::bits == 8) {
    const uint4& four = v[step / 2];
    u32 first = step % 2 ? four.z : four.x, second = step % 2 ? four.w : four.y;
    a[0] = sub_half2(__byte_perm(first, 0x64646464u, 0x4140), low);
    a[1] = sub_half2(__byte_perm(first, 0x64646464u, 0x4342), high);
    a[2] = sub_half2(__byte_perm(second, 0x64646464u, 0x4140), low);
    a[3] = sub_half2(__byte_perm(second, 0x64646464u, 0x4342), high);
  } else {
    u32 word = step == 0 ? v->x : step == 1 ? v->y : step == 2 ? v->z : v->w;
    if constexpr (P::book) {
      for (int i = 0; i < 4; i++) a[i] = book[word >> 8 * i & 255];
    } else {
      for (int i = 0; i < 4; i++)
        a[i] = sub_half2((word >> 4 * i & 0x000f000fu) | 0x64006400u, i % 2 ? high : low);
    }
  }
}

template <class P>
DEVICE u32 offset_of(const u8* zeros, i64 at) {
  return twice(0x6400u + (P::zero ? zeros[at] : P::offset));
}

// -- the product
// --------------------------------------------------------------------------------------------- x: what
// to_half made. scales, zeros (minima): [N / 16, groups, 16]. TOKENS: tokens of a block, by 8. TILES: tiles
// of 16 rows of a warp. Of experts (P::experts > 0) the weights stand one after the other, and blockIdx.z
// says which: its rows of `out` are offsets[z] … offsets[z + 1] - 1 (at most one of each token), and row i is
// made of row source[i] / P::per_row of x (i itself where that is 0).
template <class P, int TOKENS, int TILES>
DEVICE void product(const u16* x, const float* factors, const float* sums, const void* codes,
                    const void* scales, const void* zeros, const float* bias, const float* residual,
                    float* out, int tokens, const int* source = nullptr, const int* offsets = nullptr) {
  static_assert(P::k_padded % UNIT == 0, "rows are whole units");
  constexpr int UNITS = P::k_padded / UNIT, V = P::bits / 4, S = P::span, ROWS = 16 * TILES + 4;
  constexpr bool PLAIN = P::bits == 16;
  extern __shared__ float parts[];
  __shared__ u32 book[P::book ? 256 : 1];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  if constexpr (P::book) {
    for (int i = threadIdx.x; i < 256; i += 32 * P::splits)
      book[i] = pack_half2(P::value(i & 15), P::value(i >> 4));
    __syncthreads();
  }
  int first_token = blockIdx.y * (8 * TOKENS), first_row = 0;
  if constexpr (P::experts > 0) {
    first_row = offsets[blockIdx.z];
    tokens = offsets[blockIdx.z + 1] - first_row;
    if (first_token >= tokens) return;
  }
  // Which row of x a token of this block is.
  auto row_of = [&](int token) {
    if constexpr (P::experts == 0) return token;
    int row = first_row + min(token, tokens - 1);
    return P::per_row ? source[row] / P::per_row : row;
  };
  i64 tile[TILES];
  for (int r = 0; r < TILES; r++)
    tile[r] =
        (P::experts > 0 ? (i64)blockIdx.z * P::tiles : 0) + min((int)blockIdx.x * TILES + r, P::tiles - 1);
  float total[TILES][TOKENS][4] = {};
  // Where this lane's tokens begin in x; but for experts they are 8 rows apart.
  const u16* own = x + (i64)row_of(first_token + g) * P::k_padded + t * (S / 4);
  int apart[P::experts > 0 ? TOKENS : 1] = {};
  if constexpr (P::experts > 0)
    for (int n = 1; n < TOKENS; n++)
      apart[n] = (row_of(first_token + 8 * n + g) - row_of(first_token + g)) * P::k_padded;

  // Few tokens: what counts is how much is on its way from memory, so several units are asked for at once.
  constexpr int AHEAD = TOKENS > 2 || V == 4 ? 1 : 4 / V;
  // So are their scales and zero points, which no load could overtake otherwise.
  constexpr int SPANS = UNIT / S;
  constexpr bool EARLY = !PLAIN && TOKENS <= 2;
  auto place_of = [&](int r, int k) {
    return (tile[r] * P::groups + min(k / P::group_size, P::groups - 1)) * 16 + g;
  };
  int unit = warp * UNITS / P::splits, last = (warp + 1) * UNITS / P::splits;
#pragma unroll 1
  for (int next = unit; next < last; next += AHEAD) {
    uint4 ahead[AHEAD][TILES][V];
#pragma unroll
    for (int u = 0; u < AHEAD; u++)
#pragma unroll
      for (int r = 0; r < TILES; r++)
#pragma unroll
        for (int i = 0; i < V; i++)
          ahead[u][r][i] =
              ((const uint4*)codes)[((tile[r] * UNITS + min(next + u, last - 1)) * V + i) * 32 + lane];
    constexpr int KEPT = EARLY ? AHEAD : 1, ROOM = EARLY ? SPANS : 1;
    float scale_of[KEPT][TILES][ROOM][2];
    u32 zero_of[KEPT][TILES][ROOM][2];
    if constexpr (EARLY) {
#pragma unroll
      for (int u = 0; u < AHEAD; u++)
#pragma unroll
        for (int r = 0; r < TILES; r++)
#pragma unroll
          for (int span = 0; span < SPANS; span++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
              i64 at = place_of(r, min(next + u, last - 1) * UNIT + span * S) + 8 * i;
              scale_of[u][r][span][i] = load<P::scale_kind>(scales, at);
              if constexpr (P::zero) zero_of[u][r][span][i] = ((const u8*)zeros)[at];
            }
    }
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
      unit = next + u;
      if (unit >= last) break;
      const uint4(&v)[TILES][V] = ahead[u];
#pragma unroll
      for (int span = 0; span < UNIT / S; span++) {
        int k = unit * UNIT + span * S, group = min(k / P::group_size, P::groups - 1);
        float sum[TILES][TOKENS][4] = {};
        u32 low[TILES] = {}, high[TILES] = {};
        if constexpr (!PLAIN && !P::book && !P::minimum) {
#pragma unroll
          for (int r = 0; r < TILES; r++) {
            if constexpr (EARLY && P::zero) {
              low[r] = twice(0x6400u + zero_of[u][r][span][0]);
              high[r] = twice(0x6400u + zero_of[u][r][span][1]);
            } else {
              i64 at = place_of(r, k);
              low[r] = offset_of<P>((const u8*)zeros, at), high[r] = offset_of<P>((const u8*)zeros, at + 8);
            }
          }
        } else if constexpr (P::minimum) {
          for (int r = 0; r < TILES; r++) low[r] = high[r] = 0x64006400u;
        }
        constexpr int STEPS = S == 16 ? 1 : 2;  // that 8 or 16 bytes of a token are good for
#pragma unroll
        for (int step = 0; step < S / 16; step += STEPS) {
          u32 a[STEPS][TILES][4];
#pragma unroll
          for (int j = 0; j < STEPS; j++)
#pragma unroll
            for (int r = 0; r < TILES; r++)
              operand<P>(a[j][r], v[r], span * (S / 16) + step + j, low[r], high[r], book);
#pragma unroll
          for (int n = 0; n < TOKENS; n++) {
            const u16* from =
                own + (P::experts > 0 ? apart[P::experts > 0 ? n : 0] : 8 * n * P::k_padded) + k + 4 * step;
            u32 b[2 * STEPS];
            if constexpr (STEPS == 2) {
              uint4 four = *(const uint4*)from;
              b[0] = four.x, b[1] = four.y, b[2] = four.z, b[3] = four.w;
            } else {
              uint2 two = *(const uint2*)from;
              b[0] = two.x, b[1] = two.y;
            }
#pragma unroll
            for (int j = 0; j < STEPS; j++)
#pragma unroll
              for (int r = 0; r < TILES; r++)
                multiply(PLAIN ? total[r][n] : sum[r][n], a[j][r], b[2 * j], b[2 * j + 1]);
          }
        }
        if constexpr (!PLAIN) {
#pragma unroll
          for (int r = 0; r < TILES; r++) {
            i64 at = place_of(r, k);
            float scale[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
              if constexpr (EARLY) scale[i] = scale_of[u][r][span][i];
              else scale[i] = load<P::scale_kind>(scales, at + 8 * i);
            }
            float least[2] = {};
            if constexpr (P::minimum)
              if (k % P::group_size == 0 && k < P::k)
                least[0] = load<P::zero_kind>(zeros, at), least[1] = load<P::zero_kind>(zeros, at + 8);
#pragma unroll
            for (int n = 0; n < TOKENS; n++)
#pragma unroll
              for (int i = 0; i < 4; i++) {
                total[r][n][i] = fmaf(sum[r][n][i], scale[i / 2], total[r][n][i]);
                if constexpr (P::minimum) {
                  int token = row_of(min(first_token + 8 * n + 2 * t + i % 2, tokens - 1));
                  total[r][n][i] = fmaf(sums[(i64)token * P::groups + group], least[i / 2], total[r][n][i]);
                }
              }
          }
        }
      }
    }
  }

  float* part = parts + warp * (8 * TOKENS * ROWS);
  for (int r = 0; r < TILES; r++)
    for (int n = 0; n < TOKENS; n++)
      for (int i = 0; i < 4; i++)
        part[(8 * n + 2 * t + i % 2) * ROWS + 16 * r + g + i / 2 * 8] = total[r][n][i];
  __syncthreads();
  for (int at = threadIdx.x; at < 8 * TOKENS * 16 * TILES; at += 32 * P::splits) {
    int row = at % (16 * TILES), column = at / (16 * TILES), token = first_token + column;
    int n = blockIdx.x * (16 * TILES) + row;
    if (token >= tokens || n >= P::n) continue;
    float y = parts[column * ROWS + row];
    for (int s = 1; s < P::splits; s++) y += parts[(s * 8 * TOKENS + column) * ROWS + row];
    y = __fmul_rn(y, factors[row_of(token)]);
    if (P::bias) y += bias[n];
    if (P::residual) y += residual[(i64)token * P::n + n];
    out[(i64)(first_row + token) * P::n + n] = y;
  }
}

// Rows of a table in the layout of products.
template <class P>
DEVICE void embedding(const int* ids, const void* codes, const void* scales, const void* zeros, float* out) {
  int n = min(max(ids[blockIdx.x], 0), P::n - 1);
  for (int k = threadIdx.x; k < P::k; k += P::threads) {
    u32 code = code_at<P>(codes, n, k);
    float y;
    if constexpr (P::bits == 16) {
      y = half_to_float((u16)code);
    } else {
      i64 at = ((i64)(n / 16) * P::groups + k / P::group_size) * 16 + n % 16;
      float scale = load<P::scale_kind>(scales, at);
      if constexpr (P::minimum) y = (float)code * scale + load<P::zero_kind>(zeros, at);
      else if constexpr (P::book) y = P::value(code) * scale;
      else y = ((float)code - (float)(P::zero ? ((const u8*)zeros)[at] : P::offset)) * scale;
    }
    out[(i64)blockIdx.x * P::k + k] = y;
  }
}
