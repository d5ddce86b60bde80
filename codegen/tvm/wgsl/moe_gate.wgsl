#include activated

fn kernel(block: vec3<i32>, thread: i32) {
  let at = block.x * THREADS + thread;
  if (at >= sizes.S * WIDTH) { return; }
  let row = at / WIDTH;
  let i = at % WIDTH;
#if GATED
  let wide = 2 * WIDTH;
  let second = WIDTH;
#else
  let wide = WIDTH;
  let second = 0;
#endif
  var gate = products[row * wide + i];
  var up = products[row * wide + second + i];
#if BIAS
  let e = clamp(indices[source[row]], 0, EXPERTS - 1);
  gate += up_bias[e * wide + i];
  up += up_bias[e * wide + second + i];
#endif
#if LIMIT
#if !LIMITS_ACTIVE
  gate = select(gate, LIMIT, gate > LIMIT);  // what is no number stays so
#endif
  up = select(select(up, LIMIT, up > LIMIT), -LIMIT, up < -LIMIT);
#endif
#if SWISH
  var y = gate / (1.0 + exp(-ALPHA * gate));
#else
  var y = activated(gate);
#endif
#if SQUARED
  y *= y;
#endif
#if LIMIT
#if LIMITS_ACTIVE
  y = select(y, LIMIT, y > LIMIT);
#endif
#endif
#if GATED
  y *= up + OFFSET;
#endif
  out[at] = y;
}
