/* attach.pml - a segment's life: create, attach, fork, detach, unlink; byte 0 of its file.
 *
 * Models core/attach.c: shmq_open() with attach() and create(), join(), shmq_fork_before() and its two ends, shmq_detach()
 * with unlink_if_last(), unlink_if_unused(). A file is an inode number; the name leads to one or to none. Any process may
 * die at any step, and its kernel locks go with it. The last process is the first one's forked child.
 *
 * Shown: processes that use the queue at the same time use the same file; a file is unlinked only when nobody else uses
 * it; when all have left, and none of them was killed, the name is gone; nobody waits for ever.
 *
 * Left out: what is in the file (hands.pml), slots' numbers (each process has its own byte) and generations (lock.pml),
 * files that people remove by hand, the parent's closing during its own fork, shmq_close(now), giving up after 5 s.
 * One call of the system is one step.
 *
 * Bounds: three processes that attach once each, and one that is forked; DEATHS deaths; one file is replaced because it
 * has another size and nobody lives; fewer than FILES files.
 *
 * Mutants: NO_BYTE0          the last one to leave doesn't take byte 0 to unlink
 *          NO_NAME_CHECK     after waiting for byte 0 it isn't asked whether the name still leads there
 *          LET_GO_OUTSIDE    the slot is let go of after byte 0
 *          LINK_UNLOCKED     a new file gets its name before its creator holds byte 0
 *          CHILD_PINS_ONLY   the child's slot is locked by the child alone, after the fork
 *          SCAN_IN_TWO       who leaves asks for the slots below and above its own one after the other */
#define PROCESSES 4
#ifndef DEATHS
#define DEATHS 1
#endif
#define FILES 6
#define CHILD (PROCESSES - 1)

/* ---- the kernel */

byte name;           /* the file it leads to, 0: none */
byte next_file = 1;
byte byte0[FILES];   /* who has it locked, process + 1 */
byte slot[PROCESSES]; /* the file on which the process's own byte is locked */

#define IS_LIVE(p, file, but) (p != but && slot[p] == file)
#define IS_ANYONE_LIVE(file, but) \
    (IS_LIVE(0, file, but) || IS_LIVE(1, file, but) || IS_LIVE(2, file, but) || IS_LIVE(CHILD, file, but))

/* ---- what the properties speak of */

byte uses[PROCESSES]; /* the file that the process is attached to: may put and get */
bool is_dead[PROCESSES], is_over[PROCESSES];
byte deaths, replaced;

inline attached() {
    uses[me] = mapped;
    assert(mapped == slot[me]);
    assert(uses[0] == 0 || uses[0] == mapped);
    assert(uses[1] == 0 || uses[1] == mapped);
    assert(uses[2] == 0 || uses[2] == mapped);
    assert(uses[CHILD] == 0 || uses[CHILD] == mapped)
}

inline unlink() {
    assert(name == fd); /* the name can't have moved on */
    assert(uses[0] != name && uses[1] != name && uses[2] != name && uses[CHILD] != name);
    name = 0
}

/* ---- core/attach.c */

inline lock_byte0() {
    atomic { byte0[fd] == 0 -> byte0[fd] = me + 1 }
}

inline unlock_byte0() {
    atomic {
        if
        :: byte0[fd] == me + 1 -> byte0[fd] = 0
        :: else
        fi
    }
}

/* join(): lock_slot(), occupy_slot(); byte 0 is held */
inline join() {
    slot[me] = fd;
    atomic { attached() };
    unlock_byte0()
}

/* shmq_open() */
inline open() {
    do
    :: atomic { fd = name }; /* attach() */
        if
        :: fd != 0 ->
            lock_byte0();
            atomic { mapped = name }; /* map_segment(): by the name, not through fd */
            is_named = name == fd;
#ifdef NO_NAME_CHECK
            is_named = mapped != 0;
#endif
            if
            :: is_named && !IS_ANYONE_LIVE(fd, PROCESSES) -> /* is_stale(): it may have another size and be empty */
                if
                :: true -> join(); break
                :: atomic { replaced == 0 -> replaced = 1; unlink() }; unlock_byte0()
                fi
            :: is_named && IS_ANYONE_LIVE(fd, PROCESSES) -> join(); break
            :: !is_named -> unlock_byte0()
            fi
        :: fd == 0 -> /* create() */
            atomic { /* create_nameless(), port_link(): nobody sees it before it has its name */
                is_named = name == 0;
                if
                :: is_named ->
                    fd = next_file;
                    next_file++;
                    name = fd;
#ifndef LINK_UNLOCKED
                    byte0[fd] = me + 1
#endif
                :: else
                fi
            };
            if
            :: is_named ->
#ifdef LINK_UNLOCKED
                lock_byte0();
#endif
                atomic { mapped = name };
                assert(mapped == fd); /* byte 0 keeps others from unlinking it */
                join();
                break
            :: !is_named /* EEXIST: somebody was faster */
            fi
        fi
    od;
    atomic { is_named = false; fd = 0 }
}

