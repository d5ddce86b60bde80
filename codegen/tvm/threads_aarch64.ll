; What threads.ll asks of an aarch64 machine.

declare i64 @llvm.ctlz.i64(i64, i1)

; `yield` does nothing on most cores; an instruction barrier waits for some tens of cycles.
define internal void @pause() {
  call void asm sideeffect "isb", ""()
  ret void
}

; The virtual counter, which user programs may read where the cycle counter traps. It runs with 24 MHz to 1 GHz
; (CNTFRQ_EL0): moved up, so that there are 2 to 4 a nanosecond as on x86-64.
define internal i64 @ticks() {
  %count = call i64 asm sideeffect "mrs $0, cntvct_el0", "=r"()
  %frequency = call i64 asm sideeffect "mrs $0, cntfrq_el0", "=r"()
  %zeros = call i64 @llvm.ctlz.i64(i64 %frequency, i1 false)
  %shift = sub i64 %zeros, 32
  %r = shl i64 %count, %shift
  ret i64 %r
}

; int futex(uint32_t *word, int operation, uint32_t value)
define internal void @futex(ptr %word, i32 %operation, i32 %value) {
  %r = call i64 (i64, ...) @syscall(i64 98, ptr %word, i32 %operation, i32 %value, ptr null, ptr null, i32 0)
  ret void
}
