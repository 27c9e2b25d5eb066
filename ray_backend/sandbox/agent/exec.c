/* Execs: their streams, their keepers, and the bytes between. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tree.h"

#define DROPPED_GRACE_MS 1000   /* execs whose client was replaced */
#define KEEPER_PATIENCE_MS 3000 /* on top of a kill's grace, before its keeper is taken for stuck */
#define ORPHAN_RECHECK_MS 5
#define STRIKES 64

struct keeper {
    pid_t pid;
    int socket;
    size_t slot;    /* where it was polled */
    uint32_t exec;  /* the stream id by which it may be killed; 0: its client is gone */
    bool in_use, ended, gone, waits, dead; /* waits: for another exec, or the end of its socket */
    uint32_t kills; /* asked for and not answered */
    uint64_t patience_ns; /* 0: none */
};

static struct keeper keepers[KEEPERS_MAX];
static size_t keepers_used; /* slots beyond are free */
static struct keeper *resting; /* has nothing to do, and is handed the next exec; NULL: none */
static uint64_t orphans_recheck_ns;
static int orphan_rounds; /* walks still to be made that find no orphan */

/* ---- keepers ---- */

static struct keeper *keeper_new(void) {
    for (size_t i = 0; i < KEEPERS_MAX; i++) {
        if (keepers[i].in_use)
            continue;
        keepers[i] = (struct keeper){.in_use = true, .socket = -1, .slot = NO_SLOT};
        if (i >= keepers_used)
            keepers_used = i + 1;
        return &keepers[i];
    }
    return NULL;
}

static void keeper_free(struct keeper *k) {
    close_fd(&k->socket);
    if (resting == k)
        resting = NULL;
    k->in_use = false;
    while (keepers_used > 0 && !keepers[keepers_used - 1].in_use)
        keepers_used--;
}

static bool is_keeper(pid_t pid) {
    for (size_t i = 0; i < keepers_used; i++)
        if (keepers[i].in_use && !keepers[i].dead && keepers[i].pid == pid)
            return true;
    return false;
}

static struct stream *stream_of(const struct keeper *k) {
    for (size_t i = 0; i < streams_used; i++)
        if (streams[i].kind == EXEC && streams[i].keeper == k)
            return &streams[i];
    return NULL;
}

static void keeper_tell(struct keeper *k, enum keeper_verb verb, int32_t number) {
    struct keeper_message message = {.verb = verb, .number = number};
    if (k->dead || k->gone)
        return;
    if (verb == KEEPER_KILL)
        kill(k->pid, SIGCONT); /* code of the same user may have stopped it */
    if (send(k->socket, &message, sizeof message, MSG_NOSIGNAL | MSG_DONTWAIT) < 0) {
        /* it is ending, or stopped and flooded: patience_ns is for that */
    }
}

static void keeper_kill(struct keeper *k, uint32_t grace_ms) {
    if (grace_ms > INT32_MAX)
        grace_ms = INT32_MAX;
    uint64_t patience = now_ns() + ((uint64_t)grace_ms + KEEPER_PATIENCE_MS) * 1000000u;
    if (k->patience_ns == 0 || patience < k->patience_ns)
        k->patience_ns = patience;
    if (k->waits) { /* nothing is left to kill */
        k->waits = false;
        close_fd(&k->socket);
    }
    keeper_tell(k, KEEPER_KILL, (int32_t)grace_ms);
}

static void exec_ended(struct stream *s, const struct keeper_message *end, uint8_t flags) {
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

static void keeper_says(struct keeper *k, const struct keeper_message *message) {
    struct stream *s = stream_of(k);
    switch (message->verb) {
    case KEEPER_STARTED:
        if (s != NULL) {
            s->started = true;
            s->pid = message->number;
        }
        break;
    case KEEPER_FAILED:
        k->ended = k->gone = true;
        if (s != NULL) {
            send_error(s->id, message->number, (uint8_t)message->stage);
            stream_free(s);
        }
        break;
    case KEEPER_ENDED:
        k->ended = true;
        k->gone = k->waits = !message->left;
        if (s != NULL)
            exec_ended(s, message, 0);
        break;
    case KEEPER_GONE:
        k->gone = true;
        break;
    default:
        break;
    }
}

static void keeper_listen(struct keeper *k) {
    struct keeper_message message;
    while (room_for_control() &&
           recv(k->socket, &message, sizeof message, MSG_DONTWAIT) == sizeof message)
        keeper_says(k, &message);
}

static void send_killed(uint32_t exec, uint32_t kills) {
    put_u32(frame_open(&out), kills);
    frame_close(&out, FRAME_KILLED, exec, 4);
}

/* Keep one that has nothing more to do for the next exec, and let the others end. */
static void keeper_rest(struct keeper *k) {
    if (resting != NULL || k->kills > 0 || k->patience_ns != 0) {
        k->waits = false;
        close_fd(&k->socket);
        return;
    }
    resting = k;
    k->exec = 0;
}

/* Finish with a keeper that has died, and answer who asked for the kill. */
static void keeper_settle(struct keeper *k) {
    struct stream *s;
    keeper_listen(k);
    if (!room_for_control())
        return;
    if (!k->ended) {
        struct keeper_message lost = {.verb = KEEPER_ENDED, .number = SIGKILL};
        k->ended = true;
        if ((s = stream_of(k)) != NULL) {
            s->started = true; /* for all that is known */
            exec_ended(s, &lost, EXIT_LOST);
        }
    }
    if (stream_of(k) != NULL)
        return; /* its output first */
    if (!k->gone && orphan_rounds > 0)
        return; /* whom it kept are still being killed */
    if (k->kills > 0 && k->exec != 0)
        send_killed(k->exec, k->kills);
    keeper_free(k);
}

void keepers_settle(void) {
    for (size_t i = keepers_used; i-- > 0;) {
        struct keeper *k = &keepers[i];
        if (k->in_use && k->dead)
            keeper_settle(k);
        else if (k->in_use && k->waits && k != resting && stream_of(k) == NULL)
            keeper_rest(k);
    }
}

void keepers_reap(void) {
    int status;
    pid_t pid;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
        for (size_t i = 0; i < keepers_used; i++) {
            struct keeper *k = &keepers[i];
            if (!k->in_use || k->dead || k->pid != pid)
                continue;
            k->dead = true;
            /* Killed by code of its user, or by us for being stuck: whom it kept are ours now. */
            if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
                orphan_rounds = 2;
                orphans_recheck_ns = 1;
            }
        }
}

