// k, v [T, heads, D] into pages [2, N, heads, page_size, D]. A workgroup writes one head of a token, key and
// value.

#include pairs

fn kernel(block: vec3<i32>, thread: i32) {
  let slot = slot_mapping[block.x];
  if (slot < 0) { return; }
  for (var which = 0; which < 2; which++) {
    let page = which * sizes.N + slot / PAGE_SIZE;
    let to = ((page * HEADS + block.y) * PAGE_SIZE + slot % PAGE_SIZE) * HEAD_DIM;
    for (var i = 2 * thread; i < HEAD_DIM; i += 2 * THREADS) {
      if (which == 0) {
        let at = block.x * K_STRIDE + K_FIRST + block.y * HEAD_DIM + i;
        store_pair(to + i, vec2(k[at], k[at + 1]));
      } else {
        let at = block.x * V_STRIDE + V_FIRST + block.y * HEAD_DIM + i;
        store_pair(to + i, vec2(v[at], v[at + 1]));
      }
    }
  }
}
