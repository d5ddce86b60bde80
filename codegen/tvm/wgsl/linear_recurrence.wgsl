#include state

fn kernel(block: vec3<i32>, thread: i32) {
  let own = tokens_of(block.y);
  let channel = block.x * THREADS + thread;
  if (own.first == own.last || channel >= CHANNELS) { return; }
  let kept = own.slot * CHANNELS + channel;
  var h = select(state[kept], 0.0, own.fresh);
  for (var t = own.first; t < own.last; t++) {
    h = fma(a[t * A_STRIDE + A_FIRST + channel], h, x[t * X_STRIDE + X_FIRST + channel]);
    out[t * CHANNELS + channel] = h;
  }
  state[kept] = h;
}
