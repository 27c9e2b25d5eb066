/* Execs: their streams, and the bytes between the client and the program. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define DROPPED_GRACE_MS 1000 /* execs whose client was replaced */

void exec_started(struct stream *s, int32_t pid) {
    s->started = true;
    s->pid = pid;
}

void exec_failed(struct stream *s, const struct keeper_message *why) {
    send_error(s->id, why->number, (uint8_t)why->stage);
    stream_free(s);
}

void exec_ended(struct stream *s, const struct keeper_message *end, uint8_t flags) {
    s->ended = true;
    s->end = *end;
    s->end_flags = flags | (oom_kills() > s->oom_kills ? EXIT_OUT_OF_MEMORY : 0);
    for (int i = 0; i < 2; i++) {
        int waiting = 0;
        if (s->out[i].fd >= 0 && ioctl(s->out[i].fd, FIONREAD, &waiting) != 0)
            waiting = 0;
        s->out[i].due = waiting > 0 ? (uint64_t)waiting : 0;
    }
}

/* ---- starting ---- */

/* The ends of an exec's pipes that stay here, and those that go to the keeper. */
struct plumbing {
    int ours[2], input;
    struct keeper_ends theirs;
};

static int make_pipe(int *read_end, int *write_end) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0)
        return errno;
    *read_end = ends[0];
    *write_end = ends[1];
    return 0;
}

static int plumb(struct plumbing *p, bool with_input) {
    int error = 0;
    *p = (struct plumbing){{-1, -1}, -1, {-1, -1, {-1, -1}, {-1, -1}, signals_fd}};
    for (int i = 0; i < 2 && error == 0; i++)
        if ((error = make_pipe(&p->ours[i], &p->theirs.write[i])) == 0) {
            p->theirs.read[i] = p->ours[i];
            fcntl(p->ours[i], F_SETFL, O_NONBLOCK);
        }
    if (with_input && error == 0 && (error = make_pipe(&p->theirs.input, &p->input)) == 0)
        fcntl(p->input, F_SETFL, O_NONBLOCK);
    return error;
}

static int make_ring(struct input *input) {
    void *ring =
        mmap(NULL, INPUT_WINDOW, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (ring == MAP_FAILED)
        return errno;
    madvise(ring, INPUT_WINDOW, MADV_DONTFORK);
    input->ring = ring;
    return 0;
}

void exec_start(const struct frame *frame, uint8_t *request) {
    struct exec_request r;
    struct plumbing p;
    if (!decode_exec(request, frame->length, &r)) {
        protocol_error("a malformed exec request");
        return;
    }
    bool with_input = (r.flags & EXEC_STDIN) != 0;
    struct stream *s = stream_new(EXEC, frame->stream);
    int error = plumb(&p, with_input);
    if (s == NULL)
        error = EAGAIN;
    if (error == 0 && with_input)
        error = make_ring(&s->in);
    if (error == 0) {
        s->oom_kills = oom_kills();
        error = keeper_take(&s->keeper, frame->stream, &r, request, frame->length, &p.theirs);
    }
    close_fd(&p.theirs.input);
    close_fd(&p.theirs.write[0]);
    close_fd(&p.theirs.write[1]);
    if (error == 0) {
        s->in.fd = p.input;
        s->started = s->start_told = !(r.flags & EXEC_TELL_START);
        for (int i = 0; i < 2; i++)
            s->out[i] = (struct output){.fd = p.ours[i], .slot = NO_SLOT, .credit = r.credit[i]};
        return;
    }
    send_error(frame->stream, error, STAGE_START);
    close_fd(&p.input);
    close_fd(&p.ours[0]);
    close_fd(&p.ours[1]);
    if (s != NULL)
        stream_free(s);
}

/* ---- running ---- */

/* Give the program its input as far as it takes it. */
static void pump_input(struct stream *s) {
    struct input *input = &s->in;
    while (input->fd >= 0 && input->used > 0) {
        size_t run = INPUT_WINDOW - input->head;
        if (run > input->used)
            run = input->used;
        ssize_t n = write(input->fd, input->ring + input->head, run);
        if (n < 0 && errno == EAGAIN)
            break;
        if (n < 0) { /* nobody reads: the rest is taken and thrown away, as by a closed pipe */
            close_fd(&input->fd);
            n = (ssize_t)input->used;
        }
        input->head = (input->head + (size_t)n) % INPUT_WINDOW;
        input->used -= (size_t)n;
        input->ungranted += (size_t)n;
    }
    if (input->end_seen && input->used == 0) {
        close_fd(&input->fd);
        munmap(input->ring, INPUT_WINDOW);
        input->ring = NULL;
    } else {
        grant_input(s);
    }
}

void exec_input(struct stream *s, const uint8_t *bytes, size_t n) {
    struct input *input = &s->in;
    if (input->fd < 0) { /* closed by the program */
        input->ungranted += n;
        return;
    }
    size_t tail = (input->head + input->used) % INPUT_WINDOW, run = INPUT_WINDOW - tail;
    if (run > n)
        run = n;
    put_bytes(input->ring + tail, bytes, run);
    put_bytes(input->ring, bytes + run, n - run);
    input->used += n;
}

/* Pass on what the program wrote: one frame at most. */
static void pump_output(struct stream *s, int which) {
    struct output *o = &s->out[which];
    uint64_t most = FRAME_BODY_MAX - 1;
    if (o->fd < 0)
        return;
    if (s->ended && o->due == 0) {
        close_fd(&o->fd);
        return;
    }
    if (o->credit == 0 || !room_for_contents() || (!s->ended && !poll_ready(o->slot)))
        return;
    if (most > o->credit)
        most = o->credit;
    if (s->ended && most > o->due)
        most = o->due;
    uint8_t *body = frame_open(&out);
    ssize_t n = read(o->fd, body + 1, (size_t)most);
    if (n > 0) {
        put_u8(body, (uint8_t)(CHANNEL_STDOUT + which));
        frame_close(&out, FRAME_OUTPUT, s->id, (size_t)n + 1);
        o->credit -= (uint64_t)n;
        if (s->ended)
            o->due -= (uint64_t)n;
    }
    if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR) || (s->ended && o->due == 0))
        close_fd(&o->fd);
}

