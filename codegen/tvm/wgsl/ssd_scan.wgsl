#include state
#include column

fn kernel(block: vec3<i32>, thread: i32) {
  let own = tokens_of(block.y);
  let i = block.x * THREADS + thread;
  let head = i / HEAD_DIM;
  if (own.first == own.last || head >= HEADS) { return; }
  let row = head / (HEADS / GROUPS) * COLUMN;
  let kept = (own.slot * HEADS + head) * COLUMN * HEAD_DIM + i % HEAD_DIM;
  take_column(kept, HEAD_DIM, own.fresh);
  for (var t = own.first; t < own.last; t++) {
    let step = dt[t * DT_STRIDE + DT_FIRST + head];
    let value = x[t * X_STRIDE + X_FIRST + i];
    let decay = exp(step * a[head]);
    var y = 0.0;
    for (var n = 0; n < COLUMN; n++) {
      let h = fma(decay, column_of(kept, HEAD_DIM, n), b[t * B_STRIDE + B_FIRST + row + n] * (step * value));
      set_column(kept, HEAD_DIM, n, h);
      y = fma(c[t * C_STRIDE + C_FIRST + row + n], h, y);
    }
#if D
    y = fma(d[head], value, y);
#endif
    out[t * (HEADS * HEAD_DIM) + i] = y;
  }
  keep_column(kept, HEAD_DIM);
}