/* Kill whoever became our child because a keeper was killed. Two walks in a row must find nobody:
   a process may be adopted just behind the first one's back. */
static void kill_orphans(uint64_t now) {
    if (orphans_recheck_ns == 0 || now < orphans_recheck_ns)
        return;
    for (int i = 0; i < STRIKES; i++) {
        tree_strike(is_keeper);
        keepers_reap();
    }
    orphan_rounds = tree_kill(is_keeper) > 0 ? 2 : orphan_rounds - 1;
    orphans_recheck_ns = orphan_rounds > 0 ? now + ORPHAN_RECHECK_MS * 1000000u : 0;
}

void keepers_tend(void) {
    uint64_t now = now_ns();
    for (size_t i = 0; i < keepers_used; i++) {
        struct keeper *k = &keepers[i];
        if (!k->in_use)
            continue;
        if (k->dead || poll_ready(k->slot))
            keeper_listen(k);
        if (!k->dead && k->patience_ns != 0 && now >= k->patience_ns) {
            k->patience_ns = 0;
            kill(k->pid, SIGKILL);
        }
    }
    kill_orphans(now);
}

void keepers_poll(void) {
    bool answerable = room_for_control();
    for (size_t i = 0; i < keepers_used; i++) {
        struct keeper *k = &keepers[i];
        k->slot = NO_SLOT;
        if (!k->in_use || k->dead)
            continue;
        if (answerable && !k->gone)
            k->slot = poll_add(k->socket, POLLIN);
        if (k->patience_ns != 0)
            wake_at(k->patience_ns);
    }
    if (orphans_recheck_ns != 0)
        wake_at(orphans_recheck_ns);
}

void keepers_forget(void) {
    for (size_t i = 0; i < keepers_used; i++)
        keepers[i].exec = 0;
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

/* Hand an exec to the keeper that rests, where there is one and it still can. */
static struct keeper *keeper_reuse(const void *request, size_t length, const struct plumbing *p) {
    struct keeper *k = resting;
    if (k == NULL)
        return NULL;
    resting = NULL;
    if (!k->dead) {
        kill(k->pid, SIGCONT); /* code of the same user may have stopped it */
        if (keeper_next(k->socket, request, length, &p->theirs)) {
            *k = (struct keeper){
                .pid = k->pid, .socket = k->socket, .slot = NO_SLOT, .in_use = true};
            return k;
        }
    }
    return NULL; /* it ends, or rests again */
}

static int keeper_fork(struct keeper *k, const struct exec_request *r, void *memory,
                       struct plumbing *p) {
    int pair[2];
    if (k == NULL)
        return EAGAIN;
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0)
        return errno;
    k->socket = pair[0];
    p->theirs.socket = pair[1];
    k->pid = keeper_start(r, memory, &p->theirs, &origin);
    int error = k->pid < 0 ? errno : 0;
    close(pair[1]);
    return error;
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
    struct keeper *k = NULL;
    int error = plumb(&p, with_input);
    if (s == NULL)
        error = EAGAIN;
    if (error == 0 && with_input)
        error = make_ring(&s->in);
    if (error == 0) {
        s->oom_kills = oom_kills();
        k = keeper_reuse(request, frame->length, &p);
        if (k == NULL)
            error = keeper_fork(k = keeper_new(), &r, request, &p);
    }
    close_fd(&p.theirs.input);
    close_fd(&p.theirs.write[0]);
    close_fd(&p.theirs.write[1]);
    if (error == 0) {
        k->exec = frame->stream;
        s->keeper = k;
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
    if (k != NULL)
        keeper_free(k);
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
    for (size_t i = 0; i < keepers_used; i++)
        if (keepers[i].in_use && keepers[i].exec == frame->stream) {
            keepers[i].kills++;
            keeper_kill(&keepers[i], grace_ms);
            return;
        }
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
