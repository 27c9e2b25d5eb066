#include "files.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <unistd.h>

#define OPEN_FLAGS (O_CLOEXEC | O_NOCTTY | O_NONBLOCK)
#define CREATE_TRIES 8
#define LINKS_MAX 40
#define NO_REPLACE 1 /* RENAME_NOREPLACE, which not every libc names */

static int result(int returned) {
    return returned == 0 ? 0 : errno;
}

int files_stat(const struct file_request *r, struct stat *st, char link[PATH_MAX_BYTES],
               size_t *link_length) {
    *link_length = 0;
    if (!(r->flags & STAT_NO_FOLLOW))
        return result(stat(r->path, st));
    if (lstat(r->path, st) != 0)
        return errno;
    if (S_ISLNK(st->st_mode)) {
        ssize_t n = readlink(r->path, link, PATH_MAX_BYTES);
        if (n < 0)
            return errno;
        *link_length = (size_t)n;
    }
    return 0;
}

static struct identity heir;

void files_give_to(const struct identity *who) {
    heir = *who;
}

/* What is new belongs to whom programs run as, but for a group that its directory has given it.
   Where that is refused, as by a network file system, it stays as that has made it. */
static void bequeath(int fd) {
    struct stat st;
    if (!heir.given || fstat(fd, &st) != 0)
        return;
    gid_t gid = st.st_gid == getegid() ? heir.gid : (gid_t)-1;
    if (fchownat(fd, "", heir.uid, gid, AT_EMPTY_PATH) == 0 && S_ISREG(st.st_mode) &&
        st.st_mode & (S_ISUID | S_ISGID) && fchmod(fd, st.st_mode & 07777) != 0) {
        /* the bits that a new owner costs a file are gone */
    }
}

/* Make a directory, and with `parents` what is missing before it; without `whole` only that. Every
   step starts from the directory that the last one opened: code inside, which may rename what
   belongs to it meanwhile, gets nothing that this did not make. */
static int make_directory(const char *path, mode_t mode, bool parents, bool whole) {
    char name[NAME_MAX + 1];
    int error = 0, at = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    bool none = true;
    if (at < 0)
        return errno;
    for (;;) {
        path += strspn(path, "/");
        size_t n = strcspn(path, "/");
        bool last = path[n + strspn(path + n, "/")] == '\0';
        if (n == 0 || (last && !whole))
            break;
        if (n > NAME_MAX) {
            error = ENAMETOOLONG;
            break;
        }
        memcpy(name, path, n);
        name[n] = '\0';
        none = false;
        bool made = (last || parents) && mkdirat(at, name, last ? mode : 0777) == 0;
        if (!made && (last || (parents && errno != EEXIST))) {
            error = errno;
            break;
        }
        int next = openat(at, name, O_PATH | O_DIRECTORY | O_CLOEXEC | (made ? O_NOFOLLOW : 0));
        if (next < 0) {
            error = errno;
            break;
        }
        close(at);
        at = next;
        if (made)
            bequeath(at);
        path += n;
    }
    close(at);
    return none && whole && error == 0 ? EEXIST : error;
}

int files_mkdir(const struct file_request *r) {
    struct stat st;
    int error =
        make_directory(r->path, (mode_t)(r->mode & 07777), (r->flags & MKDIR_PARENTS) != 0, true);
    if (error == EEXIST && (r->flags & MKDIR_EXIST_OK) && stat(r->path, &st) == 0 &&
        S_ISDIR(st.st_mode))
        error = 0;
    return error;
}

int files_remove(const struct file_request *r) {
    return result(r->flags & REMOVE_DIRECTORY ? rmdir(r->path) : unlink(r->path));
}

int files_rename(const struct file_request *r) {
    if (r->flags & RENAME_NO_REPLACE)
        return result((int)syscall(SYS_renameat2, AT_FDCWD, r->path, AT_FDCWD, r->target,
                                   NO_REPLACE));
    return result(rename(r->path, r->target));
}

/* Close what cannot be read or written without waiting for somebody. */
static int admit(int fd, struct stat *st) {
    int error = 0;
    if (fstat(fd, st) != 0)
        error = errno;
    else if (S_ISDIR(st->st_mode))
        error = EISDIR;
    else if (!S_ISREG(st->st_mode) && !S_ISCHR(st->st_mode))
        error = EOPNOTSUPP;
    if (error != 0)
        close(fd);
    return error;
}

/* Opening a FIFO without a partner or a socket fails with ENXIO, which names a missing device. */
static int open_error(void) {
    return errno == ENXIO ? EOPNOTSUPP : errno;
}

