/* Files and directories as streams, and the requests on names that are answered at once. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define ENTRY_HEAD 3 /* type (u8), length of the name (u16) */

extern char **environ;

static int blob_fd = -1;

/* Pass on the next piece of a file. */
static void pump_read(struct stream *s) {
    uint64_t most = FRAME_BODY_MAX - 1;
    if (most > s->left)
        most = s->left;
    if (most > 0 && s->credit == 0)
        return;
    if (most > s->credit)
        most = s->credit;
    uint8_t *body = frame_open(&out);
    ssize_t n = 0;
    if (most > 0)
        n = s->seekable ? pread(s->fd, body + 1, (size_t)most, (off_t)s->offset)
                        : read(s->fd, body + 1, (size_t)most);
    if (n > 0) {
        put_u8(body, CHANNEL_STDOUT);
        frame_close(&out, FRAME_OUTPUT, s->id, (size_t)n + 1);
        s->offset += (uint64_t)n;
        s->left -= (uint64_t)n;
        s->credit -= (uint64_t)n;
        if (s->left > 0)
            return;
    }
    if (n < 0 && errno == EINTR)
        return;
    if (n < 0)
        send_error(s->id, errno, STAGE_REQUEST);
    else
        send_empty(FRAME_DONE, s->id);
    stream_free(s);
}

/* Pass on as many names as fit. */
static void pump_list(struct stream *s) {
    uint8_t *body = frame_open(&out), *at = put_u8(body, CHANNEL_STDOUT);
    const struct dirent *entry;
    s->begun = true;
    for (;;) {
        long here = telldir(s->dir);
        errno = 0;
        if ((entry = readdir(s->dir)) == NULL)
            break;
        const char *name = entry->d_name;
        if (strcmp(name, ".") == 0 || strcmp(name, "..") == 0)
            continue;
        size_t n = strlen(name), used = (size_t)(at - body);
        if (used + ENTRY_HEAD + n > FRAME_BODY_MAX || ENTRY_HEAD + n > s->credit) {
            seekdir(s->dir, here); /* it waits for the next frame, or for credit */
            break;
        }
        at = put_u8(at, entry->d_type);
        at = put_u16(at, (uint16_t)n);
        at = put_bytes(at, name, n);
        s->credit -= ENTRY_HEAD + n;
    }
    int error = errno;
    if (at > body + 1)
        frame_close(&out, FRAME_OUTPUT, s->id, (size_t)(at - body));
    if (entry != NULL)
        return;
    if (error != 0)
        send_error(s->id, error, STAGE_REQUEST);
    else
        send_empty(FRAME_DONE, s->id);
    stream_free(s);
}

void transfer_pump(struct stream *s) {
    if (s->kind == WRITE)
        grant_input(s);
    else if (room_for_contents())
        s->kind == READ ? pump_read(s) : pump_list(s);
}

/* A file is always ready: only credit and room hold it up. */
void transfer_poll(const struct stream *s) {
    bool runnable = (s->kind == READ && (s->credit > 0 || s->left == 0)) ||
                    (s->kind == LIST && (!s->begun || s->credit >= ENTRY_HEAD + NAME_MAX));
    if (runnable && room_for_contents())
        wake_at(0);
}

/* Give what a descriptor holds, from an offset on, as a stream. */
static int start_read(uint32_t id, int fd, const struct stat *st, const struct file_request *r) {
    struct stream *s = stream_new(READ, id);
    if (s == NULL) {
        close(fd);
        return EAGAIN;
    }
    s->fd = fd;
    s->credit = r->credit;
    s->offset = r->offset;
    s->left = r->length;
    s->seekable = S_ISREG(st->st_mode);
    send_stat(FRAME_OPENED, id, st, "", 0);
    return 0;
}

static int write_all(int fd, const void *bytes, size_t n) {
    for (size_t done = 0; done < n;) {
        ssize_t written = write(fd, (const char *)bytes + done, n - done);
        if (written < 0)
            return errno;
        done += (size_t)written;
    }
    return 0;
}

/* The environment of the container, as a file in memory: NUL ends each entry. */
static int environment_file(int *fd) {
    int error = 0;
    *fd = memfd_create("environ", MFD_CLOEXEC);
    if (*fd < 0)
        return errno;
    for (char **entry = environ; *entry != NULL && error == 0; entry++)
        error = write_all(*fd, *entry, strlen(*entry) + 1);
    if (error != 0)
        close(*fd);
    return error;
}

