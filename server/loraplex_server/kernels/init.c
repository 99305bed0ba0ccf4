// Asks Linux for the use of AMX, which a process must do once. Returns 0 when it was granted, or is not needed.

#ifdef __AMX_BF16__
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <unistd.h>

int request_tiles(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return (int)syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}
#else
int request_tiles(void) { return 0; }
#endif
