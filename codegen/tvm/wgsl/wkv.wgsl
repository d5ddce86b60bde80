#include state

fn kernel(block: vec3<i32>, thread: i32) {
  let own = tokens_of(block.y);
  let channel = block.x * THREADS + thread;
  if (own.first == own.last || channel >= CHANNELS) { return; }
  let kept = own.slot * 3 * CHANNELS + channel;
  var top = select(state[kept], 0.0, own.fresh);
  var below = select(state[kept + CHANNELS], 0.0, own.fresh);
  var largest = select(-1.0e38, state[kept + 2 * CHANNELS], below > 0.0);
  for (var t = own.first; t < own.last; t++) {
    let key = k[t * K_STRIDE + K_FIRST + channel];
    let value = v[t * V_STRIDE + V_FIRST + channel];
    var now = max(largest, first[channel] + key);
    var before = exp(largest - now);
    var add = exp(first[channel] + key - now);
    out[t * CHANNELS + channel] = fma(before, top, add * value) / fma(before, below, add);
    now = max(largest + decay[channel], key);
    before = exp(largest + decay[channel] - now);
    add = exp(key - now);
    top = fma(before, top, add * value);
    below = fma(before, below, add);
    largest = now;
  }
  state[kept] = top;
  state[kept + CHANNELS] = below;
  state[kept + 2 * CHANNELS] = largest;
}
