#ifndef ENGRAM_H
#define ENGRAM_H

/* Written by cbindgen from crates/capi/src. Do not edit: see crates/capi/tests/header.rs. */

#include <stddef.h>
#include <stdint.h>

/*
 `engram_open`: the table is read into memory, on huge pages where the system has them, and checked.
 */
#define ENGRAM_RAM 0

/*
 `engram_open`: the file is mapped. It must not be shortened while it is open: the process would end.
 */
#define ENGRAM_MAPPED 1

/*
 `engram_open`: the file is mapped, and a handler for SIGBUS is installed in the process, so that a file that is
 shortened, or whose disk fails, is an error.
 */
#define ENGRAM_MAPPED_GUARDED 2

/*
 `engram_open`: rows are read from the disk, many at a time, past the system's page cache.
 */
#define ENGRAM_DIRECT 3

/*
 Values of 32 bits.
 */
#define ENGRAM_F32 0

/*
 Brain floats of 16 bits.
 */
#define ENGRAM_BF16 1

/*
 IEEE floats of 16 bits.
 */
#define ENGRAM_F16 2

/*
 The result of every function but `engram_last_error`.
 */
typedef enum engram_status {
  /*
   Success.
   */
  ENGRAM_OK = 0,
  /*
   A pointer is null, a number or size is wrong, or a row is not in the table.
   */
  ENGRAM_INVALID = 1,
  /*
   No table or ticket has this handle: it was closed, taken, or never opened.
   */
  ENGRAM_NO_HANDLE = 2,
  /*
   The file is not a table, or a table of another addressing.
   */
  ENGRAM_NOT_THIS_TABLE = 3,
  /*
   A file or the disk failed, or the file was changed while it was open.
   */
  ENGRAM_IO = 4,
  /*
   No memory, or no room for more rows to prefetch now.
   */
  ENGRAM_NO_ROOM = 5,
  /*
   Rows did not arrive in time.
   */
  ENGRAM_TOO_SLOW = 6,
  /*
   A defect of this library.
   */
  ENGRAM_DEFECT = 7,
} engram_status;

/*
 An open table.
 */
typedef uint64_t engram_table;

/*
 What a table is like.
 */
typedef struct engram_shape {
  /*
   Number of rows: ids are from 0 to one less.
   */
  uint64_t rows;
  /*
   Values per row.
   */
  uint64_t width;
  /*
   Bytes of a stored row.
   */
  uint64_t row_bytes;
  /*
   The layer of the model, from 0.
   */
  uint64_t layer;
  /*
   The addressing that the rows belong to.
   */
  uint8_t identity[32];
  /*
   Layout of a row: 0 f32, 1 bf16, 2 fp8 (e4m3, a scale per 32 values), 3 f16, 4 fp8 with one scale, 5 int8, 6 int4.
   */
  uint32_t format;
} engram_shape;

/*
 Rows that were asked for.
 */
typedef uint64_t engram_ticket;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/*
 Opens the table file at `path` (UTF-8) in the tier `tier`. If `identity` (32 bytes) is not null, the rows must belong to
 this addressing and `layer`. `table` becomes the handle.

 # Safety
 `path` is null or ends with a zero, `identity` is null or has 32 bytes, `table` is null or can be written to.
 */
enum engram_status engram_open(const char *path,
                               const uint8_t *identity,
                               uint64_t layer,
                               int32_t tier,
                               engram_table *table);

/*
 Closes a table. Calls that are using it still succeed. Take or cancel its tickets before: rows that have not arrived are
 an error afterwards.
 */
enum engram_status engram_close(engram_table table);

/*
 What a table is like.

 # Safety
 `shape` is null or can be written to.
 */
enum engram_status engram_get_shape(engram_table table, struct engram_shape *shape);

/*
 Copies the rows `ids` (`count` of them, in any order) as they are stored to `out`, which has `out_bytes` bytes: `count`
 times `row_bytes`.

 # Safety
 `ids` is null or has `count` numbers, `out` is null or has `out_bytes` bytes.
 */
enum engram_status engram_read(engram_table table,
                               const uint64_t *ids,
                               size_t count,
                               void *out,
                               size_t out_bytes);

/*
 Decodes the rows `ids` to `out` as values of `type`, `count` times `width` of them; `out_bytes` is the size of `out`.

 # Safety
 `ids` is null or has `count` numbers, `out` is null or has `out_bytes` bytes and is aligned for its type.
 */
enum engram_status engram_gather(engram_table table,
                                 const uint64_t *ids,
                                 size_t count,
                                 int32_t type,
                                 void *out,
                                 size_t out_bytes);

/*
 Begins to fetch the rows `ids` on other threads. `ticket` becomes their handle; take or cancel it. The status is
 ENGRAM_NO_ROOM while too many rows are under way: take some first.

 # Safety
 `ids` is null or has `count` numbers, `ticket` is null or can be written to.
 */
enum engram_status engram_prefetch_submit(engram_table table,
                                          const uint64_t *ids,
                                          size_t count,
                                          engram_ticket *ticket);

/*
 Whether the rows of a ticket are there: `ready` becomes 1 or 0. `engram_prefetch_take` waits where they are not.

 # Safety
 `ready` is null or can be written to.
 */
enum engram_status engram_prefetch_poll(engram_ticket ticket,
                                        int32_t *ready);

/*
 Waits for the rows of a ticket and decodes them to `out` as `engram_gather` does. The ticket is then gone, unless
 `out` was refused.

 # Safety
 `out` is null or has `out_bytes` bytes and is aligned for its type.
 */
enum engram_status engram_prefetch_take(engram_ticket ticket,
                                        int32_t type,
                                        void *out,
                                        size_t out_bytes);

/*
 Gives up the rows of a ticket.
 */
enum engram_status engram_prefetch_cancel(engram_ticket ticket);

/*
 Copies the last error of this thread to `text`, at most `bytes` bytes with the zero at the end. Returns the bytes that
 the whole message needs, with the zero; `text` may be null.

 # Safety
 `text` is null or has `bytes` bytes.
 */
size_t engram_last_error(char *text,
                         size_t bytes);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* ENGRAM_H */
