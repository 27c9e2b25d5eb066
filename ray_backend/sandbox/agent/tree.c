#include "tree.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SEEN_MAX 65536   /* more are found by the next walk */
#define STOP_ROUNDS 32   /* who cannot be stopped by then is in uninterruptible sleep */

enum relation { UNKNOWN, BELOW, ELSEWHERE };

struct seen {
    pid_t pid, parent;
    char state;
    uint8_t relation;
};

/* Untouched, and so no memory, until the first kill. */
static struct seen seen[SEEN_MAX];
static size_t seen_count;

/* Fields 3 and 4 of /proc/PID/stat. The name before them, in brackets, may hold anything. */
static bool read_stat(int proc_fd, const char *name, struct seen *entry) {
    char path[64], text[512];
    if (snprintf(path, sizeof path, "%s/stat", name) >= (int)sizeof path)
        return false;
    int fd = openat(proc_fd, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    if (n <= 0)
        return false;
    text[n] = '\0';
    const char *at = strrchr(text, ')');
    int parent;
    if (at == NULL || sscanf(at + 1, " %c %d", &entry->state, &parent) != 2)
        return false;
    entry->pid = (pid_t)strtol(name, NULL, 10);
    entry->parent = (pid_t)parent;
    entry->relation = UNKNOWN;
    return true;
}

static int by_pid(const void *a, const void *b) {
    pid_t x = ((const struct seen *)a)->pid, y = ((const struct seen *)b)->pid;
    return (x > y) - (x < y);
}

static struct seen *find(pid_t pid) {
    struct seen key = {.pid = pid};
    return bsearch(&key, seen, seen_count, sizeof seen[0], by_pid);
}

/* Settle the relation of one process and of all that lie between it and a settled one. */
static void settle(struct seen *entry, pid_t self, spared_fn spared) {
    enum relation relation = ELSEWHERE;
    struct seen *at = entry;
    /* A walk is no snapshot, so that the parents might seem to go round: count the steps. */
    for (size_t steps = 0; at != NULL && steps <= seen_count; steps++) {
        if (at->relation != UNKNOWN) {
            relation = at->relation;
            break;
        }
        if (at->parent == self) {
            relation = spared != NULL && spared(at->pid) ? ELSEWHERE : BELOW;
            break;
        }
        at = find(at->parent);
    }
    for (at = entry; at != NULL && at->relation == UNKNOWN; at = find(at->parent)) {
        at->relation = (uint8_t)relation;
        if (at->parent == self)
            break;
    }
}

/* Fill `seen` with the descendants of this process, zombies left out. */
static void look(spared_fn spared) {
    pid_t self = getpid();
    seen_count = 0;
    int proc_fd = open("/proc", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *proc = proc_fd < 0 ? NULL : fdopendir(proc_fd);
    if (proc == NULL) {
        if (proc_fd >= 0)
            close(proc_fd);
        return;
    }
    const struct dirent *entry;
    while (seen_count < SEEN_MAX && (entry = readdir(proc)) != NULL)
        if (entry->d_name[0] >= '1' && entry->d_name[0] <= '9' &&
            read_stat(proc_fd, entry->d_name, &seen[seen_count]))
            seen_count++;
    closedir(proc);
    qsort(seen, seen_count, sizeof seen[0], by_pid);
    for (size_t i = 0; i < seen_count; i++)
        settle(&seen[i], self, spared);
    size_t kept = 0;
    for (size_t i = 0; i < seen_count; i++)
        if (seen[i].relation == BELOW && seen[i].state != 'Z' && seen[i].state != 'X')
            seen[kept++] = seen[i];
    seen_count = kept;
}

void tree_terminate(pid_t group) {
    if (group > 0) {
        kill(-group, SIGTERM);
        kill(-group, SIGCONT);
    }
    look(NULL);
    for (size_t i = 0; i < seen_count; i++) {
        if (group > 0 && getpgid(seen[i].pid) == group)
            continue;
        kill(seen[i].pid, SIGTERM);
        kill(seen[i].pid, SIGCONT);
    }
}

size_t tree_kill(spared_fn spared) {
    for (int round = 0; round < STOP_ROUNDS; round++) {
        size_t running = 0;
        look(spared);
        for (size_t i = 0; i < seen_count; i++)
            if (seen[i].state != 'T' && seen[i].state != 't') {
                kill(seen[i].pid, SIGSTOP);
                running++;
            }
        if (running == 0)
            break;
        sched_yield();
    }
    for (size_t i = 0; i < seen_count; i++)
        kill(seen[i].pid, SIGKILL);
    return seen_count;
}

void tree_strike(spared_fn spared) {
    static char text[65536]; /* who does not fit is struck the next time */
    char path[64];
    snprintf(path, sizeof path, "/proc/self/task/%d/children", (int)getpid());
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? 0 : read(fd, text, sizeof text - 1);
    if (fd >= 0)
        close(fd);
    text[n > 0 ? n : 0] = '\0';
    char *end;
    for (const char *at = text; *at != '\0'; at = end + 1) {
        pid_t pid = (pid_t)strtol(at, &end, 10);
        if (end == at || *end != ' ') /* cut off, perhaps in the middle of a number */
            break;
        if (spared == NULL || !spared(pid))
            kill(pid, SIGKILL);
    }
}
