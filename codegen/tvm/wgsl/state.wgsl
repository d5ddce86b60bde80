// Recurrences (`ir/ops/state.py` says what they compute). A thread goes through a sequence's tokens, one after the
// other, for its channels: a row's bits depend on the tokens before it alone, however the sequence is cut. Grid:
// channels or heads, sequences.

struct Tokens {
  first: i32,
  last: i32,
  slot: i32,
  fresh: bool  // nothing of the sequence was computed before
}

fn tokens_of(b: i32) -> Tokens {
  let begin = query_start[b];
  let end = query_start[b + 1];
  return Tokens(begin, end, state_slot[b], context_len[b] == end - begin);
}
