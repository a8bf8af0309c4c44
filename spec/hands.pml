/* hands.pml - records in hand: the two positions, the tables R and H, sweeping, giving back, taking over.
 *
 * Models core/queue.c and core/hands.c, with the labels of docs/protocol.md: small puts and gets, big ones that are
 * reserved and claimed, batches of two, reservations that get_pos passes, the sweep of both sides. Any process may die
 * between any two steps. A step is an access that another process may see or change in the meantime. Accesses to what
 * only a lock's holder touches are joined, and so is the taking of a lock with what comes next.
 *
 * Shown: every item is delivered once (maybe to one that then dies), a producer's items in their order (unless one is
 * given back or its taker dies), a record's room is used again only when it's over, and nobody waits for ever.
 *
 * Left out: liveness (an owner is gone when it has died or detached: lock.pml), sleeping and waking (event.pml), how a
 * position is read without a lock (side.pml), full tables, clear(). All records have the same length.
 *
 * Bounds: PRODUCERS and CONSUMERS, RECORDS records, room for CAPACITY of them, DEATHS deaths, GIVES givings back,
 * SWEEPS sweeps of which nobody knows the use (those with a reason are unlimited).
 *
 * Mutants: NO_VOID          who takes a lock over leaves the entries that its dead owner had begun
 *          PUT_POS_LATE     put_pos is read after looking at the passed reservations
 *          H_FIRST          a producer reads H before get_pos
 *          FREE_FIRST       a reservation's entry is freed before its commit
 *          POS_BEFORE_OWNER who looks for what to deliver reads an entry's position before its owner
 *          ABANDON_BLINDLY  a sweep doesn't look again whether the dead owner's reservation is still there */
#ifndef PRODUCERS
#define PRODUCERS 1
#endif
#ifndef CONSUMERS
#define CONSUMERS 2
#endif
#ifndef RECORDS
#define RECORDS 3
#endif
#ifndef CAPACITY
#define CAPACITY 2
#endif
#ifndef DEATHS
#define DEATHS 1
#endif
#ifndef GIVES
#define GIVES 1
#endif
#ifndef SWEEPS
#define SWEEPS 1
#endif
#define ALL (PRODUCERS + CONSUMERS)
#define R_ENTRIES PRODUCERS
#define H_ENTRIES 2 /* in hand are at most CAPACITY records */
#define NONE H_ENTRIES
#define PRODUCING 0
#define CONSUMING 1

mtype = { NOTHING, RESERVED, COMMITTED, ABANDONED, DELIVERED }

/* ---- the segment */

typedef Record {
    mtype state;
    bool is_big;
    byte begins /* the position of what stands here: tells that the room was used again */
}
typedef Hand {
    byte pos1, owner, end
}
Record ring[CAPACITY];
#define AT(pos) ring[(pos) % CAPACITY]
Hand R[R_ENTRIES], H[H_ENTRIES];
byte put_pos, get_pos;
byte lock[2]; /* its owner; owners are process + 1 */

bool gone[ALL]; /* dead, or detached */

/* ---- what the properties speak of */

mtype fate[RECORDS] = NOTHING; /* of the item at this position */
byte by[RECORDS];              /* its producer */
byte last[PRODUCERS];          /* where the last item taken of this producer's ends */
byte deaths, gives, sweeps;
bool has_taker_died, is_end_seen;

inline exists(pos) { assert(AT(pos).begins == pos && AT(pos).state != NOTHING) }

inline take(pos) {
    exists(pos);
    assert(AT(pos).state == COMMITTED);
    assert(pos >= last[by[pos]] || gives > 0 || has_taker_died);
    last[by[pos]] = pos + 1
}

inline deliver(pos) {
    assert(fate[pos] == COMMITTED);
    fate[pos] = DELIVERED
}

inline write(pos, what, big) { /* shmq_ring_begin(): the record that was here must be over */
    assert(pos < CAPACITY || fate[pos - CAPACITY] == DELIVERED || fate[pos - CAPACITY] == ABANDONED);
    AT(pos).state = what;
    AT(pos).is_big = big;
    AT(pos).begins = pos;
    by[pos] = me
}

/* ---- locks (lock.pml) */

#define IS_FREE(side) (lock[side] == 0 || gone[lock[side] - 1])

inline free_void(entry, published) { /* of shmq_hands_void() */
#ifndef NO_VOID
    if
    :: entry.pos1 > published -> entry.pos1 = 0
    :: else
    fi
#else
    skip
#endif
}

inline enter_producing() {
    IS_FREE(PRODUCING);
    if
    :: lock[PRODUCING] != 0 -> /* L3 */
        free_void(R[0], put_pos);
        free_void(R[R_ENTRIES - 1], put_pos)
    :: else /* L1 */
    fi;
    lock[PRODUCING] = me + 1
}

