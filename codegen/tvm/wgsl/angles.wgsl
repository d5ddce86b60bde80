// Sine and cosine to 2e-7 of angles up to 2e5 (positions of a context), to 1e-5 up to 1e6, and within [-1, 1] beyond:
// those of the language are good to 5e-4, and only within [-pi, pi].
// pi / 2 in parts of 7 bits, so that multiples of up to 2^17 are exact (Cody and Waite); polynomials of Cephes.

fn turned(x: f32, quarters: i32) -> f32 {
  let k = round(x * 0.63661977236758134);
  var r = x - k * 1.5625;
  r -= k * 0.0081787109375;
  r -= k * 0.00011730194091796875;
  r -= k * 3.1292438507080078e-7;
  r -= k * 9.920935796805404e-10;
  let z = r * r;
  let s = fma(fma(fma(-1.9515295891e-4, z, 8.3321608736e-3), z, -1.6666654611e-1) * z, r, r);
  let c = fma(fma(fma(2.443315711809948e-5, z, -1.388731625493765e-3), z, 4.166664568298827e-2) * z, z, 1.0 - 0.5 * z);
  let which = (i32(k) + quarters) & 3;
  let y = select(s, c, (which & 1) == 1);
  return clamp(select(y, -y, which >= 2), -1.0, 1.0);
}

fn sin_of(x: f32) -> f32 { return turned(x, 0); }

fn cos_of(x: f32) -> f32 { return turned(x, 1); }
