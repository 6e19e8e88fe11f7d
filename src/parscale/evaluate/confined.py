"""The inside of the sandbox: a script that gives up every right but to compute and to read, and then runs a program.

It imports nothing but the standard library, so that it starts quickly and its memory is the program's.
"""

import ctypes
import json
import os
import platform
import resource
import struct
import sys

NO_SANDBOX = 71
"""Exit status where the kernel refused; the program was not run."""

# Numbers of the calls that computing, reading files and importing take, on each machine. Everything else gives EPERM.
MACHINES = {
    "x86_64": {
        "arch": 0xC000003E,
        "opens": {2: 1, 257: 2},  # open, openat: which argument has the flags
        "calls": (
            # read write close stat fstat lstat poll lseek mmap mprotect munmap brk sigaction sigprocmask sigreturn
            0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,
            # pread readv writev access select yield mremap madvise dup nanosleep getitimer setitimer getpid exit uname
            17, 19, 20, 21, 23, 24, 25, 28, 32, 35, 36, 38, 39, 60, 63,
            # getcwd readlink gettimeofday getrlimit getrusage sysinfo times getuid getgid geteuid getegid getppid
            79, 89, 96, 97, 98, 99, 100, 102, 104, 107, 108, 110,
            # sigaltstack gettid time futex sched_getaffinity getdents64 restart clock_gettime clock_getres
            131, 186, 201, 202, 204, 217, 219, 228, 229,
            # clock_nanosleep exit_group newfstatat readlinkat faccessat pselect6 set_robust_list getrandom statx rseq
            230, 231, 262, 267, 269, 270, 273, 318, 332, 334,
            # faccessat2
            439,
        ),
    },
    "aarch64": {
        "arch": 0xC00000B7,
        "opens": {56: 2},  # openat
        "calls": (
            # getcwd dup faccessat close getdents64 lseek read write readv writev pread pselect6 ppoll readlinkat
            17, 23, 48, 57, 61, 62, 63, 64, 65, 66, 67, 72, 73, 78,
            # newfstatat fstat exit exit_group futex set_robust_list nanosleep getitimer setitimer clock_gettime
            79, 80, 93, 94, 98, 99, 101, 102, 103, 113,
            # clock_getres clock_nanosleep sched_getaffinity sched_yield restart sigaltstack sigaction sigprocmask
            114, 115, 123, 124, 128, 132, 134, 135,
            # sigreturn times uname getrlimit getrusage gettimeofday getpid getppid getuid geteuid getgid getegid gettid
            139, 153, 160, 163, 165, 169, 172, 173, 174, 175, 176, 177, 178,
            # sysinfo brk munmap mremap mmap mprotect madvise getrandom statx rseq faccessat2
            179, 214, 215, 216, 222, 226, 233, 278, 291, 293, 439,
        ),
    },
}  # fmt: skip
OUTPUT = 4096
"""Bytes that a program can leave in the files that its output goes to."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050001, 0x80000000
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16
_SET_SECCOMP, _NO_NEW_PRIVILEGES, _DEATH_SIGNAL = 22, 38, 1


def limit(seconds: int, memory: int) -> None:
    """CPU seconds and bytes of address space; no core dump, and of what is written a few lines at most."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (OUTPUT, OUTPUT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def confine() -> None:
    """Install the filter; it cannot be taken off again. Ends the process where that fails."""
    program = _filter()
    code = ctypes.create_string_buffer(program)
    told = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    call = ctypes.CDLL(None, use_errno=True).prctl
    call.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong)
    for option, first, second in ((_DEATH_SIGNAL, 9, None), (_NO_NEW_PRIVILEGES, 1, None), (_SET_SECCOMP, 2, told)):
        if call(option, first, second, 0, 0):
            print(f"prctl {option}: {os.strerror(ctypes.get_errno())}", file=sys.stderr)
            sys.exit(NO_SANDBOX)


def _filter() -> bytes:
    """The BPF program, eight bytes an instruction: code, jump if true, jump if false, operand."""
    machine = MACHINES[platform.machine()]

    def step(code: int, operand: int, true: int = 0, false: int = 0) -> bytes:
        return struct.pack("HBBI", code, true, false, operand)

    steps = [
        step(_LOAD, _ARCH),
        step(_EQUAL, machine["arch"], true=1),
        step(_RETURN, _KILL),  # calls of another architecture have other numbers
        step(_LOAD, _NUMBER),
    ]
    for number in machine["calls"]:
        steps += [step(_EQUAL, number, false=1), step(_RETURN, _ALLOW)]
    for number, argument in machine["opens"].items():
        steps += [
            step(_EQUAL, number, false=4),
            step(_LOAD, _ARGUMENTS + 8 * argument),
            step(_ANY_BIT, WRITES, false=1),
            step(_RETURN, _REFUSE),
            step(_RETURN, _ALLOW),
        ]
    return b"".join([*steps, step(_RETURN, _REFUSE)])


def main() -> None:
    """Read what to run from stdin; write the token to stdout once the program came to its end."""
    told = json.load(sys.stdin)
    result = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    limit(told["seconds"], told["memory"])
    confine()
    try:
        exec(compile(told["program"], "<program>", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        os.write(2, f"\n{type(error).__name__}: {error}".encode(errors="replace")[:1000])
        os._exit(1)
    os.write(result, told["token"].encode())
    os._exit(0)


if __name__ == "__main__":
    main()
