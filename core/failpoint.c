/* failpoint.c - where the test build's spots lead; see failpoint.h. */
#include "failpoint.h"

#ifdef SHMQ_TEST

#include <stdio.h>
#include <string.h>

void (*shmq_failpoint)(const char *name) = NULL;

void shmq_at_store(const char *file, int line)
{
    char name[32];
    const char *slash = strrchr(file, '/');
    if (shmq_failpoint == NULL)
        return;
    snprintf(name, sizeof name, "%s:%d", slash != NULL ? slash + 1 : file, line);
    shmq_failpoint(name);
}

#else
typedef int shmq_no_failpoints; /* a file must hold something */
#endif
