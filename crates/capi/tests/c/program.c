/* Uses all of engram.h, rightly and wrongly. Arguments: a table file of 1000 f32 rows of 4 values, row i being i, i, i, i,
 * of the addressing 07...07 and layer 1; and a file that is no table. */
#include "engram.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition)                                                       \
    do {                                                                       \
        if (!(condition)) {                                                    \
            char text[512];                                                    \
            engram_last_error(text, sizeof text);                              \
            fprintf(stderr, "%d: %s: %s\n", __LINE__, #condition, text);       \
            exit(1);                                                           \
        }                                                                      \
    } while (0)

static const uint64_t ids[3] = {17, 999, 17};

static void rows_are_right(engram_table table) {
    float rows[12], again[12];
    uint16_t narrow[12];
    CHECK(engram_read(table, ids, 3, rows, sizeof rows) == ENGRAM_OK);
    CHECK(rows[0] == 17 && rows[5] == 999 && rows[11] == 17);
    CHECK(engram_gather(table, ids, 3, ENGRAM_F32, again, sizeof again) == ENGRAM_OK);
    CHECK(memcmp(rows, again, sizeof rows) == 0);
    CHECK(engram_gather(table, ids, 3, ENGRAM_BF16, narrow, sizeof narrow) == ENGRAM_OK);
    CHECK(narrow[0] == 0x4188 && narrow[4] == 0x447a); /* 999 rounds to 1000. */
    CHECK(engram_gather(table, ids, 3, ENGRAM_F16, narrow, sizeof narrow) == ENGRAM_OK);
    CHECK(narrow[0] == 0x4c40 && narrow[4] == 0x63ce);
    CHECK(engram_read(table, NULL, 0, NULL, 0) == ENGRAM_OK);
}

static void wrong_calls_are_refused(engram_table table) {
    float rows[12];
    uint64_t beyond = 1000;
    engram_ticket ticket = 0;
    int32_t ready;
    char text[64];
    CHECK(engram_read(table, ids, 3, rows, sizeof rows - 1) == ENGRAM_INVALID);
    CHECK(engram_read(table, ids, 3, NULL, sizeof rows) == ENGRAM_INVALID);
    CHECK(engram_read(table, NULL, 3, rows, sizeof rows) == ENGRAM_INVALID);
    CHECK(engram_read(table, ids, SIZE_MAX, rows, sizeof rows) == ENGRAM_INVALID);
    CHECK(engram_read(table, &beyond, 1, rows, 16) == ENGRAM_INVALID);
    CHECK(engram_last_error(text, sizeof text) > sizeof text && strlen(text) == sizeof text - 1);
    CHECK(strncmp(text, "row 1000, at position 0", 23) == 0);
    CHECK(engram_last_error(NULL, 0) > 0);
    CHECK(engram_gather(table, ids, 3, 9, rows, sizeof rows) == ENGRAM_INVALID);
    CHECK(engram_gather(table, ids, 3, ENGRAM_F32, (char *)rows + 1, sizeof rows) == ENGRAM_INVALID);
    CHECK(engram_get_shape(table, NULL) == ENGRAM_INVALID);
    CHECK(engram_prefetch_submit(table, &beyond, 1, &ticket) == ENGRAM_INVALID && ticket == 0);
    CHECK(engram_prefetch_submit(table, ids, 3, NULL) == ENGRAM_INVALID);
    CHECK(engram_prefetch_poll(77777, &ready) == ENGRAM_NO_HANDLE);
    CHECK(engram_prefetch_take(77777, ENGRAM_F32, rows, sizeof rows) == ENGRAM_NO_HANDLE);
    CHECK(engram_prefetch_cancel(0) == ENGRAM_NO_HANDLE);
    CHECK(engram_read(0, ids, 3, rows, sizeof rows) == ENGRAM_NO_HANDLE);
    CHECK(engram_close(0) == ENGRAM_NO_HANDLE);
    CHECK(engram_close(UINT64_MAX) == ENGRAM_NO_HANDLE);
}

static void rows_come_ahead(engram_table table) {
    float rows[12];
    engram_ticket one, other;
    int32_t ready = 2;
    CHECK(engram_prefetch_submit(table, ids, 3, &one) == ENGRAM_OK);
    CHECK(engram_prefetch_submit(table, ids, 3, &other) == ENGRAM_OK && one != other);
    CHECK(engram_prefetch_poll(one, &ready) == ENGRAM_OK && (ready == 0 || ready == 1));
    CHECK(engram_prefetch_poll(one, NULL) == ENGRAM_INVALID);
    CHECK(engram_prefetch_take(one, ENGRAM_F32, rows, 4) == ENGRAM_INVALID); /* The ticket stays. */
    CHECK(engram_prefetch_take(one, ENGRAM_F32, rows, sizeof rows) == ENGRAM_OK && rows[4] == 999);
    CHECK(engram_prefetch_take(one, ENGRAM_F32, rows, sizeof rows) == ENGRAM_NO_HANDLE);
    CHECK(engram_prefetch_cancel(other) == ENGRAM_OK);
    CHECK(engram_prefetch_poll(other, &ready) == ENGRAM_NO_HANDLE);
}

static void *use(void *table) {
    for (int i = 0; i < 50; i++) {
        rows_are_right(*(engram_table *)table);
        rows_come_ahead(*(engram_table *)table);
    }
    return NULL;
}

/* Rows that are under way when their table is closed arrive, or are an error; the ticket is gone in both cases. */
static void tickets_outlive_their_table(const char *path) {
    float rows[12];
    engram_table table;
    engram_ticket taken, cancelled, polled;
    int32_t ready;
    engram_status status;
    CHECK(engram_open(path, NULL, 0, ENGRAM_DIRECT, &table) == ENGRAM_OK);
    CHECK(engram_prefetch_submit(table, ids, 3, &taken) == ENGRAM_OK);
    CHECK(engram_prefetch_submit(table, ids, 3, &cancelled) == ENGRAM_OK);
    CHECK(engram_prefetch_submit(table, ids, 3, &polled) == ENGRAM_OK);
    CHECK(engram_close(table) == ENGRAM_OK);
    CHECK(engram_prefetch_submit(table, ids, 3, &taken) == ENGRAM_NO_HANDLE);
    status = engram_prefetch_take(taken, ENGRAM_F32, rows, sizeof rows);
    CHECK(status == ENGRAM_OK ? rows[4] == 999 : status == ENGRAM_IO);
    CHECK(engram_prefetch_take(taken, ENGRAM_F32, rows, sizeof rows) == ENGRAM_NO_HANDLE);
    CHECK(engram_prefetch_cancel(cancelled) == ENGRAM_OK);
    CHECK(engram_prefetch_poll(polled, &ready) == ENGRAM_OK);
    CHECK(engram_prefetch_cancel(polled) == ENGRAM_OK);
}

/* Takes tickets that another thread takes, too: one of them has the rows. */
static void *take(void *ticket) {
    float rows[12];
    engram_status status = engram_prefetch_take(*(engram_ticket *)ticket, ENGRAM_F32, rows, sizeof rows);
    CHECK(status == ENGRAM_OK ? rows[4] == 999 : status == ENGRAM_NO_HANDLE);
    return status == ENGRAM_OK ? ticket : NULL;
}

static void one_of_many_takes_a_ticket(engram_table table) {
    engram_ticket ticket;
    pthread_t threads[4];
    int taken = 0;
    CHECK(engram_prefetch_submit(table, ids, 3, &ticket) == ENGRAM_OK);
    for (int i = 0; i < 4; i++) CHECK(pthread_create(&threads[i], NULL, take, &ticket) == 0);
    for (int i = 0; i < 4; i++) {
        void *found;
        pthread_join(threads[i], &found);
        taken += found != NULL;
    }
    CHECK(taken == 1);
}

/* Closes while others read: they get rows or an error. */
static void *use_until_closed(void *table) {
    float rows[12];
    engram_status status;
    do {
        status = engram_read(*(engram_table *)table, ids, 3, rows, sizeof rows);
        CHECK(status == ENGRAM_OK ? rows[0] == 17 : status == ENGRAM_NO_HANDLE);
    } while (status == ENGRAM_OK);
    return NULL;
}

int main(int count, char **arguments) {
    const char *path = arguments[1];
    uint8_t identity[32], other[32];
    engram_table table = 0;
    engram_shape shape;
    pthread_t threads[4];
    memset(identity, 7, sizeof identity);
    memset(other, 8, sizeof other);
    if (count != 3) return 2;

    CHECK(engram_open(NULL, NULL, 0, ENGRAM_RAM, &table) == ENGRAM_INVALID);
    CHECK(engram_open(path, NULL, 0, ENGRAM_RAM, NULL) == ENGRAM_INVALID);
    CHECK(engram_open("\xff", NULL, 0, ENGRAM_RAM, &table) == ENGRAM_INVALID);
    CHECK(engram_open(path, NULL, 0, 99, &table) == ENGRAM_INVALID);
    CHECK(engram_open("no/such/table", NULL, 0, ENGRAM_RAM, &table) == ENGRAM_IO);
    CHECK(engram_open(arguments[2], NULL, 0, ENGRAM_RAM, &table) == ENGRAM_NOT_THIS_TABLE);
    CHECK(engram_open(path, other, 1, ENGRAM_RAM, &table) == ENGRAM_NOT_THIS_TABLE);
    CHECK(engram_open(path, identity, 2, ENGRAM_RAM, &table) == ENGRAM_NOT_THIS_TABLE);
    CHECK(table == 0);

    for (int32_t tier = ENGRAM_RAM; tier <= ENGRAM_DIRECT; tier++) {
        CHECK(engram_open(path, tier % 2 ? identity : NULL, 1, tier, &table) == ENGRAM_OK);
        CHECK(engram_get_shape(table, &shape) == ENGRAM_OK);
        CHECK(shape.rows == 1000 && shape.width == 4 && shape.row_bytes == 16 && shape.layer == 1 && shape.format == 0);
        CHECK(memcmp(shape.identity, identity, 32) == 0);
        rows_are_right(table);
        wrong_calls_are_refused(table);
        rows_come_ahead(table);
        one_of_many_takes_a_ticket(table);
        for (int i = 0; i < 4; i++) CHECK(pthread_create(&threads[i], NULL, use, &table) == 0);
        for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);
        for (int i = 0; i < 4; i++) CHECK(pthread_create(&threads[i], NULL, use_until_closed, &table) == 0);
        CHECK(engram_close(table) == ENGRAM_OK);
        for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);
        CHECK(engram_close(table) == ENGRAM_NO_HANDLE);
    }
    tickets_outlive_their_table(path);
    puts("all is well");
    return 0;
}