inline enter_consuming() {
    IS_FREE(CONSUMING);
    if
    :: lock[CONSUMING] != 0 -> /* L3 */
        free_void(H[0], get_pos);
        free_void(H[1], get_pos)
    :: else /* L1 */
    fi;
    lock[CONSUMING] = me + 1
}

inline leave(side) { /* L2 */
    assert(lock[side] == me + 1);
    lock[side] = 0
}

/* ---- put */

/* read_free_pos() in 1 + H_ENTRIES steps: get_pos first, then H. The first one may go with the taking of the lock. */
inline read_free_pos_begin(out) {
#ifdef H_FIRST
    out = RECORDS
#else
    out = get_pos /* A1 */
#endif
}

inline read_free_pos_end(out) {
    do
    :: atomic {
            i < H_ENTRIES ->
            if
            :: H[i].pos1 != 0 && H[i].pos1 - 1 < out -> out = H[i].pos1 - 1 /* A5 */
            :: else
            fi;
            i++
        }
    :: atomic {
            i == H_ENTRIES -> i = 0;
#ifdef H_FIRST
            if
            :: get_pos < out -> out = get_pos
            :: else
            fi;
#endif
            break
        }
    od
}

#define HAS_ROOM_IN_H(i, pos) (H[i].pos1 == 0 || H[i].pos1 + CAPACITY > pos + 1)
#define HAS_ROOM(pos) (get_pos + CAPACITY > pos && HAS_ROOM_IN_H(0, pos) && HAS_ROOM_IN_H(1, pos))
#if CONSUMERS == 2
#define NO_CONSUMER (gone[PRODUCERS] && gone[PRODUCERS + 1])
#else
#define NO_CONSUMER gone[PRODUCERS]
#endif

inline put_small(pos, big) {
    atomic { write(pos, COMMITTED, big); put_pos = pos + 1; fate[pos] = COMMITTED }; /* S1 */
    atomic { leave(PRODUCING); i = 0 }
}

#if PRODUCERS == 2
#define IS_R_FULL (R[0].pos1 != 0 && R[1].pos1 != 0)
#else
#define IS_R_FULL (R[0].pos1 != 0)
#endif

inline put_reserved(pos) {
    atomic {
        i = (R[0].pos1 == 0 -> 0 : 1);
        R[i].owner = me + 1;
        R[i].pos1 = pos + 1; /* R5 */
        write(pos, RESERVED, true)
    };
    put_pos = pos + 1; /* S1 */
    atomic { leave(PRODUCING) };
#ifdef FREE_FIRST
    R[i].pos1 = 0;
    atomic { AT(pos).state = COMMITTED; fate[pos] = COMMITTED; i = 0 }
#else
    atomic { AT(pos).state = COMMITTED; fate[pos] = COMMITTED }; /* R3 */
    atomic { R[i].pos1 = 0; i = 0 } /* R5 */
#endif
}

proctype Producer(byte me) {
    byte p, i, free;
    {
        do
        :: atomic { enter_producing(); p = put_pos; read_free_pos_begin(free) };
            if
            :: p == RECORDS -> atomic { leave(PRODUCING); break }
            :: p < RECORDS && p >= CAPACITY -> read_free_pos_end(free) /* fits() */
            :: p < CAPACITY && p < RECORDS
            fi;
            if
            :: p + 1 > free + CAPACITY ->
                atomic { leave(PRODUCING); free = 0 };
                atomic {
                    HAS_ROOM(p) || put_pos != p || NO_CONSUMER -> /* wait_for_room() */
                    if
                    :: NO_CONSUMER -> break
                    :: else
                    fi
                }
            :: else ->
                free = 0;
                if
                :: put_small(p, false)
                :: IS_R_FULL -> put_small(p, true)
                :: !IS_R_FULL -> put_reserved(p)
                fi;
                if
                :: p + 1 == RECORDS -> break
                :: else
                fi
            fi
        od;
        atomic { p = 0; free = 0; gone[me] = true }
    } unless {
        gone[me] -> d_step { p = 0; i = 0; free = 0 }
    }
}

/* ---- get */

/* Move i to the next entry of H that isn't free. Only the lock's holder takes free ones. */
inline next_hand() {
    do
    :: i < H_ENTRIES && H[i].pos1 == 0 -> i++
    :: else -> break
    od
}

/* The lowest entry of H that can be delivered, or NONE. i is at the first one that isn't free. */
inline deliverable() {
    do
    :: i < H_ENTRIES ->
#ifdef POS_BEFORE_OWNER
        p = H[i].pos1;
#endif
        atomic {
#ifndef POS_BEFORE_OWNER
            p = H[i].pos1; /* in one step with the owner: where there is none, nobody but us changes it */
#endif
            if
            :: p != 0 && H[i].owner == 0 && (best == NONE || p < H[best].pos1) -> /* A4, A5 */
                exists(p - 1);
                if
                :: AT(p - 1).state == ABANDONED -> H[i].pos1 = 0 /* A3, R5 */
                :: AT(p - 1).state == COMMITTED -> best = i
                :: else
                fi
            :: else
            fi;
            p = 0;
            i++;
            next_hand()
        }
    :: else -> break
    od
}

