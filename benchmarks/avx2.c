/* Show a program a processor that has AVX2 alone: no AVX-512, no VNNI, no bf16, no AMX.

       gcc -O2 -shared -fPIC -o avx2.so benchmarks/avx2.c
       LD_PRELOAD=./avx2.so python bench.py ...

   torch, onnxruntime, oneDNN and OpenVINO ask the processor what it has (the instruction CPUID) and
   take their code for AVX2 then. So the speed and the answers of that code, which sums in 16 bits
   (lib/graph.py), can be seen on a newer processor. It is still that processor, with its caches and
   memory, and its VNNI is missing, not slow: expect ratios of an older one, not its times.

   Linux on x86-64, where the processor can raise a fault for CPUID (`cpuid_fault` in /proc/cpuinfo):
   arch_prctl(2), ARCH_SET_CPUID. Each CPUID becomes a SIGSEGV, whose handler answers. Threads that
   the program starts inherit this; programs that it starts load this library themselves. */

#define _GNU_SOURCE
#include <asm/prctl.h>
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

typedef int (*Sigaction)(int, const struct sigaction *, struct sigaction *);

/* What the program itself wants to happen at a SIGSEGV. */
static struct sigaction wanted;

static Sigaction real_sigaction(void) { return (Sigaction)dlsym(RTLD_NEXT, "sigaction"); }

static long allow_cpuid(long yes) { return syscall(SYS_arch_prctl, ARCH_SET_CPUID, yes); }

static uint32_t bits(int count, const int *numbers) {
    uint32_t mask = 0;
    for (int i = 0; i < count; i++) mask |= 1u << numbers[i];
    return mask;
}
#define BITS(...) \
    bits(sizeof((int[]){__VA_ARGS__}) / sizeof(int), (int[]){__VA_ARGS__})

enum { EAX, EBX, ECX, EDX };

/* Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2A, CPUID. */
static void hide(uint32_t leaf, uint32_t subleaf, uint32_t answer[4]) {
    if (leaf == 7 && subleaf == 0) {
        answer[EBX] &= ~BITS(16, 17, 21, 26, 27, 28, 30, 31); /* AVX-512 */
        answer[ECX] &= ~BITS(1, 6, 11, 12, 14);               /* AVX-512: VBMI, VNNI, BITALG ... */
        answer[EDX] &= ~BITS(2, 3, 8, 22, 23, 24, 25);        /* AVX-512; AMX: 22, 24, 25 */
    } else if (leaf == 7 && subleaf == 1) {
        answer[EAX] &= ~BITS(4, 5, 21, 23); /* AVX-VNNI, AVX-512 bf16, AMX fp16, AVX-IFMA */
        answer[EDX] &= ~BITS(4, 5, 10, 19); /* AVX-VNNI-INT8, AVX-NE-CONVERT, -INT16, AVX10 */
    } else if (leaf == 0xd && subleaf == 0) {
        answer[EAX] &= ~BITS(5, 6, 7, 17, 18); /* the registers of AVX-512 and AMX */
    } else if (leaf == 0x1d || leaf == 0x1e || leaf == 0x24) {
        memset(answer, 0, 4 * sizeof *answer); /* AMX, AVX10 */
    }
}

static void on_fault(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const uint8_t *code = (const uint8_t *)registers[REG_RIP];
    if (info->si_code != SI_KERNEL || code[0] != 0x0f || code[1] != 0xa2) {
        real_sigaction()(SIGSEGV, &wanted, NULL); /* a fault of the program: it comes again */
        return;
    }
    uint32_t leaf = registers[REG_RAX], subleaf = registers[REG_RCX], answer[4];
    allow_cpuid(1);
    __asm__ volatile("cpuid"
                     : "=a"(answer[EAX]), "=b"(answer[EBX]), "=c"(answer[ECX]), "=d"(answer[EDX])
                     : "a"(leaf), "c"(subleaf));
    allow_cpuid(0);
    hide(leaf, subleaf, answer);
    registers[REG_RAX] = answer[EAX], registers[REG_RBX] = answer[EBX];
    registers[REG_RCX] = answer[ECX], registers[REG_RDX] = answer[EDX];
    registers[REG_RIP] += 2;
}

/* Keeps our handler where the program sets one of its own, as Python's faulthandler does. */
int sigaction(int number, const struct sigaction *action, struct sigaction *old) {
    if (number != SIGSEGV) return real_sigaction()(number, action, old);
    if (old) *old = wanted;
    if (action) wanted = *action;
    return 0;
}

__attribute__((constructor)) static void begin(void) {
    struct sigaction ours = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
    real_sigaction()(SIGSEGV, &ours, &wanted);
    if (allow_cpuid(0)) {
        fputs("avx2.so: this processor or kernel cannot hide its instructions\n", stderr);
        exit(1);
    }
}
