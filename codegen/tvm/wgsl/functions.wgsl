// What WGSL lacks, or has in a form that overflows.

fn safe_tanh(x: f32) -> f32 {
  let e = exp(-2.0 * abs(x));
  let z = x * x;
  let near = x * fma(z, fma(z, fma(z, -0.053968254, 0.13333333), -0.33333333), 1.0);  // where 1 - e loses digits
  return select(sign(x) * (1.0 - e) / (1.0 + e), near, abs(x) < 0.1);
}

// Abramowitz and Stegun 7.1.26; to 1.5e-7.
fn erf_of(x: f32) -> f32 {
  let a = abs(x);
  let t = 1.0 / fma(0.3275911, a, 1.0);
  var p = fma(1.061405429, t, -1.453152027);
  p = fma(p, t, 1.421413741);
  p = fma(p, t, -0.284496736);
  p = fma(p, t, 0.254829592);
  return sign(x) * (1.0 - p * t * exp(-a * a));
}

// Whole powers of negative numbers too.
fn pow_of(x: f32, y: f32) -> f32 {
  if (y == 0.0) { return 1.0; }
  let size = pow(abs(x), y);
  if (x >= 0.0 || floor(y) != y) { return select(pow(x, y), size, x >= 0.0); }
  return select(size, -size, abs(y) % 2.0 == 1.0);
}
