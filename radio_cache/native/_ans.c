/* Asymmetric numeral systems (rANS) for rows of small integers: radio_cache/codecs/rans.py has the format and the same in NumPy.

   J. Duda, "Asymmetric numeral systems", arXiv 1311.2540. States of 32 bits, words of 16 bits, probabilities of 12 bits. Several
   states ("lanes") take turns, so that the processor works on all of them at once. Without a compiler NumPy does the work. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <string.h>

#define VERSION 1 /* one more whenever a function takes or returns something else: rans.py compares it */
#define PROBABILITY_BITS 12
#define SLOTS (1 << PROBABILITY_BITS)
#define SYMBOLS 256
#define ESCAPE (SYMBOLS - 1) /* stands for a value that no symbol has; the value itself is in the list behind the words */
#define LOWEST 65536u        /* a state is at least this; below it takes another word */
#define MAX_LANES 64
#define HEADER_BYTES 8 /* numbers of words and of escaped values, uint32 each */
#define SPARE_BYTES 16 /* at the end of a row: decoding looks at up to a few words too many before it compares */

/* Runs of symbols that share a table, in the order in which they are coded. `order` has the place of each symbol in its row. */
typedef struct {
    const int32_t *runs, *order;
    Py_ssize_t num_runs, num_symbols;
    int lanes;
} Plan;

static int is_plan(const Plan *plan, Py_ssize_t num_tables) {
    int64_t total = 0;
    if (plan->lanes < 1 || plan->lanes > MAX_LANES || plan->num_runs != num_tables) return 0;
    for (Py_ssize_t run = 0; run < plan->num_runs; run++) {
        if (plan->runs[run] < 0) return 0;
        total += plan->runs[run];
    }
    for (Py_ssize_t i = 0; i < plan->num_symbols; i++)
        if (plan->order[i] < 0 || plan->order[i] >= plan->num_symbols) return 0;
    return total == plan->num_symbols;
}

/* 0, -1, 1, -2, 2 ... to symbols 0, 1, 2, 3, 4 ... and back */
static inline uint32_t symbol_of(int32_t value) {
    uint32_t symbol = value < 0 ? (uint32_t)(-2 * (int64_t)value - 1) : 2 * (uint32_t)value;
    return symbol < ESCAPE ? symbol : ESCAPE;
}
/* A symbol that the table gives no slot is escaped, too. */
static inline uint32_t coded_symbol(int32_t value, const uint16_t *frequency) {
    const uint32_t symbol = symbol_of(value);
    return frequency[symbol] ? symbol : ESCAPE;
}
static inline int16_t value_of(uint32_t symbol) { return symbol & 1 ? -(int16_t)((symbol + 1) >> 1) : (int16_t)(symbol >> 1); }

/* One step of decoding. An entry of the table holds the symbol (8 bits), its frequency less 1 (12 bits), and the slot's distance from its
   first (12 bits). There is no branch, because the processor would guess one in seven wrongly; so a row ends with spare bytes. */
static inline uint32_t next_symbol(uint32_t *state, const uint32_t *table, const uint8_t **word) {
    const uint32_t entry = table[*state & (SLOTS - 1)];
    const uint32_t next = ((entry >> 12 & 4095) + 1) * (*state >> PROBABILITY_BITS) + (entry & 4095), is_short = next < LOWEST;
    uint16_t low;
    memcpy(&low, *word, 2);
    *state = is_short ? next << 16 | low : next;
    *word += 2 * is_short;
    return entry >> 24;
}

/* Store a symbol's value, or the next escaped one. Returns 0 if there is none. */
static inline int put(int16_t *place, uint32_t symbol, const uint8_t **escaped, const uint8_t *last_escaped) {
    if (symbol != ESCAPE) {
        *place = value_of(symbol);
        return 1;
    }
    if (*escaped == last_escaped) return 0;
    memcpy(place, *escaped, 2);
    *escaped += 2;
    return 1;
}

