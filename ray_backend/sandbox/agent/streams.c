/* The table of streams, and what is sent on them. */
#include "agent.h"

#include <dirent.h>
#include <sys/mman.h>
#include <unistd.h>

struct stream streams[STREAMS_MAX];
size_t streams_used;
struct buffer out;

/* ---- sending ---- */

bool room_for_control(void) {
    return buffer_room(&out) >= CONTROL_ROOM;
}

bool room_for_contents(void) {
    return buffer_used(&out) <= BULK_QUEUED_MAX;
}

void send_empty(uint8_t type, uint32_t stream) {
    frame_open(&out);
    frame_close(&out, type, stream, 0);
}

void send_error(uint32_t stream, int error, uint8_t stage) {
    put_u8(put_u32(frame_open(&out), (uint32_t)error), stage);
    frame_close(&out, FRAME_ERROR, stream, 5);
}

void send_killed(uint32_t exec, uint32_t kills) {
    put_u32(frame_open(&out), kills);
    frame_close(&out, FRAME_KILLED, exec, 4);
}

void send_stat(uint8_t type, uint32_t stream, const struct stat *st, const char *link,
               size_t link_length) {
    put_bytes(put_stat(frame_open(&out), st), link, link_length);
    frame_close(&out, type, stream, STAT_BYTES + link_length);
}

void grant_input(struct stream *s) {
    struct input *input = &s->in;
    if (input->ungranted < GRANT_STEP || !room_for_control())
        return;
    put_u32(frame_open(&out), (uint32_t)input->ungranted);
    frame_close(&out, FRAME_GRANT, s->id, 4);
    input->window += input->ungranted;
    input->ungranted = 0;
}

/* ---- streams ---- */

void close_fd(int *fd) {
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

struct stream *stream_find(uint32_t id) {
    for (size_t i = 0; i < streams_used; i++)
        if (streams[i].kind != FREE && streams[i].id == id)
            return &streams[i];
    return NULL;
}

struct stream *stream_new(enum stream_kind kind, uint32_t id) {
    for (size_t i = 0; i < STREAMS_MAX; i++) {
        if (streams[i].kind != FREE)
            continue;
        streams[i] = (struct stream){.kind = kind,
                                     .id = id,
                                     .in = {.fd = -1, .window = INPUT_WINDOW},
                                     .out = {{.fd = -1}, {.fd = -1}},
                                     .fd = -1};
        if (i >= streams_used)
            streams_used = i + 1;
        return &streams[i];
    }
    return NULL;
}

void stream_free(struct stream *s) {
    close_fd(&s->in.fd);
    if (s->in.ring != NULL)
        munmap(s->in.ring, INPUT_WINDOW);
    close_fd(&s->out[0].fd);
    close_fd(&s->out[1].fd);
    if (s->dir != NULL)
        closedir(s->dir);
    close_fd(&s->fd);
    s->kind = FREE;
    while (streams_used > 0 && streams[streams_used - 1].kind == FREE)
        streams_used--;
}
