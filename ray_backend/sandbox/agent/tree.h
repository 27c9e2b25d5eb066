/* The process tree as /proc shows it, and the killing of everything below one process.

   Who is a descendant is told by parent ids alone. That is enough, because everybody who calls here
   is a subreaper (or PID 1): a process whose parent dies becomes a child of its nearest subreaper,
   so that no double fork, setsid or cleared environment leads out of the tree. A caller without
   children has no descendants, which makes waitpid's ECHILD the proof that a kill is complete.

   What is not covered: a process in uninterruptible sleep dies when the kernel lets it. A process
   id that is freed and given out again between the look and the kill would be hit by mistake; that
   takes a whole round of the id space in the time of one walk (about 10 us a process). */
#ifndef APOTHIC_TREE_H
#define APOTHIC_TREE_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

/* Whether the subtree of this child of ours is left alone. */
typedef bool (*spared_fn)(pid_t child);

/* Ask every descendant to end: SIGTERM once, and SIGCONT so that a stopped one hears it. First a whole
   process group, unless that is 0: a fork loop ends with one call, and a walk beside it takes long. */
void tree_terminate(pid_t group);

/* Kill every descendant of this process: stop them all first, so that a fork loop that runs into
   a limit on processes cannot outrun the walk, then SIGKILL. Gives how many were alive at the last
   look. Call until nobody is left: some may have been born or adopted meanwhile. spared may be
   NULL. */
size_t tree_kill(spared_fn spared);

/* Send SIGKILL to every child of this process, at once and without a walk, which takes so long
   that a process may have forked and exited many times before its signal comes. Such a one is our
   child most of the time, so that repeating this catches it. */
void tree_strike(spared_fn spared);

#endif