static int start_memory_read(uint8_t type, uint32_t id, struct file_request *r) {
    struct stat st;
    int fd, error = 0;
    r->length = LENGTH_UNKNOWN;
    if (type == FRAME_ENVIRON)
        error = environment_file(&fd);
    else if ((fd = blob_fd >= 0 ? fcntl(blob_fd, F_DUPFD_CLOEXEC, 3)
                                : memfd_create("blob", MFD_CLOEXEC)) < 0)
        error = errno;
    if (error != 0)
        return error;
    if (fstat(fd, &st) != 0) {
        error = errno;
        close(fd);
        return error;
    }
    return start_read(id, fd, &st, r);
}

static int start_list(uint32_t id, const struct file_request *r) {
    int fd = open(r->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NONBLOCK);
    DIR *dir = fd < 0 ? NULL : fdopendir(fd);
    struct stream *s = dir == NULL ? NULL : stream_new(LIST, id);
    if (s != NULL) {
        s->dir = dir;
        s->credit = r->credit;
        return 0;
    }
    int error = dir == NULL ? errno : EAGAIN;
    if (dir != NULL)
        closedir(dir);
    else if (fd >= 0)
        close(fd);
    return error;
}

static int start_write(uint32_t id, const struct file_request *r) {
    struct stream *s = stream_new(WRITE, id);
    if (s == NULL)
        return EAGAIN;
    int error = files_open_write(r, &s->file);
    if (error != 0)
        stream_free(s);
    return error;
}

void transfer_request(const struct frame *frame) {
    static struct file_request r;
    static char link[PATH_MAX_BYTES];
    struct stat st;
    size_t link_length = 0;
    int fd = -1, error = decode_file(frame->type, frame->body, frame->length, &r);
    uint32_t id = frame->stream;
    bool done = false;
    if (error == -1) {
        protocol_error("a malformed request");
        return;
    }
    if (error == 0)
        switch (frame->type) {
        case FRAME_STAT:
            if ((error = files_stat(&r, &st, link, &link_length)) == 0)
                send_stat(FRAME_DONE, id, &st, link, link_length);
            break;
        case FRAME_MKDIR:
            error = files_mkdir(&r);
            done = true;
            break;
        case FRAME_REMOVE:
            error = files_remove(&r);
            done = true;
            break;
        case FRAME_RENAME:
            error = files_rename(&r);
            done = true;
            break;
        case FRAME_READ:
            if ((error = files_open_read(&r, &fd, &st)) == 0)
                error = start_read(id, fd, &st, &r);
            break;
        case FRAME_GET_BLOB:
        case FRAME_ENVIRON:
            error = start_memory_read(frame->type, id, &r);
            break;
        case FRAME_LIST:
            error = start_list(id, &r);
            break;
        case FRAME_WRITE:
            error = start_write(id, &r);
            break;
        default:
            break;
        }
    if (error != 0)
        send_error(id, error, STAGE_REQUEST);
    else if (done)
        send_empty(FRAME_DONE, id);
}

/* A new file each time: whoever reads the old one goes on doing so. */
void transfer_set_blob(const struct frame *frame) {
    int error = frame->length > BLOB_MAX ? EFBIG : 0, fd = -1;
    if (error == 0 && (fd = memfd_create("blob", MFD_CLOEXEC)) < 0)
        error = errno;
    if (error == 0)
        error = write_all(fd, frame->body, frame->length);
    if (error != 0) {
        close_fd(&fd);
        send_error(frame->stream, error, STAGE_REQUEST);
        return;
    }
    close_fd(&blob_fd);
    blob_fd = fd;
    send_empty(FRAME_DONE, frame->stream);
}

void transfer_input(struct stream *s, const uint8_t *bytes, size_t n) {
    int error = files_write(&s->file, bytes, n);
    s->in.ungranted += n;
    if (error != 0) {
        send_error(s->id, error, STAGE_REQUEST);
        transfer_drop(s);
    }
}

void transfer_end(struct stream *s) {
    struct stat st;
    int error = files_finish(&s->file, &st);
    if (error != 0)
        send_error(s->id, error, STAGE_REQUEST);
    else
        send_stat(FRAME_DONE, s->id, &st, "", 0);
    stream_free(s);
}

void transfer_drop(struct stream *s) {
    if (s->kind == WRITE)
        files_abandon(&s->file);
    stream_free(s);
}
