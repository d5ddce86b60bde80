; What kernels need at run time, linked into every kernel library: threads, scratch memory, the step's C entry points.
;
; TVM's kernels call through three variables (__TVMBackend...), which TVM's own runtime library would set. Defining them
; here makes a kernel library stand alone: it loads in a fraction of a millisecond, and its threads behave as we want.
;
; Threads. A parallel region is a number of tasks. `state` holds the region's number (high half) and the next task (low
; half); whoever increments it by compare-and-swap owns that task, so a thread that is late takes nothing, and the caller
; never waits for a thread that has not started: a core that somebody else uses costs its share, not a stall. Tasks are
; more than threads, so that the faster thread takes more. Which thread computes a task does not change its result.
; Workers spin for some microseconds between regions, then give way, then sleep on a futex; none is pinned to a core.
;
; A worker that loses its core in the middle of a task makes the caller wait for milliseconds, where a region takes
; microseconds. Where the caller waited far longer than it worked, it computes alone for as long as it waited, and twice
; as long each time that this happens before it has worked in parallel for as long again, up to 2^28 ticks (some 0.1 s).
; A busy machine costs the second thread then, and not more than that; one that is busy now and then costs about twice
; what was waited. Time is what counts and not regions: those of a long prompt take a hundred times those of a token.
;
; After a fork the child has no workers, and computes alone.
;
; Profile. The step calls `llmc_mark` after each kernel call; where somebody asked (`llmc_profile`), the cycles since the
; mark before are added to that call's count.

; `pause`, `ticks` and `futex` are the machine's: threads_MACHINE.ll, which is put before this text.

@threads = internal global i32 1, align 64           ; that may compute, the caller included
@started = internal global i32 0                     ; workers that exist
@busy = internal global i32 0, align 64              ; a region is running
@state = internal global i64 0, align 64             ; region << 32 | tasks taken from the end << 16 | from the beginning
@left = internal global i32 0, align 64              ; tasks that are not finished
@region = internal global i32 0, align 64            ; the futex that idle workers sleep on
@sleepers = internal global i32 0, align 64
@alone = internal global i64 0, align 64             ; the cycle counter until which the caller computes alone
@caution = internal global i64 0                     ; for how long it was the last time, less what went well since
@function = internal global ptr null, align 64       ; the region: function, its closure, number of tasks
@closure = internal global ptr null
@tasks = internal global i32 0
@failed = internal global i32 0
@error = internal global ptr null                    ; kind of the last error that a packed function set
@cycles = internal global ptr null, align 64         ; int64 for each call of the step; null: nobody asks
@mark = internal global i64 0

@__TVMBackendParallelLaunch = global ptr @llmc_launch
@__TVMBackendAllocWorkspace = global ptr @allocate
@__TVMBackendFreeWorkspace = global ptr @release

declare i32 @__tvm_ffi_workspace(ptr, ptr, i32, ptr)
declare i32 @posix_memalign(ptr, i64, i64)
declare void @free(ptr)
declare i64 @syscall(i64, ...)
declare i32 @sched_yield()
declare i32 @pthread_create(ptr, ptr, ptr, ptr)
declare i32 @pthread_detach(i64)
declare i32 @pthread_sigmask(i32, ptr, ptr)
declare i64 @llvm.smax.i64(i64, i64)
declare i64 @llvm.smin.i64(i64, i64)
declare i32 @llvm.smin.i32(i32, i32)

; ---- entry points: int f(int64_t *dims, uint64_t *pointers), 0 where all went well; llmc_step is made by build.py -----

%value = type { i32, i32, ptr }                      ; TVMFFIAny: type (4: an opaque pointer), zero, the pointer

define i32 @llmc_workspace(ptr %dims, ptr %pointers) {
  %r = call i32 @call_packed(ptr @__tvm_ffi_workspace, ptr %dims, ptr %pointers)
  ret i32 %r
}

define i32 @call_packed(ptr %f, ptr %dims, ptr %pointers) {
  %args = alloca [2 x %value], align 16
  %result = alloca %value, align 16
  store %value { i32 4, i32 0, ptr null }, ptr %args
  %p0 = getelementptr %value, ptr %args, i64 0, i32 2
  store ptr %dims, ptr %p0
  %second = getelementptr %value, ptr %args, i64 1
  store %value { i32 4, i32 0, ptr null }, ptr %second
  %p1 = getelementptr %value, ptr %args, i64 1, i32 2
  store ptr %pointers, ptr %p1
  store %value zeroinitializer, ptr %result
  %r = call i32 %f(ptr null, ptr %args, i32 2, ptr %result)
  ret i32 %r
}

