// What the scheduler stands on: stacks that can be switched, and what the sanitizers have to be told of them. Included by simt_machine.cpp alone.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if !defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_UCONTEXT
#endif
#if defined(SIMT_UCONTEXT)
#include <ucontext.h>
#endif

// ------------------------------------------------------------------------------------------------------------------ sanitizers

#if defined(SIMT_ASAN)
extern "C" {
void __asan_poison_memory_region(const volatile void*, size_t);
void __asan_unpoison_memory_region(const volatile void*, size_t);
void __sanitizer_start_switch_fiber(void** fake, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake, const void** bottom, size_t* size);
}
#else
static void __asan_poison_memory_region(const volatile void*, size_t) {}
static void __asan_unpoison_memory_region(const volatile void*, size_t) {}
#endif

#if defined(SIMT_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned flags);
void __tsan_acquire(void*);
void __tsan_release(void*);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
// Two teams of fibers take turns, each with shared memory of its own and unknown to the other: so a block is in no order with its neighbours but
// the one that the kernel makes. A team per block would be ten times slower.
static constexpr int TEAMS = 2;
#else
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
static constexpr int TEAMS = 1;
#endif

// ------------------------------------------------------------------------------------------------------------------ switching stacks

namespace simt {

#if defined(SIMT_UCONTEXT)
struct Context {
  ucontext_t u;
};
static void swap(Context& from, Context& to) { swapcontext(&from.u, &to.u); }
static void prepare(Context& c, char* bottom, size_t size, void (*entry)()) {
  getcontext(&c.u);
  c.u.uc_stack.ss_sp = bottom;
  c.u.uc_stack.ss_size = size;
  c.u.uc_link = nullptr;
  makecontext(&c.u, entry, 0);
}
#else
// Swaps the registers that a function must preserve; swapcontext would also make a system call for the signal mask, 20 times slower.
struct Context {
  void* sp;
};
extern "C" void simt_swap(void** from, void* to);
__asm__(
    ".text\n.hidden simt_swap\n.globl simt_swap\n.type simt_swap, @function\nsimt_swap:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n.size simt_swap, .-simt_swap\n");
static void swap(Context& from, Context& to) { simt_swap(&from.sp, to.sp); }
static void prepare(Context& c, char* bottom, size_t size, void (*entry)()) {
  void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(bottom) + size) & ~uintptr_t{15});
  // At its entry a function finds the stack pointer at 16n + 8, as after a call.
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  top -= 6;
  memset(top, 0, 6 * sizeof(void*));
  c.sp = top;
}
#endif

}  // namespace simt
