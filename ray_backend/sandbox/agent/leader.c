#include "leader.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

static const char *environment_value(char *const envp[], const char *name) {
    size_t n = strlen(name);
    for (; *envp != NULL; envp++)
        if (strncmp(*envp, name, n) == 0 && (*envp)[n] == '=')
            return *envp + n + 1;
    return NULL;
}

/* execve that returns why not. A script whose interpreter is missing gives ENOENT too. */
static int try_program(const char *path, char *const argv[], char *const envp[], uint32_t *stage) {
    execve(path, argv, envp);
    int error = errno;
    if (error == ENOENT && access(path, F_OK) == 0)
        *stage = STAGE_INTERPRETER;
    return error;
}

/* Look for the program as execvp does, in the PATH that the program itself will see. */
static int run_program(char *const argv[], char *const envp[], uint32_t *stage) {
    const char *name = argv[0];
    if (strchr(name, '/') != NULL || name[0] == '\0')
        return try_program(name, argv, envp, stage);
    const char *at = environment_value(envp, "PATH");
    if (at == NULL)
        at = DEFAULT_PATH;
    int result = ENOENT;
    for (;;) {
        char candidate[PATH_MAX_BYTES + 1];
        size_t n = strcspn(at, ":");
        int length = snprintf(candidate, sizeof candidate, "%.*s/%s", n > 0 ? (int)n : 1,
                              n > 0 ? at : ".", name);
        if (n <= PATH_MAX_BYTES && length > 0 && (size_t)length < sizeof candidate) {
            uint32_t missing = STAGE_PROGRAM;
            int error = try_program(candidate, argv, envp, &missing);
            if (missing == STAGE_INTERPRETER) {
                *stage = missing;
                return error;
            }
            if (error == EACCES)
                result = error;
            else if (error != ENOENT && error != ENOTDIR && error != ENAMETOOLONG && error != ELOOP)
                return error;
        }
        if (at[n] == '\0')
            return result;
        at += n + 1;
    }
}

/* Give what reads like an empty file, for this keeper's leaders. */
static int open_null(void) {
    static int null = -1;
    int ends[2];
    if (null < 0)
        null = open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (null < 0 && pipe2(ends, O_CLOEXEC) == 0) {
        close(ends[1]); /* an image without /dev/null: a pipe that nobody writes to reads the same */
        null = ends[0];
    }
    return null;
}

#define FEW_POINTERS 256

static char **many_pointers; /* of the leader that starts */

/* Lay argv and envp out, valid until the next call; NULL where there is no room. */
static char **lay_out(const struct exec_request *request, const struct identity *who,
                      char ***envp) {
    static char *few[FEW_POINTERS], home[sizeof "HOME=" + PATH_MAX_BYTES];
    size_t count = (size_t)request->argc + request->envc + 3;
    /* The kernel takes 6 MiB of strings and pointers; a hostile count of empty strings less. */
    if (count > FEW_POINTERS && count <= REQUEST_MAX / sizeof *many_pointers)
        many_pointers = malloc(count * sizeof *many_pointers);
    char **argv = count > FEW_POINTERS ? many_pointers : few;
    if (argv == NULL)
        return NULL;
    const char *at = request->strings;
    for (uint32_t i = 0; i < request->argc; i++, at += strlen(at) + 1)
        argv[i] = (char *)at;
    argv[request->argc] = NULL;
    *envp = argv + request->argc + 1;
    uint32_t last = request->envc;
    for (uint32_t i = 0; i < last; i++, at += strlen(at) + 1)
        (*envp)[i] = (char *)at;
    (*envp)[last] = NULL;
    if (who->given && environment_value(*envp, "HOME") == NULL) {
        snprintf(home, sizeof home, "HOME=%s", who->home);
        (*envp)[last++] = home;
        (*envp)[last] = NULL;
    }
    return argv;
}

/* Become the program, or give why not. This runs in a vfork child, on the keeper's memory. */
static struct failure leader_run(char **argv, char **envp, const struct exec_request *request,
                                 const struct keeper_ends *ends, int input,
                                 const struct identity *who, const struct agent_origin *origin) {
    struct failure failure = {0, STAGE_START};
    sigset_t none;
    setsid();
    setrlimit(RLIMIT_NOFILE, &origin->files);
    if (dup2(input, 0) < 0 || dup2(ends->write[0], 1) < 0 || dup2(ends->write[1], 2) < 0)
        return failure.error = errno, failure;
    failure.stage = STAGE_USER;
    if ((failure.error = become(who, origin->gid)) != 0)
        return failure;
    failure.stage = STAGE_CWD;
    if (chdir(request->cwd) != 0)
        return failure.error = errno, failure;
    failure.stage = STAGE_PROGRAM;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    failure.error = run_program(argv, envp, &failure.stage);
    return failure;
}

pid_t leader_start(const struct exec_request *request, const struct keeper_ends *ends,
                   const struct identity *who, const struct agent_origin *origin,
                   struct failure *failure) {
    static volatile struct failure told;
    char **envp, **argv = lay_out(request, who, &envp);
    int input = ends->input >= 0 ? ends->input : open_null();
    *failure = (struct failure){argv == NULL ? E2BIG : errno, STAGE_START};
    if (argv == NULL || input < 0)
        return -1;
    told.error = 0;
    pid_t pid = vfork();
    if (pid == 0) {
        struct failure mine = leader_run(argv, envp, request, ends, input, who, origin);
        told.stage = mine.stage;
        told.error = mine.error;
        _exit(127);
    }
    *failure = (struct failure){pid < 0 ? errno : told.error, told.stage};
    if (pid < 0)
        failure->stage = STAGE_START;
    free(many_pointers);
    many_pointers = NULL;
    return pid;
}
