#include activated

fn kernel(block: vec3<i32>, thread: i32) {
  let at = block.x * THREADS + thread;
  if (at < sizes.T * WIDTH) { out[at] = activated(x[at]); }
}
