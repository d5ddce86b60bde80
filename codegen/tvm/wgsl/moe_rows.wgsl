// One workgroup: pairs of a token and one of its experts, brought together by expert and in order. A thread
// counts and places the pairs of its experts.

var<workgroup> counts: array<i32, EXPERTS>;
var<workgroup> firsts: array<i32, EXPERTS>;

fn kernel(block: vec3<i32>, thread: i32) {
  for (var e = thread; e < EXPERTS; e += THREADS) {
    var count = 0;
    for (var p = 0; p < sizes.S; p++) { count += select(0, 1, clamp(indices[p], 0, EXPERTS - 1) == e); }
    counts[e] = count;
  }
  workgroupBarrier();
  if (thread == 0) {
    var total = 0;
    var some = 0;
    for (var e = 0; e < EXPERTS; e++) {
      firsts[e] = total;
      offsets[e] = total;
      total += counts[e];
      if (counts[e] > 0) {
        some++;
        active_[some] = e;
      }
    }
    offsets[EXPERTS] = total;
    active_[0] = some;
  }
  workgroupBarrier();
  for (var e = thread; e < EXPERTS; e += THREADS) {
    var at = firsts[e];
    for (var p = 0; p < sizes.S; p++) {
      if (clamp(indices[p], 0, EXPERTS - 1) == e) {
        place[p] = at;
        source[at] = p;
        at++;
      }
    }
  }
}