static void send_exit(const struct stream *s) {
    int status = s->end.number;
    bool signaled = WIFSIGNALED(status);
    uint8_t flags = s->end_flags;
    if (signaled)
        flags |= EXIT_SIGNALED | (WCOREDUMP(status) ? EXIT_CORE : 0);
    if (s->end.left)
        flags |= EXIT_LEFT_BEHIND;
    uint8_t *at = frame_open(&out);
    at = put_u8(at, flags);
    at = put_u8(at, (uint8_t)(signaled ? WTERMSIG(status) : WEXITSTATUS(status)));
    put_u64(at, s->end.duration_ns);
    frame_close(&out, FRAME_EXIT, s->id, 10);
}

void exec_pump(struct stream *s) {
    if (s->started && !s->start_told && room_for_control()) {
        put_u32(frame_open(&out), (uint32_t)s->pid);
        frame_close(&out, FRAME_STARTED, s->id, 4);
        s->start_told = true;
    }
    if (s->in.ring != NULL)
        pump_input(s);
    if (!s->start_told)
        return;
    pump_output(s, 0);
    pump_output(s, 1);
    if (s->ended && s->out[0].fd < 0 && s->out[1].fd < 0 && room_for_control()) {
        send_exit(s);
        keeper_tell(s->keeper, KEEPER_DRAIN, 0); /* it still holds our ends of the pipes */
        stream_free(s);
    }
}

void exec_poll(struct stream *s) {
    bool waits_for_us = s->started && !s->start_told;
    if (s->in.fd >= 0 && s->in.used > 0)
        poll_add(s->in.fd, POLLOUT);
    for (int i = 0; i < 2; i++) {
        struct output *o = &s->out[i];
        o->slot = NO_SLOT;
        if (s->ended) /* what is due is in the pipe already */
            waits_for_us |= o->fd >= 0 && (o->credit > 0 || o->due == 0);
        else if (s->start_told && o->fd >= 0 && o->credit > 0 && room_for_contents())
            o->slot = poll_add(o->fd, POLLIN);
    }
    waits_for_us |= s->ended && s->out[0].fd < 0 && s->out[1].fd < 0;
    if (waits_for_us && room_for_contents())
        wake_at(0);
}

/* ---- ending ---- */

void exec_drop(struct stream *s) {
    keeper_tell(s->keeper, KEEPER_DRAIN, 0);
    keeper_kill(s->keeper, DROPPED_GRACE_MS);
    stream_free(s);
}

void exec_kill(const struct frame *frame) {
    struct cursor c = {frame->body, frame->length, false};
    uint32_t grace_ms = take_u32(&c);
    uint8_t flags = take_u8(&c);
    struct stream *s = stream_find(frame->stream);
    if (c.bad || c.left != 0 || (s != NULL && s->kind != EXEC)) {
        protocol_error("a malformed kill");
        return;
    }
    if (s != NULL && flags & KILL_DISCARD_OUTPUT) {
        keeper_tell(s->keeper, KEEPER_DRAIN, 0);
        close_fd(&s->out[0].fd);
        close_fd(&s->out[1].fd);
    }
    if (!keepers_kill(frame->stream, grace_ms))
        send_killed(frame->stream, 1); /* nothing of it is left */
}

void exec_signal(const struct frame *frame) {
    struct stream *s = stream_find(frame->stream);
    if (frame->length != 1 || frame->body[0] == 0 || frame->body[0] >= NSIG ||
        (s != NULL && s->kind != EXEC))
        protocol_error("a malformed signal");
    else if (s != NULL)
        keeper_tell(s->keeper, KEEPER_SIGNAL, frame->body[0]);
}