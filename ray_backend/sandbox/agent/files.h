/* What the agent does with names: each call gives 0 or an errno. Nothing here waits for another
   process: FIFOs, sockets and block devices are refused, character devices opened non-blocking.
   A path on a network file system that hangs does hang the agent. */
#ifndef APOTHIC_FILES_H
#define APOTHIC_FILES_H

#include <limits.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>

#include "identity.h"
#include "wire.h"

/* Have new files and directories belong to somebody else than the agent. */
void files_give_to(const struct identity *who);

/* link gets the target of a symbolic link that was not followed, link_length its length. */
int files_stat(const struct file_request *r, struct stat *st, char link[PATH_MAX_BYTES],
               size_t *link_length);
int files_mkdir(const struct file_request *r);
int files_remove(const struct file_request *r);
int files_rename(const struct file_request *r);

int files_open_read(const struct file_request *r, int *fd, struct stat *st);

/* A file being written. An existing one keeps its inode, and so mode, owner and links: it is
   written over in place and cut at the end. Where the length is announced, the space is reserved
   first, so that a full disk is noticed while the old content is still whole. One that this write
   created is removed again unless it is finished.

   With WRITE_REPLACE it is another file beside the old one, with its mode and owner, and takes its
   name at the end. */
struct written_file {
    int fd;
    bool created, regular, append, cut;
    uint64_t offset;
    int directory; /* of a replacement, else -1 */
    char scratch[32], name[NAME_MAX + 1];
};

int files_open_write(const struct file_request *r, struct written_file *file);
int files_write(struct written_file *file, const uint8_t *bytes, size_t n);
/* Close for good; st gets what became of the file. */
int files_finish(struct written_file *file, struct stat *st);
void files_abandon(struct written_file *file);

#endif
