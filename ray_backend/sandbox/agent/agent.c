/* The agent: PID 1 in every sandbox container, and the only thing there that is ours.

   It speaks the protocol of wire.h on its stdin and stdout. One thread, one wait point (poll in
   `wait_for_work`), no state but tables of a fixed size. Between two waits it does what can be done
   at once: takes frames, looks after its keepers (keeper.h), and moves bytes between the streams
   and the output buffer, as far as their credit and its room go. Nothing is read that there is no
   room to answer, so that neither a client nor a program can make it grow.

   --die-on-eof   the end of stdin ends everything: it is closed when the actor dies.
   --link PATH    speak over the socket at PATH in place of stdin and stdout, where it answers: the
                  engine's streams cost six wake-ups and four copies more. Its end is that of stdin;
                  without --die-on-eof stdin and stdout are taken up again then, for another client.
   --owner USER   whom new files and directories belong to, as `docker exec --user` takes them.
   --version      print the protocol's version. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "identity.h"
#include "tree.h"

#define IN_CAPACITY ((size_t)2 * FRAME_MAX)
#define OUT_CAPACITY ((size_t)BULK_QUEUED_MAX + FRAME_MAX + 8 * CONTROL_ROOM)
#define EOF_RECHECK_MS 100
#define OWN_FILES_MAX 8192
#define OWN_GROUP 0x6170 /* any that no image uses */
#define POLLED_MAX (3 + KEEPERS_MAX + 3 * STREAMS_MAX)

int signals_fd;
bool pid_one;
struct agent_origin origin;

static struct buffer in;
static int oom_counter_fd = -1;
static bool die_on_eof;
static int engine_streams[2] = {-1, -1}; /* stdin and stdout, while the link has their places */
static bool frames_left;        /* taking frames stopped for lack of room */
static uint64_t eof_recheck_ns; /* 0: stdin is open */
static size_t turn;             /* the stream that is served first */

static struct pollfd polled[POLLED_MAX];
static size_t polled_count;
static uint64_t wake_ns;

static _Noreturn void die(int status) {
    if (pid_one)
        _exit(status); /* the kernel kills all that is left in the container */
    for (;;) {
        while (waitpid(-1, NULL, WNOHANG) > 0) {
        }
        if (waitpid(-1, NULL, WNOHANG) < 0 && errno == ECHILD)
            _exit(status);
        tree_strike(NULL);
        tree_kill(NULL);
        poll(NULL, 0, 1);
    }
}

/* Write what the other side takes now. */
static void flush_output(void) {
    while (buffer_used(&out) > 0) {
        ssize_t n = write(1, out.data + out.start, buffer_used(&out));
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            return;
        if (n < 0 && die_on_eof)
            die(0);
        buffer_consume(&out, n < 0 ? buffer_used(&out) : (size_t)n);
    }
}

/* ---- memory ---- */

/* The engine mounts the container's own control group there, of version 2 or 1. Opened before any
   program could put something else in its place. */
static int open_oom_counter(void) {
    int fd = open("/sys/fs/cgroup/memory.events", O_RDONLY | O_CLOEXEC);
    return fd >= 0 ? fd : open("/sys/fs/cgroup/memory/memory.oom_control", O_RDONLY | O_CLOEXEC);
}

uint64_t oom_kills(void) {
    char text[1024];
    ssize_t n = oom_counter_fd < 0 ? -1 : pread(oom_counter_fd, text, sizeof text - 1, 0);
    if (n <= 0)
        return 0;
    text[n] = '\0';
    for (const char *line = text; line != NULL; line = strchr(line, '\n')) {
        line += *line == '\n';
        if (strncmp(line, "oom_kill ", 9) == 0)
            return strtoull(line + 9, NULL, 10);
    }
    return 0;
}

/* ---- input ---- */

