#include "keeper.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "leader.h"
#include "tree.h"

#define RETRY_MS 5
#define STRIKES 64
#define STOPS_MAX 64
#define FDS_MAX 8192 /* the agent lowers its own limit to this */
#define OOM_SCORE_MORE 100
#define OOM_SCORE_MAX 1000 /* proc(5) */

uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

struct keeping {
    const struct keeper_ends *ends;
    pid_t leader;
    uint64_t started_ns, deadline_ns;
    enum { IDLE, ASKED, KILLING } kill;
    bool leader_ended, all_told, draining, orphaned;
    int status;
    int drain[2];
};

static void tell(const struct keeping *k, struct keeper_message message) {
    if (send(k->ends->socket, &message, sizeof message, MSG_NOSIGNAL) < 0) {
        /* the agent is gone; its end of the socket says so where we read */
    }
}

static int compare_ints(const void *a, const void *b) {
    int x = *(const int *)a, y = *(const int *)b;
    return (x > y) - (x < y);
}

static void close_between(unsigned first, unsigned last) {
    if (first > last || syscall(SYS_close_range, first, last, 0) == 0)
        return;
    for (unsigned fd = first; fd <= last && fd < FDS_MAX; fd++)
        close((int)fd);
}

/* Drop what belongs to the agent and to other execs; 0, 1 and 2 go later. */
static void close_others(const struct keeper_ends *ends) {
    int kept[] = {ends->socket,  ends->input,    ends->read[0], ends->read[1],
                  ends->write[0], ends->write[1], ends->signals};
    size_t count = sizeof kept / sizeof kept[0];
    qsort(kept, count, sizeof kept[0], compare_ints);
    unsigned next = 3;
    for (size_t i = 0; i < count; i++) {
        if (kept[i] < (int)next)
            continue;
        if (kept[i] > (int)next)
            close_between(next, (unsigned)kept[i] - 1);
        next = (unsigned)kept[i] + 1;
    }
    close_between(next, ~0u);
}

/* Let go of who made this process its tracer (PTRACE_TRACEME) and has stopped for a signal. That
   arrives, but for the SIGTRAP that execve sends only to the traced, which looks like one from the
   process itself. */
static void let_go(pid_t pid, int number) {
    siginfo_t why;
    if (number == SIGTRAP && ptrace(PTRACE_GETSIGINFO, pid, NULL, &why) == 0 &&
        why.si_code == SI_USER && why.si_pid == pid)
        number = 0;
    ptrace(PTRACE_DETACH, pid, NULL, (void *)(intptr_t)number);
}

/* Collect everybody who ended; gives false when nobody is left. Until the agent is told that the
   leader has ended, the write ends of the pipes stay open here: it would only be woken by their
   closing just before. */
static bool reap(struct keeping *k) {
    int status, stops = 0;
    pid_t pid;
    bool ended_now = false;
    while (stops < STOPS_MAX && (pid = waitpid(-1, &status, WNOHANG)) > 0)
        if (WIFSTOPPED(status)) {
            stops++;
            if (k->kill != KILLING)
                let_go(pid, WSTOPSIG(status));
        } else if (pid == k->leader && !k->leader_ended) {
            k->leader_ended = ended_now = true;
            k->status = status;
        }
    if (stops == STOPS_MAX) /* some may stop without end: hear the agent, then go on */
        raise(SIGCHLD);
    if (ended_now) {
        k->all_told = pid < 0;
        tell(k, (struct keeper_message){.verb = KEEPER_ENDED,
                                        .number = k->status,
                                        .left = pid >= 0,
                                        .duration_ns = now_ns() - k->started_ns});
        close(k->ends->write[0]);
        close(k->ends->write[1]);
    }
    return pid >= 0;
}

static void obey(struct keeping *k) {
    struct keeper_message message;
    for (;;) {
        ssize_t n = recv(k->ends->socket, &message, sizeof message, MSG_DONTWAIT);
        if (n < 0)
            return; /* nothing more */
        if (n != sizeof message) {
            k->orphaned = true;
            k->kill = KILLING;
            return;
        }
        if (message.verb == KEEPER_DRAIN)
            k->draining = true;
        else if (message.verb == KEEPER_SIGNAL && !k->leader_ended)
            kill(-k->leader, message.number);
        else if (message.verb == KEEPER_KILL && k->kill != KILLING) {
            uint64_t deadline = now_ns() + (uint64_t)(uint32_t)message.number * 1000000u;
            if (k->kill == IDLE && message.number > 0)
                tree_terminate(k->leader_ended ? 0 : k->leader);
            if (k->kill == IDLE || deadline < k->deadline_ns)
                k->deadline_ns = deadline;
            k->kill = message.number > 0 ? ASKED : KILLING;
        }
    }
}