; Packed functions report a wrong call here; ours are called from above only.
define void @TVMFFIErrorSetRaisedFromCStrParts(ptr %kind, ptr %parts, i32 %count) {
  store ptr %kind, ptr @error
  ret void
}

; ---- profile --------------------------------------------------------------------------------------------------------

; Add each call's cycles to counts[call] from now on; null: no longer. Called between steps.
define void @llmc_profile(ptr %counts) {
  store ptr %counts, ptr @cycles
  ret void
}

; The call of that number has ended; -1: the step begins. Returns 0.
define i32 @llmc_mark(i32 %call) {
  %counts = load ptr, ptr @cycles
  %off = icmp eq ptr %counts, null
  br i1 %off, label %done, label %look

look:
  %now = call i64 @ticks()
  %then = load i64, ptr @mark
  store i64 %now, ptr @mark
  %begins = icmp slt i32 %call, 0
  br i1 %begins, label %done, label %count

count:
  %index = zext i32 %call to i64
  %place = getelementptr i64, ptr %counts, i64 %index
  %before = load i64, ptr %place
  %spent = sub i64 %now, %then
  %after = add i64 %before, %spent
  store i64 %after, ptr %place
  br label %done

done:
  ret i32 0
}

; ---- scratch memory -------------------------------------------------------------------------------------------------

define internal ptr @allocate(i32 %device, i32 %id, i64 %size, i32 %code, i32 %bits) {
  %place = alloca ptr
  store ptr null, ptr %place
  %e = call i32 @posix_memalign(ptr %place, i64 64, i64 %size)
  %p = load ptr, ptr %place
  ret ptr %p
}

define internal i32 @release(i32 %device, i32 %id, ptr %p) {
  call void @free(ptr %p)
  ret i32 0
}

; ---- threads --------------------------------------------------------------------------------------------------------

; Let up to n threads compute, the caller included; returns how many will. Called between steps.
define i32 @llmc_set_threads(i32 %n) {
entry:
  %one = icmp slt i32 %n, 1
  %wanted = select i1 %one, i32 1, i32 %n
  %thread = alloca i64
  %all = alloca [16 x i64], align 16
  %old = alloca [16 x i64], align 16
  br label %fill

fill:                                                ; workers take no signals: those are the process's
  %i = phi i64 [ 0, %entry ], [ %i1, %fill ]
  %word = getelementptr [16 x i64], ptr %all, i64 0, i64 %i
  store i64 -1, ptr %word
  %i1 = add i64 %i, 1
  %filled = icmp eq i64 %i1, 16
  br i1 %filled, label %mask, label %fill

mask:
  %m = call i32 @pthread_sigmask(i32 2, ptr %all, ptr %old)
  br label %next

next:
  %have = load i32, ptr @started
  %workers = add i32 %have, 1
  %enough = icmp sge i32 %workers, %wanted
  br i1 %enough, label %done, label %create

create:
  %index = zext i32 %have to i64
  %argument = inttoptr i64 %index to ptr
  %e = call i32 @pthread_create(ptr %thread, ptr null, ptr @worker, ptr %argument)
  %well = icmp eq i32 %e, 0
  br i1 %well, label %created, label %done

created:
  %id = load i64, ptr %thread
  %d = call i32 @pthread_detach(i64 %id)
  store i32 %workers, ptr @started
  br label %next

done:
  %r = call i32 @pthread_sigmask(i32 2, ptr %old, ptr null)
  %now = load i32, ptr @started
  %can = add i32 %now, 1
  %fewer = icmp slt i32 %can, %wanted
  %count = select i1 %fewer, i32 %can, i32 %wanted
  store i64 0, ptr @alone
  store i64 0, ptr @caution
  store atomic i32 %count, ptr @threads release, align 4
  ret i32 %count
}

