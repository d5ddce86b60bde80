// A quantized number of a weight in the layout of `layout.py`, and what a code stands for.

#if CODEBOOK
var<private> book: array<f32, 16> = VALUES;
#endif

// Scales, zero points and minima of row n: [tiles, groups, 16].
fn place_of(tile: i32, row: i32, group: i32) -> i32 { return (tile * GROUPS + group) * 16 + row; }
