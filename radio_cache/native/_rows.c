/* Rows of shard files into one buffer, read and checked without Python: see radio_cache/shards/native.py for its use, and what happens where it was not built.

   Needs a processor with the crc32 instruction (x86-64 since 2008); elsewhere the import fails and Python does the work. */

#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>

#if !defined(__x86_64__) || !defined(__GNUC__)
#error "x86-64 and GCC or Clang only: radio-cache works without this module"
#endif

#include <errno.h>
#include <fcntl.h>
#include <immintrin.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

#define VERSION 2 /* incremented whenever a signature changes: radio_cache/native/__init__.py compares it */
#define TARGET __attribute__((target("sse4.2")))
#define CRC_BYTES 4
#define PIECE (256 << 10) /* bytes read before they are checked, while the processor's cache still holds them */
#define LANE 4096         /* bytes of each of the three lanes that are checked side by side */

/* --- crc32c */

/* What LANE zero bytes do to a remainder, by each of its four bytes: the map is linear. */
static uint32_t past_lane[4][256];

TARGET static uint32_t one_lane(uint32_t crc, const uint8_t *data, size_t length) {
    uint64_t word, wide = crc;
    for (; length >= 8; data += 8, length -= 8) {
        memcpy(&word, data, 8);
        wide = _mm_crc32_u64(wide, word);
    }
    for (crc = (uint32_t)wide; length; data++, length--) crc = _mm_crc32_u8(crc, *data);
    return crc;
}

static uint32_t shifted(uint32_t crc) {
    return past_lane[0][crc & 255] ^ past_lane[1][crc >> 8 & 255] ^ past_lane[2][crc >> 16 & 255] ^ past_lane[3][crc >> 24];
}

static void make_table(void) {
    static const uint8_t zeros[LANE];
    uint32_t past_bit[32];
    for (int bit = 0; bit < 32; bit++) past_bit[bit] = one_lane((uint32_t)1 << bit, zeros, LANE);
    for (int byte = 0; byte < 4; byte++)
        for (int value = 0; value < 256; value++) {
            past_lane[byte][value] = 0;
            for (int bit = 0; bit < 8; bit++)
                if (value >> bit & 1) past_lane[byte][value] ^= past_bit[8 * byte + bit];
        }
}

/* The instruction takes three cycles and can begin every cycle: three lanes at once, joined by the table. */
TARGET static uint32_t in_lanes(uint32_t crc, const uint8_t *data, size_t length) {
    for (; length >= 3 * LANE; data += 3 * LANE, length -= 3 * LANE) {
        uint64_t first = crc, second = 0, third = 0, a, b, c;
        for (size_t at = 0; at < LANE; at += 8) {
            memcpy(&a, data + at, 8);
            memcpy(&b, data + LANE + at, 8);
            memcpy(&c, data + 2 * LANE + at, 8);
            first = _mm_crc32_u64(first, a);
            second = _mm_crc32_u64(second, b);
            third = _mm_crc32_u64(third, c);
        }
        crc = shifted(shifted((uint32_t)first) ^ (uint32_t)second) ^ (uint32_t)third;
    }
    return one_lane(crc, data, length);
}

/* Where there are multiplications of four polynomials at once (Intel since Ice Lake, AMD since Zen 4), a quarter of the time:
   16 bytes that lie FOLD bytes before others count for as much as two products of their halves with these, in place of the
   others. See Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction", Intel, 2009. */
#define FOLD 256
static uint64_t past_fold[2];

/* x to the power of `bits` modulo the polynomial of crc32c, with bits in reverse order. */
static uint64_t power(int bits) {
    uint32_t rest = 0x80000000;
    while (bits--) rest = rest & 1 ? rest >> 1 ^ 0x82F63B78 : rest >> 1;
    return (uint64_t)rest << 1; /* a product of reversed polynomials comes out one bit lower */
}

#define FOLDED(sum, at) \
    _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(sum, factors, 0x00), _mm512_clmulepi64_epi128(sum, factors, 0x11), \
                              _mm512_loadu_si512(data + (at)), 0x96) /* a ^ b ^ c */

