/* Preloaded into a process: while the file $READ_ONLY_WHEN exists, everything below $READ_ONLY_BELOW is on a disk that takes no
 * writes, as after disk errors, when the kernel makes a file system read-only under open files. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <unistd.h>

static int below(const char *path) {
    const char *folder = getenv("READ_ONLY_BELOW"), *when = getenv("READ_ONLY_WHEN");
    return folder && when && path && !strncmp(path, folder, strlen(folder)) && !access(when, F_OK);
}

static int refused(int fd) {
    char link[64], path[4096];
    int kept = errno, found;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    path[length < 0 ? 0 : length] = 0;
    found = below(path);
    errno = found ? EROFS : kept;
    return found;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define GUARDED(type, name, parameters, arguments) \
    type name parameters { return refused(fd) ? (type)-1 : NEXT(name) arguments; }

GUARDED(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size))
GUARDED(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
GUARDED(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
GUARDED(int, ftruncate, (int fd, off_t size), (fd, size))
GUARDED(int, ftruncate64, (int fd, off64_t size), (fd, size))

int posix_fallocate(int fd, off_t at, off_t size) { return refused(fd) ? EROFS : NEXT(posix_fallocate)(fd, at, size); }
int posix_fallocate64(int fd, off64_t at, off64_t size) { return refused(fd) ? EROFS : NEXT(posix_fallocate64)(fd, at, size); }

#define OPENING(name) \
    int name(const char *path, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        int mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, int) : 0; \
        va_end(rest); \
        if ((flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)) && below(path)) { errno = EROFS; return -1; } \
        return NEXT(name)(path, flags, mode); \
    }
OPENING(open)
OPENING(open64)

int unlink(const char *path) { if (below(path)) { errno = EROFS; return -1; } return NEXT(unlink)(path); }
int truncate(const char *path, off_t size) { if (below(path)) { errno = EROFS; return -1; } return NEXT(truncate)(path, size); }
int truncate64(const char *path, off64_t size) { if (below(path)) { errno = EROFS; return -1; } return NEXT(truncate64)(path, size); }

int statvfs(const char *path, struct statvfs *found) {
    int answer = NEXT(statvfs)(path, found);
    if (!answer && below(path)) found->f_flag |= ST_RDONLY;
    return answer;
}
int statvfs64(const char *path, struct statvfs64 *found) {
    int answer = NEXT(statvfs64)(path, found);
    if (!answer && below(path)) found->f_flag |= ST_RDONLY;
    return answer;
}
