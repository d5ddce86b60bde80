// x float32 [T, K] by a weight [N, K] of 4, 8 or 16 bits, in the layout of `layout.py`: tiles of 16 rows, units
// of 64 columns, 16 bytes a lane. A workgroup computes a tile for TOKENS tokens; its 32 · SPLITS threads share
// out the units always alike, and their sums are added in order, so that a token's result does not depend on
// how many there are. A lane holds rows g and g + 8 and the t-th quarter of the columns of a span.
//
// Of experts the weights stand one after the other, and block.z says which: its rows of `out` are offsets[z] …
// offsets[z + 1] - 1, and row i is made of row source[i] / PER_ROW of x (i itself where that is 0).

#type codes vec4<u32>
#if FOURS
#type x vec4<f32>
#endif
#include codes

const S: i32 = SPAN;
const UNITS: i32 = K_PADDED / 64;
const VECTORS: i32 = BITS / 4;

var<workgroup> parts: array<f32, 4 * SPLITS * 16 * TOKENS>;

#if !FOURS
fn token_at(at: i32, column: i32) -> f32 {
  if (column >= K) { return 0.0; }
  return x[at];
}
#endif

// Four columns of x; zeros beyond the last one, since what is stored for those is not zero.
fn tokens_at(row: i32, column: i32) -> vec4<f32> {
#if FOURS
#if WHOLE
  return x[row * (K / 4) + column / 4];
#else
  if (column >= K) { return vec4(0.0); }
  return x[row * (K / 4) + column / 4];
#endif
#else
  let at = row * K + column;
  return vec4(token_at(at, column), token_at(at + 1, column + 1), token_at(at + 2, column + 2),
              token_at(at + 3, column + 3));
#endif
}

fn kernel(block: vec3<i32>, thread: i32) {
  let lane = thread % 32;
  let warp = thread / 32;
  let g = lane / 4;
  let t = lane % 4;
  let first = block.y * TOKENS;
#if EXPERTS
  let first_row = offsets[block.z];
  let tokens = offsets[block.z + 1] - first_row;
  let tile = block.z * TILES + block.x;
  if (first >= tokens) { return; }
#else
  let first_row = 0;
  let tokens = sizes.T;
  let tile = block.x;
#endif
  var row: array<i32, TOKENS>;
  for (var n = 0; n < TOKENS; n++) {
    row[n] = first_row + min(first + n, tokens - 1);
#if PER_ROW
    row[n] = source[row[n]] / PER_ROW;
#endif
  }
  var low: array<f32, TOKENS>;
  var high: array<f32, TOKENS>;
  for (var unit = warp * UNITS / SPLITS; unit < (warp + 1) * UNITS / SPLITS; unit++) {
    var v: array<vec4<u32>, VECTORS>;
    for (var i = 0; i < VECTORS; i++) { v[i] = codes[((tile * UNITS + unit) * VECTORS + i) * 32 + lane]; }
    for (var span = 0; span < 64 / S; span++) {
      let k = unit * 64 + span * S;
#if BITS == 16
      let scale = vec2(1.0);
#else
      let group = min(k / GROUP_SIZE, GROUPS - 1);
      let place = place_of(tile, g, group);
      let scale = vec2(get_scales(place), get_scales(place + 8));
#if ZERO
      let zero = vec2(get_zeros(place), get_zeros(place + 8));
#endif
#if MINIMUM
      let minimum = vec2(get_zeros(place), get_zeros(place + 8));
#endif
#endif
      for (var s = 0; s < S / 16; s++) {
        let step = span * (S / 16) + s;
        var a: vec4<f32>;
        var b: vec4<f32>;
#if BITS == 4
        let word = v[0][step];
#if CODEBOOK
        a = vec4(book[word & 15], book[(word >> 4) & 15], book[(word >> 16) & 15], book[(word >> 20) & 15]);
        b = vec4(book[(word >> 8) & 15], book[(word >> 12) & 15], book[(word >> 24) & 15], book[word >> 28]);
#else
        a = vec4<f32>(vec4(word, word >> 16, word >> 8, word >> 24) & vec4<u32>(15));
        b = vec4<f32>(vec4(word >> 4, word >> 20, word >> 12, word >> 28) & vec4<u32>(15));
#endif
#endif
#if BITS == 8
        let one = v[step / 2][step % 2 * 2];
        let two = v[step / 2][step % 2 * 2 + 1];
        a = vec4<f32>(vec4(one, one >> 8, two, two >> 8) & vec4<u32>(255));
        b = vec4<f32>(vec4(one >> 16, one >> 24, two >> 16, two >> 24) & vec4<u32>(255));
#endif
#if BITS == 16
        a = vec4(unpack2x16float(v[step].x), unpack2x16float(v[step].z));
        b = vec4(unpack2x16float(v[step].y), unpack2x16float(v[step].w));
#endif
#if ZERO
        a = (a - zero.x) * scale.x;
        b = (b - zero.y) * scale.y;
#endif
#if MINIMUM
        a = fma(a, vec4(scale.x), vec4(minimum.x));
        b = fma(b, vec4(scale.y), vec4(minimum.y));
#endif
#if CODEBOOK
        a *= scale.x;
        b *= scale.y;
#endif
#if SYMMETRIC
        a = (a - f32(OFFSET)) * scale.x;
        b = (b - f32(OFFSET)) * scale.y;
#endif
        let column = k + t * (S / 4) + 4 * s;
        for (var n = 0; n < TOKENS; n++) {
          let four = tokens_at(row[n], column);
          low[n] += dot(a, four);
          high[n] += dot(b, four);
        }
      }
    }
  }
  for (var n = 0; n < TOKENS; n++) {
    parts[((warp * 4 + t) * TOKENS + n) * 16 + g] = low[n];
    parts[((warp * 4 + t) * TOKENS + n) * 16 + g + 8] = high[n];
  }
  workgroupBarrier();
  for (var at = thread; at < 16 * TOKENS; at += THREADS) {
    let token = first + at / 16;
    let n = block.x * 16 + at % 16;
    if (token >= tokens || n >= N) { continue; }
    var y = 0.0;
    for (var s = 0; s < 4 * SPLITS; s++) { y += parts[s * 16 * TOKENS + at]; }
#if BIAS
    y += bias[n];
#endif
#if RESIDUAL
    y += residual[token * N + n];
#endif
    out[(first_row + token) * N + n] = y;
  }
}
