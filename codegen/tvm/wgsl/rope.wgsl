// A head stands in columns of a wider row, STRIDE apart from row to row and from column FIRST on.

fn kernel(block: vec3<i32>, thread: i32) {
  let at = block.x * THREADS + thread;
  if (at >= sizes.T * (HEADS * HEAD_DIM)) { return; }
  let token = at / (HEADS * HEAD_DIM);
  let column = at % (HEADS * HEAD_DIM);
  let i = column % HEAD_DIM;
  let head = token * STRIDE + FIRST + column - i;
  if (i >= ROTARY_DIM) {
    out[at] = x[head + i];
    return;
  }
#if INTERLEAVED
  let second = i % 2 == 1;
  let other = i ^ 1;
#else
  let second = i >= ROTARY_DIM / 2;
  let other = select(i + ROTARY_DIM / 2, i - ROTARY_DIM / 2, second);
#endif
  let turned = select(-x[head + other], x[head + other], second);
  out[at] = fma(x[head + i], cosines[token * ROTARY_DIM + i], turned * sines[token * ROTARY_DIM + i]);
}
