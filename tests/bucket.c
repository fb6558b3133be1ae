/* Makes the files below $BUCKET behave as on a mounted bucket, for a program that this library is preloaded into.

   No hard links, no locks, no fsync of folders; listing a folder takes 20 ms. With BUCKET_FLAT, as in a bucket without
   hierarchical namespace, a folder that holds something cannot be renamed: gcsfuse's error for it is EMFILE. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define REAL(name, result, ...) ((result(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name))

static int below(const char *path) {
    const char *bucket = getenv("BUCKET");
    return bucket && path && !strncmp(path, bucket, strlen(bucket));
}

static int inside(int fd) { /* whether an open file is in the bucket */
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    path[length < 0 ? 0 : length] = 0;
    return below(path);
}

static int refuse(int error) { errno = error; return -1; }

static int is_filled(const char *path) {
    DIR *folder = REAL(opendir, DIR *, const char *)(path); /* NULL for a file */
    int entries = 0;
    while (folder && readdir(folder)) entries++;
    if (folder) closedir(folder);
    return entries > 2; /* . and .. */
}

int link(const char *from, const char *to) { return below(to) ? refuse(EPERM) : REAL(link, int, const char *, const char *)(from, to); }

int linkat(int from_fd, const char *from, int to_fd, const char *to, int flags) {
    return below(to) ? refuse(EPERM) : REAL(linkat, int, int, const char *, int, const char *, int)(from_fd, from, to_fd, to, flags);
}

int flock(int fd, int operation) { return inside(fd) ? refuse(ENOSYS) : REAL(flock, int, int, int)(fd, operation); }

#define CONTROL(name) /* fcntl, and the name that glibc gives it for large files */ \
    int name(int fd, int command, ...) { \
        va_list rest; \
        va_start(rest, command); \
        void *argument = va_arg(rest, void *); \
        va_end(rest); \
        int locks = command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK || command == F_OFD_SETLKW; \
        return locks && inside(fd) ? refuse(ENOSYS) : REAL(name, int, int, int, void *)(fd, command, argument); \
    }
CONTROL(fcntl)
CONTROL(fcntl64)

int fsync(int fd) {
    struct stat found;
    int folder = !fstat(fd, &found) && S_ISDIR(found.st_mode);
    return folder && inside(fd) ? refuse(EINVAL) : REAL(fsync, int, int)(fd);
}

DIR *opendir(const char *path) {
    if (below(path)) usleep(20000);
    return REAL(opendir, DIR *, const char *)(path);
}

int rename(const char *from, const char *to) {
    if (getenv("BUCKET_FLAT") && below(from) && is_filled(from)) return refuse(EMFILE);
    return REAL(rename, int, const char *, const char *)(from, to);
}