int files_open_read(const struct file_request *r, int *fd, struct stat *st) {
    *fd = open(r->path, O_RDONLY | OPEN_FLAGS);
    if (*fd < 0)
        return open_error();
    int error = admit(*fd, st);
    if (error == 0 && r->offset > INT64_MAX) {
        close(*fd);
        error = EINVAL;
    }
    return error;
}

/* O_CREAT only where nothing is: the kernel refuses it on others' files in sticky directories,
   and to know that the file is new is to know that it may be removed. */
static int open_or_create(const char *path, const struct file_request *r, bool *created) {
    int flags = O_WRONLY | OPEN_FLAGS | (r->flags & WRITE_APPEND ? O_APPEND : 0);
    mode_t mode = (mode_t)(r->mode & 07777);
    for (int tries = 0; tries < CREATE_TRIES; tries++) {
        int fd = r->flags & WRITE_EXCLUSIVE ? -1 : open(path, flags);
        *created = false;
        if (fd >= 0 || (!(r->flags & WRITE_EXCLUSIVE) && errno != ENOENT))
            return fd;
        fd = open(path, flags | O_CREAT | O_EXCL, mode);
        *created = fd >= 0;
        if (fd >= 0)
            bequeath(fd);
        if (fd >= 0 || r->flags & WRITE_EXCLUSIVE || errno != EEXIST)
            return fd;
    }
    return open(path, flags | O_CREAT, mode); /* a symbolic link to nothing */
}

/* Reserve room for what will be written, where the file system can. */
static int reserve(int fd, uint64_t from, uint64_t length, off_t old_size) {
    if (length == LENGTH_UNKNOWN || length == 0 || from > (uint64_t)INT64_MAX - length)
        return 0;
    if (fallocate(fd, FALLOC_FL_KEEP_SIZE, (off_t)from, (off_t)length) == 0 ||
        (errno != ENOSPC && errno != EDQUOT && errno != EFBIG))
        return 0;
    int error = errno;
    if (ftruncate(fd, old_size) != 0) {
        /* what had been reserved stays so until the file is next cut */
    }
    return error;
}

/* Open the directory of a path whose symbolic links have been followed, also those that lead to
   nothing, and give the name in it. */
