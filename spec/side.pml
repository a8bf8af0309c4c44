/* side.pml - a side's mark: {position, count}, published by one store and read without a lock.
 *
 * Models core/side.h: the lock's holder writes the idle copy and bumps `seq`; it may die at any step, and the next one
 * goes on. Shown: a reader gets a pair that was published, and no older one than it got before.
 *
 * Left out: the lock (the next writer begins when the one before has ended or died), and stores or loads out of order:
 * labels S2 and A2 are there for machines that do so. Bounds: WRITERS publications begun, two reads.
 *
 * Mutants: NO_RETRY   a reader doesn't look at seq again
 *          ONE_COPY   the copy in force is written
 *          SEQ_FIRST  seq is bumped before the copy is written */
#define WRITERS 4

byte seq;
byte pos[2], count[2];
byte pos_of[WRITERS + 1], count_of[WRITERS + 1]; /* what each seq stands for */

#ifdef ONE_COPY
#define IDLE (seq % 2)
#else
#define IDLE ((seq + 1) % 2)
#endif

proctype Writers() {
    byte n, old_pos, old_count;
    do
    :: n < WRITERS ->
        atomic {
            n++;
            old_pos = pos[seq % 2];
            old_count = count[seq % 2];
            assert(old_pos == pos_of[seq] && old_count == count_of[seq]);
            pos_of[seq + 1] = old_pos + n; /* tells the writer */
            count_of[seq + 1] = old_count + 1
        };
        if
        :: true -> goto died
        :: true
        fi;
#ifdef SEQ_FIRST
        seq++; /* S1 */
        pos[seq % 2] = pos_of[seq]; /* S2 */
        count[seq % 2] = count_of[seq]
#else
        pos[IDLE] = pos_of[seq + 1]; /* S2 */
        if
        :: true -> goto died
        :: true
        fi;
        count[IDLE] = count_of[seq + 1];
        if
        :: true -> goto died
        :: true
        fi;
        seq++ /* S1 */
#endif
        ;
        died: skip
    :: n == WRITERS -> break
    od
}

proctype Reader() {
    byte key, p, c, reads, last;
    do
    :: reads < 2 ->
        key = seq; /* A1 */
        p = pos[key % 2]; /* A2 */
        c = count[key % 2];
        if
#ifdef NO_RETRY
        :: true ->
#else
        :: seq == key ->
#endif
            assert(p == pos_of[key] && c == count_of[key] && c >= last);
            atomic { last = c; reads++ }
#ifndef NO_RETRY
        :: else
#endif
        fi
    :: reads == 2 -> break
    od
}

init {
    atomic { run Writers(); run Reader() }
}
