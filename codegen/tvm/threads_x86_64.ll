; What threads.ll asks of an x86-64 machine.

declare void @llvm.x86.sse2.pause()
declare i64 @llvm.readcyclecounter()

; Give the core's other thread a turn, for some 40 to 140 cycles.
define internal void @pause() {
  call void @llvm.x86.sse2.pause()
  ret void
}

; The time stamp counter: 2 to 4 a nanosecond.
define internal i64 @ticks() {
  %r = call i64 @llvm.readcyclecounter()
  ret i64 %r
}

; int futex(uint32_t *word, int operation, uint32_t value)
define internal void @futex(ptr %word, i32 %operation, i32 %value) {
  %r = call i64 (i64, ...) @syscall(i64 202, ptr %word, i32 %operation, i32 %value, ptr null, ptr null, i32 0)
  ret void
}
