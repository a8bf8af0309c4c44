/* lock.pml - the lock that names its owner, and who counts as dead.
 *
 * Models core/lock.c, and of core/attach.c the slots: lock_slot(), occupy_slot(), shmq_is_dead(), let_go_of_slot(),
 * with the labels of docs/protocol.md. An attachment takes a slot's byte, makes a new generation of its owner word, lets
 * its threads take a side's lock (with SIDES=2 both, one after the other), and detaches when the last one has left.
 * Any attachment may die at any step, with all its threads; the kernel then drops its byte. Slots are used again.
 *
 * Shown: at most one live thread is inside; a live owner's lock is never taken; nobody waits for ever.
 *
 * Left out: the futex (a sleep ends when the word has changed or its time is up; all sleeps are bounded, so a lost wake
 * costs time only), spinning, giving up, what the section does (hands.pml). A slot's owner word may be seen as it was
 * one generation ago (weak memory); all else is sequentially consistent.
 *
 * Bounds: SLOTS slots, ATTACHMENTS attachments, of which the first has two threads and the others one, SIDES locks,
 * DEATHS deaths; LOOKS times a waiter looks at an owner that seems alive. The first SLOTS are attached from the start.
 *
 * Mutants: PROBE_OWN        liveness is asked through a description that holds a lock: one's own looks unlocked
 *          DETACH_INSIDE    the first thread to leave detaches
 *          STALE_GENERATION an owner is dead if its slot's owner word is different, instead of newer
 *          GENERATION_WRAP  a generation comes again
 *          NO_PROBE         only a newer generation tells of a death
 *          NO_COMPARE       the lock is taken over whatever the word is by then
 *          NESTED           the second lock is asked for while the first one is held */
#ifndef ATTACHMENTS
#define ATTACHMENTS 3
#endif
#ifndef SLOTS
#define SLOTS 2
#endif
#ifndef DEATHS
#define DEATHS 2
#endif
#ifndef LOOKS
#define LOOKS 1
#endif
#ifndef SIDES
#define SIDES 1
#endif

/* The owner word of layout.h with one bit for the slot; bit 0 is the contended one. 0 is nobody. */
#ifdef GENERATION_WRAP
#define GENERATIONS 2
#else
#define GENERATIONS 16
#endif
#define OWNER(generation, slot) (((generation) << 3) | (((slot) + 1) << 1))
#define GENERATION(owner) ((owner) >> 3)
#define SLOT(owner) ((((owner) >> 1) & 3) - 1)
#define CONTENDED 1
#define NOT_CONTENDED(word) ((word) & 254)

byte word[SIDES];       /* the sides' locks */
byte slot_owner[SLOTS]; /* who has the slot or had it last */
byte holder[SLOTS];     /* kernel: whose description has the slot's byte, attachment + 1 */

/* An attachment, as its own process sees it. */
byte self[ATTACHMENTS], calls[ATTACHMENTS];
bool is_open[ATTACHMENTS], is_dead[ATTACHMENTS];

byte deaths, looks;
byte inside[SIDES]; /* the live thread in the section, thread + 1 */

/* Does it look as if nobody lived under this owner word? */
#define IS_LOCKED(owner) (holder[SLOT(owner)] != 0)
#ifdef GENERATION_WRAP
#define IS_NEWER(now, owner) ((now) != (owner))
#else
#define IS_NEWER(now, owner) ((now) > (owner))
#endif
#ifdef NO_PROBE
#define LOOKS_DEAD(owner) (owner != self[a] && IS_NEWER(slot_owner[SLOT(owner)], owner))
#else
#define LOOKS_DEAD(owner) (owner != self[a] && (!IS_LOCKED(owner) || IS_NEWER(slot_owner[SLOT(owner)], owner)))
#endif

/* shmq_is_dead(owner) -> looks_dead */
inline ask() {
    atomic {
        looks_dead = false;
#ifdef NO_PROBE
        skip
#elif defined(PROBE_OWN)
        looks_dead = holder[SLOT(held)] == 0 || holder[SLOT(held)] == a + 1
#else
        if
        :: NOT_CONTENDED(held) != self[a] -> looks_dead = !IS_LOCKED(held)
        :: else
        fi
#endif
    };
    if
    :: !looks_dead && NOT_CONTENDED(held) != self[a] ->
        atomic { /* A6: what is seen may be older */
            now = slot_owner[SLOT(held)];
            if
            :: true
#ifndef GENERATION_WRAP /* it fails even so */
            :: GENERATION(now) > 0 -> now = OWNER(GENERATION(now) - 1, SLOT(held))
#endif
            fi;
#ifdef STALE_GENERATION
            looks_dead = now != NOT_CONTENDED(held);
#else
            looks_dead = IS_NEWER(now, NOT_CONTENDED(held));
#endif
            now = 0
        }
    :: else
    fi
}