/* Throw away what background processes write, so that they do not die of a closed pipe. */
static void drain(int *fd) {
    static char waste[65536];
    ssize_t n = read(*fd, waste, sizeof waste);
    if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) {
        close(*fd);
        *fd = -1;
    }
}

/* Kill whom can be found now; gives false when nobody is left. */
static bool kill_round(struct keeping *k) {
    /* A loop of forks ends at once: the kernel lets nobody be born into a group that it kills. Until
       the leader is collected, its number is nobody else's. */
    if (!k->leader_ended)
        kill(-k->leader, SIGKILL);
    for (int i = 0; i < STRIKES; i++) {
        tree_strike(NULL);
        if (!reap(k))
            return false;
    }
    tree_kill(NULL);
    return true;
}

/* Stay until nobody is left below. Gives back only where the agent knows so from the leader's end,
   and asked for no kill: else it waits for this process to end. */
static void keep(struct keeping *k) {
    while (reap(k)) {
        int timeout = -1;
        if (k->kill == ASKED) {
            uint64_t now = now_ns();
            if (now >= k->deadline_ns)
                k->kill = KILLING;
            else
                timeout = (int)((k->deadline_ns - now) / 1000000u) + 1;
        }
        if (k->kill == KILLING) {
            if (!kill_round(k))
                break;
            timeout = RETRY_MS;
        }
        struct pollfd polled[] = {
            {k->ends->signals, POLLIN, 0},
            {k->orphaned ? -1 : k->ends->socket, POLLIN, 0},
            {k->draining ? k->drain[0] : -1, POLLIN, 0},
            {k->draining ? k->drain[1] : -1, POLLIN, 0},
        };
        if (poll(polled, 4, timeout) <= 0)
            continue;
        if (polled[0].revents != 0) { /* only to make it quiet: reap looks for itself */
            char ignored[2048];
            if (read(k->ends->signals, ignored, sizeof ignored) < 0)
                continue;
        }
        if (polled[1].revents != 0)
            obey(k);
        for (int i = 0; i < 2; i++)
            if (polled[2 + i].revents != 0)
                drain(&k->drain[i]);
    }
    if (!k->all_told)
        tell(k, (struct keeper_message){.verb = KEEPER_GONE});
    if (!k->all_told || k->kill != IDLE)
        _exit(0);
}

/* What root in the sandbox can write about this process, although it is fenced, and its children
   inherit. Put back each time: to look at it from the agent costs ten times as much. */
static struct trait {
    const char *path;
    int base, more; /* more: what leaders have more than this process */
    int fd;
    char own[24], leaders[24];
} traits[] = {
    /* When memory runs out, programs go before the agent and the keepers. That a leader inherits its
       score spares it the way through /proc. */
    {.path = "/proc/self/oom_score_adj", .base = 10, .more = OOM_SCORE_MORE},
    {.path = "/proc/self/coredump_filter", .base = 16},
};
#define TRAITS (sizeof traits / sizeof traits[0])
#define SCORE (&traits[0])

static void put(int fd, const char *text) {
    if (fd >= 0 && text[0] != '\0' && pwrite(fd, text, strlen(text), 0) < 0) {
        /* it stays: no exec is worth less for it */
    }
}

static void keep_traits(void) {
    for (struct trait *t = traits; t < traits + TRAITS; t++) {
        char text[sizeof t->own] = "";
        t->fd = open(t->path, O_RDWR | O_CLOEXEC);
        if (t->fd < 0 || read(t->fd, text, sizeof text - 1) <= 0)
            continue;
        long own = strtol(text, NULL, t->base), leaders = own + t->more;
        if (t->more > 0 && leaders > OOM_SCORE_MAX)
            leaders = OOM_SCORE_MAX;
        snprintf(t->own, sizeof t->own, "%ld", own);
        snprintf(t->leaders, sizeof t->leaders, "%ld", leaders);
    }
}

/* Have what is forked next inherit what leaders have. */
static void put_traits(void) {
    for (const struct trait *t = traits; t < traits + TRAITS; t++)
        put(t->fd, t->leaders);
}

