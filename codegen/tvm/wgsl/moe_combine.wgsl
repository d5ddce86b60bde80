fn kernel(block: vec3<i32>, thread: i32) {
  for (var i = thread; i < WIDTH; i += THREADS) {
    var sum = 0.0;
    for (var j = 0; j < TOP_K; j++) {
      let pair = block.x * TOP_K + j;
      var value = y[place[pair] * WIDTH + i];
#if BIAS
      value += down_bias[clamp(indices[pair], 0, EXPERTS - 1) * WIDTH + i];
#endif
      sum = fma(value, weights[pair], sum);
    }
    out[block.x * WIDTH + i] = sum;
  }
}
