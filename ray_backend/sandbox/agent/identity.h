/* Whom a program runs as. */
#ifndef APOTHIC_IDENTITY_H
#define APOTHIC_IDENTITY_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#include "wire.h"

#define GROUPS_MAX 256

struct identity {
    bool given;
    uid_t uid;
    gid_t gid, groups[GROUPS_MAX];
    size_t group_count;
    char home[PATH_MAX_BYTES + 1];
};

/* Look up "name", "uid", "name:group" or "uid:gid", as `docker exec --user` takes them; empty is
   nobody else. Gives 0 or an errno. */
int resolve_user(const char *text, struct identity *who);

/* Become that user, or, without one, who the agent was, whose group was `own`. Gives 0 or an
   errno. */
int become(const struct identity *who, gid_t own);

#endif
