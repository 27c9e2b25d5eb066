/* What the parts of the agent share: the tables, the output buffer, and who serves what.
   agent.c has the loop, gate.c the client and its frames, streams.c the table, exec.c the execs,
   keepers.c who keeps them, transfer.c the files, hosts.c the name of this machine. */
#ifndef APOTHIC_AGENT_H
#define APOTHIC_AGENT_H

#include <dirent.h>
#include <stdbool.h>
#include <stdint.h>

#include "files.h"
#include "keeper.h"
#include "wire.h"

#define CONTROL_ROOM 8192 /* more than one request or one ended exec ever adds to the output */
#define BULK_QUEUED_MAX (FRAME_BODY_MAX / 2) /* contents wait while more than this is unsent */
#define GRANT_STEP (INPUT_WINDOW / 4)
#define NO_SLOT SIZE_MAX

struct output {
    int fd;
    size_t slot;          /* where it was polled */
    uint64_t credit, due; /* due: what was in the pipe when the leader ended */
};

struct input {
    int fd;
    uint8_t *ring; /* INPUT_WINDOW bytes */
    size_t head, used, window, ungranted;
    bool end_seen;
};

enum stream_kind { FREE, EXEC, READ, LIST, WRITE };

struct keeper;

struct stream {
    enum stream_kind kind;
    uint32_t id;
    struct input in; /* of an EXEC; of a WRITE window and ungranted only */
    /* EXEC */
    struct keeper *keeper;
    struct output out[2];
    int32_t pid;
    bool started, start_told, ended;
    struct keeper_message end;
    uint8_t end_flags;
    uint64_t oom_kills; /* before its start */
    /* READ, LIST */
    int fd;
    DIR *dir;
    bool begun, seekable;
    uint64_t credit, offset, left;
    /* WRITE */
    struct written_file file;
};

extern struct stream streams[STREAMS_MAX];
extern size_t streams_used; /* slots beyond are free */
extern struct buffer out;
extern int signals_fd;
extern bool pid_one;
extern struct agent_origin origin;

/* agent.c */
/* How many processes of this container the kernel has killed for lack of memory. */
uint64_t oom_kills(void);
size_t poll_add(int fd, short events); /* gives the slot */
bool poll_ready(size_t slot);
void wake_at(uint64_t at_ns);

/* gate.c */
/* Take the frames that have come; gives true if some are left because there is no room to answer. */
bool take_frames(struct buffer *in);
void protocol_error(const char *why);

/* streams.c */
bool room_for_control(void);
bool room_for_contents(void);
void send_empty(uint8_t type, uint32_t stream);
void send_error(uint32_t stream, int error, uint8_t stage);
void send_killed(uint32_t exec, uint32_t kills);
void send_stat(uint8_t type, uint32_t stream, const struct stat *st, const char *link,
               size_t link_length);
/* Let the client send as much more as has been used up, once that is worth a frame. */
void grant_input(struct stream *s);
void close_fd(int *fd);
struct stream *stream_find(uint32_t id);
struct stream *stream_new(enum stream_kind kind, uint32_t id);
/* Release everything that a stream holds, whatever state it is in. */
void stream_free(struct stream *s);

/* exec.c */
void exec_start(const struct frame *frame, uint8_t *request);
void exec_input(struct stream *s, const uint8_t *bytes, size_t n);
void exec_kill(const struct frame *frame);
void exec_signal(const struct frame *frame);
/* Nobody waits for this exec any more: kill it in its own time. */
void exec_drop(struct stream *s);
void exec_pump(struct stream *s);
void exec_poll(struct stream *s);
void exec_started(struct stream *s, int32_t pid);
void exec_failed(struct stream *s, const struct keeper_message *why);
void exec_ended(struct stream *s, const struct keeper_message *end, uint8_t flags);

/* keepers.c */
/* Have an exec started, by the keeper that rests or by a new one; gives 0 or errno. `request` is what
   `r` was decoded from. The ends stay the caller's. */
int keeper_take(struct keeper **taken, uint32_t exec, const struct exec_request *r,
                uint8_t *request, size_t length, struct keeper_ends *ends);
/* A keeper to which the end of its exec leaves nothing hears none of these. */
void keeper_tell(struct keeper *k, enum keeper_verb verb, int32_t number);
void keeper_kill(struct keeper *k, uint32_t grace_ms);
/* Kill what an exec left, ended or not, and answer once it is dead; gives false if nothing is. */
bool keepers_kill(uint32_t exec, uint32_t grace_ms);
/* All execs that have ended stay as they are, but cannot be asked for by id any more. */
void keepers_forget(void);
void keepers_poll(void);
/* Hear what keepers say, bury the dead, kill whom they left. */
void keepers_tend(void);
/* Answer those who wait for keepers that have died. */
void keepers_settle(void);
void keepers_reap(void);

/* hosts.c */
/* Give localhost and the host name addresses where the image does not. */
void name_localhost(void);

/* transfer.c */
void transfer_request(const struct frame *frame);
void transfer_set_blob(const struct frame *frame);
void transfer_input(struct stream *s, const uint8_t *bytes, size_t n);
void transfer_end(struct stream *s);
void transfer_drop(struct stream *s);
void transfer_pump(struct stream *s);
void transfer_poll(const struct stream *s);

#endif
