// Runs the threads of a CUDA launch on the CPU: one fiber for each, all on one OS thread, which change places only
// where threads wait for each other. So a launch is repeatable, and what it does wrong can be told: barriers that not
// all threads reach, shuffles from absent lanes, deadlocks, too much shared memory. Shared memory begins as NaN. Under
// AddressSanitizer accesses out of its bounds are found; under ThreadSanitizer, to which each fiber is a thread ordered
// by nothing but barriers, fences and atomics, races are.
//
// A wave of blocks is resident at once: one block, or a cluster, or the grid of a cooperative launch.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>
#include <sys/mman.h>
#include <vector_functions.h>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#elif __has_feature(thread_sanitizer)
#define __SANITIZE_THREAD__ 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)0)
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)0)
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#else
#define __tsan_acquire(p) ((void)0)
#define __tsan_release(p) ((void)0)
#endif
#if !defined(__x86_64__) && !defined(CUDAHOST_UCONTEXT)
#define CUDAHOST_UCONTEXT  // the C library's contexts, slower by a system call
#endif
#if defined(CUDAHOST_UCONTEXT)
#include <ucontext.h>
#endif
#define CUDAHOST_FN __attribute__((no_sanitize("thread"))) inline  // shim internals are invisible to the race detector
#define CUDAHOST_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cudahost {
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct Config {
  dim3 grid, block;
  size_t smem = 0;
  cudaStream_t stream = nullptr;
  bool cooperative = false;
  unsigned cluster = 1;
};
enum State : unsigned char { READY, YIELD, WARP, BLOCK, CLUSTER, GRID, DONE };
struct WarpOp {
  const char* kind;
  unsigned mask, arrived, gen, valid[2];
  uint64_t slot[2][32];
};
struct Warp {
  unsigned missing, gone, nops;
  WarpOp ops[32];
};  // lanes that never existed / or exited; one op per distinct mask
struct Barrier {
  const char* file;
  int line;
  unsigned arrived, gen, sum[2];
};
struct Block;
struct Thread {
  void* sp;
  char* stack;
  Block* blk;
  uint3 idx;
  unsigned rank;
  State st;
  bool fenced;
  const char* file;
  int line;
  void *fake, *tsan, *seen;
  WarpOp* op;
};
struct Block {
  uint3 idx;
  void* seen;
  unsigned slots, live;
  Thread* t;
  Warp* w;
  char* smem;
  Barrier bar, cbar;
};
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr size_t kStack = 256 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif
constexpr size_t kSmem = 256 << 10, kSmemMax = 227 << 10, kStaticMax = 48 << 10, kGap = 64;
struct Run {  // the one running launch
  Config cfg;
  unsigned nthr, nwarp, nres, alive;
  void (*call)(void*);
  void* arg;
  Block* blk;
  Thread* cur;
  void *main_sp, *main_fake, *main_tsan;
  const void* main_bot;
  size_t main_size;
  struct {
    const void* tag;
    size_t off;
  } slot[32];
  unsigned nslot;
  size_t top, static_bytes;
  Barrier grid;
  char sync;
  char msg[1024];
  bool failed, restart;
  unsigned long switches;
  char* stacks;
  size_t nstack;
  char* smems;
  size_t nsmem;
  unsigned order;
};
inline Run g;

