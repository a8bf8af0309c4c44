/* failpoint.h - named spots where the test build kills or pauses a process; nothing at all in a real build.
 * A spot stands after each store to shared memory that begins, decides or ends something; its comment says what a
 * death there leaves. */
#ifndef SHMQ_FAILPOINT_H
#define SHMQ_FAILPOINT_H

#ifdef SHMQ_TEST
extern void (*shmq_failpoint)(const char *name);
#define SHMQ_FAILPOINT(name) (shmq_failpoint != NULL ? shmq_failpoint(name) : (void)0)
#else
#define SHMQ_FAILPOINT(name) ((void)0)
#endif

#endif
