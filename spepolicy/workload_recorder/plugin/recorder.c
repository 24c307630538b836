/*
 * A TCG plugin that reduces the instructions and memory accesses of an AArch64 program to counts, for each interval of
 * instructions and each 64 bytes of code, and to a sample of the addresses that it accesses.
 *
 *     qemu-aarch64 -plugin ./recorder.so,out=FILE,interval=N,skip=N,limit=N,every=N program arguments
 *
 * The file: "SPEREC2\n"; then for each interval a struct interval, its struct row's and its struct sampled's; then an
 * interval of 0 instructions, struct heap, the number of bytes and the text of /proc/self/maps, where the program's
 * files lie. All numbers are of the computer that records. spepolicy/workload_recorder/raw.py reads it.
 *
 * Only the first thread is counted. QEMU ends a block of instructions behind each branch, so where the next block
 * begins says whether it was taken.
 */
#include <stdio.h>
#include <unistd.h>

#include "qemu_plugin_api.h"
#include "core.h"

PLUGIN_EXPORT int qemu_plugin_version = PLUGIN_API_VERSION;

enum column {
    INSTRUCTIONS, LOADS, STORES, ATOMICS, BRANCHES, TAKEN, MISPREDICTED,
    STORE_MISSES,                    /* stores that miss L1 */
    FROM_L2, FROM_LLC, FROM_DRAM,    /* loads and atomics that these levels serve; the others hit in L1 */
    WAITS_L2, WAITS_LLC, WAITS_DRAM, /* of those, loads whose address is that of a load before which is under way */
    LEADS_LLC, LEADS_DRAM,           /* of those, other loads with none of these levels under way before them */
    WALKS,                           /* of those beyond L1, with a miss of the TLB */
    COLUMNS
};

struct row {
    uint64_t line; /* address of the code / 64, + 1; 0 is free */
    uint32_t count[COLUMNS];
};

struct interval {
    uint64_t instructions;
    uint32_t rows, syscalls, sampled, nothing;
};

/* One access of the many: every=N takes each with a chance of 1 in N, so that no loop can hide from it. */
struct sampled {
    uint64_t line, address; /* address of the code / 64; of the data */
    uint8_t load, miss, by_stack_pointer, bytes_log2;
    uint32_t nothing;
};

/* What brk() has moved: from where to where. */
struct heap {
    uint64_t begin, end;
};

/* A load that misses L1 is under way for so many instructions: a Neoverse N1 holds 128, and then waits. */
#define WINDOW 128
#define LINES 256     /* of which it is remembered when they were brought in */
#define FORWARDS 4096 /* places in memory that what was loaded is followed through */
#define PARTS 8 /* lines of 64 bytes that a block may touch; longer ones are counted in their last */
#define ROWS (1 << 18)

struct part {
    uint64_t line;
    uint32_t instructions, loads, stores, atomics;
    struct row *row;
};

struct block {
    uint64_t begin, behind, branch_pc, epoch, executed;
    enum branch branch;
    unsigned parts;
    struct part part[PARTS];
};

struct access {
    struct block *block;
    unsigned part, base, index, value; /* registers; 31 and 32 are none */
    bool load;
    uint64_t executed;
};

/* A result of other registers, without memory. */
struct computed {
    unsigned result, from[3];
};

/* Where a value came from: the load that missed last on its way, and when. */
struct origin {
    uint64_t at;
    enum level from;
};

static struct row *rows;
static struct row **used;
static unsigned rows_used;
static uint64_t epoch = 1, executed, in_interval, total, interval = 1000000, skip, limit = UINT64_MAX;
static uint64_t every = 128, until_sample, random_state = 1;
static uint32_t syscalls;
static struct heap heap;
static struct sampled *sampled;
static uint32_t sampled_count, sampled_room;
static struct block *last;
static struct origin origin[33];
static struct {
    uint64_t address;
    struct origin origin;
} forward[FORWARDS];
static struct {
    uint64_t line;
    struct origin origin;
} brought[LINES];
static uint64_t lead_at;
static FILE *out;

static struct row *row_of(uint64_t line)
{
    size_t at = (line * 0x9E3779B97F4A7C15u) >> 46;

    while (rows[at].line != 0 && rows[at].line != line + 1)
        at = (at + 1) % ROWS;
    if (rows[at].line == 0) {
        if (rows_used == ROWS / 2) {
            fprintf(stderr, "recorder: more than %d lines of code in an interval; choose a shorter one\n", ROWS / 2);
            exit(1);
        }
        rows[at].line = line + 1;
        used[rows_used++] = &rows[at];
    }
    return &rows[at];
}

