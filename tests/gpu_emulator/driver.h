// Stands behind the kernels: as much of CUDA's driver interface as the executor calls, over this machine's
// memory. "Device" memory is filled with NaNs, as nobody may count on zeros.

#include <malloc.h>

namespace emulated {
template <class... A>
void call(void (*kernel)(A...), void** p) {
  [&]<size_t... I>(std::index_sequence<I...>) { kernel(*(A*)p[I]...); }(std::index_sequence_for<A...>{});
}
static void (*running)(void**);
static void** given;
static void enter() {
  running(given);
  threads[current].done = true;
  swapcontext(&threads[current].context, &scheduler);
}

static void run_block(size_t shared) {
  static std::vector<std::vector<char>> stacks;
  int count = block_size.x;
  threads.assign(count, Thread());
  warps.assign((count + 31) / 32, Warp());
  all = Barrier();
  all.size = count;
  for (int w = 0; w < (int)warps.size(); w++) warps[w].barrier.size = min(32, count - 32 * w);
  memset(dynamic_shared, 0x7f, shared);
  if ((int)stacks.size() < count) stacks.resize(count, std::vector<char>(1 << 17));
  for (int i = 0; i < count; i++) {
    Thread& t = threads[i];
    t.at.x = i, t.at.y = t.at.z = 0;
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = stacks[i].data();
    t.context.uc_stack.ss_size = stacks[i].size();
    t.context.uc_link = &scheduler;
    makecontext(&t.context, enter, 0);
  }
  // A warp goes as far as barriers of the block let it before the next one moves: what a missing one allows
  // then happens.
  for (int left = count; left > 0;) {
    left = 0;
    for (int first = 0; first < count; first += 32) {
      for (bool moving = true; moving;) {
        moving = false;
        for (current = first; current < min(first + 32, count); current++) {
          if (threads[current].done) continue;
          swapcontext(&scheduler, &threads[current].context);
          moving |= !threads[current].done && !threads[current].held;
        }
      }
      for (int i = first; i < min(first + 32, count); i++) left += !threads[i].done;
    }
  }
}
}  // namespace emulated

#define API extern "C" int
static long long launches = 0, allocated = 0;
API cuInit(unsigned) { return 0; }
API cuDriverGetVersion(int* v) {
  *v = 13000;
  return 0;
}
API cuDeviceGetCount(int* n) {
  *n = 1;
  return 0;
}
API cuDeviceGet(int* d, int) {
  *d = 0;
  return 0;
}
API cuDeviceGetName(char* name, int n, int) {
  snprintf(name, n, "emulated");
  return 0;
}
API cuDeviceTotalMem_v2(size_t* n, int) {
  *n = (size_t)1 << 32;
  return 0;
}
API cuDeviceGetAttribute(int* v, int which, int) {
  *v = which == 75 ? 8 : which == 76 ? 0 : which == 97 ? 166912 : which == 16 ? 4 : 0;
  return 0;
}
API cuDevicePrimaryCtxRetain(void** c, int) {
  *c = (void*)1;
  return 0;
}
API cuDevicePrimaryCtxRelease_v2(int) { return 0; }
API cuCtxSetCurrent(void*) { return 0; }
API cuMemGetInfo_v2(size_t* free, size_t* total) {
  *free = (size_t)1 << 31, *total = (size_t)1 << 32;
  return 0;
}
API cuMemAlloc_v2(void** p, size_t n) {
  if (n > (size_t)1 << 31) return 2;
  *p = aligned_alloc(256, (n + 255) / 256 * 256);
  memset(*p, 0xff, n);
  allocated += n;
  return 0;
}
API cuMemFree_v2(void* p) {
  memset(p, 0xff, malloc_usable_size(p));  // whoever reads it still gets NaNs
  free(p);
  return 0;
}
API cuMemHostAlloc(void** p, size_t n, unsigned) {
  *p = aligned_alloc(256, (n + 255) / 256 * 256);
  return 0;
}
API cuMemFreeHost(void* p) {
  free(p);
  return 0;
}
API cuMemcpyHtoDAsync_v2(void* to, const void* from, size_t n, void*) {
  memcpy(to, from, n);
  return 0;
}
API cuMemcpyDtoHAsync_v2(void* to, const void* from, size_t n, void*) {
  memcpy(to, from, n);
  return 0;
}
API cuMemcpyDtoDAsync_v2(void* to, const void* from, size_t n, void*) {
  memmove(to, from, n);
  return 0;
}
API cuMemsetD8Async(void* to, unsigned char v, size_t n, void*) {
  memset(to, v, n);
  return 0;
}
API cuStreamCreate(void** s, unsigned) {
  *s = (void*)1;
  return 0;
}
API cuStreamSynchronize(void*) { return 0; }
API cuModuleLoadData(void** m, const void*) {
  *m = (void*)1;
  return 0;
}
API cuModuleUnload(void*) { return 0; }
API cuModuleGetFunction(void** f, void*, const char* name);
API cuFuncSetAttribute(void*, int, int) { return 0; }
API cuGetErrorString(int, const char** text) {
  *text = "emulated error";
  return 0;
}
struct Recorded {
  void* f;
  int sizes[5];
  void** p;
};
static std::vector<Recorded>* recording = nullptr;
static long long replays = 0;
static int launch(const Recorded& r) {
  launches++;
  emulated::running = (void (*)(void**))r.f;
  emulated::given = r.p;
  emulated::block_size.x = r.sizes[3];
  if (!emulated::dynamic_shared) emulated::dynamic_shared = (char*)aligned_alloc(256, 1 << 18);
  for (int z = 0; z < r.sizes[2]; z++)
    for (int y = 0; y < r.sizes[1]; y++)
      for (int x = 0; x < r.sizes[0]; x++) {
        emulated::block_at.x = x, emulated::block_at.y = y, emulated::block_at.z = z;
        emulated::run_block(r.sizes[4]);
      }
  return 0;
}
API cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned, unsigned,
                   unsigned shared, void*, void** p, void**) {
  if (gy > 65535 || gz > 65535 || bx > 1024 || !gx || !gy || !gz || shared > 166912) return 1;
  Recorded r = {f, {(int)gx, (int)gy, (int)gz, (int)bx, (int)shared}, p};
  if (!recording) return launch(r);
  recording->push_back(r);
  return 0;
}
API cuStreamBeginCapture_v2(void*, int) {
  recording = new std::vector<Recorded>();
  return 0;
}
API cuStreamEndCapture(void*, void** graph) {
  *graph = recording;
  recording = nullptr;
  return 0;
}
API cuGraphInstantiateWithFlags(void** e, void* graph, unsigned long long) {
  *e = new std::vector<Recorded>(*(std::vector<Recorded>*)graph);
  return 0;
}
API cuGraphDestroy(void* graph) {
  delete (std::vector<Recorded>*)graph;
  return 0;
}
API cuGraphExecDestroy(void* graph) {
  delete (std::vector<Recorded>*)graph;
  return 0;
}
API cuGraphLaunch(void* e, void*) {
  replays++;
  for (auto& r : *(std::vector<Recorded>*)e) launch(r);
  return 0;
}
extern "C" long long emulated_replays() { return replays; }
extern "C" long long emulated_launches() { return launches; }
