// What of its sequence's context a token sees: positions begin … end - 1.

struct Seen {
  sequence: i32,
  position: i32,
  begin: i32,
  end: i32
}

fn seen_by(token: i32) -> Seen {
  var sequence = 0;
  while (sequence + 1 < sizes.B && query_start[sequence + 1] <= token) { sequence++; }
  let context = context_len[sequence];
  let position = context - (query_start[sequence + 1] - token);
  var begin = 0;
  var end = context;
#if WINDOW
  begin = max(0, position - WINDOW + 1);
#endif
#if CAUSAL
  end = position + 1;
#else
#if WINDOW
  end = min(context, position + WINDOW);
#endif
#endif
  return Seen(sequence, position, begin, end);
}
