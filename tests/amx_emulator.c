// Instructions of AMX on processors that lack them, or whose tiles the system keeps back: each raises SIGILL, and
// the handler does what the instruction would have done (Intel SDM, volume 2, "TILE" and "TDP" instructions), for
// the tile registers of the thread. For tests: a product of tiles takes microseconds.

#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

enum { TILES = 8, ROWS = 16, BYTES = 64 };

typedef struct {
  uint8_t config[64];
  uint8_t data[TILES][ROWS][BYTES];
} State;

static __thread State state;
static uint64_t count;
static struct sigaction before;

static int rows_of(int tile) { return state.config[48 + tile]; }

static int bytes_of(int tile) {
  return state.config[16 + 2 * tile] | state.config[17 + 2 * tile] << 8;
}

static float bfloat(const uint8_t* at) {
  uint32_t bits = (uint32_t)(at[0] | at[1] << 8) << 16;
  if (!(bits & 0x7f800000)) bits &= 0x80000000;  // numbers below the normal ones are zeros
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static float flushed(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (!(bits & 0x7f800000)) bits &= 0x80000000;
  memcpy(&value, &bits, 4);
  return value;
}

static void bfloat_product(int to, int left, int right) {
  for (int m = 0; m < rows_of(to); m++) {
    float even[16] = {0}, odd[16] = {0};
    for (int k = 0; k < bytes_of(left) / 4; k++)
      for (int n = 0; n < bytes_of(to) / 4; n++) {
        const uint8_t *a = state.data[left][m] + 4 * k, *b = state.data[right][k] + 4 * n;
        even[n] = flushed(__builtin_fmaf(bfloat(a), bfloat(b), even[n]));
        odd[n] = flushed(__builtin_fmaf(bfloat(a + 2), bfloat(b + 2), odd[n]));
      }
    for (int n = 0; n < bytes_of(to) / 4; n++) {
      float sum;
      memcpy(&sum, state.data[to][m] + 4 * n, 4);
      sum = flushed(flushed(sum) + flushed(even[n] + odd[n]));
      memcpy(state.data[to][m] + 4 * n, &sum, 4);
    }
  }
}

static void byte_product(int to, int left, int right, int left_signed, int right_signed) {
  for (int m = 0; m < rows_of(to); m++)
    for (int n = 0; n < bytes_of(to) / 4; n++) {
      int32_t sum;
      memcpy(&sum, state.data[to][m] + 4 * n, 4);
      for (int k = 0; k < bytes_of(left) / 4; k++)
        for (int i = 0; i < 4; i++) {
          uint8_t a = state.data[left][m][4 * k + i], b = state.data[right][k][4 * n + i];
          sum += (left_signed ? (int8_t)a : a) * (right_signed ? (int8_t)b : b);
        }
      memcpy(state.data[to][m] + 4 * n, &sum, 4);
    }
}

static const int REGISTERS[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

// What follows the opcode of an instruction with an operand in memory: its address, and the stride of its rows.
// Returns how many bytes it takes, 0 for a form that no instruction of AMX has.
static int operand(const uint8_t* at, const greg_t* g, int x, int b, uint64_t* address, uint64_t* stride) {
  int mod = at[0] >> 6, rm = at[0] & 7, size = 1;
  uint64_t base;
  *stride = 0;
  if (mod == 3) return 0;
  if (rm == 4) {
    int index = (at[1] >> 3 & 7) | x << 3, from = (at[1] & 7) | b << 3;
    size = 2;
    if (index != 4) *stride = (uint64_t)g[REGISTERS[index]] << (at[1] >> 6);
    if (mod == 0 && (from & 7) == 5) {
      int32_t far;
      memcpy(&far, at + 2, 4);
      *address = (uint64_t)(int64_t)far;
      return 6;
    }
    base = (uint64_t)g[REGISTERS[from]];
  } else {
    if (mod == 0 && rm == 5) return 0;  // relative to the instruction: `handle` knows where it ends
    base = (uint64_t)g[REGISTERS[rm | b << 3]];
  }
  if (mod == 1) return *address = base + (uint64_t)(int64_t)(int8_t)at[size], size + 1;
  if (mod == 2) {
    int32_t far;
    memcpy(&far, at + size, 4);
    return *address = base + (uint64_t)(int64_t)far, size + 4;
  }
  return *address = base, size;
}

// The bytes that the instruction takes, 0 where it is none of AMX.
static int emulated(const uint8_t* at, greg_t* g) {
  if (at[0] != 0xc4 || (at[1] & 0x1f) != 2 || (at[2] & 0x84) != 0) return 0;  // VEX.128.0F38.W0
  int x = !(at[1] & 0x40), b = !(at[1] & 0x20), prefix = at[2] & 3, vvvv = ~(at[2] >> 3) & 15;
  int opcode = at[3], mod = at[4] >> 6, reg = at[4] >> 3 & 7, rm = at[4] & 7;
  uint64_t address = 0, stride = 0;
  switch (opcode) {
    case 0x49: {
      if (mod == 3) {
        if (prefix == 3) return memset(state.data[reg], 0, sizeof state.data[reg]), 5;  // tilezero
        if (prefix == 0) return memset(&state, 0, sizeof state), 5;                     // tilerelease
        return 0;
      }
      int size = operand(at + 4, g, x, b, &address, &stride);
      if (!size && mod == 0 && rm == 5) {
        int32_t far;
        memcpy(&far, at + 5, 4);
        address = (uint64_t)(at + 9) + (uint64_t)(int64_t)far, size = 5;
      }
      // The index of an ldtilecfg is part of its address.
      if (!size) return 0;
      address += stride;
      if (prefix == 0) {
        memset(&state, 0, sizeof state);
        memcpy(state.config, (const void*)address, 64);
      } else if (prefix == 1) {
        memcpy((void*)address, state.config, 64);
      } else {
        return 0;
      }
      return 4 + size;
    }
    case 0x4b: {
      int size = operand(at + 4, g, x, b, &address, &stride);
      if (!size || rm != 4) return 0;
      if (prefix == 2) {
        for (int m = 0; m < rows_of(reg); m++)
          memcpy((void*)(address + (uint64_t)m * stride), state.data[reg][m], bytes_of(reg));
      } else if (prefix != 0) {  // tileloadd, tileloaddt1
        memset(state.data[reg], 0, sizeof state.data[reg]);
        for (int m = 0; m < rows_of(reg); m++)
          memcpy(state.data[reg][m], (const void*)(address + (uint64_t)m * stride), bytes_of(reg));
      } else {
        return 0;
      }
      return 4 + size;
    }
    case 0x5c:
      if (mod != 3 || prefix != 2) return 0;
      bfloat_product(reg, rm, vvvv);
      return 5;
    case 0x5e:
      if (mod != 3) return 0;
      byte_product(reg, rm, vvvv, prefix == 3 || prefix == 2, prefix == 3 || prefix == 1);
      return 5;
  }
  return 0;
}

static void handle(int number, siginfo_t* info, void* context) {
  greg_t* g = ((ucontext_t*)context)->uc_mcontext.gregs;
  int size = emulated((const uint8_t*)g[REG_RIP], g);
  if (size) {
    g[REG_RIP] += size;
    __atomic_fetch_add(&count, 1, __ATOMIC_RELAXED);
  } else if (before.sa_flags & SA_SIGINFO && before.sa_sigaction) {
    before.sa_sigaction(number, info, context);
  } else {
    signal(SIGILL, SIG_DFL);  // it is raised again, and ends the process
  }
}

// 0 when instructions of AMX are emulated from now on, in all threads.
int amx_emulate(void) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigemptyset(&action.sa_mask);
  return sigaction(SIGILL, &action, &before);
}

// How many were.
uint64_t amx_emulated(void) { return count; }