/* Decode one row. Nothing is read outside its bytes, whatever they are. Returns 0 for bytes that no encoder wrote. */
static int decode_row(const uint8_t *row, Py_ssize_t row_bytes, const Plan *plan, const uint32_t *tables, int16_t *out) {
    uint32_t num_words, num_escapes, states[MAX_LANES];
    const int lanes = plan->lanes;
    if (row_bytes < HEADER_BYTES + 4 * lanes + SPARE_BYTES) return 0;
    memcpy(&num_words, row, 4);
    memcpy(&num_escapes, row + 4, 4);
    if (HEADER_BYTES + 4 * (int64_t)lanes + 2 * (int64_t)num_words + 2 * (int64_t)num_escapes + SPARE_BYTES > row_bytes) return 0;
    memcpy(states, row + HEADER_BYTES, 4 * lanes);
    const uint8_t *word = row + HEADER_BYTES + 4 * lanes, *end = word + 2 * (size_t)num_words, *escaped = end;
    const uint8_t *last_escaped = end + 2 * (size_t)num_escapes;
    const int32_t *place = plan->order;
    for (Py_ssize_t run = 0; run < plan->num_runs; run++) {
        const uint32_t *table = tables + run * SLOTS;
        int32_t left = plan->runs[run];
        for (; left >= 4 && lanes == 4; left -= 4) { /* the usual number of lanes, side by side in registers */
            uint32_t symbols[4];
            for (int lane = 0; lane < 4; lane++) symbols[lane] = next_symbol(&states[lane], table, &word);
            if (word > end) return 0;
            for (int lane = 0; lane < 4; lane++)
                if (!put(out + *place++, symbols[lane], &escaped, last_escaped)) return 0;
        }
        for (int lane = 0; left; left--, lane = lane + 1 == lanes ? 0 : lane + 1) {
            const uint32_t symbol = next_symbol(&states[lane], table, &word);
            if (word > end || !put(out + *place++, symbol, &escaped, last_escaped)) return 0;
        }
    }
    for (int lane = 0; lane < lanes; lane++)
        if (states[lane] != LOWEST) return 0;
    return word == end && escaped == last_escaped;
}

/* Encode one row, last symbol first. Returns the bytes it took, or 0 if they do not fit. `words` is scratch for `num_symbols` words. */
static int64_t encode_row(const int16_t *values, const Plan *plan, const uint16_t *frequencies, const uint16_t *starts, uint16_t *words,
                          uint8_t *row, Py_ssize_t row_bytes) {
    uint32_t states[MAX_LANES], num_escapes = 0;
    const int lanes = plan->lanes;
    int64_t num_words = 0, number = plan->num_symbols;
    for (int each = 0; each < lanes; each++) states[each] = LOWEST;
    for (Py_ssize_t run = plan->num_runs; run--;) {
        const uint16_t *frequency = frequencies + run * SYMBOLS, *start = starts + run * SYMBOLS;
        int lane = (plan->runs[run] + lanes - 1) % lanes;
        for (int32_t left = plan->runs[run]; left; left--) {
            const uint32_t symbol = coded_symbol(values[plan->order[--number]], frequency), share = frequency[symbol];
            uint32_t state = states[lane];
            num_escapes += symbol == ESCAPE;
            if (state >= (uint64_t)share << (32 - PROBABILITY_BITS)) {
                words[num_words++] = (uint16_t)state;
                state >>= 16;
            }
            states[lane] = (state / share << PROBABILITY_BITS) + state % share + start[symbol];
            lane = lane ? lane - 1 : lanes - 1;
        }
    }
    const int64_t total = HEADER_BYTES + 4 * (int64_t)lanes + 2 * num_words + 2 * (int64_t)num_escapes;
    if (total + SPARE_BYTES > row_bytes) return 0;
    const uint32_t count = (uint32_t)num_words;
    memcpy(row, &count, 4);
    memcpy(row + 4, &num_escapes, 4);
    memcpy(row + HEADER_BYTES, states, 4 * lanes);
    uint8_t *next = row + HEADER_BYTES + 4 * lanes;
    while (num_words) { /* the last word written is the first that is read */
        memcpy(next, &words[--num_words], 2);
        next += 2;
    }
    number = 0;
    for (Py_ssize_t run = 0; num_escapes && run < plan->num_runs; run++)
        for (int32_t left = plan->runs[run]; left; left--) {
            const int16_t value = values[plan->order[number++]];
            if (coded_symbol(value, frequencies + run * SYMBOLS) == ESCAPE) {
                memcpy(next, &value, 2);
                next += 2;
            }
        }
    memset(next, 0, row + row_bytes - next);
    return total;
}

