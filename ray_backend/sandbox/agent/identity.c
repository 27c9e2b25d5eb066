#include "identity.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define LINE_MAX_BYTES 4096

static bool parse_id(const char *text, uint32_t *id) {
    char *end;
    if (text[0] < '0' || text[0] > '9')
        return false;
    errno = 0;
    unsigned long v = strtoul(text, &end, 10);
    *id = (uint32_t)v;
    return errno == 0 && *end == '\0' && v < UINT32_MAX;
}

/* Split a line of passwd or group at its colons; gives how many fields there are. */
static size_t split(char *line, char *fields[], size_t limit) {
    size_t count = 0;
    line[strcspn(line, "\n")] = '\0';
    for (char *at = line; at != NULL && count < limit;) {
        fields[count++] = at;
        at = strchr(at, ':');
        if (at != NULL)
            *at++ = '\0';
    }
    return count;
}

/* The image's own files are read, not libc's lookups: those may ask a daemon in the container. */
static FILE *open_table(const char *path) {
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (fd >= 0 && fstat(fd, &st) == 0 && S_ISREG(st.st_mode))
        return fdopen(fd, "r");
    if (fd >= 0)
        close(fd);
    return NULL;
}

/* Find a user by name or id; without an entry `found` stays false. */
static void find_user(const char *name, bool numeric, uint32_t id, struct identity *who,
                      char *real_name, bool *found) {
    char line[LINE_MAX_BYTES], *fields[7];
    uint32_t uid, gid;
    FILE *table = open_table("/etc/passwd");
    if (table == NULL)
        return;
    while (!*found && fgets(line, sizeof line, table) != NULL) {
        if (split(line, fields, 7) < 6 || !parse_id(fields[2], &uid) || !parse_id(fields[3], &gid))
            continue;
        if (strcmp(fields[0], name) != 0 && !(numeric && uid == id))
            continue;
        who->uid = uid;
        who->gid = gid;
        snprintf(who->home, sizeof who->home, "%s", fields[5]);
        snprintf(real_name, LINE_MAX_BYTES, "%s", fields[0]);
        *found = true;
    }
    fclose(table);
}

static bool lists(char *members, const char *name) {
    for (char *rest, *at = strtok_r(members, ",", &rest); at; at = strtok_r(NULL, ",", &rest))
        if (strcmp(at, name) == 0)
            return true;
    return false;
}

/* Find the group called `group`, or, without one, those that have `member` in their list. */
static bool find_groups(const char *group, const char *member, struct identity *who) {
    char line[LINE_MAX_BYTES], *fields[4];
    uint32_t gid;
    bool found = false;
    FILE *table = open_table("/etc/group");
    if (table == NULL)
        return false;
    while (fgets(line, sizeof line, table) != NULL) {
        size_t count = split(line, fields, 4);
        if (count < 3 || !parse_id(fields[2], &gid))
            continue;
        if (group != NULL && strcmp(fields[0], group) == 0) {
            who->gid = gid;
            found = true;
            break;
        }
        if (group == NULL && count == 4 && who->group_count < GROUPS_MAX &&
            lists(fields[3], member))
            who->groups[who->group_count++] = gid;
    }
    fclose(table);
    return found;
}

int resolve_user(const char *text, struct identity *who) {
    char name[LINE_MAX_BYTES], real_name[LINE_MAX_BYTES] = "";
    uint32_t id = 0;
    bool found = false;
    memset(who, 0, sizeof *who);
    if (text[0] == '\0')
        return 0;
    if ((size_t)snprintf(name, sizeof name, "%s", text) >= sizeof name)
        return EINVAL;
    char *group = strchr(name, ':');
    if (group != NULL)
        *group++ = '\0';
    bool numeric = parse_id(name, &id);
    strcpy(who->home, "/");
    find_user(name, numeric, id, who, real_name, &found);
    if (!found && !numeric)
        return ENOENT;
    if (!found)
        who->uid = id;
    if (group == NULL)
        find_groups(NULL, real_name, who);
    else if (parse_id(group, &id))
        who->gid = id;
    else if (!find_groups(group, NULL, who))
        return ENOENT;
    if (who->group_count < GROUPS_MAX)
        who->groups[who->group_count++] = who->gid;
    who->given = true;
    return 0;
}

int become(const struct identity *who, gid_t own) {
    gid_t gid = who->given ? who->gid : own;
    if (who->given && getuid() == who->uid && own == who->gid && geteuid() != 0)
        return 0; /* an agent that is nobody special can still be asked for itself */
    if (who->given && setgroups(who->group_count, who->groups) != 0)
        return errno;
    if (setresgid(gid, gid, gid) != 0)
        return errno;
    if (who->given && setresuid(who->uid, who->uid, who->uid) != 0)
        return errno;
    return 0;
}
