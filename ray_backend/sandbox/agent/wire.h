/* The protocol as bytes: buffers, frames, requests. No I/O, no process, no allocation beyond the
   buffer that it is given, so that it can be fuzzed by itself.

   A frame is: body length (u32), stream id (u32), type (u8), the body, a trailer byte. Integers
   are little-endian. protocol.py describes the bodies. */
#ifndef APOTHIC_WIRE_H
#define APOTHIC_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>

#include "constants.h"

#define FRAME_MAX (FRAME_HEADER_BYTES + FRAME_BODY_MAX + FRAME_TRAILER_BYTES)

/* Bytes start..end of data are filled. */
struct buffer {
    uint8_t *data;
    size_t capacity, start, end;
};

size_t buffer_used(const struct buffer *b);
size_t buffer_room(const struct buffer *b);
/* Move what is filled to the front, so that all room lies behind it. */
void buffer_compact(struct buffer *b);
void buffer_consume(struct buffer *b, size_t n);

/* Reading: `bad` is set, and zeros are given, once more is taken than there is. */
struct cursor {
    const uint8_t *at;
    size_t left;
    bool bad;
};

uint8_t take_u8(struct cursor *c);
uint16_t take_u16(struct cursor *c);
uint32_t take_u32(struct cursor *c);
uint64_t take_u64(struct cursor *c);
const uint8_t *take_bytes(struct cursor *c, size_t n);

uint8_t *put_u8(uint8_t *at, uint8_t v);
uint8_t *put_u16(uint8_t *at, uint16_t v);
uint8_t *put_u32(uint8_t *at, uint32_t v);
uint8_t *put_u64(uint8_t *at, uint64_t v);
uint8_t *put_bytes(uint8_t *at, const void *bytes, size_t n);
uint8_t *put_stat(uint8_t *at, const struct stat *st);

struct frame {
    uint32_t stream;
    uint8_t type;
    const uint8_t *body;
    size_t length;
};

enum scan { SCAN_MORE, SCAN_FRAME, SCAN_BAD };

/* Take the next frame off the buffer; its body stays valid until the buffer is filled again.
   Without `synced` everything before a hello is skipped, and only a hello is given. SCAN_BAD has
   cleared `synced` and says why: what came was no frame. */
enum scan frame_scan(struct buffer *in, bool *synced, struct frame *frame, const char **why);

/* Writing: open gives where the body goes (the caller has checked buffer_room), close completes
   the frame with as much of the body as was written. */
uint8_t *frame_open(struct buffer *out);
void frame_close(struct buffer *out, uint8_t type, uint32_t stream, size_t body_length);
void magic_append(struct buffer *out);

struct hello {
    uint16_t version;
    const uint8_t *nonce;
};

bool decode_hello(const struct frame *frame, struct hello *hello);

/* Strings are NUL-terminated and lie one after another: argc of argv, envc of env. */
struct exec_request {
    uint32_t flags, credit[2], argc, envc;
    const char *cwd, *user, *strings;
};

bool decode_exec(const uint8_t *body, size_t length, struct exec_request *request);

/* The requests on names; which fields a type has is told in protocol.py. */
struct file_request {
    uint32_t flags, mode, credit;
    uint64_t offset, length;
    char path[PATH_MAX_BYTES + 1], target[PATH_MAX_BYTES + 1];
};

/* Give 0, an errno (the request is well-formed but cannot be met), or -1 (malformed). */
int decode_file(uint8_t type, const uint8_t *body, size_t length, struct file_request *request);

#endif
