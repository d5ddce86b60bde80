// Two parts of a row's context as one: largest scores (base 2), and sums of 2^(score - largest).

const NONE: f32 = -3.0e38;
const LOG2E: f32 = 1.4426950408889634;

// By what the part before and the part after are multiplied.
fn joined(before: f32, after: f32) -> vec2<f32> {
  let most = max(before, after);
  return vec2(exp2(before - most), exp2(after - most));
}

// What a result is multiplied by once its whole context is known: sinks take weight and give nothing.
fn whole(most: f32, sum: f32, head: i32) -> f32 {
#if SINKS
  let sink = sinks[head] * LOG2E;
  let factors = joined(most, sink);
  return factors.x / fma(sum, factors.x, factors.y);
#else
  return select(0.0, 1.0 / sum, sum != 0.0);
#endif
}