__attribute__((target("avx512f,vpclmulqdq,sse4.2"))) static uint32_t by_folding(uint32_t crc, const uint8_t *data, size_t length) {
    if (length < 2 * FOLD) return one_lane(crc, data, length);
    const __m512i factors = _mm512_broadcast_i32x4(_mm_set_epi64x(past_fold[1], past_fold[0]));
    __m512i a = _mm512_loadu_si512(data), b = _mm512_loadu_si512(data + 64), c = _mm512_loadu_si512(data + 128),
            d = _mm512_loadu_si512(data + 192);
    a = _mm512_xor_si512(a, _mm512_zextsi128_si512(_mm_cvtsi32_si128(crc)));
    data += FOLD, length -= FOLD;
    for (; length >= FOLD; data += FOLD, length -= FOLD) {
        a = FOLDED(a, 0);
        b = FOLDED(b, 64);
        c = FOLDED(c, 128);
        d = FOLDED(d, 192);
    }
    uint8_t sums[FOLD]; /* of the same remainder as all that was folded into them */
    _mm512_storeu_si512(sums, a);
    _mm512_storeu_si512(sums + 64, b);
    _mm512_storeu_si512(sums + 128, c);
    _mm512_storeu_si512(sums + 192, d);
    return one_lane(one_lane(0, sums, FOLD), data, length);
}

static uint32_t (*remainder_of)(uint32_t, const uint8_t *, size_t) = in_lanes;

static void choose_way(void) {
    make_table();
    past_fold[0] = power(8 * FOLD + 32);
    past_fold[1] = power(8 * FOLD - 32);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq")) remainder_of = by_folding;
}

static uint32_t extended(uint32_t crc, const uint8_t *data, size_t length) { return ~remainder_of(~crc, data, length); }

/* --- reading */

enum { DONE, WOULD_WAIT, CUT_SHORT, OTHER_BYTES, FAILED };

/* Where `count` stored chunks lie (descriptor, offset, length without checksum), and at which byte of `out` each goes. */
typedef struct {
    const int32_t *descriptors;
    const int64_t *offsets, *lengths, *places;
    const uint8_t *check;
    uint8_t *out;
    Py_ssize_t count;
} Rows;

/* Fill `count` buffers from `offset` on. */
static int fill(int descriptor, struct iovec *buffers, int count, int64_t offset, int cached_only) {
    while (count) {
        ssize_t got;
#ifdef RWF_NOWAIT
        if (cached_only) got = preadv2(descriptor, buffers, count, offset, RWF_NOWAIT);
        else
#endif
            got = preadv(descriptor, buffers, count, offset);
        if (got < 0) {
            if (cached_only) return WOULD_WAIT;
            if (errno == EINTR) continue;
            return FAILED;
        }
        if (got == 0) return cached_only ? WOULD_WAIT : CUT_SHORT;
        offset += got;
        while (count && (size_t)got >= buffers->iov_len) {
            got -= buffers->iov_len;
            buffers++;
            count--;
        }
        if (count) {
            if (cached_only) return WOULD_WAIT;
            buffers->iov_base = (uint8_t *)buffers->iov_base + got;
            buffers->iov_len -= got;
        }
    }
    return DONE;
}

static int read_row(const Rows *rows, Py_ssize_t number, int cached_only) {
    uint8_t *row = rows->out + rows->places[number];
    int descriptor = rows->descriptors[number], status;
    int64_t offset = rows->offsets[number], size = rows->lengths[number];
    if (!rows->check[number]) {
        struct iovec whole = {row, size};
        return fill(descriptor, &whole, 1, offset, cached_only);
    }
    uint32_t crc = 0, stored = 0;
    for (int64_t first = 0; first < size; first += PIECE) {
        int64_t left = size - first, length = left < PIECE ? left : PIECE;
        struct iovec buffers[2] = {{row + first, length}, {&stored, CRC_BYTES}};
        status = fill(descriptor, buffers, left <= PIECE ? 2 : 1, offset + first, cached_only);
        if (status != DONE) return status;
        crc = extended(crc, row + first, length);
    }
    return crc == stored ? DONE : OTHER_BYTES; /* both little-endian */
}