static void set_nonblocking(void) {
    fcntl(0, F_SETFL, fcntl(0, F_GETFL) | O_NONBLOCK);
    fcntl(1, F_SETFL, fcntl(1, F_GETFL) | O_NONBLOCK);
}

/* Nobody else is there yet: whoever answers at the path was put there by the engine. */
static void use_link(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    size_t n = strlen(path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || n >= sizeof address.sun_path)
        goto refused;
    put_bytes((uint8_t *)address.sun_path, path, n);
    if (connect(fd, (const struct sockaddr *)&address, sizeof address) != 0)
        goto refused;
    for (int i = 0; i < 2; i++)
        if ((engine_streams[i] = fcntl(i, F_DUPFD_CLOEXEC, 3)) < 0 || dup2(fd, i) < 0)
            _exit(1);
    close_fd(&fd);
    set_nonblocking();
    return;
refused: /* the client waits for either a connection or these words */
    fprintf(stderr, "agent: no link: %s\n", strerror(errno));
    close_fd(&fd);
}

/* The link's client is gone for good; the next one comes through the engine. */
static bool leave_link(void) {
    if (engine_streams[0] < 0)
        return false;
    for (int i = 0; i < 2; i++) {
        if (dup2(engine_streams[i], i) < 0)
            die(1);
        close_fd(&engine_streams[i]);
    }
    return true;
}

static void fill_input(void) {
    buffer_compact(&in);
    ssize_t n = read(0, in.data + in.end, in.capacity - in.end);
    if (n > 0) {
        in.end += (size_t)n;
        eof_recheck_ns = 0;
    } else if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
        if (die_on_eof)
            die(0);
        if (!leave_link())
            eof_recheck_ns = now_ns() + EOF_RECHECK_MS * 1000000u; /* somebody may attach */
    }
}

/* ---- the loop ---- */

size_t poll_add(int fd, short events) {
    polled[polled_count] = (struct pollfd){fd, events, 0};
    return polled_count++;
}

bool poll_ready(size_t slot) {
    return slot != NO_SLOT && polled[slot].revents != 0;
}

void wake_at(uint64_t at_ns) {
    if (at_ns < wake_ns)
        wake_ns = at_ns;
}

enum { SLOT_SIGNALS, SLOT_STDIN, SLOT_STDOUT };

/* Wait until something can be done. */
static void wait_for_work(void) {
    bool answerable = room_for_control();
    int timeout = -1;
    wake_ns = UINT64_MAX;
    polled_count = 0;
    poll_add(signals_fd, POLLIN);
    if (answerable && !frames_left && eof_recheck_ns == 0)
        poll_add(0, POLLIN);
    else /* an end that ends everything is heard even when nobody takes our output */
        poll_add(die_on_eof ? 0 : -1, 0);
    poll_add(buffer_used(&out) > 0 ? 1 : -1, POLLOUT);
    keepers_poll();
    for (size_t i = 0; i < streams_used; i++) {
        if (streams[i].kind == EXEC)
            exec_poll(&streams[i]);
        else if (streams[i].kind != FREE)
            transfer_poll(&streams[i]);
    }
    if (frames_left && answerable)
        wake_at(0);
    if (eof_recheck_ns != 0 && answerable)
        wake_at(eof_recheck_ns);
    if (wake_ns != UINT64_MAX) {
        uint64_t now = now_ns();
        timeout = wake_ns <= now ? 0 : (int)((wake_ns - now) / 1000000u) + 1;
    }
    if (poll(polled, polled_count, timeout) < 0 && errno != EINTR)
        die(1);
}

/* PID 1 ends by a SIGTERM from outside only: whoever is in the container has an id here. */
static void take_signals(void) {
    struct signalfd_siginfo info;
    while (read(signals_fd, &info, sizeof info) == sizeof info)
        if (info.ssi_signo == SIGTERM &&
            (!pid_one || (info.ssi_code == SI_USER && info.ssi_pid == 0)))
            die(0);
    keepers_reap();
}