static void end_interval(void)
{
    struct interval head = { in_interval, rows_used, syscalls, sampled_count, 0 };

    bool counts = total > skip; /* before that, only caches and predictors learn */

    if (counts)
        fwrite(&head, sizeof(head), 1, out);
    for (unsigned i = 0; i < rows_used; i++) {
        used[i]->line--;
        if (counts)
            fwrite(used[i], sizeof(**used), 1, out);
        memset(used[i], 0, sizeof(**used));
    }
    if (counts && sampled_count)
        fwrite(sampled, sizeof(*sampled), sampled_count, out);
    rows_used = syscalls = sampled_count = 0;
    in_interval = 0;
    epoch++;
}

static void finish(void)
{
    struct interval end = { 0, 0, 0, 0, 0 };
    static char text[1 << 20];
    FILE *maps = fopen("/proc/self/maps", "r");
    uint64_t size = maps ? fread(text, 1, sizeof(text), maps) : 0;

    if (!out)
        return;
    if (in_interval)
        end_interval();
    fwrite(&end, sizeof(end), 1, out);
    fwrite(&heap, sizeof(heap), 1, out);
    fwrite(&size, sizeof(size), 1, out);
    fwrite(text, 1, size, out);
    if (fclose(out)) {
        perror("recorder: cannot write the recording");
        _exit(1);
    }
    out = NULL;
}

static void on_block(unsigned int vcpu, void *data)
{
    struct block *b = data;

    if (vcpu != 0)
        return;
    if (last && last->branch != NOT_A_BRANCH && last->epoch == epoch) {
        bool taken = b->begin != last->behind;
        struct row *row = last->part[last->parts - 1].row;

        row->count[BRANCHES]++;
        row->count[TAKEN] += taken;
        row->count[MISPREDICTED] += mispredicted(last->branch, last->branch_pc, b->begin, taken);
    }
    if (in_interval >= interval) {
        end_interval();
        if (total >= limit) {
            finish();
            _exit(0);
        }
    }
    if (b->epoch != epoch) {
        for (unsigned i = 0; i < b->parts; i++)
            b->part[i].row = row_of(b->part[i].line);
        b->epoch = epoch;
    }
    for (unsigned i = 0; i < b->parts; i++) {
        uint32_t *count_of = b->part[i].row->count;

        count_of[INSTRUCTIONS] += b->part[i].instructions;
        count_of[LOADS] += b->part[i].loads;
        count_of[STORES] += b->part[i].stores;
        count_of[ATOMICS] += b->part[i].atomics;
        in_interval += b->part[i].instructions;
        total += b->part[i].instructions;
    }
    b->executed = ++executed;
    last = b;
}

static bool waited_for(struct origin o)
{
    return o.from != L1 && total - o.at < WINDOW;
}

/* Draw how many accesses are passed over before the next is taken: evenly from 0 to 2 * every - 2. */
static void draw_until_sample(void)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    until_sample = (random_state >> 33) % (2 * every - 1);
}

static void take_sample(const struct access *a, uint64_t address, bool miss, qemu_plugin_meminfo_t info)
{
    if (sampled_count == sampled_room) {
        sampled_room = sampled_room ? 2 * sampled_room : 1 << 16;
        sampled = realloc(sampled, sampled_room * sizeof(*sampled));
        if (!sampled)
            abort();
    }
    sampled[sampled_count++] = (struct sampled){
        .line = a->block->part[a->part].line, .address = address, .load = a->load, .miss = miss,
        .by_stack_pointer = a->base == 31, .bytes_log2 = qemu_plugin_mem_size_shift(info),
    };
    draw_until_sample();
}

static void on_access(unsigned int vcpu, qemu_plugin_meminfo_t info, uint64_t address, void *data)
{
    struct access *a = data;
    enum level level;
    uint64_t line = address >> 6;
    bool walk;

    if (vcpu != 0)
        return;
    level = access_data(address, &walk);
    /* An instruction that accesses memory several times is one operation, with the address of its first access. */
    if (a->executed == a->block->executed || a->block->epoch != epoch)
        return;
    a->executed = a->block->executed;
    if (until_sample-- == 0)
        take_sample(a, address, level != L1, info);
    if (level != L1) {
        uint32_t *count_of = a->block->part[a->part].row->count;

        count_of[a->load ? FROM_L2 + level - L2 : STORE_MISSES]++;
        count_of[WALKS] += walk && a->load;
        if (a->load && (waited_for(origin[a->base]) || waited_for(origin[a->index]))) {
            count_of[WAITS_L2 + level - L2]++;
            lead_at = total;
        } else if (a->load && level != L2 && total - lead_at >= WINDOW) {
            count_of[LEADS_LLC + level - LLC]++;
            lead_at = total;
        }
        brought[line % LINES].line = line;
        brought[line % LINES].origin = (struct origin){ total, level };
    }
    if (a->value < 31) {
        unsigned place = (address >> 3) % FORWARDS;

        if (!a->load) {
            forward[place].address = address;
            forward[place].origin = origin[a->value];
        } else if (level != L1) {
            origin[a->value] = (struct origin){ total, level };
        } else if (brought[line % LINES].line == line && waited_for(brought[line % LINES].origin)) {
            origin[a->value] = brought[line % LINES].origin; /* the line is still on its way */
        } else if (forward[place].address == address) {
            origin[a->value] = forward[place].origin;
        } else {
            origin[a->value] = (struct origin){ 0, L1 };
        }
    }
}

