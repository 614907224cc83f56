/* Makes one system call after another, each in a process of its own, and prints what the kernel says to it.
 *
 *   syscalls WHAT...     NUMBER          that call, with -1 as every argument
 *                        socket:FAMILY   socket(FAMILY, SOCK_DGRAM, 0)
 *                        clone:FLAGS     clone(FLAGS | SIGCHLD)
 *                        int80           getpid() by the 32-bit entry (x86-64 only)
 *
 * One line each: WHAT and `ok`, `errno N` or `signal N`. It is C because our Rust is free of unsafe code, and a call by its
 * number is nothing else.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* Exit statuses carry the error's number; this one, which no error has, means success. */
enum { SUCCEEDED = 200 };

static long call(const char *what)
{
    if (strncmp(what, "socket:", 7) == 0)
        return socket(atoi(what + 7), SOCK_DGRAM, 0);
    if (strncmp(what, "clone:", 6) == 0) {
        long child = syscall(SYS_clone, strtoul(what + 6, NULL, 0) | SIGCHLD, 0, 0, 0, 0);
        if (child == 0)
            _exit(0);
        return child;
    }
#ifdef __x86_64__
    if (strcmp(what, "int80") == 0) {
        long result;
        __asm__ volatile("int $0x80" : "=a"(result) : "a"(20L) : "memory", "r8", "r9", "r10", "r11");
        return result;
    }
#endif
    return syscall(strtol(what, NULL, 10), -1L, -1L, -1L, -1L, -1L, -1L);
}

int main(int count, char **words)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (int at = 1; at < count; at++) {
        int status;
        pid_t child = fork();
        if (child < 0)
            return 1;
        if (child == 0) {
            alarm(2);
            _exit(call(words[at]) < 0 ? errno : SUCCEEDED);
        }
        if (waitpid(child, &status, 0) != child)
            return 1;
        if (WIFSIGNALED(status))
            printf("%s signal %d\n", words[at], WTERMSIG(status));
        else if (WEXITSTATUS(status) == SUCCEEDED)
            printf("%s ok\n", words[at]);
        else
            printf("%s errno %d\n", words[at], WEXITSTATUS(status));
    }
    return 0;
}
