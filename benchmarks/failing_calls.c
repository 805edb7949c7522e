/* Calls to the file system that fail when told to, in every thread and library of a process:
   cc -shared -fPIC -o failing_calls.so failing_calls.c; LD_PRELOAD=./failing_calls.so python ... */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_int count;
static int first, last, number;
static const char *name = "";

/* From now on, let calls from..to fail with an errno. */
void fail_calls(int from, int to, int error) { first = from, last = to, number = error, count = 0; }

/* How many calls there were since. */
int counted_calls(void) { return count; }

/* The first one that failed. */
const char *failed_call(void) { return name; }

static int fails(const char *call) {
  int own = last ? ++count : 0;
  if (own < first || own > last || !own) return 0;
  if (own == first) name = call;
  errno = number;
  return 1;
}

/* A pipe or an event is none, nor is standard output. */
static int is_file(int fd) {
  struct stat is;
  return fd > 2 && !fstat(fd, &is) && (S_ISREG(is.st_mode) || S_ISDIR(is.st_mode));
}

#define CALL(result, call, parameters, arguments, when)              \
  result call parameters {                                           \
    static result(*real) parameters;                                 \
    if (!real) real = (result(*) parameters)dlsym(RTLD_NEXT, #call); \
    return (when) && fails(#call) ? -1 : real arguments;             \
  }

CALL(ssize_t, write, (int fd, const void *from, size_t size), (fd, from, size), is_file(fd))
CALL(ssize_t, writev, (int fd, const struct iovec *from, int size), (fd, from, size), is_file(fd))
CALL(ssize_t, pwrite, (int fd, const void *from, size_t size, off_t at), (fd, from, size, at), 1)
CALL(ssize_t, pwrite64, (int fd, const void *from, size_t size, off64_t at), (fd, from, size, at), 1)
CALL(ssize_t, pwritev, (int fd, const struct iovec *from, int size, off_t at),
     (fd, from, size, at), 1)
CALL(int, fsync, (int fd), (fd), 1)
CALL(int, fdatasync, (int fd), (fd), 1)
CALL(int, ftruncate, (int fd, off_t size), (fd, size), 1)
CALL(int, ftruncate64, (int fd, off64_t size), (fd, size), 1)
CALL(int, rename, (const char *from, const char *to), (from, to), 1)
CALL(int, renameat, (int at, const char *from, int to_at, const char *to), (at, from, to_at, to), 1)
CALL(int, renameat2, (int at, const char *from, int to_at, const char *to, unsigned flags),
     (at, from, to_at, to, flags), 1)
CALL(int, link, (const char *from, const char *to), (from, to), 1)
CALL(int, linkat, (int at, const char *from, int to_at, const char *to, int flags),
     (at, from, to_at, to, flags), 1)
CALL(int, unlink, (const char *path), (path), 1)
CALL(int, unlinkat, (int at, const char *path, int flags), (at, path, flags), 1)
CALL(int, mkdir, (const char *path, mode_t mode), (path, mode), 1)
CALL(int, mkdirat, (int at, const char *path, mode_t mode), (at, path, mode), 1)

#define WRITES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT))
#define OPEN(call, parameters, ...)                                     \
  int call parameters {                                                 \
    static int(*real) parameters;                                       \
    if (!real) real = (int(*) parameters)dlsym(RTLD_NEXT, #call);       \
    va_list more;                                                       \
    va_start(more, flags);                                              \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
    va_end(more);                                                       \
    return WRITES(flags) && fails(#call) ? -1 : real(__VA_ARGS__, flags, mode); \
  }

OPEN(open, (const char *path, int flags, ...), path)
OPEN(open64, (const char *path, int flags, ...), path)
OPEN(openat, (int at, const char *path, int flags, ...), at, path)
OPEN(openat64, (int at, const char *path, int flags, ...), at, path)

#define FOPEN(call)                                                               \
  FILE *call(const char *path, const char *mode) {                                \
    static FILE *(*real)(const char *, const char *);                             \
    if (!real) real = (FILE * (*)(const char *, const char *)) dlsym(RTLD_NEXT, #call); \
    return mode[0] != 'r' && fails(#call) ? 0 : real(path, mode);                 \
  }

FOPEN(fopen)
FOPEN(fopen64)
