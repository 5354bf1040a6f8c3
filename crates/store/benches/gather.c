// The plain loop that a gather is measured against: 264-byte rows, asked for ahead, copied one after another.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { ROW = 264, AHEAD = 16 };

void gather(const char *table, const uint64_t *ids, size_t count, char *out) {
    for (size_t i = 0; i < count; i++) {
        if (i + AHEAD < count) {
            const char *next = table + ids[i + AHEAD] * ROW;
            for (size_t line = 0; line < ROW; line += 64) __builtin_prefetch(next + line);
            __builtin_prefetch(next + ROW - 1);
        }
        memcpy(out + i * ROW, table + ids[i] * ROW, ROW);
    }
}

// What no gather can pass: every line of the rows is asked for as above, but further ahead and into the second cache,
// and one word of each row is read. Nothing is copied.
void touch(const char *table, const uint64_t *ids, size_t count, char *out) {
    enum { FAR = 64 };
    uint64_t sum = 0;
    for (size_t i = 0; i < count; i++) {
        if (i + FAR < count) {
            const char *next = table + ids[i + FAR] * ROW, *end = next + ROW;
            for (next -= (uintptr_t)next % 64; next < end; next += 64) __builtin_prefetch(next, 0, 2);
        }
        uint64_t word;
        memcpy(&word, table + ids[i] * ROW, sizeof word);
        sum += word;
    }
    memcpy(out, &sum, sizeof sum);
}
