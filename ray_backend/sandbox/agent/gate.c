/* The gate: who the client is, which of its frames are taken, and who serves them. */
#include "agent.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CREDIT_MAX ((uint64_t)1 << 62)

static bool synced, fatal_told;
static uint32_t last_stream;

/* A request that comes in parts. */
static uint8_t *request;
static size_t request_length, request_capacity;
static uint32_t request_stream;

/* ---- clients ---- */

static void request_free(void) {
    free(request);
    request = NULL;
    request_length = request_capacity = 0;
    request_stream = 0;
}

/* The client is gone, or talks nonsense: nobody waits for what is open. Half-written new files go
   away, execs are killed, background processes of earlier execs stay. */
static void drop_client(void) {
    keepers_forget();
    for (size_t i = streams_used; i-- > 0;) {
        if (streams[i].kind == EXEC)
            exec_drop(&streams[i]);
        else if (streams[i].kind != FREE)
            transfer_drop(&streams[i]);
    }
    request_free();
    last_stream = 0;
}

void protocol_error(const char *why) {
    synced = false;
    drop_client();
    if (fatal_told) /* once is enough for whatever follows until the next hello */
        return;
    fatal_told = true;
    size_t n = strlen(why);
    put_bytes(frame_open(&out), why, n);
    frame_close(&out, FRAME_FATAL, 0, n);
}

/* A client, new or again: it knows by its nonce from where on our output is meant for it. */
static void on_hello(const struct frame *frame) {
    struct hello hello;
    if (!decode_hello(frame, &hello)) {
        protocol_error("a malformed hello");
        return;
    }
    drop_client();
    fatal_told = false;
    synced = hello.version == PROTOCOL_VERSION;
    magic_append(&out);
    uint8_t *body = frame_open(&out), *at = put_u16(body, PROTOCOL_VERSION);
    at = put_bytes(at, hello.nonce, NONCE_BYTES);
    at = put_u32(at, (uint32_t)((pid_one ? CAPABILITY_INIT : 0) |
                                (geteuid() == 0 ? CAPABILITY_SWITCH_USER : 0)));
    at = put_u32(at, INPUT_WINDOW);
    frame_close(&out, FRAME_WELCOME, 0, (size_t)(at - body));
}

/* ---- frames on open streams; those for a stream that has just ended are late, not wrong ---- */

static void on_data(const struct frame *frame) {
    struct stream *s = stream_find(frame->stream);
    if (s == NULL)
        return;
    if ((s->kind != WRITE && (s->kind != EXEC || s->in.ring == NULL)) || s->in.end_seen) {
        protocol_error("data for a stream that takes none");
        return;
    }
    if (frame->length > s->in.window) {
        protocol_error("more data than was granted");
        return;
    }
    s->in.window -= frame->length;
    if (s->kind == EXEC)
        exec_input(s, frame->body, frame->length);
    else
        transfer_input(s, frame->body, frame->length);
}

static void on_end(const struct frame *frame) {
    struct stream *s = stream_find(frame->stream);
    if (frame->length != 0 || (s != NULL && s->kind != EXEC && s->kind != WRITE))
        protocol_error("a malformed end");
    else if (s != NULL && s->kind == EXEC)
        s->in.end_seen = true;
    else if (s != NULL)
        transfer_end(s);
}

static void on_credit(const struct frame *frame) {
    struct cursor c = {frame->body, frame->length, false};
    struct stream *s = stream_find(frame->stream);
    uint8_t channel = take_u8(&c);
    uint32_t amount = take_u32(&c);
    if (c.bad || c.left != 0 || (channel != CHANNEL_STDOUT && channel != CHANNEL_STDERR)) {
        protocol_error("a malformed credit");
        return;
    }
    if (s == NULL)
        return;
    uint64_t *credit = s->kind == EXEC ? &s->out[channel - CHANNEL_STDOUT].credit : &s->credit;
    if (*credit < CREDIT_MAX)
        *credit += amount;
}