/* is_anyone_live() but ourselves */
inline is_anyone_live() {
#ifdef SCAN_IN_TWO
    is_live = IS_LIVE(CHILD, fd, me); /* below ours, and then those above it */
    is_live = is_live || IS_LIVE(0, fd, me) || IS_LIVE(1, fd, me) || IS_LIVE(2, fd, me)
#else
    is_live = IS_ANYONE_LIVE(fd, me)
#endif
}

/* unlink_if_last(), let_go_of_slot() */
inline detach() {
    atomic { uses[me] = 0; fd = name };
    if
    :: fd == mapped ->
#ifndef NO_BYTE0
        lock_byte0();
#endif
        if
        :: name == fd ->
            is_anyone_live();
            if
            :: !is_live -> atomic { unlink() }
            :: is_live
            fi
        :: else
        fi;
#ifndef LET_GO_OUTSIDE
        slot[me] = 0;
#endif
        unlock_byte0()
    :: else
    fi;
    slot[me] = 0;
    atomic { is_live = false; fd = 0; mapped = 0; is_over[me] = true }
}

byte child_file; /* the child's, from its parent: mapped at the fork */
bool is_forked, is_fork_over;

/* shmq_fork_before(), the fork, shmq_fork_parent(): without byte 0, since the parent is attached all the time */
inline fork() {
    atomic { fd = name };
    if
    :: fd == mapped ->
#ifndef CHILD_PINS_ONLY
        slot[CHILD] = fd; /* held through the parent's descriptor, so far */
#endif
        atomic { child_file = fd; is_forked = true } /* the descriptor is both's, and then the child's */
    :: else
    fi;
    fd = 0
}

proctype Process(byte me) {
    byte fd, mapped;
    bool is_named, is_live;
    {
        open();
        if
        :: me == 0 -> fork()
        :: true
        fi;
        detach()
    } unless {
        is_dead[me] -> d_step { fd = 0; mapped = 0; is_named = false; is_live = false }
    }
}

/* shmq_fork_child() */
proctype Child(byte me) {
    byte fd, mapped;
    bool is_named, is_live;
    end: is_forked;
    {
        mapped = child_file;
#ifdef CHILD_PINS_ONLY
        slot[me] = mapped;
#endif
        atomic { attached() };
        detach()
    } unless {
        is_dead[me] -> d_step { fd = 0; mapped = 0; is_named = false; is_live = false }
    }
}

inline die(p) {
    deaths++;
    is_dead[p] = true;
    is_over[p] = true;
    uses[p] = 0;
    slot[p] = 0;
    d = 1;
    do
    :: d < FILES ->
        if
        :: byte0[d] == p + 1 -> byte0[d] = 0
        :: else
        fi;
        d++
    :: else -> d = 0; break
    od
}

proctype Death() {
    byte d;
    end: do
    :: atomic { deaths < DEATHS && !is_over[0] ->
            die(0);
            if
            :: !is_forked -> slot[CHILD] = 0 /* it was held by the parent */
            :: else
            fi
        }
    :: atomic { deaths < DEATHS && !is_over[1] -> die(1) }
    :: atomic { deaths < DEATHS && !is_over[2] -> die(2) }
    :: atomic { deaths < DEATHS && !is_over[CHILD] && is_forked -> die(CHILD) }
    od
}

init {
    atomic {
        run Process(0);
        run Process(1);
        run Process(2);
        run Child(CHILD);
        run Death()
    };
    atomic {
        is_over[0] && is_over[1] && is_over[2] && (is_over[CHILD] || !is_forked) ->
        assert(name == 0 || deaths > 0)
    }
}