#if defined(CUDAHOST_UCONTEXT)
CUDAHOST_FN void ctx_switch(void** from, void* to) {
  ucontext_t u;
  *from = &u;
  swapcontext(&u, static_cast<ucontext_t*>(to));
}
CUDAHOST_FN void* ctx_make(char* stack, void (*fn)()) {
  auto* u = reinterpret_cast<ucontext_t*>(stack + 4096);
  getcontext(u);
  u->uc_stack.ss_sp = stack + 8192;
  u->uc_stack.ss_size = kStack - 8192;
  u->uc_link = nullptr;
  makecontext(u, fn, 0);
  return u;
}
#else
__attribute__((naked, noinline)) inline void ctx_switch(void** /*rdi*/, void* /*rsi*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n movq %rsp, (%rdi)\n"
      "movq %rsi, %rsp\n popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}
CUDAHOST_FN void* ctx_make(char* stack, void (*fn)()) {
  auto** sp = reinterpret_cast<void**>(stack + kStack) - 1;  // entered by ret: rsp = 8 mod 16
  sp[0] = nullptr;
  *--sp = reinterpret_cast<void*>(fn);
  return sp - 6;  // six callee-saved registers, any value
}
#endif
CUDAHOST_FN void to_main([[maybe_unused]] bool last = false) {  // fiber -> scheduler
  Thread& t = *g.cur;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &t.fake, g.main_bot, g.main_size);
#elif defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(g.main_tsan, __tsan_switch_to_fiber_no_sync);
#endif
  ctx_switch(&t.sp, g.main_sp);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(g.cur->fake, &g.main_bot, &g.main_size);
#endif
}
CUDAHOST_FN void resume(Thread& t) {  // scheduler -> fiber
  g.cur = &t;
  threadIdx = t.idx;
  blockIdx = t.blk->idx;
  g.switches++;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&g.main_fake, t.stack, kStack);
#elif defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(t.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  ctx_switch(&g.main_sp, t.sp);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(g.main_fake, nullptr, nullptr);
#endif
}
[[noreturn]] CUDAHOST_FN void fail(const char* fmt, ...) {  // from a fiber: stop the launch, throw on the host side
  int n = std::snprintf(g.msg, sizeof g.msg, "block (%u,%u,%u) thread (%u,%u,%u): ", blockIdx.x, blockIdx.y, blockIdx.z,
                        threadIdx.x, threadIdx.y, threadIdx.z);
  va_list ap;
  va_start(ap, fmt);
  std::vsnprintf(g.msg + n, sizeof g.msg - n, fmt, ap);
  va_end(ap);
  g.failed = true;
  for (;;) to_main();
}
CUDAHOST_FN void block_on(State s, const char* file, int line) {
  Thread& t = *g.cur;
  t.st = s;
  t.file = file;
  t.line = line;
  to_main();
}

// Race-detector clocks live behind the arena, which is fresh for every block: sharing one would order blocks.
CUDAHOST_FN void* clock_at(Block& b, unsigned k) {
  return b.smem + (238 << 10) + 8 * k;
}  // 0..1 block, 2..3 cluster, 4..5 grid, 6.. warps

// --- barriers ---------------------------------------------------------------------------------------------------
CUDAHOST_FN int barrier(Barrier& b, Block* first, unsigned nblk, State st, [[maybe_unused]] unsigned clk, int v,
                        const char* file, int line) {
  const unsigned p = b.gen & 1;
  if (!b.arrived) {
    b.file = file;
    b.line = line;
    b.sum[p] = 0;
  } else if (b.line != line || std::strcmp(b.file, file))
    fail("divergent barrier: %s:%d while other threads wait at %s:%d", file, line, b.file, b.line);
  b.sum[p] += v != 0;
  __tsan_release(clock_at(*first, clk + p));
  if (++b.arrived == nblk * g.nthr) {
    b.arrived = 0;
    b.gen++;
    for (unsigned i = 0; i < nblk; i++)
      for (unsigned k = 0; k < g.nthr; k++)
        if (first[i].t[k].st == st) first[i].t[k].st = READY;
    if (nblk > 1) {
      g.restart = true;
      block_on(READY, file, line);
    }  // let `order` alone decide which block goes first
  } else
    block_on(st, file, line);
  __tsan_acquire(clock_at(*first, clk + p));
  return int(b.sum[p]);
}
CUDAHOST_FN int block_barrier(int v, const char* f, int l) {
  Block& b = *g.cur->blk;
  return barrier(b.bar, &b, 1, BLOCK, 0, v, f, l);
}
CUDAHOST_FN Block* cluster_first() { return g.blk + (g.cur->blk - g.blk) / g.cfg.cluster * g.cfg.cluster; }

// --- warp collectives: publish 8 bytes, wait for all live lanes of the mask, read
// --------------------------------------
CUDAHOST_FN void warp_release(Warp& w, WarpOp& o, Thread* lane0) {
  if ((o.arrived | w.gone) != (o.mask | w.gone) || !o.arrived) return;
  for (unsigned l = 0; l < 32; l++)
    if (o.arrived >> l & 1 && lane0[l].st == WARP && lane0[l].op == &o) lane0[l].st = READY;
  o.valid[o.gen & 1] = o.arrived;
  o.arrived = 0;
  o.gen++;
}
struct Got {
  WarpOp* o;
  unsigned p;
};
CUDAHOST_FN Got warp_exchange(const char* kind, unsigned mask, uint64_t bits, bool sync, const char* file, int line) {
  Thread& t = *g.cur;
  Block& b = *t.blk;
  Warp& w = b.w[t.rank / 32];
  const unsigned lane = t.rank % 32;
  if (!(mask >> lane & 1)) fail("%s at %s:%d: mask %08x lacks the calling lane %u", kind, file, line, mask, lane);
  if (!sync && mask & w.gone & ~w.missing)
    fail("%s at %s:%d: mask %08x names exited lanes %08x", kind, file, line, mask, mask & w.gone & ~w.missing);
  unsigned i = 0;
  while (i < w.nops && w.ops[i].mask != mask) i++;
  if (i == 32) fail("more than 32 distinct warp masks");
  WarpOp* o = &w.ops[i];
  if (i == w.nops) {
    w.nops++;
    o->mask = mask;
    o->arrived = o->gen = 0;
  }
  const unsigned p = o->gen & 1;
  if (!o->arrived)
    o->kind = kind;
  else if (std::strcmp(o->kind, kind))
    fail("%s at %s:%d while other lanes of mask %08x wait in %s", kind, file, line, mask, o->kind);
  o->slot[p][lane] = bits;
  o->arrived |= 1u << lane;
  t.op = o;
  if (sync)
    __tsan_release(
        clock_at(b, 6 + (t.rank / 32 * 32 + i) * 2 + p));  // only __syncwarp orders memory, shuffles and votes do not
  const unsigned gen = o->gen;
  warp_release(w, *o, b.t + t.rank / 32 * 32);
  if (o->gen == gen) block_on(WARP, file, line);
  if (sync) __tsan_acquire(clock_at(b, 6 + (t.rank / 32 * 32 + i) * 2 + p));
  return {o, p};
}
template <class T>
CUDAHOST_FN T shfl(const char* kind, unsigned mask, T v, int arg, int width, const char* file, int line) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &v, sizeof v);
  const Got r = warp_exchange(kind, mask, bits, false, file, line);
  const int lane = int(g.cur->rank % 32), base = lane & ~(width - 1), last = base + width - 1;
  int src = lane;
  switch (kind[7]) {  // "__shfl_xor", "__shfl_down", "__shfl_up", "__shfl_idx"
    case 'x':
      src = lane ^ arg;
      if (src > last) src = lane;
      break;
    case 'd':
      src = lane + arg;
      if (src > last) src = lane;
      break;
    case 'u':
      src = lane - arg;
      if (src < base) src = lane;
      break;
    default:
      src = base + (arg & (width - 1));
  }
  if (!(r.o->valid[r.p] >> src & 1))
    fail("%s at %s:%d reads lane %d, which takes no part (mask %08x)", kind, file, line, src, mask);
  T out;
  __builtin_memcpy(&out, &r.o->slot[r.p][src], sizeof out);
  return out;
}
CUDAHOST_FN unsigned ballot(unsigned mask, int pred, const char* file, int line) {
  const Got r = warp_exchange("__ballot/any/all", mask, pred != 0, false, file, line);
  unsigned out = 0;
  for (int l = 0; l < 32; l++)
    if (r.o->valid[r.p] >> l & 1 && r.o->slot[r.p][l]) out |= 1u << l;
  return out;
}

// --- shared memory: one arena per resident block, [dynamic][gap][static...], same offsets in every block
// ---------------
CUDAHOST_FN void* shared_at(const void* tag, size_t size, size_t align) {
  unsigned i = 0;
  while (i < g.nslot && g.slot[i].tag != tag) i++;
  if (i == g.nslot) {
    if (g.nslot == 32) fail("more than 32 shared variables");
    g.slot[i] = {tag, (g.top + kGap + align - 1) / align * align};
    g.top = g.slot[i].off + size;
    g.static_bytes += size;
    g.nslot++;
    if (g.static_bytes > kStaticMax || g.static_bytes + g.cfg.smem > kSmemMax)
      fail("too much shared memory: %zu static + %zu dynamic", g.static_bytes, g.cfg.smem);
  }
  Block& b = *g.cur->blk;
  if (!(b.slots >> i & 1)) {
    b.slots |= 1u << i;
    ASAN_UNPOISON_MEMORY_REGION(b.smem + g.slot[i].off, size);
  }
  return b.smem + g.slot[i].off;
}
template <class T, class Tag>
CUDAHOST_FN T& shared(Tag) {
  static const char tag = 0;
  return *static_cast<T*>(shared_at(&tag, sizeof(T), alignof(T) > 16 ? alignof(T) : 16));
}
CUDAHOST_FN void* dyn_shared() { return g.cur->blk->smem; }

// --- launch -------------------------------------------------------------------------------------------------------
CUDAHOST_FN void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &g.main_bot, &g.main_size);
#endif
  g.call(g.arg);
  Thread& t = *g.cur;
  Warp& w = t.blk->w[t.rank / 32];
  t.st = DONE;
  g.alive--;
  w.gone |= 1u << (t.rank % 32);
  for (unsigned i = 0; i < w.nops; i++) {
    if (w.ops[i].arrived && w.ops[i].mask >> t.rank % 32 & 1 && std::strcmp(w.ops[i].kind, "__syncwarp"))
      fail("exits while lanes %08x wait in %s with mask %08x", w.ops[i].arrived, w.ops[i].kind, w.ops[i].mask);
    warp_release(w, w.ops[i], t.blk->t + t.rank / 32 * 32);
  }
  if (!--t.blk->live) ASAN_POISON_MEMORY_REGION(t.blk->smem, kSmem);  // catches cluster peers that read too late
  to_main(true);
}
CUDAHOST_FN void permute(unsigned* p, unsigned n,
                         uint64_t& s) {  // order 0: ascending, 1: descending, else pseudo-random
  for (unsigned i = 0; i < n; i++) p[i] = g.order == 1 ? n - 1 - i : i;
  if (g.order > 1)
    for (unsigned i = n; i > 1; i--) {
      s = s * 6364136223846793005ull + 1442695040888963407ull;
      std::swap(p[i - 1], p[(s >> 33) % i]);
    }
}
CUDAHOST_FN void deadlock() {
  static const char* what[] = {
      "ready", "spinning", "in a warp collective", "at __syncthreads", "at cluster sync", "at grid sync", "exited"};
  int n = std::snprintf(g.msg, sizeof g.msg, "deadlock:");
  unsigned shown = 0;
  for (unsigned b = 0; b < g.nres && shown < 6; b++) {
    for (int s = 0; s <= DONE; s++) {
      unsigned c = 0;
      Thread* f = nullptr;
      for (unsigned k = 0; k < g.nthr; k++)
        if (g.blk[b].t[k].st == s) {
          c++;
          if (!f) f = &g.blk[b].t[k];
        }
      if (c && n < int(sizeof g.msg) - 200) {
        n += std::snprintf(g.msg + n, sizeof g.msg - n, " block (%u,%u,%u): %u of %u threads %s", g.blk[b].idx.x,
                           g.blk[b].idx.y, g.blk[b].idx.z, c, g.nthr, what[s]);
        if (s != DONE) n += std::snprintf(g.msg + n, sizeof g.msg - n, " [%s:%d]", f->file ? f->file : "?", f->line);
        n += std::snprintf(g.msg + n, sizeof g.msg - n, ";"), shown++;
      }
    }
  }
  g.failed = true;
}
CUDAHOST_FN void run_resident(const unsigned* bo, const unsigned* wo, const unsigned* lo) {
  for (unsigned idle = 0; g.alive && !g.failed;) {
    bool any = false, real = false;
    g.restart = false;
    for (unsigned b = 0; b < g.nres && !g.restart; b++)
      for (unsigned w = 0; w < g.nwarp && !g.restart; w++)
        for (bool again = true; again;) {
          again = false;
          for (unsigned l = 0; l < 32 && !g.restart; l++) {
            const unsigned r = wo[w] * 32 + lo[l];
            if (r >= g.nthr) continue;
            Thread& t = g.blk[bo[b]].t[r];
            if (t.st != READY) continue;
            resume(t);
            if (g.failed) return;
            any = again = true;
            real |= t.st != YIELD;
          }
        }
    for (unsigned b = 0; b < g.nres; b++)
      for (unsigned k = 0; k < g.nthr; k++)
        if (g.blk[b].t[k].st == YIELD) {
          g.blk[b].t[k].st = READY;
          any = true;
        }
    idle = real ? 0 : idle + 1;
    if (g.alive && (!any || idle > 100000)) deadlock();
  }
}
CUDAHOST_FN char* map(size_t n) {
  void* p = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(p);
}
CUDAHOST_FN char* map_stacks(
    size_t n) {  // lowest page of each stack is a guard (while the kernel's map count allows it)
  char* p = map(n * kStack);
  for (size_t i = 0; i < n && n <= 8192; i++) mprotect(p + i * kStack, 4096, PROT_NONE);
  return p;
}
inline unsigned order = [] {
  const char* e = std::getenv("CUDAHOST_ORDER");
  return e ? unsigned(std::atoi(e)) : 0u;
}();

CUDAHOST_FN void run(const Config& c, void (*call)(void*), void* arg) {
  const uint64_t nblk = uint64_t(c.grid.x) * c.grid.y * c.grid.z, nthr = uint64_t(c.block.x) * c.block.y * c.block.z;
  if (!nblk || !nthr || nthr > 1024 || c.block.z > 64 || c.grid.x > 0x7fffffffu || c.grid.y > 65535 || c.grid.z > 65535)
    throw Error("invalid launch configuration");
  if (c.smem > kSmemMax) throw Error("too much dynamic shared memory");
  if (!c.cluster || c.cluster > 8 || c.grid.x % c.cluster)
    throw Error("grid.x is not a multiple of the cluster size (1..8)");
  const unsigned nres = c.cooperative ? unsigned(nblk) : c.cluster;
  g.cfg = c;
  g.nthr = unsigned(nthr);
  g.nwarp = (g.nthr + 31) / 32;
  g.nres = nres;
  g.call = call;
  g.arg = arg;
  g.order = order;
  g.nslot = 0;
  g.top = (c.smem + 15) / 16 * 16;
  g.static_bytes = 0;
  g.grid = {};
  g.failed = false;
  gridDim = c.grid;
  blockDim = c.block;
  auto* thr = static_cast<Thread*>(std::calloc(size_t(nres) * nthr, sizeof(Thread)));
  auto* blk = static_cast<Block*>(std::calloc(nres, sizeof(Block)));
  auto* wrp = static_cast<Warp*>(std::calloc(size_t(nres) * g.nwarp, sizeof(Warp)));
  auto* ord = static_cast<unsigned*>(std::calloc(nblk + nres + g.nwarp + 32, sizeof(unsigned)));
  g.blk = blk;
  uint64_t seed = g.order;
  unsigned *uo = ord, *bo = ord + nblk, *wo = bo + nres, *lo = wo + g.nwarp;
  permute(uo, unsigned(nblk / nres), seed);
  permute(bo, nres, seed);
  permute(wo, g.nwarp, seed);
  permute(lo, 32, seed);
#if defined(__SANITIZE_THREAD__)
  // ThreadSanitizer knows a thread by one of 255 slots. Threads beyond them take the slots of others, whose accesses
  // then seem to be their own: races would go unseen.
  if (nblk * nthr > 250) throw Error("too many threads for a -fsanitize=thread build (250 per launch)");
  g.main_tsan = __tsan_get_current_fiber();
  auto** fib = static_cast<void**>(std::calloc(nblk * nthr, sizeof(void*)));
  unsigned nfib = 0;
#endif
  for (uint64_t u = 0; u < nblk / nres && !g.failed; u++) {
#if defined(__SANITIZE_THREAD__)  // fresh memory per wave, else reuse would look like a race between blocks
    g.stacks = map_stacks(nres * nthr);
    g.smems = map(nres * kSmem);
    g.nstack = g.nsmem = 0;
    std::memset(g.smems, 0xFF, nres * kSmem);
#else
    if (g.nstack < nres * nthr) {
      if (g.stacks) munmap(g.stacks, g.nstack * kStack);
      g.stacks = map_stacks(g.nstack = nres * nthr);
    }
    if (g.nsmem < nres) {
      if (g.smems) munmap(g.smems, g.nsmem * kSmem);
      g.smems = map((g.nsmem = nres) * kSmem);
    }
#endif
    g.alive = unsigned(nres * nthr);
    for (unsigned b = 0; b < nres; b++) {
      Block& B = blk[b];
      const uint64_t id = uint64_t(uo[u]) * nres + b;
      B.idx = {unsigned(id % c.grid.x), unsigned(id / c.grid.x % c.grid.y), unsigned(id / c.grid.x / c.grid.y)};
      B.slots = 0;
      B.seen = nullptr;
      B.live = g.nthr;
      B.t = thr + b * nthr;
      B.w = wrp + size_t(b) * g.nwarp;
      B.smem = g.smems + b * kSmem;
      B.bar = B.cbar = {};
#if !defined(__SANITIZE_THREAD__)
      ASAN_UNPOISON_MEMORY_REGION(B.smem, kSmem);
      std::memset(B.smem, 0xFF, u ? g.top : kSmem);
      ASAN_POISON_MEMORY_REGION(B.smem, kSmem);
      ASAN_UNPOISON_MEMORY_REGION(B.smem, c.smem);
#endif
      for (unsigned w = 0; w < g.nwarp; w++) {
        B.w[w].nops = 0;
        B.w[w].gone = B.w[w].missing = (w + 1) * 32 <= g.nthr ? 0u : ~0u << (g.nthr - w * 32);
      }
      for (unsigned k = 0; k < g.nthr; k++) {
        Thread& t = B.t[k];
        t = Thread{};
        t.blk = &B;
        t.rank = k;
        t.stack = g.stacks + (b * nthr + k) * kStack;
        t.idx = {k % c.block.x, k / c.block.x % c.block.y, k / c.block.x / c.block.y};
        ASAN_UNPOISON_MEMORY_REGION(t.stack + 4096, kStack - 4096);  // a failed launch leaves frames behind
        t.sp = ctx_make(t.stack, fiber_main);
#if defined(__SANITIZE_THREAD__)
        fib[nfib++] = t.tsan = __tsan_create_fiber(0);
        char nm[64];
        std::snprintf(nm, sizeof nm, "block(%u,%u,%u) thread(%u,%u,%u)", B.idx.x, B.idx.y, B.idx.z, t.idx.x, t.idx.y,
                      t.idx.z);
        __tsan_set_fiber_name(t.tsan, nm);
#endif
      }
    }
    run_resident(bo, wo, lo);
#if defined(__SANITIZE_THREAD__)
    munmap(g.stacks, nres * nthr * kStack);
    munmap(g.smems, nres * kSmem);
    g.stacks = g.smems = nullptr;
#endif
  }
#if defined(__SANITIZE_THREAD__)  // join at the very end: blocks stay unordered, and no thread id is reused within a
                                  // launch
  for (unsigned k = 0; k < nfib; k++) {
    __tsan_switch_to_fiber(fib[k], __tsan_switch_to_fiber_no_sync);
    __tsan_release(&g.sync);
    __tsan_switch_to_fiber(g.main_tsan, __tsan_switch_to_fiber_no_sync);
    __tsan_destroy_fiber(fib[k]);
  }
  __tsan_acquire(&g.sync);
  std::free(fib);
#endif
  std::free(thr);
  std::free(blk);
  std::free(wrp);
  std::free(ord);
  if (g.failed) throw Error(g.msg);
}
template <class... P, class... A>
void launch(const Config& c, void (*kernel)(P...), A&&... a) {
  struct Pack {
    void (*k)(P...);
    std::tuple<P...> args;
  } pack{kernel, std::tuple<P...>(std::forward<A>(a)...)};
  run(
      c,
      [](void* p) {
        auto* q = static_cast<Pack*>(p);
        std::apply(q->k, q->args);
      },
      &pack);
}
template <class T, class F>
CUDAHOST_FN T atomic_rmw(T* p, F f) {
  g.cur->seen = g.cur->blk->seen = p;
  T o, n;
  __atomic_load(p, &o, __ATOMIC_RELAXED);
  do n = f(o);
  while (!__atomic_compare_exchange(p, &o, &n, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  if (g.cur->fenced) __tsan_release(p);  // fence, then atomic: release (a fence after the atomic acquires)
  return o;
}
}  // namespace cudahost
