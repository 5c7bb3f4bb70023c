// Fibers: functions with their own stacks that take turns on one OS thread. The sanitizers are told of every switch.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <new>

#if defined(__has_feature)
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

// ThreadSanitizer must not see the simulator's own accesses, and AddressSanitizer need not.
#define CUDAHOST_HIDDEN __attribute__((no_sanitize("thread", "address", "undefined"))) inline
// The same for accesses to a kernel's memory, which AddressSanitizer checks.
#define CUDAHOST_UNORDERED __attribute__((no_sanitize("thread"))) inline

namespace cudahost {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif
constexpr size_t kPageBytes = 4 << 10;

struct Fiber {
  void* position;  // where it resumes: its stack pointer, or its context
  char* stack;
  void* fake_stack;  // AddressSanitizer's
  void* tsan;        // ThreadSanitizer's
};

// The OS thread's own stack, which resumes a fiber and to which the last one returns.
struct Home {
  void* position;
  void* fake_stack;
  const void* stack;
  size_t stack_bytes;
  void* tsan;
  bool left;  // and no fiber has arrived since
};
inline Home home;

#if defined(CUDAHOST_UCONTEXT)

CUDAHOST_HIDDEN void switch_stacks(void** from, void* to) {
  ucontext_t here;
  *from = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to));
}

CUDAHOST_HIDDEN void* first_position(char* stack, void (*function)()) {
  // The context is stored at the lower end of the stack, above the guard page.
  auto* const context = reinterpret_cast<ucontext_t*>(stack + kPageBytes);
  getcontext(context);
  context->uc_stack.ss_sp = stack + 2 * kPageBytes;
  context->uc_stack.ss_size = kStackBytes - 2 * kPageBytes;
  context->uc_link = nullptr;
  makecontext(context, function, 0);
  return context;
}

#else

__attribute__((naked, noinline)) inline void switch_stacks(void** /*rdi*/, void* /*rsi*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n movq %rsp, (%rdi)\n"
      "movq %rsi, %rsp\n popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}

CUDAHOST_HIDDEN void* first_position(char* stack, void (*function)()) {
  auto** position = reinterpret_cast<void**>(stack + kStackBytes) - 1;  // entered by ret: rsp is then 8 modulo 16
  position[0] = nullptr;
  *--position = reinterpret_cast<void*>(function);
  return position - 6;  // six callee-saved registers of any value
}

#endif

// Switches from home to a fiber. Returns when a fiber switches back.
CUDAHOST_HIDDEN void resume(Fiber& fiber) {
  home.left = true;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&home.fake_stack, fiber.stack, kStackBytes);
#elif defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  switch_stacks(&home.position, fiber.position);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(home.fake_stack, nullptr, nullptr);
#endif
}

// Must be the first call in a fiber's function, and follows every switch to a fiber.
CUDAHOST_HIDDEN void arrive([[maybe_unused]] void* fake_stack = nullptr) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, home.left ? &home.stack : nullptr,
                                  home.left ? &home.stack_bytes : nullptr);
#endif
  home.left = false;
}

// Switches from a fiber to another one. Returns when the first one is resumed.
CUDAHOST_HIDDEN void hand_over(Fiber& from, Fiber& to, [[maybe_unused]] bool for_good = false) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.stack, kStackBytes);
#elif defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  switch_stacks(&from.position, to.position);
  arrive(from.fake_stack);
}

// Switches from a fiber to home. Returns when the fiber is resumed.
CUDAHOST_HIDDEN void go_home(Fiber& fiber, [[maybe_unused]] bool for_good = false) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, home.stack, home.stack_bytes);
#elif defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(home.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  switch_stacks(&fiber.position, home.position);
  arrive(fiber.fake_stack);
}

CUDAHOST_HIDDEN char* map_memory(size_t bytes) {
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(memory);
}

// Maps stacks with a guard page below each. Above 8192 stacks there are no guard pages: the system limits the mappings
// of a process.
CUDAHOST_HIDDEN char* map_stacks(size_t count) {
  constexpr size_t kMaxGuarded = 8192;
  char* const stacks = map_memory(count * kStackBytes);
  for (size_t i = 0; i < count && count <= kMaxGuarded; ++i) mprotect(stacks + i * kStackBytes, kPageBytes, PROT_NONE);
  return stacks;
}

}  // namespace cudahost