; int launch(int (*f)(int task, struct { void *sync; int tasks; } *, void *closure), void *closure, int tasks)
define i32 @llmc_launch(ptr %f, ptr %data, i32 %given) {
entry:
  %env = alloca { ptr, i32 }
  %n = load atomic i32, ptr @threads acquire, align 4
  %several = mul i32 %n, 4
  %single = icmp sle i32 %n, 1
  %natural = select i1 %single, i32 1, i32 %several
  %free = icmp sle i32 %given, 0
  %asked = select i1 %free, i32 %natural, i32 %given
  %count = call i32 @llvm.smin.i32(i32 %asked, i32 65535)
  %trivial = icmp eq i32 %count, 1
  %direct = or i1 %single, %trivial
  br i1 %direct, label %serial, label %lock

lock:                                                ; a second thread of the process, or a region in a region, is serial
  %got = cmpxchg ptr @busy, i32 0, i32 1 acquire monotonic
  %mine = extractvalue { i32, i1 } %got, 1
  br i1 %mine, label %weigh, label %serial

weigh:
  %t0 = call i64 @ticks()
  %until = load i64, ptr @alone
  %more = sub i64 %until, %t0                        ; beyond what there can be where it is over, or the counter was set
  %careful = icmp ult i64 %more, 268435457
  br i1 %careful, label %careful_one, label %publish

careful_one:
  store atomic i32 0, ptr @busy release, align 4
  br label %serial

serial:
  store ptr null, ptr %env
  %envn = getelementptr { ptr, i32 }, ptr %env, i64 0, i32 1
  store i32 %count, ptr %envn
  br label %each

each:
  %k = phi i32 [ 0, %serial ], [ %k1, %each ]
  %sum = phi i32 [ 0, %serial ], [ %sum1, %each ]
  %r = call i32 %f(i32 %k, ptr %env, ptr %data)
  %sum1 = or i32 %sum, %r
  %k1 = add i32 %k, 1
  %end = icmp sge i32 %k1, %count
  br i1 %end, label %serial_done, label %each

serial_done:
  %bad = icmp ne i32 %sum1, 0
  %bad32 = sext i1 %bad to i32
  ret i32 %bad32

publish:
  store atomic ptr %f, ptr @function monotonic, align 8
  store atomic ptr %data, ptr @closure monotonic, align 8
  store atomic i32 %count, ptr @tasks monotonic, align 4
  store atomic i32 0, ptr @failed monotonic, align 4
  store atomic i32 %count, ptr @left monotonic, align 4
  %last = load atomic i32, ptr @region monotonic, align 4
  %number = add i32 %last, 1
  %wide = zext i32 %number to i64
  %fresh = shl i64 %wide, 32
  store atomic i64 %fresh, ptr @state release, align 8
  store atomic i32 %number, ptr @region seq_cst, align 4
  %asleep = load atomic i32, ptr @sleepers seq_cst, align 4
  %anyone = icmp sgt i32 %asleep, 0
  br i1 %anyone, label %wake, label %work

wake:                                                ; FUTEX_WAKE | FUTEX_PRIVATE
  call void @futex(ptr @region, i32 129, i32 2147483647)
  br label %work

work:
  call void @take(i32 %number, i32 0)
  %t1 = call i64 @ticks()
  br label %wait

wait:
  %spins = phi i32 [ 0, %work ], [ %spins1, %spin ], [ 0, %yield ]
  %rest = load atomic i32, ptr @left acquire, align 4
  %finished = icmp eq i32 %rest, 0
  br i1 %finished, label %done, label %again

again:
  %spins1 = add i32 %spins, 1
  %patient = icmp ult i32 %spins1, 64
  br i1 %patient, label %spin, label %yield

spin:
  call void @pause()
  br label %wait

yield:                                               ; the thread that holds the last task may need this core
  %y = call i32 @sched_yield()
  br label %wait

done:
  %t2 = call i64 @ticks()
  %worked = sub i64 %t1, %t0
  %waited = sub i64 %t2, %t1
  %twice = shl i64 %worked, 1
  %patience = add i64 %twice, 200000                 ; some 80 µs
  %stalled = icmp sgt i64 %waited, %patience
  %caution = load i64, ptr @caution
  %eased = sub i64 %caution, %worked
  %calmer = call i64 @llvm.smax.i64(i64 %eased, i64 0)
  %doubled = shl i64 %caution, 1
  %least = call i64 @llvm.smax.i64(i64 %doubled, i64 %waited)
  %most = call i64 @llvm.smin.i64(i64 %least, i64 268435456)
  %next = select i1 %stalled, i64 %most, i64 %calmer
  store i64 %next, ptr @caution
  %resume = add i64 %t2, %most
  %penalty = select i1 %stalled, i64 %resume, i64 0
  store i64 %penalty, ptr @alone
  %result = load atomic i32, ptr @failed monotonic, align 4
  store atomic i32 0, ptr @busy release, align 4
  ret i32 %result
}