/* Do one exec; `memory` is freed as soon as the program runs. */
static void keeper_exec(const struct exec_request *request, void *memory,
                        const struct keeper_ends *ends, const struct agent_origin *origin) {
    struct keeping k = {.ends = ends, .drain = {ends->read[0], ends->read[1]}};
    struct identity who;
    struct failure failure = {0, STAGE_USER};
    failure.error = resolve_user(request->user, &who);
    k.started_ns = now_ns();
    if (failure.error == 0) {
        put_traits();
        k.leader = leader_start(request, ends, &who, origin, &failure);
        put(SCORE->fd, SCORE->own);
    }
    if (failure.error != 0) {
        if (k.leader > 0)
            waitpid(k.leader, NULL, 0);
        tell(&k, (struct keeper_message){
                     .verb = KEEPER_FAILED, .stage = failure.stage, .number = failure.error});
        _exit(0);
    }
    if (request->flags & EXEC_TELL_START)
        tell(&k, (struct keeper_message){.verb = KEEPER_STARTED, .number = k.leader});
    free(memory);
    if (ends->input >= 0)
        close(ends->input);
    /* The agent's; what takes these numbers next must not be what a leader gets as its own. */
    dup2(ends->socket, 0);
    dup2(ends->socket, 1);
    keep(&k);
    for (int i = 0; i < 2; i++)
        if (k.drain[i] >= 0)
            close(k.drain[i]);
}

/* ---- one exec after another ---- */

#define ENDS_MAX 5

union ends_control {
    struct cmsghdr header; /* for its alignment */
    char bytes[CMSG_SPACE(ENDS_MAX * sizeof(int))];
};

bool keeper_next(int socket, const void *request, size_t length, const struct keeper_ends *ends) {
    int fds[ENDS_MAX] = {ends->read[0], ends->read[1], ends->write[0], ends->write[1], ends->input};
    size_t count = ends->input >= 0 ? ENDS_MAX : ENDS_MAX - 1;
    struct keeper_message head = {.verb = KEEPER_NEXT, .number = (int32_t)count};
    struct iovec parts[] = {{&head, sizeof head}, {(void *)request, length}};
    union ends_control control;
    memset(&control, 0, sizeof control);
    struct msghdr message = {.msg_iov = parts,
                             .msg_iovlen = 2,
                             .msg_control = control.bytes,
                             .msg_controllen = CMSG_SPACE(count * sizeof(int))};
    struct cmsghdr *c = CMSG_FIRSTHDR(&message);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(count * sizeof(int));
    memcpy(CMSG_DATA(c), fds, count * sizeof(int));
    return length <= KEEPER_NEXT_MAX && sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT) > 0;
}

/* Wait for another exec; this process ends when there will be none. */
static void wait_for_next(struct keeper_ends *ends, struct exec_request *request) {
    static uint8_t body[KEEPER_NEXT_MAX];
    struct keeper_message head;
    union ends_control control;
    for (;;) {
        struct iovec parts[] = {{&head, sizeof head}, {body, sizeof body}};
        struct msghdr message = {.msg_iov = parts,
                                 .msg_iovlen = 2,
                                 .msg_control = control.bytes,
                                 .msg_controllen = sizeof control.bytes};
        ssize_t n = recvmsg(ends->socket, &message, MSG_CMSG_CLOEXEC);
        if (n < (ssize_t)sizeof head || head.verb == KEEPER_KILL)
            _exit(0);
        if (head.verb != KEEPER_NEXT)
            continue; /* it was for the last one */
        int fds[ENDS_MAX] = {-1, -1, -1, -1, -1};
        struct cmsghdr *c = CMSG_FIRSTHDR(&message);
        size_t size = (size_t)head.number * sizeof(int);
        if (c == NULL || size > sizeof fds || c->cmsg_len != CMSG_LEN(size) ||
            !decode_exec(body, (size_t)n - sizeof head, request))
            _exit(1); /* no files left for this process, say: it counts as killed */
        memcpy(fds, CMSG_DATA(c), size);
        memcpy(ends->read, fds, sizeof ends->read);
        memcpy(ends->write, fds + 2, sizeof ends->write);
        ends->input = fds[4];
        return;
    }
}

static _Noreturn void keeper_run(const struct exec_request *first, void *memory,
                                 const struct keeper_ends *given,
                                 const struct agent_origin *origin) {
    struct keeper_ends ends = *given;
    struct exec_request request = *first;
    sigset_t all;
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    prctl(PR_SET_NAME, "keeper");
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL);
    close_others(&ends);
    keep_traits();
    for (;;) {
        keeper_exec(&request, memory, &ends, origin);
        memory = NULL;
        wait_for_next(&ends, &request);
    }
}

pid_t keeper_start(const struct exec_request *request, void *memory, const struct keeper_ends *ends,
                   const struct agent_origin *origin) {
    pid_t pid = fork();
    if (pid == 0)
        keeper_run(request, memory, ends, origin);
    return pid;
}