static PyObject *py_decode(PyObject *module, PyObject *args) {
    Py_buffer rows, runs, order, tables, out;
    Plan plan;
    Py_ssize_t failed = -1;
    PyObject *result = NULL;
    if (!PyArg_ParseTuple(args, "y*y*y*y*iw*", &rows, &runs, &order, &tables, &plan.lanes, &out)) return NULL;
    plan.runs = runs.buf, plan.num_runs = runs.len / 4, plan.order = order.buf, plan.num_symbols = order.len / 4;
    const Py_ssize_t count = plan.num_symbols ? out.len / (2 * plan.num_symbols) : 0, row_bytes = count ? rows.len / count : 0;
    if (!is_plan(&plan, tables.len / (4 * SLOTS)) || count * plan.num_symbols * 2 != out.len || count * row_bytes != rows.len) {
        PyErr_SetString(PyExc_ValueError, "runs, order, tables and buffers do not fit together");
        goto release;
    }
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t number = 0; number < count && failed < 0; number++)
        if (!decode_row((uint8_t *)rows.buf + number * row_bytes, row_bytes, &plan, tables.buf, (int16_t *)out.buf + number * plan.num_symbols))
            failed = number;
    Py_END_ALLOW_THREADS
    result = PyLong_FromSsize_t(failed);
release:
    PyBuffer_Release(&rows);
    PyBuffer_Release(&runs);
    PyBuffer_Release(&order);
    PyBuffer_Release(&tables);
    PyBuffer_Release(&out);
    return result;
}

static PyObject *py_encode(PyObject *module, PyObject *args) {
    Py_buffer values, runs, order, frequencies, starts, out, lengths;
    Plan plan;
    PyObject *result = NULL;
    uint16_t *words = NULL;
    if (!PyArg_ParseTuple(args, "y*y*y*y*y*iw*w*", &values, &runs, &order, &frequencies, &starts, &plan.lanes, &out, &lengths)) return NULL;
    plan.runs = runs.buf, plan.num_runs = runs.len / 4, plan.order = order.buf, plan.num_symbols = order.len / 4;
    const Py_ssize_t count = lengths.len / 8, row_bytes = count ? out.len / count : 0;
    int valid = is_plan(&plan, frequencies.len / (2 * SYMBOLS)) && frequencies.len == starts.len &&
                count * plan.num_symbols * 2 == values.len && count * row_bytes == out.len;
    for (Py_ssize_t i = ESCAPE; valid && i < frequencies.len / 2; i += SYMBOLS) valid = ((uint16_t *)frequencies.buf)[i] > 0;
    if (!valid) {
        PyErr_SetString(PyExc_ValueError, "runs, order, frequencies and buffers do not fit together");
        goto release;
    }
    words = PyMem_RawMalloc(2 * (plan.num_symbols ? plan.num_symbols : 1));
    if (!words) {
        PyErr_NoMemory();
        goto release;
    }
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t number = 0; number < count; number++)
        ((int64_t *)lengths.buf)[number] = encode_row((int16_t *)values.buf + number * plan.num_symbols, &plan, frequencies.buf, starts.buf, words,
                                                      (uint8_t *)out.buf + number * row_bytes, row_bytes);
    Py_END_ALLOW_THREADS
    PyMem_RawFree(words);
    result = Py_NewRef(Py_None);
release:
    PyBuffer_Release(&values);
    PyBuffer_Release(&runs);
    PyBuffer_Release(&order);
    PyBuffer_Release(&frequencies);
    PyBuffer_Release(&starts);
    PyBuffer_Release(&out);
    PyBuffer_Release(&lengths);
    return result;
}

static PyMethodDef methods[] = {
    {"decode", py_decode, METH_VARARGS, NULL},
    {"encode", py_encode, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_ans", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__ans(void) {
    const uint16_t one = 1;
    if (!*(const uint8_t *)&one) {
        PyErr_SetString(PyExc_ImportError, "this processor is big-endian: radio-cache works without this module");
        return NULL;
    }
    PyObject *module = PyModule_Create(&definition);
    if (!module || PyModule_AddIntConstant(module, "VERSION", VERSION) < 0) return NULL;
    return module;
}