/* shmq_hands_take() on H: entry i */
inline take_hand(pos, to, who) {
    do
    :: H[i].pos1 == 0 -> break
    :: else -> i++ /* beyond the end: the bounds are wrong */
    od;
    H[i].owner = who;
    H[i].end = to;
    H[i].pos1 = pos + 1 /* R5 */
}

/* skip(): p moves past what can't be delivered, maybe up to a committed record */
inline skip_records() {
    atomic { p = get_pos; i = 0 };
    do
    :: atomic {
            p < bound && !is_found ->
            exists(p);
            if
            :: AT(p).state == COMMITTED -> is_found = true /* A3 */
            :: AT(p).state == RESERVED -> take_hand(p, p + 1, 0); i = 0; p++
            :: AT(p).state == ABANDONED -> p++
            fi
        }
    :: atomic { else -> break }
    od
}

#define IS_SMALL(pos) (AT(pos).state == COMMITTED && AT(pos).begins == pos && !AT(pos).is_big)
#define END_LOOK is_found = false; bound = 0; best = NONE; p = 0; i = 0

/* Deliver from entry `best`. One store to it decides. */
inline take_from_hand() {
    atomic {
        p = H[best].pos1 - 1;
        take(p);
        if
        :: AT(p).is_big && H[best].end == p + 1 -> H[best].owner = me + 1; hand = best /* R4 */
        :: else -> deliver(p); H[best].pos1 = (p + 1 < H[best].end -> p + 2 : 0)       /* R5 */
        fi;
        END_LOOK
    }
}

/* take_from_ring(), get_batch_locked(): from p on */
inline take_from_ring() {
    if
    :: !AT(p).is_big -> atomic { take(p); deliver(p); get_pos = p + 1; END_LOOK } /* S1 */
    :: AT(p).is_big ->
        atomic { take_hand(p, p + 1, me + 1); hand = i };
        atomic { take(p); get_pos = p + 1; END_LOOK } /* S1 */
    :: p == get_pos && IS_SMALL(p) && p + 1 < bound && IS_SMALL(p + 1) ->
        atomic { take_hand(p, p + 2, me + 1); hand = i };
        atomic { take(p); take(p + 1); get_pos = p + 2; END_LOOK } /* S1 */
    fi
}

/* Nothing: what was skipped stays behind. */
inline leave_empty() {
    if
    :: p != get_pos -> get_pos = p /* S1 */
    :: p == get_pos
    fi;
    atomic { END_LOOK; leave(CONSUMING) }
}

/* shmq_release(), shmq_give_back_from(): no lock */
inline let_go() {
    if
    :: atomic {
            p = H[hand].pos1 - 1;
            deliver(p);
            if
            :: H[hand].end > p + 1 -> deliver(p + 1)
            :: else
            fi;
            H[hand].pos1 = 0; /* R5 */
            hand = NONE;
            p = 0
        }
    :: atomic { gives < GIVES -> gives++; H[hand].owner = 0; hand = NONE } /* R4: all of it */
    :: atomic {
            gives < GIVES && H[hand].end > H[hand].pos1 -> /* from the second record on */
            gives++;
            p = H[hand].pos1 - 1;
            deliver(p);
            H[hand].pos1 = p + 2; /* R5 */
            p = 0
        };
        atomic { H[hand].owner = 0; hand = NONE } /* R4 */
    fi
}

/* ---- sweep */

inline sweep_producing() {
    atomic { enter_producing(); read_free_pos_begin(free) };
    read_free_pos_end(free);
    below = get_pos;
    do
    :: i < R_ENTRIES ->
        owner = (R[i].pos1 != 0 -> R[i].owner : 0);
        atomic { /* abandon(): the reservation of one who is gone is changed by nobody else */
            p = R[i].pos1;
            if
            :: owner == 0 || !gone[owner - 1] -> owner = 0
#ifndef ABANDON_BLINDLY
            :: owner != 0 && gone[owner - 1] && p == 0 -> owner = 0 /* it had come to its end before it left */
#endif
            :: else ->
                if
                :: p != 0 && p - 1 < free -> R[i].pos1 = 0; owner = 0 /* R5 */
                :: else ->
                    assert(p != 0);
                    exists(p - 1);
                    if
                    :: AT(p - 1).state == COMMITTED -> R[i].pos1 = 0; owner = 0 /* A3, R5 */
                    :: else -> AT(p - 1).state = ABANDONED; fate[p - 1] = ABANDONED /* R3 */
                    fi
                fi
            fi;
            p = 0
        };
        if
        :: owner != 0 -> atomic { R[i].owner = 0; owner = 0; i++ } /* R4 */
        :: else -> i++
        fi
    :: else -> break
    od;
    atomic { /* shmq_hands_settle_reservations() */
        i = 0;
        do
        :: i < R_ENTRIES ->
            if
            :: R[i].owner == 0 && R[i].pos1 != 0 && R[i].pos1 - 1 < below -> R[i].pos1 = 0
            :: else
            fi;
            i++
        :: else -> break
        od;
        i = 0; free = 0; below = 0;
        leave(PRODUCING)
    }
}

