// Rows of a table in the layout of products.

#include codes

fn code_at(n: i32, k: i32) -> u32 {
  let row = n % 16;
  let at = k % 64;
  let within = at % SPAN;
  let run = within % (SPAN / 4);
  let step = at / SPAN * (SPAN / 16) + run / 4;
  let i = run % 4;
  let lane = row % 8 * 4 + within / (SPAN / 4);
  let half = i % 2;
  let operand = i / 2 * 2 + row / 8;
  let unit = n / 16 * (K_PADDED / 64) + k / 64;
#if BITS == 4
  let word = codes[(unit * 32 + lane) * 4 + step];
#if CODEBOOK
  return (word >> u32(8 * operand + 4 * half)) & 15;
#else
  return (word >> u32(16 * half + 4 * operand)) & 15;
#endif
#endif
#if BITS == 8
  let byte = ((unit * 2 + step / 2) * 32 + lane) * 16 + step % 2 * 8 + operand * 2 + half;
  return (codes[byte / 4] >> u32(8 * (byte % 4))) & 255;
#endif
#if BITS == 16
  let number = ((unit * 4 + step) * 32 + lane) * 8 + operand * 2 + half;
  return (codes[number / 2] >> u32(16 * (number % 2))) & 0xffff;
#endif
}

fn kernel(block: vec3<i32>, thread: i32) {
  let n = clamp(ids[block.x], 0, N - 1);
  for (var k = thread; k < K; k += THREADS) {
    let code = code_at(n, k);
#if BITS == 16
    out[block.x * K + k] = unpack2x16float(code).x;
#else
    let at = place_of(n / 16, n % 16, k / GROUP_SIZE);
#if MINIMUM
    out[block.x * K + k] = f32(code) * get_scales(at) + get_zeros(at);
#endif
#if CODEBOOK
    out[block.x * K + k] = book[code] * get_scales(at);
#endif
#if ZERO
    out[block.x * K + k] = (f32(code) - get_zeros(at)) * get_scales(at);
#endif
#if SYMMETRIC
    out[block.x * K + k] = (f32(code) - f32(OFFSET)) * get_scales(at);
#endif
#endif
  }
}