/* Serve every stream once, each time another one first. */
static void pump_all(void) {
    turn++;
    for (size_t i = 0, count = streams_used; i < count; i++) {
        struct stream *s = &streams[(turn + i) % count];
        if (s->kind == EXEC)
            exec_pump(s);
        else if (s->kind != FREE)
            transfer_pump(s);
    }
}

static struct buffer io_buffer(size_t capacity) {
    void *data = mmap(NULL, capacity, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED)
        _exit(1);
    madvise(data, capacity, MADV_DONTFORK); /* a keeper lives long and has no use for it */
    return (struct buffer){.data = data, .capacity = capacity};
}

/* Make this process one that code of the same user, root without CAP_SYS_PTRACE and
   CAP_SYS_RESOURCE included, can neither trace, nor open the pipes of, nor change the limits of:
   a CPU limit kills even PID 1. Against the last, one of its ids has to be nobody else's. */
static void fence(void) {
    origin.gid = getgid();
    if (setresgid((gid_t)-1, (gid_t)-1, OWN_GROUP) != 0) {
        /* not root: its limits stay open to code of this user */
    }
    prctl(PR_SET_DUMPABLE, 0);
}

static void set_up(const char *link) {
    sigset_t handled;
    pid_one = getpid() == 1;
    for (int fd = 0; fd < 3; fd++)
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDWR) != fd)
            _exit(1);
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    prctl(PR_SET_NAME, "agent");
    umask(022);
    fence();
    getrlimit(RLIMIT_NOFILE, &origin.files);
    struct rlimit files = origin.files;
    files.rlim_cur = files.rlim_max < OWN_FILES_MAX ? files.rlim_max : OWN_FILES_MAX;
    setrlimit(RLIMIT_NOFILE, &files);

    for (int n = 1; n < NSIG; n++)
        signal(n, SIG_DFL); /* what our parent ignored is not for programs to inherit */
    sigemptyset(&handled);
    sigaddset(&handled, SIGCHLD);
    sigaddset(&handled, SIGTERM);
    signals_fd = signalfd(-1, &handled, SFD_CLOEXEC | SFD_NONBLOCK);
    sigaddset(&handled, SIGPIPE);
    if (signals_fd < 0 || sigprocmask(SIG_BLOCK, &handled, NULL) != 0)
        _exit(1);
    set_nonblocking();
    if (link != NULL)
        use_link(link);
    if (pid_one)
        name_localhost();
    oom_counter_fd = open_oom_counter();
    in = io_buffer(IN_CAPACITY);
    out = io_buffer(OUT_CAPACITY);
}

int main(int argc, char *argv[]) {
    const char *link = NULL, *owner = "";
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--die-on-eof") == 0) {
            die_on_eof = true;
        } else if (strcmp(argv[i], "--link") == 0 && i + 1 < argc) {
            link = argv[++i];
        } else if (strcmp(argv[i], "--owner") == 0 && i + 1 < argc) {
            owner = argv[++i];
        } else if (strcmp(argv[i], "--version") == 0) {
            printf("%d\n", PROTOCOL_VERSION);
            return 0;
        } else {
            fprintf(stderr, "agent: unknown argument %s\n", argv[i]);
            return 2;
        }
    }
    set_up(link);
    struct identity who;
    if (resolve_user(owner, &who) == 0) /* where there is no such user, execs will say so */
        files_give_to(&who);
    for (;;) {
        wait_for_work();
        if (die_on_eof && polled[SLOT_STDIN].revents & (POLLHUP | POLLERR | POLLNVAL))
            die(0);
        if (poll_ready(SLOT_SIGNALS))
            take_signals();
        if (poll_ready(SLOT_STDIN) || (eof_recheck_ns != 0 && now_ns() >= eof_recheck_ns))
            fill_input();
        frames_left = take_frames(&in);
        keepers_tend();
        pump_all();
        keepers_settle();
        flush_output();
    }
}
