/* A keeper: one small process for each exec, between the agent and the program.

   It is a subreaper, so that everything the exec ever starts stays below it, whatever it does with
   sessions and double forks. It starts the leader, reaps, tells how the leader ended, kills the
   tree when it is asked to, and after the exec goes on reading the pipes that background processes
   still write to. It ends after a kill, or when nothing is left below it; but if nothing was left
   when the leader ended, it waits for the agent to hand it another exec, or to close the socket:
   in a series of execs that spares the fork and the end of a process each.

   It talks to the agent in `struct keeper_message`s over a SOCK_SEQPACKET pair. Code in the
   sandbox cannot write to that: the keeper is undumpable like the agent. Code of the same user may
   kill it; its processes then become children of the agent, which kills them. */
#ifndef APOTHIC_KEEPER_H
#define APOTHIC_KEEPER_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/types.h>

#include "wire.h"

enum keeper_verb {
    /* to the keeper */
    KEEPER_KILL = 1, /* number: the grace in ms */
    KEEPER_SIGNAL,   /* number: sent to the leader's process group */
    KEEPER_DRAIN,    /* the agent reads the pipes no more */
    KEEPER_NEXT,     /* another exec: its request follows, its ends come along; number: how many */
    /* from the keeper */
    KEEPER_STARTED, /* number: the leader's process id */
    KEEPER_FAILED,  /* number: errno; stage */
    KEEPER_ENDED,   /* number: wait status; left: processes remain, else it waits; duration_ns */
    KEEPER_GONE,    /* now nothing remains */
};

struct keeper_message {
    uint32_t verb, stage;
    int32_t number;
    uint32_t left;
    uint64_t duration_ns;
};

/* Everything is closed by whoever calls keeper_start, whether it works or not. */
struct keeper_ends {
    int socket;               /* the keeper's end */
    int input;                /* read end for the leader's stdin, or -1 */
    int read[2], write[2];    /* both ends of stdout and of stderr */
    int signals;              /* a signalfd with SIGCHLD */
};

/* What execs get back that the agent has changed for itself. */
struct agent_origin {
    struct rlimit files;
    gid_t gid;
};

/* Fork a keeper; gives its process id, or -1 with errno. The keeper frees the request's memory,
   `memory`, when it has no more use for it. */
pid_t keeper_start(const struct exec_request *request, void *memory, const struct keeper_ends *ends,
                   const struct agent_origin *origin);

#define KEEPER_NEXT_MAX 16384 /* bytes of a request that is handed over; a longer one is forked with */

/* Hand another exec to a keeper that waits; gives false where that cannot be.
   socket: the agent's end. ends: as for keeper_start, but for its own socket and signals. */
bool keeper_next(int socket, const void *request, size_t length, const struct keeper_ends *ends);

uint64_t now_ns(void);

#endif
