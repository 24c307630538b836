/*
 * The parts of a core that a profile depends on: caches with a stream prefetcher, a TLB, branch prediction.
 *
 * Sizes are those of a Neoverse N1 (Arm Neoverse N1 Technical Reference Manual: L1D 64 KiB of 4 ways, L2 1 MiB of 8
 * ways, second level TLB of 1280 entries and 5 ways, lines of 64 bytes) with a system level cache of 32 MiB, of which
 * implementations differ. Replacement is LRU. The prefetcher and the predictors are plain ones of their kind: what a
 * real core does better is not public.
 */
#ifndef SPEPOLICY_CORE_H
#define SPEPOLICY_CORE_H

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum level { L1, L2, LLC, DRAM };

struct cache {
    unsigned sets, ways;
    uint64_t *tag;   /* [sets * ways], of line + 1; 0 is empty */
    uint64_t *stamp; /* [sets * ways], time of the last use */
    bool *fetched;   /* [sets * ways], by the prefetcher and not used since */
};

static uint64_t now;

static void cache_make(struct cache *c, unsigned sets, unsigned ways)
{
    size_t n = (size_t)sets * ways;

    c->sets = sets;
    c->ways = ways;
    c->tag = calloc(n, sizeof(*c->tag));
    c->stamp = calloc(n, sizeof(*c->stamp));
    c->fetched = calloc(n, sizeof(*c->fetched));
    if (!c->tag || !c->stamp || !c->fetched)
        abort();
}

/* Use a line, and bring it in if it is not there. *fresh* says whether the prefetcher had brought it for this use. */
static bool cache_use(struct cache *c, uint64_t line, bool by_prefetcher, bool *fresh)
{
    size_t first = (size_t)(line & (c->sets - 1)) * c->ways, oldest = first;

    for (size_t i = first; i < first + c->ways; i++) {
        if (c->tag[i] == line + 1) {
            if (by_prefetcher)
                return true;
            *fresh = c->fetched[i];
            c->fetched[i] = false;
            c->stamp[i] = ++now;
            return true;
        }
        if (c->stamp[i] < c->stamp[oldest])
            oldest = i;
    }
    c->tag[oldest] = line + 1;
    c->stamp[oldest] = ++now;
    c->fetched[oldest] = by_prefetcher;
    return false;
}

/* --- data side ------------------------------------------------------------------------------------------------- */

#define STREAMS 16
#define DISTANCE 4 /* lines that the prefetcher is ahead */

static struct cache l1, l2, llc, tlb;
static struct {
    uint64_t line, used;
    int step, hits;
} stream[STREAMS];

static void data_side_make(void)
{
    cache_make(&l1, 256, 4);
    cache_make(&l2, 2048, 8);
    cache_make(&llc, 32768, 16);
    cache_make(&tlb, 256, 5);
}

/* A miss of L1, or the first use of a prefetched line: follow its stream, or begin one in place of the oldest. */
static void prefetch(uint64_t line)
{
    int oldest = 0;
    bool fresh;

    for (int i = 0; i < STREAMS; i++) {
        int64_t step = (int64_t)(line - stream[i].line);

        if (step >= -2 && step <= 2 && step != 0) {
            int direction = step > 0 ? 1 : -1;

            stream[i].hits = direction == stream[i].step ? stream[i].hits + 1 : 0;
            stream[i].step = direction;
            stream[i].line = line;
            stream[i].used = ++now;
            if (stream[i].hits < 1)
                return;
            for (int ahead = 1; ahead <= DISTANCE; ahead++) {
                uint64_t next = line + (uint64_t)(int64_t)(ahead * direction);

                /* Within the page of 4 KiB: the next one may be anywhere in physical memory. */
                if ((next ^ line) >> 6)
                    return;
                cache_use(&llc, next, true, &fresh);
                cache_use(&l2, next, true, &fresh);
                cache_use(&l1, next, true, &fresh);
            }
            return;
        }
        if (stream[i].used < stream[oldest].used)
            oldest = i;
    }
    stream[oldest].line = line;
    stream[oldest].step = stream[oldest].hits = 0;
    stream[oldest].used = ++now;
}

/* Access the line of *address*; say which level serves it, and whether the TLB misses. */
static enum level access_data(uint64_t address, bool *walk)
{
    uint64_t line = address >> 6;
    bool fresh = false, ignored = false;

    *walk = !cache_use(&tlb, address >> 12, false, &ignored);
    if (cache_use(&l1, line, false, &fresh)) {
        if (fresh)
            prefetch(line);
        return L1;
    }
    prefetch(line);
    if (cache_use(&l2, line, false, &ignored))
        return L2;
    return cache_use(&llc, line, false, &ignored) ? LLC : DRAM;
}

/* --- branch side ----------------------------------------------------------------------------------------------- */

enum branch { NOT_A_BRANCH, DIRECT, CALL, CONDITIONAL, INDIRECT, INDIRECT_CALL, RETURN };

#define COUNTERS (1 << 16)
#define TARGETS (1 << 12)
#define STACK 16

static uint8_t by_address[COUNTERS], by_history[COUNTERS], chooser[COUNTERS];
static uint64_t target[TARGETS], stack[STACK], history, path;
static unsigned depth;

static void count(uint8_t *counter, bool up)
{
    if (up && *counter < 3)
        ++*counter;
    else if (!up && *counter > 0)
        --*counter;
}

/* Predict the branch at *pc* and learn from what it did; return whether the prediction was wrong. */
static bool mispredicted(enum branch kind, uint64_t pc, uint64_t next, bool taken)
{
    uint64_t at = pc >> 2;
    bool wrong = false;

    if (kind == CONDITIONAL) {
        uint8_t *local = &by_address[at % COUNTERS], *global = &by_history[(at ^ history) % COUNTERS];
        uint8_t *choice = &chooser[at % COUNTERS];
        bool local_says = *local > 1, global_says = *global > 1;

        wrong = (*choice > 1 ? global_says : local_says) != taken;
        if (local_says != global_says)
            count(choice, global_says == taken);
        count(local, taken);
        count(global, taken);
        history = history << 1 | taken;
    } else if (kind == INDIRECT || kind == INDIRECT_CALL) {
        uint64_t *guess = &target[(at ^ path) % TARGETS];

        wrong = *guess != next;
        *guess = next;
    } else if (kind == RETURN) {
        depth = (depth + STACK - 1) % STACK;
        wrong = stack[depth] != next;
    }
    if (kind == CALL || kind == INDIRECT_CALL) {
        stack[depth] = pc + 4;
        depth = (depth + 1) % STACK;
    }
    if (taken && kind != DIRECT)
        path = path << 3 ^ next >> 2;
    return wrong;
}

#endif
