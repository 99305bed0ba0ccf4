// Asks Linux for the use of AMX, which a process must do once. Returns 0 when it was granted.

#define _GNU_SOURCE
#include <sys/syscall.h>
#include <unistd.h>

int request_amx(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return (int)syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}
