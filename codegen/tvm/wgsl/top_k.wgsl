// A workgroup a row: K times the largest that comes after the one before, by value and then by place. NaN stands
// above all, 0 and -0 alike.

var<workgroup> keys: array<i32, THREADS>;
var<workgroup> places: array<i32, THREADS>;

fn key_of(x: f32) -> i32 {
  let bits = bitcast<i32>(x);
  if ((bits & 0x7fffffff) > 0x7f800000) { return 0x7fffffff; }
  if ((bits & 0x7fffffff) == 0) { return 0; }
  return select(bits, bits ^ 0x7fffffff, bits < 0);
}

fn kernel(block: vec3<i32>, thread: i32) {
  var last = 0x7fffffff;
  var place = -1;
  for (var j = 0; j < K; j++) {
    var best = -2147483647 - 1;
    var found = WIDTH;
    for (var i = thread; i < WIDTH; i += THREADS) {
      let key = key_of(x[block.x * WIDTH + i]);
      let left = key < last || (key == last && i > place);
      if (left && (key > best || (key == best && i < found))) {
        best = key;
        found = i;
      }
    }
    keys[thread] = best;
    places[thread] = found;
    workgroupBarrier();
    for (var step = THREADS / 2; step > 0; step /= 2) {
      if (thread < step) {
        let key = keys[thread + step];
        let at = places[thread + step];
        if (key > keys[thread] || (key == keys[thread] && at < places[thread])) {
          keys[thread] = key;
          places[thread] = at;
        }
      }
      workgroupBarrier();
    }
    last = keys[0];
    place = places[0];
    workgroupBarrier();
    if (thread == 0) { out[block.x * K + j] = place; }
  }
}
