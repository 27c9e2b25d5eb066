/* A fuzz target for the agent's parser: arbitrary bytes, cut at arbitrary places, as input; every
   frame that comes out is decoded as every kind of request. The sanitizers are the oracle.

   With -fsanitize=fuzzer (clang) it is a libFuzzer target. Without it, with -DSTANDALONE, it
   mutates its own seeds: `fuzz RUNS SEED`, the same for the same arguments. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "wire.h"

#define CAPACITY ((size_t)2 * FRAME_MAX)

static volatile size_t sink;

static void decode_all(const struct frame *frame) {
    static struct file_request file;
    struct exec_request exec;
    struct hello hello;
    /* A copy of the exact size: a read beyond its end is then seen. */
    uint8_t *body = malloc(frame->length + 1);
    memcpy(body + 1, frame->body, frame->length);
    struct frame copy = {frame->stream, frame->type, body + 1, frame->length};
    if (decode_hello(&copy, &hello))
        sink += hello.nonce[NONCE_BYTES - 1];
    if (decode_exec(copy.body, copy.length, &exec)) {
        const char *at = exec.strings;
        for (uint64_t n = (uint64_t)exec.argc + exec.envc; n > 0; n--)
            at += strlen(at) + 1;
        if ((const uint8_t *)at != copy.body + copy.length)
            abort();
        sink += strlen(exec.cwd) + strlen(exec.user);
    }
    for (unsigned type = 0; type < 256; type++)
        if (decode_file((uint8_t)type, copy.body, copy.length, &file) == 0) {
            sink += strlen(file.path) + strlen(file.target);
            if (file.path[0] != '/' && type != FRAME_GET_BLOB && type != FRAME_ENVIRON)
                abort();
        }
    free(body);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static uint8_t memory[CAPACITY];
    struct buffer in = {memory, CAPACITY, 0, 0};
    struct frame frame;
    const char *why = "";
    if (size == 0)
        return 0;
    bool synced = data[0] & 1;
    size_t step = 1 + (size_t)(data[0] >> 1) * 37;
    for (size_t at = 1; at < size;) {
        buffer_compact(&in);
        size_t n = size - at < step ? size - at : step;
        if (n > buffer_room(&in))
            n = buffer_room(&in);
        if (n == 0)
            abort(); /* the parser sits on a full buffer for ever */
        memcpy(in.data + in.end, data + at, n);
        in.end += n;
        at += n;
        for (enum scan scan; (scan = frame_scan(&in, &synced, &frame, &why)) != SCAN_MORE;) {
            if (scan == SCAN_FRAME)
                decode_all(&frame);
            else if (synced)
                abort();
        }
    }
    return 0;
}

#ifdef STANDALONE
static uint64_t state;

static uint32_t number(uint32_t below) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 32) % below;
}

/* A frame with a plausible body: fixed fields, then a path or strings. */
static size_t plausible(uint8_t *at) {
    static const uint8_t types[] = {FRAME_HELLO, FRAME_PART,   FRAME_EXEC,  FRAME_KILL,
                                    FRAME_DATA,  FRAME_READ,   FRAME_WRITE, FRAME_STAT,
                                    FRAME_LIST,  FRAME_RENAME, FRAME_MKDIR, FRAME_ENVIRON};
    static const uint8_t magic[] = {MAGIC_VALUES};
    struct buffer out = {at, CAPACITY, 0, 0};
    uint8_t type = types[number(sizeof types)];
    if (number(4) == 0)
        magic_append(&out);
    uint8_t *start = frame_open(&out), *body = start;
    if (type == FRAME_HELLO) {
        body = put_u16(body, PROTOCOL_VERSION);
        body = put_bytes(body, "0123456789abcdef", NONCE_BYTES);
    } else if (type == FRAME_EXEC) {
        uint32_t argc = 1 + number(3), envc = number(3);
        body = put_u32(put_u32(put_u32(body, number(4)), 1), 1);
        body = put_bytes(put_u32(put_u32(body, argc), envc), "/\0", 3);
        for (uint32_t i = 0; i < argc + envc; i++)
            body = put_bytes(body, "A=b", 4);
    } else {
        for (uint32_t n = number(25); n > 0; n--)
            body = put_u8(body, (uint8_t)number(3));
        if (number(3) == 0)
            body = put_bytes(body, magic, sizeof magic);
        body = put_bytes(body, "/some/path", 10);
    }
    frame_close(&out, type, type == FRAME_HELLO ? 0 : 1 + number(3), (size_t)(body - start));
    return out.end;
}

int main(int argc, char *argv[]) {
    static uint8_t data[2 * CAPACITY];
    uint64_t runs = argc > 1 ? strtoull(argv[1], NULL, 10) : 1000;
    state = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    state = state * 0x9e3779b97f4a7c15u + 1;
    for (uint64_t run = 0; run < runs; run++) {
        size_t size = 1;
        data[0] = (uint8_t)number(256);
        for (uint32_t n = 1 + number(6); n > 0; n--)
            size += plausible(data + size);
        for (uint32_t n = number(6); n > 0; n--) {
            uint8_t *at = &data[number((uint32_t)size)];
            switch (number(5)) {
            case 0: *at = (uint8_t)number(256); break;
            case 1: *at ^= (uint8_t)(1u << number(8)); break;
            case 2: *at = 0xff; break;
            case 3: size = (size_t)(at - data) + 1; break;
            case 4:
                if (size + 40 < sizeof data) {
                    memmove(at + 40, at, size - (size_t)(at - data));
                    memset(at, (int)number(2) * 0xab, 40);
                    size += 40;
                }
                break;
            }
        }
        if (number(50) == 0) { /* the padding of a client that attaches again */
            memset(data + size, 0, FRAME_MAX);
            size += FRAME_MAX;
            size += plausible(data + size);
        }
        LLVMFuzzerTestOneInput(data, size);
    }
    printf("%llu runs\n", (unsigned long long)runs);
    return 0;
}
#endif
