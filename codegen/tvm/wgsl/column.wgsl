// A column of a state, in registers while it is worked on where it is not too long.

#if HELD
var<private> held: array<f32, COLUMN>;

fn column_of(kept: i32, apart: i32, n: i32) -> f32 { return held[n]; }

fn set_column(kept: i32, apart: i32, n: i32, value: f32) { held[n] = value; }
#else
fn column_of(kept: i32, apart: i32, n: i32) -> f32 { return state[kept + n * apart]; }

fn set_column(kept: i32, apart: i32, n: i32, value: f32) { state[kept + n * apart] = value; }
#endif

fn take_column(kept: i32, apart: i32, fresh: bool) {
  for (var n = 0; n < COLUMN; n++) { set_column(kept, apart, n, select(state[kept + n * apart], 0.0, fresh)); }
}

fn keep_column(kept: i32, apart: i32) {
#if HELD
  for (var n = 0; n < COLUMN; n++) { state[kept + n * apart] = held[n]; }
#endif
}
