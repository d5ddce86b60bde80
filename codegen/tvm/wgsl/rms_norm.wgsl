#include reduce

fn kernel(block: vec3<i32>, thread: i32) {
  let row = block.x;
  let first = row / HEADS * STRIDE + FIRST + row % HEADS * WIDTH;
  var sum = 0.0;
  for (var i = thread; i < WIDTH; i += THREADS) { sum = fma(x[first + i], x[first + i], sum); }
  let factor = 1.0 / sqrt(reduced(sum, thread) / f32(WIDTH) + EPS);
  for (var i = thread; i < WIDTH; i += THREADS) {
#if WEIGHT
    out[row * WIDTH + i] = x[first + i] * factor * weight[i];
#else
    out[row * WIDTH + i] = x[first + i] * factor;
#endif
  }
}