/* Reads what is in memory; tells the disk to fetch a row that is not, and comes back to that later. */
static int try_row(const Rows *rows, Py_ssize_t number) {
#ifdef RWF_NOWAIT
    int status = read_row(rows, number, 1);
    if (status != WOULD_WAIT) return status;
#endif
#ifdef POSIX_FADV_WILLNEED
    posix_fadvise(rows->descriptors[number], rows->offsets[number], rows->lengths[number] + CRC_BYTES, POSIX_FADV_WILLNEED);
#endif
    return WOULD_WAIT;
}

/* --- threads

   Python's own threads take turns at the interpreter and are slow to wake: a batch of small rows is over before they begin.
   These know nothing of Python. `lock` guards all that follows and every field of a Job that changes. */

#define MAX_HELPERS 63

typedef struct Job {
    const Rows *rows;
    Py_ssize_t next, *waiting, num_waiting, next_waiting; /* rows to try; rows the disk was asked for */
    Py_ssize_t failed;
    int status, error;
    int wanted, helping; /* helpers it may still take, and has */
    pthread_cond_t left; /* the last helper left */
    struct Job *following;
} Job;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t asked = PTHREAD_COND_INITIALIZER; /* a job wants helpers */
static Job *jobs;
static int num_helpers, num_idle;

/* Take rows until none is left or one has failed: first those in memory, while the disk fetches the others, all at once. */
static void work(Job *job) {
    while (job->status == DONE) {
        int waited_for = job->next == job->rows->count, status, error;
        if (waited_for && job->next_waiting == job->num_waiting) return;
        Py_ssize_t number = waited_for ? job->waiting[job->next_waiting++] : job->next++;
        pthread_mutex_unlock(&lock);
        status = waited_for ? read_row(job->rows, number, 0) : try_row(job->rows, number);
        error = errno;
        pthread_mutex_lock(&lock);
        if (status == WOULD_WAIT) job->waiting[job->num_waiting++] = number;
        else if (status != DONE && job->status == DONE) {
            job->status = status;
            job->error = error;
            job->failed = number;
        }
    }
}

static void *help(void *nothing) {
    pthread_mutex_lock(&lock);
    for (;;) {
        Job *job = jobs;
        while (job && !job->wanted) job = job->following;
        if (!job) {
            num_idle++;
            pthread_cond_wait(&asked, &lock);
            num_idle--;
            continue;
        }
        job->wanted--;
        job->helping++;
        work(job);
        if (!--job->helping) pthread_cond_signal(&job->left);
    }
    return nothing;
}

/* One more helper, that no signal disturbs. Where there cannot be one, others do the work. */
static void hire(void) {
    pthread_t thread;
    pthread_attr_t attributes;
    sigset_t all, before;
    sigfillset(&all);
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, 256 << 10);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (!pthread_create(&thread, &attributes, help, NULL)) num_helpers++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
}

/* Do a job in this thread and `helpers` others; returns when all have left it. */
static void run(Job *job, int helpers) {
    pthread_mutex_lock(&lock);
    if (helpers > 0) {
        job->wanted = helpers;
        job->following = jobs;
        jobs = job;
        for (int missing = helpers - num_idle; missing > 0 && num_helpers < MAX_HELPERS; missing--) hire();
        for (int number = 0; number < helpers; number++) pthread_cond_signal(&asked);
    }
    work(job);
    if (helpers > 0) {
        Job **link = &jobs;
        while (*link != job) link = &(*link)->following;
        *link = job->following;
        while (job->helping) pthread_cond_wait(&job->left, &lock);
    }
    pthread_mutex_unlock(&lock);
}

/* A fork copies this thread alone: the child has no helpers and no jobs, and no other thread may hold the lock meanwhile. */
static void before_fork(void) { pthread_mutex_lock(&lock); }
static void in_parent(void) { pthread_mutex_unlock(&lock); }
static void in_child(void) {
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&asked, NULL);
    jobs = NULL;
    num_helpers = num_idle = 0;
}