static void on_cancel(const struct frame *frame) {
    struct stream *s = stream_find(frame->stream);
    if (frame->length != 0 || (s != NULL && s->kind == EXEC)) {
        protocol_error("a malformed cancel");
    } else if (s != NULL) {
        send_error(s->id, ECANCELED, STAGE_REQUEST);
        transfer_drop(s);
    }
}

/* ---- the gate ---- */

/* Keep a part of a request until the rest is there; gives false when that cannot be. */
static bool collect(const struct frame *frame) {
    size_t wanted = request_length + frame->length;
    if (wanted > REQUEST_MAX)
        return false;
    if (request == NULL || wanted > request_capacity) {
        size_t capacity = request_stream == 0 ? wanted : wanted + wanted / 2 + FRAME_BODY_MAX;
        uint8_t *larger = realloc(request, capacity > 0 ? capacity : 1);
        if (larger == NULL)
            return false;
        request = larger;
        request_capacity = capacity;
    }
    put_bytes(request + request_length, frame->body, frame->length);
    request_length = wanted;
    request_stream = frame->stream;
    return true;
}

/* The strings of an exec go to its keeper, which has no copy of the input buffer. */
static void on_exec(const struct frame *frame) {
    if (frame->body == request || collect(frame))
        exec_start(frame, request);
    else
        send_error(frame->stream, ENOMEM, STAGE_START);
}

struct verb {
    void (*handle)(const struct frame *);
    bool opens; /* the stream must be new, else known */
    bool parts; /* may be longer than a frame */
};

static const struct verb verbs[] = {
    [FRAME_EXEC] = {on_exec, true, true},
    [FRAME_KILL] = {exec_kill, false, false},
    [FRAME_SIGNAL] = {exec_signal, false, false},
    [FRAME_DATA] = {on_data, false, false},
    [FRAME_END] = {on_end, false, false},
    [FRAME_CREDIT] = {on_credit, false, false},
    [FRAME_CANCEL] = {on_cancel, false, false},
    [FRAME_STAT] = {transfer_request, true, false},
    [FRAME_LIST] = {transfer_request, true, false},
    [FRAME_READ] = {transfer_request, true, false},
    [FRAME_WRITE] = {transfer_request, true, false},
    [FRAME_MKDIR] = {transfer_request, true, false},
    [FRAME_REMOVE] = {transfer_request, true, false},
    [FRAME_RENAME] = {transfer_request, true, false},
    [FRAME_GET_BLOB] = {transfer_request, true, false},
    [FRAME_SET_BLOB] = {transfer_set_blob, true, true},
    [FRAME_ENVIRON] = {transfer_request, true, false},
};

static void on_frame(const struct frame *frame) {
    struct frame whole = *frame;
    const struct verb *verb = NULL;
    bool part = frame->type == FRAME_PART;
    if (frame->type == FRAME_HELLO) {
        on_hello(frame);
        return;
    }
    if (frame->type < sizeof verbs / sizeof verbs[0] && verbs[frame->type].handle != NULL)
        verb = &verbs[frame->type];
    bool opens = part || (verb != NULL && verb->opens);
    if (frame->stream == 0 || (verb == NULL && !part)) {
        protocol_error("an unknown frame type");
    } else if (request_stream != 0 &&
               (frame->stream != request_stream || (verb != NULL && !verb->parts))) {
        protocol_error("a request broken off in the middle");
    } else if (opens != (frame->stream > last_stream)) {
        protocol_error(opens ? "a stream id that was used before"
                             : "a frame for a stream that was never opened");
    } else if ((part || request_stream != 0) && !collect(frame)) {
        protocol_error("a request beyond the limit");
    } else if (!part) {
        if (opens)
            last_stream = frame->stream;
        if (request_stream != 0) {
            whole.body = request;
            whole.length = request_length;
        }
        verb->handle(&whole);
        request_free();
    }
}

bool take_frames(struct buffer *in) {
    struct frame frame;
    const char *why = "";
    for (;;) {
        if (!room_for_control())
            return true;
        switch (frame_scan(in, &synced, &frame, &why)) {
        case SCAN_FRAME:
            on_frame(&frame);
            break;
        case SCAN_BAD:
            protocol_error(why);
            break;
        case SCAN_MORE:
            return false;
        }
    }
}
