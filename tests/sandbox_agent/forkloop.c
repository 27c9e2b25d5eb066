/* Fork without end, in one of two ways, under a limit on processes.

   usage: forkloop CGROUP bomb|runner

   `bomb`: every process forks again and again. `runner`: every process becomes another one as fast
   as it can (fork, let the parent exit, take a session of its own), so that no look at /proc is
   ever true for long.

   Without a limit it would take the machine down: it refuses to start unless it is itself in
   CGROUP and CGROUP/pids.max is a small number. Every process ends after SECONDS in any case. */
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define LIMIT_MAX 256
#define RUNNERS_LOG2 4
#define SECONDS 20

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static FILE *open_in(const char *cgroup, const char *name) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", cgroup, name);
    return fopen(path, "r");
}

static int is_limited(const char *cgroup) {
    int limit = 0, pid = 0, mine = 0;
    FILE *max = open_in(cgroup, "pids.max"), *procs = open_in(cgroup, "cgroup.procs");
    if (max == NULL || procs == NULL || fscanf(max, "%d", &limit) != 1)
        return 0;
    /* The kernel translates the ids to the reader's process-id namespace. */
    while (fscanf(procs, "%d", &pid) == 1)
        mine |= pid == getpid();
    fclose(max);
    fclose(procs);
    return mine && limit > 0 && limit <= LIMIT_MAX;
}

int main(int argc, char *argv[]) {
    double end = now() + SECONDS;
    if (argc != 3 || !is_limited(argv[1])) {
        fputs("forkloop: no limit on processes here\n", stderr);
        return 2;
    }
    puts("ready");
    fflush(stdout);
    if (strcmp(argv[2], "bomb") == 0)
        while (now() < end)
            if (fork() < 0)
                sched_yield();
    if (strcmp(argv[2], "runner") == 0) {
        for (int depth = 0; depth < RUNNERS_LOG2; depth++)
            if (fork() < 0)
                return 1;
        while (now() < end) {
            pid_t pid = fork();
            if (pid > 0)
                return 0;
            if (pid == 0)
                setsid();
        }
    }
    return 0;
}