static void on_computed(unsigned int vcpu, void *data)
{
    struct computed *c = data;

    struct origin latest = origin[c->from[0]];

    for (int i = 1; i < 3; i++)
        if (origin[c->from[i]].at > latest.at)
            latest = origin[c->from[i]];
    if (vcpu == 0)
        origin[c->result] = latest;
}

static void on_syscall(qemu_plugin_id_t id, unsigned int vcpu, int64_t number, uint64_t a1, uint64_t a2, uint64_t a3,
                       uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8)
{
    (void)id, (void)number, (void)a1, (void)a2, (void)a3, (void)a4, (void)a5, (void)a6, (void)a7, (void)a8;
    syscalls += vcpu == 0;
}

static void on_syscall_end(qemu_plugin_id_t id, unsigned int vcpu, int64_t number, int64_t result)
{
    (void)id, (void)vcpu;
    if (number != 214 || result <= 0) /* brk() of arm64: it returns the end of the heap */
        return;
    if (!heap.begin)
        heap.begin = result;
    if ((uint64_t)result > heap.end)
        heap.end = result;
}

/* --- what an instruction is: Arm ARM DDI 0487 C4.1, top-level encodings ---------------------------------------- */

static enum branch branch_of(uint32_t code)
{
    if ((code & 0xFC000000) == 0x14000000)
        return DIRECT; /* B */
    if ((code & 0xFC000000) == 0x94000000)
        return CALL; /* BL */
    if ((code & 0xFF000000) == 0x54000000 || (code & 0x7C000000) == 0x34000000)
        return CONDITIONAL; /* B.cond; CBZ, CBNZ, TBZ, TBNZ */
    if ((code & 0xFE000000) == 0xD6000000) {
        switch (code >> 21 & 0x7) { /* with and without pointer authentication */
        case 0: return INDIRECT;
        case 1: return INDIRECT_CALL;
        case 2: return RETURN;
        }
    }
    return NOT_A_BRANCH;
}

static bool is_memory(uint32_t code)
{
    return (code & 0x0A000000) == 0x08000000;
}

static bool is_prefetch(uint32_t code) /* PRFM, immediate, register and literal */
{
    return (code & 0xFFC00000) == 0xF9800000 || (code & 0xFFE00C00) == 0xF8A00800 || (code & 0xFF000000) == 0xD8000000 ||
           (code & 0xFFE00C00) == 0xF8800000;
}

static bool is_atomic(uint32_t code) /* LSE: LDADD and its like, SWP; CAS, CASP. LDAPR is an ordinary load */
{
    bool memory_operation = (code & 0x3F200C00) == 0x38200000 && (code & 0x3FFFFC00) != 0x38BFC000;

    return memory_operation || (code & 0x3FA07C00) == 0x08A07C00 || (code & 0xBFA07C00) == 0x08207C00;
}

static bool is_load(uint32_t code)
{
    switch (code >> 27 & 0x7) {
    case 3: /* literal; register pair is 5, and single registers are 7 */
        return true;
    case 5:
        return code & 1u << 22;
    case 7: {
        unsigned opc = code >> 22 & 3;

        if (code & 1u << 26) /* SIMD and FP: opc<0> */
            return opc & 1;
        return opc != 0;
    }
    default: /* exclusive and ordered; SIMD structures */
        return code & 1u << 22;
    }
}

static void describe(struct access *a, uint32_t code)
{
    bool vector = code & 1u << 26, literal = (code >> 27 & 7) == 3 && !(code & 1u << 24);
    bool by_register = (code & 0x3B200C00) == 0x38200800;

    a->load = is_load(code) || is_atomic(code);
    a->value = vector ? 32 : code & 31;
    a->base = literal ? 32 : code >> 5 & 31;
    a->index = by_register ? code >> 16 & 31 : 32;
}

