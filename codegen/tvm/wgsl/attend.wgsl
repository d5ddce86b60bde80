// Attention over the paged cache: a workgroup goes over the context of one token for ROWS query heads of a key
// head, by chunks of 64 positions, with an online softmax (FlashAttention-2, Dao 2023). With few tokens each
// SPLIT positions are a workgroup of their own, and `combine` adds what they found; with many, a workgroup adds
// after each SPLIT. Chunks and splits begin where the position in the sequence decides, so a token's result does
// not depend on what else is computed.

#include pairs
#include functions
#include join
#include seen

const CHUNK: i32 = 64;
const PAIRS: i32 = HEAD_DIM / 2;
const OWN: i32 = (PAIRS + THREADS - 1) / THREADS;  // pairs of a result that a thread holds

var<workgroup> query: array<f32, ROWS * HEAD_DIM>;
var<workgroup> weights: array<f32, ROWS * CHUNK>;
var<workgroup> largest: array<f32, ROWS * CHUNK>;

fn kernel(block: vec3<i32>, thread: i32) {
  let token = block.x;
  let first_head = block.y * ROWS;
  let kv_head = first_head / (HEADS / KV_HEADS);
  let own = seen_by(token);
  let sequence = own.sequence;
  let position = own.position;
  var begin = own.begin;
  var end = own.end;
#if SPLITS
  begin = max(begin, block.z * SPLIT);
  end = min(end, (block.z + 1) * SPLIT);
#endif
  for (var i = thread; i < ROWS * HEAD_DIM; i += THREADS) {
    query[i] = q[(token * HEADS + first_head) * HEAD_DIM + i];
  }
  var most: array<f32, ROWS>;
  var sum: array<f32, ROWS>;
  var acc: array<vec2<f32>, ROWS * OWN>;
  for (var r = 0; r < ROWS; r++) { most[r] = NONE; }
#if !SPLITS
  var most_before: array<f32, ROWS>;
  var sum_before: array<f32, ROWS>;
  var acc_before: array<vec2<f32>, ROWS * OWN>;
  for (var r = 0; r < ROWS; r++) { most_before[r] = NONE; }
#endif
  for (var chunk = begin / CHUNK * CHUNK; chunk < end; chunk += CHUNK) {
    workgroupBarrier();
    let at = chunk + thread;
    let seen = at >= begin && at < end;
    // Set to zeros here: naga, which reads this, clears a variable of a loop once, before the loop.
    var score = array<f32, ROWS>();
    if (seen) {
      let page = block_table[sequence * sizes.P + at / PAGE_SIZE];
      let key = ((page * KV_HEADS + kv_head) * PAGE_SIZE + at % PAGE_SIZE) * HEAD_DIM;
      for (var i = 0; i < PAIRS; i++) {
        let two = load_pair(key + 2 * i);
        for (var r = 0; r < ROWS; r++) {
          score[r] += dot(two, vec2(query[r * HEAD_DIM + 2 * i], query[r * HEAD_DIM + 2 * i + 1]));
        }
      }
    }
    for (var r = 0; r < ROWS; r++) {
      var s = score[r] * SCALE;
#if SOFTCAP
      s = SOFTCAP * safe_tanh(s / SOFTCAP);
#endif
#if SLOPES
      s = fma(slopes[first_head + r], f32(at - position), s);
#endif
#if DISTANCES
      s += distances[(first_head + r) * DISTANCES + clamp(DISTANCES / 2 + at - position, 0, DISTANCES - 1)];
#endif
      score[r] = select(NONE, s * LOG2E, seen);
      largest[r * CHUNK + thread] = score[r];
    }
    workgroupBarrier();
    for (var step = CHUNK / 2; step > 0; step /= 2) {
      if (thread < step) {
        for (var r = 0; r < ROWS; r++) {
          let i = r * CHUNK + thread;
          largest[i] = max(largest[i], largest[i + step]);
        }
      }
      workgroupBarrier();
    }
    for (var r = 0; r < ROWS; r++) {
      let now = max(most[r], largest[r * CHUNK]);
      let keep = exp2(most[r] - now);
      most[r] = now;
      sum[r] *= keep;
      for (var j = 0; j < OWN; j++) { acc[r * OWN + j] *= keep; }
      weights[r * CHUNK + thread] = select(0.0, exp2(score[r] - now), seen);
    }
    workgroupBarrier();
    for (var i = max(0, begin - chunk); i < min(CHUNK, end - chunk); i++) {
      let where_ = chunk + i;
      let page = sizes.N + block_table[sequence * sizes.P + where_ / PAGE_SIZE];
      let value = ((page * KV_HEADS + kv_head) * PAGE_SIZE + where_ % PAGE_SIZE) * HEAD_DIM;
      for (var r = 0; r < ROWS; r++) { sum[r] += weights[r * CHUNK + i]; }
      for (var j = 0; j < OWN; j++) {
        let pair = thread + j * THREADS;
        if (pair < PAIRS) {
          let two = load_pair(value + 2 * pair);
          for (var r = 0; r < ROWS; r++) {
            acc[r * OWN + j] = fma(vec2(weights[r * CHUNK + i]), two, acc[r * OWN + j]);
          }
        }
      }
    }
#if !SPLITS
    if ((chunk + CHUNK) % SPLIT == 0 || chunk + CHUNK >= end) {
      for (var r = 0; r < ROWS; r++) {
        let factors = joined(most_before[r], most[r]);
        most_before[r] = max(most_before[r], most[r]);
        sum_before[r] = fma(sum[r], factors.y, sum_before[r] * factors.x);
        most[r] = NONE;
        sum[r] = 0.0;
        for (var j = 0; j < OWN; j++) {
          let i = r * OWN + j;
          acc_before[i] = fma(acc[i], vec2(factors.y), acc_before[i] * factors.x);
          acc[i] = vec2(0.0);
        }
      }
    }
#endif
  }
  for (var r = 0; r < ROWS; r++) {
    let head = first_head + r;
#if SPLITS
    let place = (block.z * sizes.T + token) * HEADS + head;
    if (thread == 0) {
      rows[2 * place] = most[r];
      rows[2 * place + 1] = sum[r];
    }
    let first = place * HEAD_DIM;
#else
    let first = (token * HEADS + head) * HEAD_DIM;
    let factor = whole(most_before[r], sum_before[r], head);
#endif
    for (var j = 0; j < OWN; j++) {
      let pair = thread + j * THREADS;
      if (pair < PAIRS) {
#if SPLITS
        let two = acc[r * OWN + j];
        part[first + 2 * pair] = two.x;
        part[first + 2 * pair + 1] = two.y;
#else
        let two = acc_before[r * OWN + j] * factor;
        out[first + 2 * pair] = two.x;
        out[first + 2 * pair + 1] = two.y;
#endif
      }
    }
  }
}
