fn kernel(block: vec3<i32>, thread: i32) {
  let row = clamp(index[block.x], 0, sizes.T - 1);
  for (var i = thread; i < WIDTH; i += THREADS) { out[block.x * WIDTH + i] = x[row * WIDTH + i]; }
}
