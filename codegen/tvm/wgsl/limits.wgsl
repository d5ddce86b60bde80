// WGSL has no literal for what is not finite, and refuses constant expressions that give it.

var<private> infinite_bits: u32 = 0x7f800000u;

fn infinity() -> f32 { return bitcast<f32>(infinite_bits); }

fn not_a_number() -> f32 { return bitcast<f32>(infinite_bits | 1u); }

fn is_nan(x: f32) -> bool { return (bitcast<u32>(x) & 0x7fffffff) > 0x7f800000; }
