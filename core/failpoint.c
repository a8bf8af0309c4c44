/* failpoint.c - where the test build's spots lead; see failpoint.h. */
#include "failpoint.h"

#include <stddef.h>

#ifdef SHMQ_TEST
void (*shmq_failpoint)(const char *name) = NULL;
#else
typedef int shmq_no_failpoints; /* a file must hold something */
#endif
