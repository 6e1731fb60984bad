/* Rows of shard files into one buffer, read and checked without Python: see rows.py for what it is for and when it is absent.

   Needs a processor with the crc32 instruction (x86-64 since 2008); elsewhere the import fails and Python does the work. */

#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>

#if !defined(__x86_64__) || !defined(__GNUC__)
#error "x86-64 and GCC or Clang only: radio-cache works without this module"
#endif

#include <errno.h>
#include <fcntl.h>
#include <nmmintrin.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

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
TARGET static uint32_t extended(uint32_t crc, const uint8_t *data, size_t length) {
    crc = ~crc;
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
    return ~one_lane(crc, data, length);
}

/* --- reading */

enum { DONE, WOULD_WAIT, CUT_SHORT, OTHER_BYTES, FAILED };

typedef struct {
    const int32_t *descriptors;
    const int64_t *offsets, *positions;
    const uint8_t *check;
    uint8_t *out;
    int64_t row_bytes;
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
    uint8_t *row = rows->out + rows->positions[number] * rows->row_bytes;
    int descriptor = rows->descriptors[number], status;
    int64_t offset = rows->offsets[number];
    if (!rows->check[number]) {
        struct iovec whole = {row, rows->row_bytes};
        return fill(descriptor, &whole, 1, offset, cached_only);
    }
    uint32_t crc = 0, stored = 0;
    for (int64_t first = 0; first < rows->row_bytes; first += PIECE) {
        int64_t left = rows->row_bytes - first, length = left < PIECE ? left : PIECE;
        struct iovec buffers[2] = {{row + first, length}, {&stored, CRC_BYTES}};
        status = fill(descriptor, buffers, left <= PIECE ? 2 : 1, offset + first, cached_only);
        if (status != DONE) return status;
        crc = extended(crc, row + first, length);
    }
    return crc == stored ? DONE : OTHER_BYTES; /* both little-endian */
}

/* All rows; first those in memory, while the disk fetches the others, all at once. Returns the status of *failed. */
static int read_rows(const Rows *rows, Py_ssize_t count, Py_ssize_t *waiting, Py_ssize_t *failed) {
    Py_ssize_t num_waiting = 0;
    for (Py_ssize_t number = 0; number < count; number++) {
#ifdef RWF_NOWAIT
        int status = read_row(rows, number, 1);
#else
        int status = WOULD_WAIT;
#endif
        if (status == WOULD_WAIT) {
#ifdef POSIX_FADV_WILLNEED
            posix_fadvise(rows->descriptors[number], rows->offsets[number], rows->row_bytes + CRC_BYTES, POSIX_FADV_WILLNEED);
#endif
            waiting[num_waiting++] = number;
        } else if (status != DONE) {
            *failed = number;
            return status;
        }
    }
    for (Py_ssize_t at = 0; at < num_waiting; at++) {
        int status = read_row(rows, waiting[at], 0);
        if (status != DONE) {
            *failed = waiting[at];
            return status;
        }
    }
    return DONE;
}

/* --- Python */

static PyObject *py_crc32c(PyObject *module, PyObject *args) {
    Py_buffer data;
    if (!PyArg_ParseTuple(args, "y*", &data)) return NULL;
    uint32_t crc;
    Py_BEGIN_ALLOW_THREADS
    crc = extended(0, data.buf, data.len);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&data);
    return PyLong_FromUnsignedLong(crc);
}

static int fits(const Rows *rows, Py_ssize_t count, Py_ssize_t out_bytes) {
    if (rows->row_bytes <= 0) return 0;
    for (Py_ssize_t number = 0; number < count; number++)
        if (rows->positions[number] < 0 || rows->positions[number] >= out_bytes / rows->row_bytes || rows->offsets[number] < 0)
            return 0;
    return 1;
}

static PyObject *py_read(PyObject *module, PyObject *args) {
    Py_buffer descriptors, offsets, positions, check, out;
    Rows rows;
    long long row_bytes;
    if (!PyArg_ParseTuple(args, "y*y*y*y*w*L", &descriptors, &offsets, &positions, &check, &out, &row_bytes)) return NULL;
    Py_ssize_t count = check.len, failed = 0, *waiting = NULL;
    int status = DONE, error = 0;
    PyObject *found = NULL;
    rows = (Rows){descriptors.buf, offsets.buf, positions.buf, check.buf, out.buf, row_bytes};
    if (descriptors.len != 4 * count || offsets.len != 8 * count || positions.len != 8 * count || !fits(&rows, count, out.len)) {
        PyErr_SetString(PyExc_ValueError, "lists of different lengths, or a row that does not fit into the buffer");
        goto release;
    }
    waiting = PyMem_Malloc((count ? count : 1) * sizeof *waiting);
    if (!waiting) {
        PyErr_NoMemory();
        goto release;
    }
    Py_BEGIN_ALLOW_THREADS
    status = read_rows(&rows, count, waiting, &failed);
    error = errno;
    Py_END_ALLOW_THREADS
    PyMem_Free(waiting);
    found = status == DONE ? Py_NewRef(Py_None) : Py_BuildValue("nii", failed, status, status == FAILED ? error : 0);
release:
    PyBuffer_Release(&descriptors);
    PyBuffer_Release(&offsets);
    PyBuffer_Release(&positions);
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
    make_table();
    PyObject *module = PyModule_Create(&definition);
    if (!module || PyModule_AddIntConstant(module, "CUT_SHORT", CUT_SHORT) < 0 ||
        PyModule_AddIntConstant(module, "OTHER_BYTES", OTHER_BYTES) < 0)
        return NULL;
    return module;
}
