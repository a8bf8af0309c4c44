/* event.pml - sleeping for items: an eventcount with a flag.
 *
 * Models core/event.c and, of core/queue.c, after_put(), after_get(), wait_for_items() and get_wait(), with the labels of
 * docs/protocol.md. Producers put a batch of items each; consumers take one at a time and come again for ever. Any of
 * them may die at any step, and a consumer's call may end early without a look at the queue: a signal, or a lock that
 * it didn't get in time. Stores to the flag and to the position go through store buffers of one entry, which empty at
 * any time, and at fences.
 *
 * Shown: nobody who lives sleeps while there is an item to take. A sleep runs out by itself only after a death or a call
 * that ended early, once for each: that is when the bound of 250 ms is needed, and once is enough.
 *
 * Left out: what is in hand (hands.pml), locks: a put and a get are one step each, closing, spinning.
 *
 * Bounds: PRODUCERS producers of BATCH items, CONSUMERS consumers, LOSSES deaths and calls that end early.
 *
 * Mutants: NO_RECHECK    a sleeper doesn't look again after it has raised its flag
 *          NO_FENCE      no fence between raising the flag and the second look (W1)
 *          NO_WAKE_FENCE no fence between publishing and looking at the flag (W2)
 *          NO_HANDING_ON who takes an item and leaves something behind wakes nobody
 *          NO_FLAG_AGAIN who has slept doesn't raise the flag for those who still do
 *          NO_KEY        a sleeper doesn't compare the count
 *          NO_BOUND      a sleep never runs out */
#ifndef PRODUCERS
#define PRODUCERS 2
#endif
#ifndef CONSUMERS
#define CONSUMERS 3
#endif
#ifndef BATCH
#define BATCH 2
#endif
#ifndef LOSSES
#define LOSSES 1
#endif

/* Shared memory, and what stands in store buffers on the way to it. */
byte items;
bool flag;
bool is_key_good[CONSUMERS]; /* the count itself would do nothing but grow: has it moved since it was read? */
bool flag_stored[CONSUMERS];
byte items_stored[PRODUCERS];

bool is_asleep[CONSUMERS], is_dead[PRODUCERS + CONSUMERS];
byte losses, rested[CONSUMERS]; /* sleeps that ran out, at most one for each loss */

/* futex: one of the sleepers, if there is one */
inline wake_one() {
    if
    :: is_asleep[0] -> is_asleep[0] = false
    :: is_asleep[1] -> is_asleep[1] = false
    :: is_asleep[CONSUMERS - 1] -> is_asleep[CONSUMERS - 1] = false
    :: else
    fi
}

/* shmq_items_wake(): the exchange, the count, the wake */
inline wake_items() {
    if
    :: atomic { flag -> flag = false };
        atomic { is_key_good[0] = false; is_key_good[1] = false; is_key_good[CONSUMERS - 1] = false }; /* K2 */
        atomic { wake_one() }
    :: atomic { !flag }
    fi
}

proctype Producer(byte me) {
    {
        items_stored[me] = BATCH; /* put_locked(), S1 */
#ifndef NO_WAKE_FENCE
        items_stored[me] == 0; /* W2 */
#endif
        wake_items() /* after_put() */
    } unless {
        is_dead[me]
    }
}

/* A sleep is much longer than a store buffer needs. */
#define IS_FLAG_STORED (flag_stored[0] || flag_stored[1] || flag_stored[CONSUMERS - 1])
#define IS_SETTLED (!IS_FLAG_STORED && items_stored[0] == 0 && items_stored[PRODUCERS - 1] == 0)

/* shmq_items_begin() */
inline raise_flag() {
    flag_stored[me] = true;
#ifndef NO_FENCE
    !flag_stored[me] /* W1 */
#endif
}

proctype Consumer(byte me) {
    {
        do
        :: atomic { items > 0 && !flag_stored[me] -> items-- }; /* get_locked(), W2 */
#ifndef NO_HANDING_ON
            if /* after_get() */
            :: flag ->
                if
                :: items > 0 -> wake_items()
                :: else
                fi
            :: else
            fi;
#endif
            if
            :: true
            :: break /* busy with the item for ever */
            fi
        :: items == 0 -> /* wait_for_items() */
            is_key_good[me] = true; /* K1 */
            raise_flag();
#ifndef NO_RECHECK
            if
            :: items > 0 -> goto again
            :: else
            fi;
#endif
#ifdef NO_KEY
            is_asleep[me] = true;
#else
            atomic {
                if
                :: is_key_good[me] -> is_asleep[me] = true
                :: else
                fi
            };
#endif
            end: if
            :: !is_asleep[me] -> /* woken */
#ifndef NO_FLAG_AGAIN
                raise_flag();
#endif
                if
                :: true
                :: atomic { losses < LOSSES -> losses++; break } /* the call ends early, and no other is made */
                fi
#ifndef NO_BOUND
            :: atomic { is_asleep[me] && rested[me] < losses && IS_SETTLED -> is_asleep[me] = false; rested[me]++ };
                if /* it ends in a sweep */
                :: items > 0 -> wake_items()
                :: else
                fi
#endif
            fi;
            again: is_key_good[me] = false
        od;
        is_key_good[me] = false
    } unless {
        is_dead[PRODUCERS + me] -> is_key_good[me] = false
    }
}

/* Store buffers empty in their own time, also those of the dead. */
proctype Memory() {
    end: do
    :: atomic { flag_stored[0] -> flag = true; flag_stored[0] = false }
    :: atomic { flag_stored[1] -> flag = true; flag_stored[1] = false }
    :: atomic { flag_stored[CONSUMERS - 1] -> flag = true; flag_stored[CONSUMERS - 1] = false }
    :: atomic { items_stored[0] > 0 -> items = items + items_stored[0]; items_stored[0] = 0 }
    :: atomic { items_stored[PRODUCERS - 1] > 0 ->
            items = items + items_stored[PRODUCERS - 1];
            items_stored[PRODUCERS - 1] = 0 }
    od
}

proctype Death() { /* the others' deaths are like these */
    end: do
    :: atomic { losses < LOSSES && !is_dead[0] -> losses++; is_dead[0] = true }
    :: atomic { losses < LOSSES && !is_dead[PRODUCERS] -> losses++; is_asleep[0] = false; is_dead[PRODUCERS] = true }
#if LOSSES > 1
    :: atomic { losses < LOSSES && !is_dead[PRODUCERS + 1] -> losses++; is_asleep[1] = false; is_dead[PRODUCERS + 1] = true }
#endif
    od
}

init {
    byte n;
    atomic {
        run Memory();
        run Death();
        do
        :: n < PRODUCERS -> run Producer(n); n++
        :: n >= PRODUCERS && n < PRODUCERS + CONSUMERS -> run Consumer(n - PRODUCERS); n++
        :: else -> n = 0; break
        od
    };
    timeout -> assert(items == 0 || !(is_asleep[0] || is_asleep[1] || is_asleep[CONSUMERS - 1]))
}