/* Follow a value through ADD, SUB, logical operations, moves, bitfields (Rd, Rn and, in the register forms, Rm), and
 * through MADD and its like (Ra too), of which MUL is one. */
static void follow(struct qemu_plugin_insn *insn, uint32_t code)
{
    unsigned group = code >> 24 & 0x1F;
    struct computed *c;

    bool registers = group == 0x0A || group == 0x0B || group == 0x1B;

    if ((code & 31) == 31 || (!registers && group != 0x11 && group != 0x12 && group != 0x13))
        return;
    c = calloc(1, sizeof(*c));
    if (!c)
        abort();
    c->result = code & 31;
    c->from[0] = group == 0x12 && code & 1u << 23 ? 32 : code >> 5 & 31; /* MOVN, MOVZ, MOVK: of no register */
    c->from[1] = registers ? code >> 16 & 31 : 32;
    c->from[2] = group == 0x1B ? code >> 10 & 31 : 32;
    qemu_plugin_register_vcpu_insn_exec_cb(insn, on_computed, QEMU_PLUGIN_CB_NO_REGS, c);
}

static void on_translation(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
    size_t n = qemu_plugin_tb_n_insns(tb);
    struct block *b = calloc(1, sizeof(*b));
    uint32_t code = 0;

    (void)id;
    if (!b)
        abort();
    b->begin = b->branch_pc = qemu_plugin_tb_vaddr(tb);
    for (size_t i = 0; i < n; i++) {
        struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
        uint64_t pc = qemu_plugin_insn_vaddr(insn);
        struct part *p;

        memcpy(&code, qemu_plugin_insn_data(insn), sizeof(code));
        if (b->parts == 0 || (b->part[b->parts - 1].line != pc >> 6 && b->parts < PARTS))
            b->part[b->parts++].line = pc >> 6;
        p = &b->part[b->parts - 1];
        p->instructions++;
        b->branch_pc = pc;
        if (!is_memory(code) || is_prefetch(code)) {
            follow(insn, code);
            continue;
        }
        if (is_atomic(code))
            p->atomics++;
        else if (is_load(code))
            p->loads++;
        else
            p->stores++;
        struct access *a = calloc(1, sizeof(*a));

        if (!a)
            abort();
        a->block = b;
        a->part = b->parts - 1;
        describe(a, code);
        qemu_plugin_register_vcpu_mem_cb(insn, on_access, QEMU_PLUGIN_CB_NO_REGS, QEMU_PLUGIN_MEM_RW, a);
    }
    b->behind = b->branch_pc + 4;
    b->branch = branch_of(code);
    qemu_plugin_register_vcpu_tb_exec_cb(tb, on_block, QEMU_PLUGIN_CB_NO_REGS, b);
}

static void on_end(qemu_plugin_id_t id, void *data)
{
    (void)id, (void)data;
    finish();
}

PLUGIN_EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const struct qemu_info_t *info, int argc, char **argv)
{
    (void)info;
    for (int i = 0; i < argc; i++) {
        if (!strncmp(argv[i], "out=", 4))
            out = fopen(argv[i] + 4, "wb");
        else if (!strncmp(argv[i], "interval=", 9))
            interval = strtoull(argv[i] + 9, NULL, 10);
        else if (!strncmp(argv[i], "skip=", 5))
            skip = strtoull(argv[i] + 5, NULL, 10);
        else if (!strncmp(argv[i], "limit=", 6))
            limit = strtoull(argv[i] + 6, NULL, 10);
        else if (!strncmp(argv[i], "every=", 6))
            every = strtoull(argv[i] + 6, NULL, 10);
        else {
            fprintf(stderr, "recorder: unknown argument '%s'; known: out=FILE, interval=N, skip=N, limit=N, every=N\n",
                    argv[i]);
            return -1;
        }
    }
    if (!out || !interval || !limit || !every) {
        fprintf(stderr, "recorder: out=FILE that can be written, interval, limit and every above 0 are needed\n");
        return -1;
    }
    fwrite("SPEREC2\n", 8, 1, out);
    draw_until_sample();
    rows = calloc(ROWS, sizeof(*rows));
    used = calloc(ROWS / 2, sizeof(*used));
    if (!rows || !used)
        return -1;
    data_side_make();
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
    qemu_plugin_register_vcpu_syscall_cb(id, on_syscall);
    qemu_plugin_register_vcpu_syscall_ret_cb(id, on_syscall_end);
    qemu_plugin_register_atexit_cb(id, on_end, NULL);
    return 0;
}
