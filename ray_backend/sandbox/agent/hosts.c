#include "agent.h"

#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const char hosts[] = "127.0.0.1\tlocalhost\n"
                            "::1\tlocalhost ip6-localhost ip6-loopback\n";

/* A container without a network has the image's own file, which is mostly empty: engines mount one
   over it elsewhere. Where it cannot be written, localhost has no address, and nothing else fails. */
void name_localhost(void) {
    int fd = open("/etc/hosts", O_WRONLY | O_CREAT | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK, 0644);
    struct stat st;
    if (fd < 0)
        return;
    if (fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && st.st_size == 0 &&
        write(fd, hosts, sizeof hosts - 1) == (ssize_t)(sizeof hosts - 1))
        fchmod(fd, 0644);
    close(fd);
}