/* --- Python */

static PyObject *py_crc32c(PyObject *module, PyObject *args) {
    Py_buffer data;
    unsigned int crc = 0; /* of what comes before */
    int lanes = 0;        /* the way of older processors, for tests on others */
    if (!PyArg_ParseTuple(args, "y*|Ip", &data, &crc, &lanes)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    crc = lanes ? ~in_lanes(~crc, data.buf, data.len) : extended(crc, data.buf, data.len);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&data);
    return PyLong_FromUnsignedLong(crc);
}

/* Another thread for every SHARE bytes: waking one takes as long as copying a few hundred kilobytes. */
#define SHARE (512 << 10)

static int fits(const Rows *rows, Py_ssize_t out_bytes, int64_t *total) {
    *total = 0;
    for (Py_ssize_t number = 0; number < rows->count; number++) {
        int64_t length = rows->lengths[number], place = rows->places[number];
        if (length <= 0 || length > out_bytes || place < 0 || place > out_bytes - length || rows->offsets[number] < 0) return 0;
        *total += length;
    }
    return 1;
}

static PyObject *py_read(PyObject *module, PyObject *args) {
    Py_buffer descriptors, offsets, lengths, places, check, out;
    int threads;
    if (!PyArg_ParseTuple(args, "y*y*y*y*y*w*i", &descriptors, &offsets, &lengths, &places, &check, &out, &threads)) return NULL;
    Py_ssize_t count = check.len;
    Rows rows = {descriptors.buf, offsets.buf, lengths.buf, places.buf, check.buf, out.buf, count};
    Job job = {.rows = &rows, .status = DONE, .left = PTHREAD_COND_INITIALIZER};
    int64_t total;
    PyObject *found = NULL;
    if (descriptors.len != 4 * count || offsets.len != 8 * count || lengths.len != 8 * count || places.len != 8 * count ||
        !fits(&rows, out.len, &total)) {
        PyErr_SetString(PyExc_ValueError, "lists of different lengths, or a row that does not fit into the buffer");
        goto release;
    }
    job.waiting = PyMem_Malloc((count ? count : 1) * sizeof *job.waiting);
    if (!job.waiting) {
        PyErr_NoMemory();
        goto release;
    }
    int64_t helpers = total / SHARE < count ? total / SHARE : count;
    if (helpers > MAX_HELPERS) helpers = MAX_HELPERS;
    if (helpers > threads - 1) helpers = threads - 1;
    Py_BEGIN_ALLOW_THREADS
    run(&job, (int)helpers);
    Py_END_ALLOW_THREADS
    PyMem_Free(job.waiting);
    pthread_cond_destroy(&job.left);
    found = job.status == DONE ? Py_NewRef(Py_None)
                               : Py_BuildValue("nii", job.failed, job.status, job.status == FAILED ? job.error : 0);
release:
    PyBuffer_Release(&descriptors);
    PyBuffer_Release(&offsets);
    PyBuffer_Release(&lengths);
    PyBuffer_Release(&places);
    PyBuffer_Release(&check);
    PyBuffer_Release(&out);
    return found;
}

static PyMethodDef methods[] = {
    {"crc32c", py_crc32c, METH_VARARGS, NULL},
    {"read", py_read, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_rows", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__rows(void) {
    if (!__builtin_cpu_supports("sse4.2")) {
        PyErr_SetString(PyExc_ImportError, "this processor has no crc32 instruction: radio-cache works without this module");
        return NULL;
    }
    choose_way();
    if (pthread_atfork(before_fork, in_parent, in_child)) return PyErr_NoMemory();
    PyObject *module = PyModule_Create(&definition);
    if (!module || PyModule_AddIntConstant(module, "VERSION", VERSION) < 0 || PyModule_AddIntConstant(module, "CUT_SHORT", CUT_SHORT) < 0 ||
        PyModule_AddIntConstant(module, "OTHER_BYTES", OTHER_BYTES) < 0)
        return NULL;
    return module;
}
