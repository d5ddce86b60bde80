#include state
#include activated

fn kernel(block: vec3<i32>, thread: i32) {
  let own = tokens_of(block.y);
  let channel = block.x * THREADS + thread;
  if (own.first == own.last || channel >= CHANNELS) { return; }
  let kept = own.slot * (WIDTH - 1) * CHANNELS + channel;
  var seen: array<f32, WIDTH>;
  for (var w = 1; w < WIDTH; w++) {
    if (!own.fresh) { seen[w] = state[kept + (w - 1) * CHANNELS]; }
  }
  for (var t = own.first; t < own.last; t++) {
    for (var w = 1; w < WIDTH; w++) { seen[w - 1] = seen[w]; }
    seen[WIDTH - 1] = x[t * X_STRIDE + X_FIRST + channel];
#if BIAS
    var y = bias[channel];
#else
    var y = 0.0;
#endif
    for (var w = 0; w < WIDTH; w++) { y = fma(weight[w * CHANNELS + channel], seen[w], y); }
#if ACTIVATES
    y = activated(y);
#endif
    out[t * CHANNELS + channel] = y;
  }
  for (var w = 1; w < WIDTH; w++) { state[kept + (w - 1) * CHANNELS] = seen[w]; }
}
