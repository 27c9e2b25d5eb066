/* The agent's side of its keepers: whom it has, what they say, and who is left when one dies. */
#include "agent.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tree.h"

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

void keeper_tell(struct keeper *k, enum keeper_verb verb, int32_t number) {
    struct keeper_message message = {.verb = verb, .number = number};
    if (k->dead || k->gone)
        return;
    if (verb == KEEPER_KILL)
        kill(k->pid, SIGCONT); /* code of the same user may have stopped it */
    if (send(k->socket, &message, sizeof message, MSG_NOSIGNAL | MSG_DONTWAIT) < 0) {
        /* it is ending, or stopped and flooded: patience_ns is for that */
    }
}

/* See to it that one which is to end does. */
static void keeper_limit(struct keeper *k, uint32_t grace_ms) {
    uint64_t patience = now_ns() + ((uint64_t)grace_ms + KEEPER_PATIENCE_MS) * 1000000u;
    if (k->patience_ns == 0 || patience < k->patience_ns)
        k->patience_ns = patience;
}

/* Have one that waits end in place of taking another exec. */
static void keeper_dismiss(struct keeper *k) {
    k->waits = false;
    keeper_limit(k, 0);
    if (!k->dead)
        kill(k->pid, SIGCONT); /* code of the same user may have stopped it */
    close_fd(&k->socket);
}

void keeper_kill(struct keeper *k, uint32_t grace_ms) {
    if (grace_ms > INT32_MAX)
        grace_ms = INT32_MAX;
    keeper_limit(k, grace_ms);
    if (k->waits) /* nothing is left to kill */
        keeper_dismiss(k);
    keeper_tell(k, KEEPER_KILL, (int32_t)grace_ms);
}

static void keeper_says(struct keeper *k, const struct keeper_message *message) {
    struct stream *s = stream_of(k);
    switch (message->verb) {
    case KEEPER_STARTED:
        if (s != NULL)
            exec_started(s, message->number);
        break;
    case KEEPER_FAILED:
        k->ended = k->gone = true;
        if (s != NULL)
            exec_failed(s, message);
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

/* Keep one that has nothing more to do for the next exec, and let the others end. */
static void keeper_rest(struct keeper *k) {
    if (resting != NULL || k->kills > 0 || k->patience_ns != 0) {
        keeper_dismiss(k);
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
            if (!s->started) /* for all that is known */
                exec_started(s, 0);
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

/* An orphan that has made us its tracer (PTRACE_TRACEME) comes here also when it stops, and stays
   stopped until it is killed. */
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

bool keepers_kill(uint32_t exec, uint32_t grace_ms) {
    for (size_t i = 0; i < keepers_used; i++)
        if (keepers[i].in_use && keepers[i].exec == exec) {
            keepers[i].kills++;
            keeper_kill(&keepers[i], grace_ms);
            return true;
        }
    return false;
}

/* ---- starting ---- */

#define IO_PRIORITY_OF_PROCESS 1
#define IO_CLASS_SHIFT 13

/* What a process hands down of its place among others. Code of the same user can change it in a
   keeper; the rest that is handed down is out of its reach, or put right there (keeper.c). */
struct scheduling {
    uint64_t attributes[7]; /* struct sched_attr, which has no header: policy, nice, limits of use */
    int nice, io_priority;
    cpu_set_t cpus[8];
};

static void look_at_scheduling(pid_t pid, struct scheduling *s) {
    memset(s, 0, sizeof *s);
    /* What cannot be read, as under gVisor, is as equal as it was. musl has no sched_getscheduler. */
    syscall(SYS_sched_getattr, pid, s->attributes, sizeof s->attributes, 0);
    sched_getaffinity(pid, sizeof s->cpus, s->cpus);
    s->nice = getpriority(PRIO_PROCESS, (id_t)pid);
    s->io_priority = (int)syscall(SYS_ioprio_get, IO_PRIORITY_OF_PROCESS, pid);
    if (s->io_priority >> IO_CLASS_SHIFT == 0)
        s->io_priority = 0; /* none of its own: old kernels give two numbers for that */
}

/* Whether a program that this keeper starts will run as one of a new keeper would. */
static bool is_scheduled_like_us(const struct keeper *k) {
    struct scheduling ours, its;
    look_at_scheduling(0, &ours);
    look_at_scheduling(k->pid, &its);
    return memcmp(&ours, &its, sizeof ours) == 0;
}

/* Hand an exec to the keeper that rests, where there is one and it still can. */
static struct keeper *keeper_reuse(const uint8_t *request, size_t length,
                                   const struct keeper_ends *ends) {
    struct keeper *k = resting;
    if (k == NULL)
        return NULL;
    resting = NULL;
    if (!k->dead && !is_scheduled_like_us(k)) {
        keeper_dismiss(k);
    } else if (!k->dead) {
        kill(k->pid, SIGCONT); /* code of the same user may have stopped it */
        if (keeper_next(k->socket, request, length, ends)) {
            *k = (struct keeper){
                .pid = k->pid, .socket = k->socket, .slot = NO_SLOT, .in_use = true};
            return k;
        }
    }
    return NULL; /* it ends, or rests again */
}

static int keeper_fork(struct keeper *k, const struct exec_request *r, uint8_t *request,
                       struct keeper_ends *ends) {
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0)
        return errno;
    k->socket = pair[0];
    ends->socket = pair[1];
    k->pid = keeper_start(r, request, ends, &origin);
    int error = k->pid < 0 ? errno : 0;
    close(pair[1]);
    return error;
}

int keeper_take(struct keeper **taken, uint32_t exec, const struct exec_request *r,
                uint8_t *request, size_t length, struct keeper_ends *ends) {
    struct keeper *k = keeper_reuse(request, length, ends);
    int error = 0;
    if (k == NULL) {
        if ((k = keeper_new()) == NULL)
            return EAGAIN;
        error = keeper_fork(k, r, request, ends);
    }
    if (error != 0) {
        keeper_free(k);
        return error;
    }
    k->exec = exec;
    *taken = k;
    return 0;
}