inline sweep_consuming() {
    atomic { enter_consuming(); next_hand() };
    do
    :: i < H_ENTRIES ->
        owner = (H[i].pos1 != 0 -> H[i].owner : 0);
        atomic {
            if
            :: owner != 0 && gone[owner - 1] -> H[i].owner = 0 /* R4 */
            :: else
            fi;
            owner = 0;
            i++;
            next_hand()
        }
    :: else -> break
    od;
    atomic { bound = put_pos; i = 0; next_hand() }; /* A1 */
    deliverable(); /* frees what was abandoned after get_pos had passed it */
    skip_records();
    leave_empty()
}

#define IS_DEAD_HAND(e) (e.pos1 != 0 && e.owner != 0 && gone[e.owner - 1])
#define IS_PASSED(i) (H[i].pos1 != 0 && H[i].owner == 0 && AT(H[i].pos1 - 1).state != RESERVED)
#define MAY_TAKE (get_pos < put_pos || IS_PASSED(0) || IS_PASSED(1))
#if PRODUCERS == 2
#define IS_R_DEAD (IS_DEAD_HAND(R[0]) || IS_DEAD_HAND(R[1]))
#define NO_PRODUCER (gone[0] && gone[1])
#else
#define IS_R_DEAD IS_DEAD_HAND(R[0])
#define NO_PRODUCER gone[0]
#endif
#define IS_SWEEP_DUE (IS_R_DEAD || IS_DEAD_HAND(H[0]) || IS_DEAD_HAND(H[1]))
#define IS_OVER (NO_PRODUCER && get_pos == put_pos && H[0].pos1 == 0 && H[1].pos1 == 0 && !IS_R_DEAD)

proctype Consumer(byte me) {
    byte p, i, best = NONE, hand = NONE, bound, free, below, owner;
    bool is_found;
    {
        do
        :: atomic { enter_consuming(); bound = put_pos; next_hand() }; /* A1 */
            deliverable();
#ifdef PUT_POS_LATE
            bound = put_pos;
#endif
            if
            :: best != NONE -> take_from_hand(); atomic { leave(CONSUMING) }
            :: best == NONE ->
                skip_records();
                if
                :: is_found -> take_from_ring(); atomic { leave(CONSUMING) }
                :: !is_found -> /* EMPTY: wait_for_items(), and what ends it */
                    leave_empty();
                    if
                    :: MAY_TAKE
                    :: IS_SWEEP_DUE -> sweep_producing(); sweep_consuming()
                    :: atomic { sweeps < SWEEPS && !IS_OVER -> sweeps++ }; sweep_producing(); sweep_consuming()
                    :: IS_OVER -> break
                    fi
                fi
            fi;
            if
            :: hand != NONE -> let_go()
            :: hand == NONE
            fi
        od;
        atomic { is_end_seen = true; gone[me] = true }
    } unless {
        gone[me] -> d_step {
            p = 0; i = 0; best = NONE; hand = NONE; bound = 0; free = 0; below = 0; owner = 0;
            is_found = false
        }
    }
}

/* ---- death */

inline die(victim) {
    gone[victim] = true;
    deaths++;
    has_taker_died = has_taker_died || victim >= PRODUCERS
}

proctype Death() {
    end: do
    :: atomic { deaths < DEATHS && !gone[0] -> die(0) }
    :: atomic { deaths < DEATHS && !gone[1] -> die(1) }
#if DEATHS > 1 || CONSUMERS == 1 /* else the one consumer's death is like the other's */
    :: atomic { deaths < DEATHS && !gone[ALL - 1] -> die(ALL - 1) }
#endif
    od
}

init {
    byte n;
    atomic {
        do
        :: n < PRODUCERS -> run Producer(n); n++
        :: n >= PRODUCERS && n < ALL -> run Consumer(n); n++
        :: else -> break
        od;
        n = 0;
        run Death()
    };
    end: atomic { /* never when no consumer is left */
        NO_PRODUCER && NO_CONSUMER && is_end_seen ->
        do
        :: n < RECORDS -> assert(fate[n] != COMMITTED); n++
        :: else -> break
        od
    }
}
