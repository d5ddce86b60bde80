#include activated

fn kernel(block: vec3<i32>, thread: i32) {
  let at = block.x * THREADS + thread;
  if (at >= sizes.T * WIDTH) { return; }
  let row = at / WIDTH * 2 * WIDTH + at % WIDTH;
  out[at] = activated(gate_up[row]) * gate_up[row + WIDTH];
}
