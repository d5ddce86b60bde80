// Adds the splits of a token's head, in order. A workgroup a token and head.

#include join
#include seen

fn kernel(block: vec3<i32>, thread: i32) {
  let token = block.x;
  let head = block.y;
  let seen = seen_by(token);
  for (var d = thread; d < HEAD_DIM; d += THREADS) {
    var most = NONE;
    var sum = 0.0;
    var result = 0.0;
    for (var split = seen.begin / SPLIT; split * SPLIT < seen.end; split++) {
      let place = (split * sizes.T + token) * HEADS + head;
      let factors = joined(most, rows[2 * place]);
      most = max(most, rows[2 * place]);
      sum = fma(rows[2 * place + 1], factors.y, sum * factors.x);
      result = fma(part[place * HEAD_DIM + d], factors.y, result * factors.x);
    }
    out[(token * HEADS + head) * HEAD_DIM + d] = result * whole(most, sum, head);
  }
}
