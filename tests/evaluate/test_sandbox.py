"""Programs that do harm do none, and are told apart from those that pass."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from parscale.errors import InputError
from parscale.evaluate import confined
from parscale.evaluate.sandbox import available, run_program

pytestmark = pytest.mark.skipif(not available(), reason="the sandbox needs Linux on x86_64 or aarch64")

SAYS_WHY = "try:\n  {}\nexcept OSError as error:\n  raise SystemExit('refused') if error.errno == 1 else error"


def test_what_computes_reads_and_imports_passes() -> None:
    assert run_program("import collections, math, re, heapq, itertools\nassert math.comb(4, 2) == 6").passed
    assert run_program("assert 'root' in open('/etc/passwd').read()\nprint('x' * 10_000_000)").passed
    assert run_program("import numpy as np\nassert np.ones((50, 50)) @ np.ones(50) @ np.ones(50) == 2500").passed
    failed = run_program("assert 1 + 1 == 3, 'sums'")
    assert (failed.passed, failed.reason) == (False, "AssertionError: sums")


def test_an_endless_loop_and_a_long_sleep_end() -> None:
    assert "CPU time" in run_program("while True: pass", seconds=1).reason
    assert "no end within 4 s" in run_program("import time; time.sleep(1000)", seconds=1).reason


def test_a_memory_hog_ends() -> None:
    assert run_program("x = bytearray(2 << 30)", memory_mib=512).reason.startswith("MemoryError")
    assert run_program("x = []\nwhile True: x.append(bytearray(1 << 20))", memory_mib=512).reason[:11] == "MemoryError"
    assert run_program("x = bytearray(100 << 20)", memory_mib=512).passed


@pytest.mark.parametrize("output", ["2", "sys.stdin.fileno() + 3"])
def test_output_does_not_fill_the_parent(output: str) -> None:
    outcome = run_program(f"import os, sys\nwhile True: os.write({output}, b'x' * 1000)")
    assert not outcome.passed
    assert len(outcome.reason) <= 300


@pytest.mark.parametrize(
    "deed",
    [
        "open({file!r}, 'w')",
        "open({file!r}, 'x')",
        "open({old!r}, 'a')",
        "open({old!r}, 'r+')",
        "os.open({file!r}, os.O_RDONLY | os.O_CREAT)",
        "os.truncate({old!r}, 0)",
        "os.remove({old!r})",
        "os.rename({old!r}, {file!r})",
        "os.link({old!r}, {file!r})",
        "os.symlink({old!r}, {file!r})",
        "os.mkdir({file!r})",
        "os.chmod({old!r}, 0)",
        "os.utime({old!r}, (0, 0))",
        "open('/proc/self/mem', 'r+b')",
    ],
)
def test_no_file_is_written_or_changed(deed: str, tmp_path: Path) -> None:
    old, file = tmp_path / "old", tmp_path / "new"
    old.write_text("as it was")
    before = old.stat()
    outcome = run_program("import os\n" + SAYS_WHY.format(deed.format(file=str(file), old=str(old))))
    assert (outcome.passed, outcome.reason) == (False, "SystemExit: refused")
    assert list(tmp_path.iterdir()) == [old]
    assert old.read_text() == "as it was"
    assert (old.stat().st_mode, old.stat().st_mtime) == (before.st_mode, before.st_mtime)


@pytest.mark.parametrize(
    "deed",
    [
        "os.fork()",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.execv('/bin/true', ['true'])",
        "subprocess.run(['true'])",
        "os.kill(os.getppid(), 9)",
        "socket.socket()",
        "os.setuid(1)",
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "os.memfd_create('x')",
        "os.pipe()",
    ],
)
def test_no_process_socket_or_right(deed: str) -> None:
    outcome = run_program("import os, socket, subprocess, resource\n" + SAYS_WHY.format(deed))
    assert not outcome.passed
    assert outcome.reason in ("SystemExit: refused", "ValueError: not allowed to raise maximum limit")


def test_the_same_deeds_work_outside(tmp_path: Path) -> None:
    """Were it not so, the tests above would show nothing."""
    child = "import os\npid = os.fork()\nif not pid: os._exit(0)\nos.waitpid(pid, 0)\nopen('new', 'w').close()"
    subprocess.run([sys.executable, "-I", "-c", child], cwd=tmp_path, check=True)
    assert (tmp_path / "new").exists()


@pytest.mark.parametrize("program", ["import os; os._exit(0)", "raise SystemExit(0)", "import os; os.abort()"])
def test_an_early_end_is_no_pass(program: str) -> None:
    assert not run_program(program).passed


def test_the_parents_environment_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "told")
    assert run_program("import os\nassert 'SECRET' not in os.environ\nassert os.getcwd() == '/'").passed


def test_without_the_kernels_consent_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(InputError, match="riscv64"):
        run_program("pass")


def test_a_filter_that_the_kernel_refuses_ends_the_child(tmp_path: Path) -> None:
    source = Path(confined.__file__).read_text().replace("_SET_SECCOMP, 2, told", "_SET_SECCOMP, 99, told")
    script = tmp_path / "confined.py"
    script.write_text(source)
    told = json.dumps(
        {"program": f"open({str(tmp_path / 'new')!r}, 'w')", "seconds": 5, "memory": 1 << 30, "token": ""}
    )
    done = subprocess.run([sys.executable, "-I", str(script)], input=told, capture_output=True, text=True, check=False)
    assert done.returncode == confined.NO_SANDBOX
    assert not (tmp_path / "new").exists()
    assert os.strerror(22) in done.stderr