inline come_in(side) {
    assert(inside[side] == 0);
    inside[side] = me + 1;
    held = 0;
    looks_dead = false
}

/* shmq_lock() */
inline lock(side) {
    do
    :: atomic { word[side] == 0 -> word[side] = self[a]; come_in(side); break }             /* L1: shmq_lock_try() */
    :: atomic { word[side] == 0 -> word[side] = self[a] | CONTENDED; come_in(side); break } /* L1: after waiting */
    :: atomic {
            word[side] != 0 && word[side] != held -> /* take_or_mark() */
            word[side] = word[side] | CONTENDED;
            held = word[side]
        }
    :: atomic { /* time is up: at once, but then only when there is something to see */
            held != 0 && word[side] == held && (LOOKS_DEAD(NOT_CONTENDED(held)) || looks < LOOKS) ->
            looks = (LOOKS_DEAD(NOT_CONTENDED(held)) -> looks : looks + 1)
        };
        ask();
        atomic { /* L3 */
            if
#ifdef NO_COMPARE
            :: looks_dead ->
#else
            :: looks_dead && word[side] == held ->
#endif
                word[side] = self[a] | CONTENDED;
                come_in(side);
                break
            :: else -> looks_dead = false
            fi
        }
    od
}

inline unlock(side) { /* L2 */
    atomic {
        assert(inside[side] == me + 1);
        assert(NOT_CONTENDED(word[side]) == self[a]);
        inside[side] = 0;
        word[side] = 0
    }
}

inline detach() { /* let_go_of_slot() */
    holder[SLOT(self[a])] = 0
}

proctype Thread(byte me, a, first) {
    byte held, now;
    bool looks_dead;
    {
        is_open[a];
#ifdef NESTED
        lock(first); lock(1 - first); unlock(1 - first); unlock(first);
#else
        lock(first); unlock(first);
#if SIDES == 2
        lock(1 - first); unlock(1 - first);
#endif
#endif
        atomic { /* shmq_let_go() */
            calls[a]--;
            if
#ifdef DETACH_INSIDE
            :: holder[SLOT(self[a])] == a + 1 -> detach()
#else
            :: calls[a] == 0 -> detach()
#endif
            :: else
            fi
        }
    } unless {
        is_dead[a] -> d_step { held = 0; now = 0; looks_dead = false }
    }
}

inline occupy(slot) { /* occupy_slot(), R6 */
    slot_owner[slot] = OWNER((GENERATION(slot_owner[slot]) + 1) % GENERATIONS, slot);
    self[a] = slot_owner[slot];
    is_open[a] = true
}

inline lock_slot(slot) { /* the kernel decides between two */
    holder[slot] == 0 -> holder[slot] = a + 1
}

proctype Attachment(byte a) {
    {
        if
        :: atomic { lock_slot(0) }; atomic { occupy(0) }
        :: atomic { lock_slot(1) }; atomic { occupy(1) }
        fi
    } unless {
        is_dead[a]
    }
}

/* A death: the process stops, and a while later the kernel has torn it down. */
#define ATTACHMENT_OF(thread) ((thread) % ATTACHMENTS) /* the last one is the first attachment's second */

inline leave_inside(side) {
    if
    :: inside[side] != 0 && ATTACHMENT_OF(inside[side] - 1) == a -> inside[side] = 0
    :: else
    fi
}

proctype Death() {
    byte a;
    end: atomic {
        deaths < DEATHS ->
        do
        :: a < ATTACHMENTS - 1 -> a++
        :: break
        od;
        if
        :: !is_dead[a] && (holder[0] == a + 1 || holder[1] == a + 1) ->
            is_dead[a] = true;
            deaths++;
            leave_inside(0);
            leave_inside(SIDES - 1)
        :: else -> a = ATTACHMENTS
        fi
    };
    atomic {
        if
        :: a < ATTACHMENTS && holder[0] == a + 1 -> holder[0] = 0
        :: a < ATTACHMENTS && holder[1] == a + 1 -> holder[1] = 0
        :: else
        fi;
        a = 0
    }
}

init {
    byte n, a;
    atomic {
        do
        :: n < DEATHS -> run Death(); n++
        :: else -> n = 0; break
        od;
        do
        :: a < ATTACHMENTS ->
            calls[a] = (a == 0 -> 2 : 1);
            if
            :: a < SLOTS -> lock_slot(a); occupy(a)
            :: else -> run Attachment(a)
            fi;
            run Thread(a, a, a % SIDES);
            if
            :: a == 0 -> run Thread(ATTACHMENTS, 0, SIDES - 1)
            :: else
            fi;
            a++
        :: else -> a = 0; break
        od
    }
}
