#include "wire.h"

#include <errno.h>
#include <string.h>

static const uint8_t MAGIC[MAGIC_BYTES] = {MAGIC_VALUES};

/* ---- buffers ---- */

size_t buffer_used(const struct buffer *b) {
    return b->end - b->start;
}

size_t buffer_room(const struct buffer *b) {
    return b->capacity - buffer_used(b);
}

void buffer_compact(struct buffer *b) {
    if (b->start == 0)
        return;
    memmove(b->data, b->data + b->start, buffer_used(b));
    b->end -= b->start;
    b->start = 0;
}

void buffer_consume(struct buffer *b, size_t n) {
    b->start += n;
    if (b->start == b->end)
        b->start = b->end = 0;
}

/* ---- integers and bytes ---- */

const uint8_t *take_bytes(struct cursor *c, size_t n) {
    static const uint8_t zeros[NONCE_BYTES];
    if (c->bad || c->left < n) {
        c->bad = true;
        return zeros;
    }
    const uint8_t *at = c->at;
    c->at += n;
    c->left -= n;
    return at;
}

static uint64_t take_number(struct cursor *c, size_t n) {
    const uint8_t *at = take_bytes(c, n);
    uint64_t v = 0;
    for (size_t i = n; i-- > 0;)
        v = v << 8 | at[i];
    return v;
}

uint8_t take_u8(struct cursor *c) {
    return (uint8_t)take_number(c, 1);
}

uint16_t take_u16(struct cursor *c) {
    return (uint16_t)take_number(c, 2);
}

uint32_t take_u32(struct cursor *c) {
    return (uint32_t)take_number(c, 4);
}

uint64_t take_u64(struct cursor *c) {
    return take_number(c, 8);
}

static uint8_t *put_number(uint8_t *at, uint64_t v, size_t n) {
    for (size_t i = 0; i < n; i++, v >>= 8)
        at[i] = (uint8_t)v;
    return at + n;
}

uint8_t *put_u8(uint8_t *at, uint8_t v) {
    return put_number(at, v, 1);
}

uint8_t *put_u16(uint8_t *at, uint16_t v) {
    return put_number(at, v, 2);
}

uint8_t *put_u32(uint8_t *at, uint32_t v) {
    return put_number(at, v, 4);
}

uint8_t *put_u64(uint8_t *at, uint64_t v) {
    return put_number(at, v, 8);
}

uint8_t *put_bytes(uint8_t *at, const void *bytes, size_t n) {
    memcpy(at, bytes, n);
    return at + n;
}

uint8_t *put_stat(uint8_t *at, const struct stat *st) {
    int64_t mtime_ns = (int64_t)st->st_mtim.tv_sec * 1000000000 + st->st_mtim.tv_nsec;
    at = put_u32(at, (uint32_t)st->st_mode);
    at = put_u32(at, (uint32_t)st->st_uid);
    at = put_u32(at, (uint32_t)st->st_gid);
    at = put_u32(at, (uint32_t)st->st_nlink);
    at = put_u64(at, (uint64_t)st->st_size);
    at = put_u64(at, (uint64_t)mtime_ns);
    at = put_u64(at, (uint64_t)st->st_ino);
    return put_u64(at, (uint64_t)st->st_dev);
}

/* ---- frames ---- */

/* Drop what precedes the first magic. A magic that is still incomplete at the end is kept. */
static bool find_magic(struct buffer *in) {
    while (buffer_used(in) > 0) {
        const uint8_t *from = in->data + in->start;
        size_t left = buffer_used(in);
        const uint8_t *at = memchr(from, MAGIC[0], left);
        if (at == NULL) {
            buffer_consume(in, left);
            return false;
        }
        buffer_consume(in, (size_t)(at - from));
        left = buffer_used(in);
        if (memcmp(at, MAGIC, left < MAGIC_BYTES ? left : MAGIC_BYTES) == 0)
            return left >= MAGIC_BYTES;
        buffer_consume(in, 1);
    }
    return false;
}

/* The frame that begins `skip` bytes on, not taken yet. */
static enum scan peek(const struct buffer *in, size_t skip, struct frame *frame, const char **why) {
    struct cursor c = {in->data + in->start + skip, buffer_used(in) - skip, false};
    if (c.left < FRAME_HEADER_BYTES)
        return SCAN_MORE;
    uint32_t length = take_u32(&c);
    frame->stream = take_u32(&c);
    frame->type = take_u8(&c);
    if (length > FRAME_BODY_MAX || frame->type == 0) {
        *why = "not a frame header";
        return SCAN_BAD;
    }
    frame->body = c.at;
    frame->length = length;
    return c.left < (size_t)length + FRAME_TRAILER_BYTES ? SCAN_MORE : SCAN_FRAME;
}

