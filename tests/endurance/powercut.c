/*
 * Records what a process asks of the files below one folder, in the order in which it is done: loaded with LD_PRELOAD.
 *
 * POWERCUT_FOLDER names the folder, POWERCUT_LOG the file that records are appended to. A record is a header and, after
 * it, the path relative to the folder and the bytes written. The call and its record are under one lock, and a sync is
 * recorded after it has returned, so nothing counts as synced that was not. Names in a folder are durable when the
 * folder is synced. Memory maps are not seen; a store keeps nothing in them that must last.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

struct header {
    char kind; /* w: write, t: truncate, s: sync, u: unlink, r: rename (the bytes are the new path) */
    char pad[3];
    uint32_t path_bytes;
    uint64_t offset;
    uint64_t bytes;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char folder[PATH_MAX];
static size_t folder_bytes;
static int record_log = -1;

static void *next(const char *name) { return dlsym(RTLD_NEXT, name); }

__attribute__((constructor)) static void begin(void) {
    const char *place = getenv("POWERCUT_FOLDER"), *file = getenv("POWERCUT_LOG");
    if (!place || !file || !realpath(place, folder))
        return;
    folder_bytes = strlen(folder);
    record_log = (int)syscall(SYS_openat, AT_FDCWD, file, O_WRONLY | O_APPEND | O_CLOEXEC, 0);
    if (record_log < 0)
        abort();
}

/* Returns the path below the folder, or NULL for what is not recorded. */
static const char *below(const char *path) {
    if (record_log < 0 || strncmp(path, folder, folder_bytes) != 0)
        return NULL;
    if (path[folder_bytes] == '\0')
        return "";
    return path[folder_bytes] == '/' ? path + folder_bytes + 1 : NULL;
}

static const char *of_descriptor(int descriptor, char *buffer) {
    char link[64];
    if (record_log < 0)
        return NULL;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, buffer, PATH_MAX - 1);
    if (length < 0)
        return NULL;
    buffer[length] = '\0';
    return below(buffer);
}

static void record(char kind, const char *path, uint64_t offset, const void *data, uint64_t bytes) {
    struct header header = {.kind = kind, .path_bytes = (uint32_t)strlen(path), .offset = offset, .bytes = bytes};
    struct iovec parts[3] = {
        {&header, sizeof header}, {(void *)path, header.path_bytes}, {(void *)data, data ? bytes : 0}};
    ssize_t expected = (ssize_t)(sizeof header + header.path_bytes + (data ? bytes : 0));
    if (syscall(SYS_writev, record_log, parts, 3) != expected)
        abort();
}

#define WRITE_AT(name, offset_type)                                                              \
    ssize_t name(int descriptor, const void *data, size_t bytes, offset_type offset) {           \
        static ssize_t (*real)(int, const void *, size_t, offset_type);                          \
        char buffer[PATH_MAX];                                                                   \
        if (!real)                                                                               \
            real = next(#name);                                                                  \
        const char *path = of_descriptor(descriptor, buffer);                                    \
        if (!path)                                                                               \
            return real(descriptor, data, bytes, offset);                                        \
        pthread_mutex_lock(&lock);                                                               \
        ssize_t done = real(descriptor, data, bytes, offset);                                    \
        if (done > 0)                                                                            \
            record('w', path, (uint64_t)offset, data, (uint64_t)done);                           \
        pthread_mutex_unlock(&lock);                                                             \
        return done;                                                                             \
    }
WRITE_AT(pwrite, off_t)
WRITE_AT(pwrite64, off64_t)

ssize_t write(int descriptor, const void *data, size_t bytes) {
    static ssize_t (*real)(int, const void *, size_t);
    char buffer[PATH_MAX];
    if (!real)
        real = next("write");
    const char *path = of_descriptor(descriptor, buffer);
    if (!path)
        return real(descriptor, data, bytes);
    pthread_mutex_lock(&lock);
    ssize_t done = real(descriptor, data, bytes);
    if (done > 0)
        record('w', path, (uint64_t)lseek(descriptor, 0, SEEK_CUR) - (uint64_t)done, data, (uint64_t)done);
    pthread_mutex_unlock(&lock);
    return done;
}

#define TRUNCATE(name, offset_type)                                                              \
    int name(int descriptor, offset_type length) {                                               \
        static int (*real)(int, offset_type);                                                    \
        char buffer[PATH_MAX];                                                                   \
        if (!real)                                                                               \
            real = next(#name);                                                                  \
        const char *path = of_descriptor(descriptor, buffer);                                    \
        if (!path)                                                                               \
            return real(descriptor, length);                                                     \
        pthread_mutex_lock(&lock);                                                               \
        int failed = real(descriptor, length);                                                   \
        if (!failed)                                                                             \
            record('t', path, (uint64_t)length, NULL, 0);                                        \
        pthread_mutex_unlock(&lock);                                                             \
        return failed;                                                                           \
    }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

#define SYNC(name)                                                                               \
    int name(int descriptor) {                                                                   \
        static int (*real)(int);                                                                 \
        char buffer[PATH_MAX];                                                                   \
        if (!real)                                                                               \
            real = next(#name);                                                                  \
        const char *path = of_descriptor(descriptor, buffer);                                    \
        if (!path)                                                                               \
            return real(descriptor);                                                             \
        pthread_mutex_lock(&lock);                                                               \
        int failed = real(descriptor);                                                           \
        if (!failed)                                                                             \
            record('s', path, 0, NULL, 0);                                                       \
        pthread_mutex_unlock(&lock);                                                             \
        return failed;                                                                           \
    }
SYNC(fsync)
SYNC(fdatasync)

int unlink(const char *name) {
    static int (*real)(const char *);
    if (!real)
        real = next("unlink");
    const char *path = below(name);
    if (!path)
        return real(name);
    pthread_mutex_lock(&lock);
    int failed = real(name);
    if (!failed)
        record('u', path, 0, NULL, 0);
    pthread_mutex_unlock(&lock);
    return failed;
}

int rename(const char *from, const char *to) {
    static int (*real)(const char *, const char *);
    if (!real)
        real = next("rename");
    const char *path = below(from), *target = below(to);
    if (!path || !target)
        return real(from, to);
    pthread_mutex_lock(&lock);
    int failed = real(from, to);
    if (!failed)
        record('r', path, 0, target, strlen(target));
    pthread_mutex_unlock(&lock);
    return failed;
}