static int open_parent(const char *path, int *directory, char name[NAME_MAX + 1]) {
    char at[PATH_MAX_BYTES + 1], link[PATH_MAX_BYTES + 1];
    strcpy(at, path);
    for (int links = 0; links < LINKS_MAX; links++) {
        char *base = strrchr(at, '/') + 1; /* paths are absolute */
        size_t n = strlen(base), stem = (size_t)(base - at);
        if (n == 0 || strcmp(base, ".") == 0 || strcmp(base, "..") == 0)
            return EISDIR;
        if (n > NAME_MAX)
            return ENAMETOOLONG;
        ssize_t length = readlink(at, link, PATH_MAX_BYTES);
        if (length < 0 && errno != EINVAL && errno != ENOENT)
            return errno;
        if (length < 0) {
            strcpy(name, base);
            *base = '\0';
            *directory = open(at, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
            return *directory < 0 ? errno : 0;
        }
        link[length] = '\0';
        if (link[0] == '/')
            stem = 0;
        if (stem + (size_t)length > PATH_MAX_BYTES)
            return ENAMETOOLONG;
        strcpy(at + stem, link);
    }
    return ELOOP;
}

/* Make a file beside the one that it shall replace, with its mode and owner. */
static int open_scratch(const struct file_request *r, struct written_file *file) {
    struct stat old, new;
    mode_t mode = (mode_t)(r->mode & 07777);
    int error = 0, existing = openat(file->directory, file->name, O_WRONLY | OPEN_FLAGS);
    if (existing < 0 && errno != ENOENT)
        return open_error();
    if (existing >= 0 && (error = admit(existing, &old)) != 0)
        return error;
    if (existing >= 0)
        close(existing);
    if (existing >= 0 && !S_ISREG(old.st_mode))
        return EOPNOTSUPP;
    for (int tries = 0; tries < CREATE_TRIES; tries++) {
        uint64_t number = 0;
        if (getrandom(&number, sizeof number, 0) != sizeof number)
            return errno;
        snprintf(file->scratch, sizeof file->scratch, ".apothic-%016llx",
                 (unsigned long long)number);
        /* Nobody reads the new content who may not read the old. */
        file->fd = openat(file->directory, file->scratch,
                          O_WRONLY | O_CREAT | O_EXCL | OPEN_FLAGS, existing >= 0 ? 0600 : mode);
        if (file->fd >= 0 || errno != EEXIST)
            break;
    }
    if (file->fd < 0)
        return errno;
    if (existing < 0) {
        bequeath(file->fd);
    } else {
        if (fstat(file->fd, &new) != 0)
            error = errno;
        else if ((new.st_uid != old.st_uid || new.st_gid != old.st_gid) &&
                 fchown(file->fd, old.st_uid, old.st_gid) != 0)
            error = errno;
        else if (fchmod(file->fd, old.st_mode & 07777) != 0)
            error = errno;
    }
    if (error == 0)
        error = reserve(file->fd, 0, r->length, 0);
    if (error != 0) {
        unlinkat(file->directory, file->scratch, 0);
        close(file->fd);
    }
    return error;
}

static int open_replacement(const struct file_request *r, struct written_file *file) {
    uint32_t impossible = WRITE_APPEND | WRITE_KEEP_REST | WRITE_EXCLUSIVE;
    if (r->offset != 0 || r->flags & impossible)
        return EINVAL;
    int error = open_parent(r->path, &file->directory, file->name);
    if (error == ENOENT && r->flags & WRITE_MAKE_PARENTS &&
        (error = make_directory(r->path, 0777, true, false)) == 0)
        error = open_parent(r->path, &file->directory, file->name);
    if (error != 0)
        return error;
    file->regular = true;
    if ((error = open_scratch(r, file)) != 0)
        close(file->directory);
    return error;
}

int files_open_write(const struct file_request *r, struct written_file *file) {
    struct stat st;
    *file = (struct written_file){.fd = -1, .directory = -1};
    if (r->offset > INT64_MAX || (r->length != LENGTH_UNKNOWN && r->length > INT64_MAX))
        return EFBIG;
    if (r->flags & WRITE_REPLACE)
        return open_replacement(r, file);
    int fd = open_or_create(r->path, r, &file->created);
    if (fd < 0 && errno == ENOENT && r->flags & WRITE_MAKE_PARENTS) {
        int error = make_directory(r->path, 0777, true, false);
        if (error != 0)
            return error;
        fd = open_or_create(r->path, r, &file->created);
    }
    if (fd < 0)
        return open_error();
    int error = admit(fd, &st);
    if (error != 0)
        return error;
    file->fd = fd;
    file->regular = S_ISREG(st.st_mode);
    file->append = (r->flags & WRITE_APPEND) != 0;
    file->cut = file->regular && !(r->flags & (WRITE_APPEND | WRITE_KEEP_REST));
    file->offset = r->offset;
    uint64_t from = file->append ? (uint64_t)st.st_size : r->offset;
    if (!file->regular || file->created || st.st_size == 0)
        return 0; /* nothing is lost when it fails */
    if ((error = reserve(fd, from, r->length, st.st_size)) != 0)
        close(fd);
    return error;
}

int files_write(struct written_file *file, const uint8_t *bytes, size_t n) {
    while (n > 0) {
        if (file->offset > (uint64_t)INT64_MAX - n)
            return EFBIG;
        ssize_t done = file->regular && !file->append
                           ? pwrite(file->fd, bytes, n, (off_t)file->offset)
                           : write(file->fd, bytes, n);
        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0)
            return errno;
        file->offset += (uint64_t)done;
        bytes += done;
        n -= (size_t)done;
    }
    return 0;
}

int files_finish(struct written_file *file, struct stat *st) {
    int error = 0;
    if (file->cut && ftruncate(file->fd, (off_t)file->offset) != 0)
        error = errno;
    if (error == 0 && fstat(file->fd, st) != 0)
        error = errno;
    if (error != 0) {
        files_abandon(file);
        return error;
    }
    error = result(close(file->fd)); /* some file systems tell of a full quota only here */
    if (file->directory < 0)
        return error;
    if (error == 0)
        error = result(renameat(file->directory, file->scratch, file->directory, file->name));
    if (error != 0)
        unlinkat(file->directory, file->scratch, 0);
    close(file->directory);
    return error;
}

void files_abandon(struct written_file *file) {
    char name[64], path[PATH_MAX_BYTES + 1];
    struct stat mine, found;
    if (file->directory >= 0) {
        unlinkat(file->directory, file->scratch, 0);
        close(file->directory);
    }
    if (file->created && fstat(file->fd, &mine) == 0) {
        snprintf(name, sizeof name, "/proc/self/fd/%d", file->fd);
        ssize_t n = readlink(name, path, PATH_MAX_BYTES);
        path[n > 0 ? n : 0] = '\0';
        if (n > 0 && lstat(path, &found) == 0 && found.st_ino == mine.st_ino &&
            found.st_dev == mine.st_dev)
            unlink(path);
    }
    close(file->fd);
}
