// Two neighbours of the cache's pages: `at` is even.

#if KIND == float32
fn load_pair(at: i32) -> vec2<f32> { return vec2(pages[at], pages[at + 1]); }
#endif
#if KIND == float16
fn load_pair(at: i32) -> vec2<f32> { return unpack2x16float(pages[at / 2]); }
#endif
#if KIND == bfloat16
fn load_pair(at: i32) -> vec2<f32> {
  let two = pages[at / 2];
  return vec2(bitcast<f32>(two << 16), bitcast<f32>(two & 0xffff0000));
}
#endif

#if WRITES
#if KIND == float32
fn store_pair(at: i32, two: vec2<f32>) {
  pages[at] = two.x;
  pages[at + 1] = two.y;
}
#endif
#if KIND == float16
fn store_pair(at: i32, two: vec2<f32>) { pages[at / 2] = pack2x16float(two); }
#endif
#if KIND == bfloat16
fn to_bfloat(x: f32) -> u32 {
  let bits = bitcast<u32>(x);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

fn store_pair(at: i32, two: vec2<f32>) { pages[at / 2] = to_bfloat(two.x) | (to_bfloat(two.y) << 16); }
#endif
#endif
