/* How a backend of ggml's kind fetches memory rows: the rows of a batch are under way while the blocks before the memory
 * layer compute. Build it with: cc backend.c -I../include -lengram -lpthread -lm */
#include "engram.h"

#include <stdio.h>
#include <stdlib.h>

struct memory_rows {
    engram_table table;
    engram_shape shape;
    engram_ticket ticket;
};

/* Once, with the model. */
static int memory_open(struct memory_rows *rows, const char *path, const uint8_t identity[32], uint64_t layer) {
    if (engram_open(path, identity, layer, ENGRAM_DIRECT, &rows->table) != ENGRAM_OK) return 0;
    return engram_get_shape(rows->table, &rows->shape) == ENGRAM_OK;
}

/* As soon as the tokens of a batch are known: ids depend on them alone. */
static int memory_begin(struct memory_rows *rows, const uint64_t *ids, size_t count) {
    return engram_prefetch_submit(rows->table, ids, count, &rows->ticket) == ENGRAM_OK;
}

/* Where the graph reaches the memory layer: `out` is the input tensor, [count, width] in f16. */
static int memory_take(struct memory_rows *rows, void *out, size_t count) {
    return engram_prefetch_take(rows->ticket, ENGRAM_F16, out, count * rows->shape.width * 2) == ENGRAM_OK;
}

int main(int count, char **arguments) {
    struct memory_rows rows;
    uint64_t ids[4] = {0, 1, 2, 3};
    char text[512];
    if (count == 2 && memory_open(&rows, arguments[1], NULL, 0) && rows.shape.rows >= 4) {
        uint16_t *out = malloc(4 * rows.shape.width * 2);
        if (out && memory_begin(&rows, ids, 4) && memory_take(&rows, out, 4)) {
            printf("row 0 begins with the bits %04x\n", out[0]);
            free(out);
            return engram_close(rows.table) != ENGRAM_OK;
        }
        free(out);
    }
    engram_last_error(text, sizeof text);
    fprintf(stderr, "usage: backend TABLE\n%s\n", text);
    return 1;
}