enum scan frame_scan(struct buffer *in, bool *synced, struct frame *frame, const char **why) {
    while (!*synced) {
        if (!find_magic(in))
            return SCAN_MORE;
        struct hello hello;
        enum scan scan = peek(in, MAGIC_BYTES, frame, why);
        if (scan == SCAN_MORE && (buffer_used(in) < MAGIC_BYTES + FRAME_HEADER_BYTES ||
                                  (frame->type == FRAME_HELLO && frame->length <= 2 + NONCE_BYTES)))
            return SCAN_MORE;
        if (scan != SCAN_FRAME || frame->body[frame->length] != FRAME_TRAILER ||
            !decode_hello(frame, &hello)) {
            buffer_consume(in, 1);
            continue;
        }
        *synced = true;
        buffer_consume(in, MAGIC_BYTES + FRAME_HEADER_BYTES + frame->length + FRAME_TRAILER_BYTES);
        return SCAN_FRAME;
    }
    enum scan scan = peek(in, 0, frame, why);
    if (scan == SCAN_BAD) { /* a magic may begin right here: keep it */
        *synced = false;
        return scan;
    }
    if (scan == SCAN_FRAME) {
        /* Taken even if broken: a magic inside its body is somebody's data. */
        buffer_consume(in, FRAME_HEADER_BYTES + frame->length + FRAME_TRAILER_BYTES);
        if (frame->body[frame->length] != FRAME_TRAILER) {
            *why = "a frame without its trailer";
            *synced = false;
            return SCAN_BAD;
        }
    }
    return scan;
}

uint8_t *frame_open(struct buffer *out) {
    buffer_compact(out);
    return out->data + out->end + FRAME_HEADER_BYTES;
}

void frame_close(struct buffer *out, uint8_t type, uint32_t stream, size_t body_length) {
    uint8_t *at = out->data + out->end;
    at = put_u32(at, (uint32_t)body_length);
    at = put_u32(at, stream);
    at = put_u8(at, type);
    put_u8(at + body_length, FRAME_TRAILER);
    out->end += FRAME_HEADER_BYTES + body_length + FRAME_TRAILER_BYTES;
}

void magic_append(struct buffer *out) {
    buffer_compact(out);
    put_bytes(out->data + out->end, MAGIC, MAGIC_BYTES);
    out->end += MAGIC_BYTES;
}

/* ---- requests ---- */

bool decode_hello(const struct frame *frame, struct hello *hello) {
    struct cursor c = {frame->body, frame->length, false};
    if (frame->type != FRAME_HELLO || frame->stream != 0)
        return false;
    hello->version = take_u16(&c);
    hello->nonce = take_bytes(&c, NONCE_BYTES);
    return !c.bad && c.left == 0;
}

/* A NUL-terminated string, given with its end inside of the body. */
static const char *take_string(struct cursor *c) {
    const uint8_t *end = c->bad ? NULL : memchr(c->at, 0, c->left);
    if (end == NULL) {
        c->bad = true;
        return "";
    }
    return (const char *)take_bytes(c, (size_t)(end - c->at) + 1);
}

bool decode_exec(const uint8_t *body, size_t length, struct exec_request *request) {
    struct cursor c = {body, length, false};
    request->flags = take_u32(&c);
    request->credit[0] = take_u32(&c);
    request->credit[1] = take_u32(&c);
    request->argc = take_u32(&c);
    request->envc = take_u32(&c);
    request->cwd = take_string(&c);
    request->user = take_string(&c);
    request->strings = (const char *)c.at;
    if (request->argc == 0 || request->argc > c.left || request->envc > c.left)
        return false;
    for (uint64_t n = (uint64_t)request->argc + request->envc; n > 0 && !c.bad; n--)
        take_string(&c);
    return !c.bad && c.left == 0 && request->cwd[0] == '/';
}

static int take_path(struct cursor *c, size_t length, char *path) {
    const uint8_t *bytes = take_bytes(c, length);
    if (c->bad || (length > 0 && memchr(bytes, 0, length) != NULL))
        return -1;
    if (length > PATH_MAX_BYTES)
        return ENAMETOOLONG;
    memcpy(path, bytes, length);
    path[length] = '\0';
    if (length == 0)
        return ENOENT;
    return path[0] == '/' ? 0 : -1;
}

int decode_file(uint8_t type, const uint8_t *body, size_t length, struct file_request *request) {
    struct cursor c = {body, length, false};
    int problem = 0;
    request->flags = request->mode = request->credit = 0;
    request->offset = request->length = 0;
    request->path[0] = request->target[0] = '\0';
    switch (type) {
    case FRAME_GET_BLOB:
    case FRAME_ENVIRON:
        request->credit = take_u32(&c);
        return c.bad || c.left > 0 ? -1 : 0;
    case FRAME_LIST:
        request->credit = take_u32(&c);
        break;
    case FRAME_READ:
        request->credit = take_u32(&c);
        request->offset = take_u64(&c);
        request->length = take_u64(&c);
        break;
    case FRAME_WRITE:
        request->flags = take_u32(&c);
        request->mode = take_u32(&c);
        request->offset = take_u64(&c);
        request->length = take_u64(&c);
        break;
    case FRAME_MKDIR:
        request->flags = take_u32(&c);
        request->mode = take_u32(&c);
        break;
    case FRAME_STAT:
    case FRAME_REMOVE:
        request->flags = take_u32(&c);
        break;
    case FRAME_RENAME:
        request->flags = take_u32(&c);
        problem = take_path(&c, take_u16(&c), request->target);
        break;
    default:
        return -1;
    }
    int path_problem = take_path(&c, c.left, request->path);
    if (c.bad || problem == -1 || path_problem == -1)
        return -1;
    return path_problem != 0 ? path_problem : problem;
}
