#include state
#include column

// log(1 + e), where the sum would lose a small e.
fn log1p_of(e: f32) -> f32 { return select(log(1.0 + e), e * (1.0 - e * (0.5 - e / 3.0)), e < 1.0e-2); }

fn kernel(block: vec3<i32>, thread: i32) {
  let own = tokens_of(block.y);
  let i = block.x * THREADS + thread;
  if (own.first == own.last || i >= CHANNELS) { return; }
  let kept = own.slot * COLUMN * CHANNELS + i;
  take_column(kept, CHANNELS, own.fresh);
  for (var t = own.first; t < own.last; t++) {
    let value = x[t * X_STRIDE + X_FIRST + i];
    var step = dt[t * DT_STRIDE + DT_FIRST + i];
#if DT_BIAS
    step += dt_bias[i];
#endif
#if SOFTPLUS_OF_DT
    step = select(log1p_of(exp(step)), step, step > 20.0);
#endif
    var y = 0.0;
    for (var n = 0; n < COLUMN; n++) {
      let decay = exp(step * a[n * CHANNELS + i]);
      let h = fma(decay, column_of(kept, CHANNELS, n), step * value * b[t * B_STRIDE + B_FIRST + n]);
      set_column(kept, CHANNELS, n, h);
      y = fma(c[t * C_STRIDE + C_FIRST + n], h, y);
    }
#if D
    y = fma(d[i], value, y);
#endif
    out[t * CHANNELS + i] = y;
  }
  keep_column(kept, CHANNELS);
}
