#include reduce

fn kernel(block: vec3<i32>, thread: i32) {
  let first = block.x * WIDTH;
  var sum = 0.0;
  for (var i = thread; i < WIDTH; i += THREADS) { sum += x[first + i]; }
  let mean = reduced(sum, thread) / f32(WIDTH);
  var squares = 0.0;
  for (var i = thread; i < WIDTH; i += THREADS) {
    let apart = x[first + i] - mean;
    squares = fma(apart, apart, squares);
  }
  let factor = 1.0 / sqrt(reduced(squares, thread) / f32(WIDTH) + EPS);
  for (var i = thread; i < WIDTH; i += THREADS) {
    var y = (x[first + i] - mean) * factor;
#if WEIGHT
    y *= weight[i];
#endif
#if BIAS
    y += bias[i];
#endif
    out[first + i] = y;
  }
}
