#include state
#include column

fn kernel(block: vec3<i32>, thread: i32) {
  let own = tokens_of(block.y);
  let i = block.x * THREADS + thread;
  let head = i / VALUE_DIM;
  if (own.first == own.last || head >= HEADS) { return; }
  let row = head / (HEADS / KEY_HEADS) * COLUMN;
  let kept = (own.slot * HEADS + head) * COLUMN * VALUE_DIM + i % VALUE_DIM;
  take_column(kept, VALUE_DIM, own.fresh);
  for (var t = own.first; t < own.last; t++) {
    let key = t * K_STRIDE + K_FIRST + row;
    let query = t * Q_STRIDE + Q_FIRST + row;
    var known = 0.0;
#if !BY_ELEMENT
    let decay = exp(g[t * G_STRIDE + G_FIRST + head]);
#endif
    for (var n = 0; n < COLUMN; n++) {
#if BY_ELEMENT
      let decay = exp(g[t * G_STRIDE + G_FIRST + head * COLUMN + n]);
#endif
      let h = column_of(kept, VALUE_DIM, n) * decay;
      set_column(kept, VALUE_DIM, n, h);
      known = fma(k[key + n], h, known);
    }
    let fresh = beta[t * BETA_STRIDE + BETA_FIRST + head] * (v[t * V_STRIDE + V_FIRST + i] - known);
    var y = 0.0;
    for (var n = 0; n < COLUMN; n++) {
      let h = fma(k[key + n], fresh, column_of(kept, VALUE_DIM, n));
      set_column(kept, VALUE_DIM, n, h);
      y = fma(q[query + n], h, y);
    }
    out[t * (HEADS * VALUE_DIM) + i] = y * SCALE;
  }
  keep_column(kept, VALUE_DIM);
}