; Take tasks of region %number until none is left: the caller from the first on, helpers from the last on. Tasks are rows
; in their order, so that many a row is near the thread that computed it in the region before.
define internal void @take(i32 %number, i32 %helper) {
entry:
  %env = alloca { ptr, i32 }
  store ptr null, ptr %env
  %helps = icmp ne i32 %helper, 0
  %one = select i1 %helps, i64 65536, i64 1
  br label %look

look:
  %s = load atomic i64, ptr @state acquire, align 8
  %high = lshr i64 %s, 32
  %current = trunc i64 %high to i32
  %same = icmp eq i32 %current, %number
  br i1 %same, label %claim, label %out

claim:                                               ; what is read here belongs to the region if the swap succeeds
  %f = load atomic ptr, ptr @function monotonic, align 8
  %data = load atomic ptr, ptr @closure monotonic, align 8
  %n = load atomic i32, ptr @tasks monotonic, align 4
  %low = trunc i64 %s to i32
  %begun = and i32 %low, 65535
  %ended = lshr i32 %low, 16
  %taken = add i32 %begun, %ended
  %open = icmp slt i32 %taken, %n
  br i1 %open, label %swap, label %out

swap:
  %s1 = add i64 %s, %one
  %pair = cmpxchg ptr @state, i64 %s, i64 %s1 acq_rel acquire
  %mine = extractvalue { i64, i1 } %pair, 1
  %behind = sub i32 %n, %ended
  %last = sub i32 %behind, 1
  %k = select i1 %helps, i32 %last, i32 %begun
  br i1 %mine, label %run, label %look

run:
  %envn = getelementptr { ptr, i32 }, ptr %env, i64 0, i32 1
  store i32 %n, ptr %envn
  %r = call i32 %f(i32 %k, ptr %env, ptr %data)
  %bad = icmp ne i32 %r, 0
  br i1 %bad, label %fail, label %finish

fail:
  store atomic i32 -1, ptr @failed monotonic, align 4
  br label %finish

finish:
  %x = atomicrmw sub ptr @left, i32 1 release
  br label %look

out:
  ret void
}

define internal ptr @worker(ptr %argument) {
entry:
  %wide = ptrtoint ptr %argument to i64
  %index = trunc i64 %wide to i32
  br label %idle

idle:
  %seen = phi i32 [ 0, %entry ], [ %now, %served ]
  br label %look

look:
  %count = phi i32 [ 0, %idle ], [ %count1, %spin ], [ %count1, %yield ], [ 0, %woken ]
  %now = load atomic i32, ptr @region acquire, align 4
  %same = icmp eq i32 %now, %seen
  br i1 %same, label %nothing, label %serve

serve:
  %n = load atomic i32, ptr @threads acquire, align 4
  %rank = add i32 %index, 1
  %wanted = icmp slt i32 %rank, %n
  br i1 %wanted, label %help, label %served

help:
  call void @take(i32 %now, i32 1)
  br label %served

served:
  br label %idle

nothing:
  %count1 = add i32 %count, 1
  %spinning = icmp ult i32 %count1, 600              ; some 20 µs: a step's serial parts are shorter
  br i1 %spinning, label %spin, label %patience

spin:
  call void @pause()
  br label %look

patience:
  %yielding = icmp ult i32 %count1, 1600            ; as long as Python takes between two steps
  br i1 %yielding, label %yield, label %sleep

yield:                                               ; who was away for some 200 µs has a core that others want
  %before = call i64 @ticks()
  %y = call i32 @sched_yield()
  %after = call i64 @ticks()
  %away = sub i64 %after, %before
  %others = icmp ugt i64 %away, 600000
  br i1 %others, label %sleep, label %look

sleep:                                               ; FUTEX_WAIT | FUTEX_PRIVATE: returns at once if @region has changed
  %more = atomicrmw add ptr @sleepers, i32 1 seq_cst
  call void @futex(ptr @region, i32 128, i32 %seen)
  %less = atomicrmw sub ptr @sleepers, i32 1 seq_cst
  br label %woken

woken:
  br label %look
}
