#include "agent.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

/* A container without a network has the image's own file, which is mostly empty: engines mount one
   over it elsewhere. Where it cannot be written the names have no address, and nothing else fails. */
void name_localhost(void) {
    int fd = open("/etc/hosts", O_WRONLY | O_CREAT | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK, 0644);
    char own[65] = "";
    struct stat st;
    if (fd < 0)
        return;
    if (fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && st.st_size == 0 &&
        gethostname(own, sizeof own - 1) == 0 &&
        dprintf(fd,
                "127.0.0.1\tlocalhost\n"
                "::1\tlocalhost ip6-localhost ip6-loopback\n"
                "127.0.1.1\t%s\n",
                own) > 0)
        fchmod(fd, 0644);
    close(fd);
}
