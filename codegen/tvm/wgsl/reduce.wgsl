// Sums over the threads of a workgroup, always in one order.

var<workgroup> lanes: array<f32, THREADS>;

fn reduced(value: f32, thread: i32) -> f32 {
  workgroupBarrier();  // what was reduced before has been read
  lanes[thread] = value;
  workgroupBarrier();
  for (var step = THREADS / 2; step > 0; step /= 2) {
    if (thread < step) { lanes[thread] += lanes[thread + step]; }
    workgroupBarrier();
  }
  return lanes[0];
}
