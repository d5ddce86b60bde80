// Rows of a table that lies row by row. An index beyond its ends is held to them, as on the CPU.

fn kernel(block: vec3<i32>, thread: i32) {
  let row = clamp(ids[block.x], 0, ROWS - 1);
  for (var i = thread; i < WIDTH; i += THREADS) { out[block.x * WIDTH + i] = get_table(row * WIDTH + i); }
}
