"""Contenders in processes of their own, asked in turn: one computes at a time, on the same number of cores.

A section's module has a function `serve(task)`, which loads and warms up, and returns a function from a request to an
answer, both dicts of plain values. `Worker` starts it in the interpreter that has the library.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class WorkerError(RuntimeError):
    """The contender failed; the message is the end of what it wrote."""


class Worker:
    """A process that answers requests.

    Args:
        module: the section's module.
        task: what `serve` is given.
        python: the interpreter.
        threads: how many cores and threads it may use.
        timeout: most seconds for loading.
    """

    def __init__(self, module: str, task: dict[str, Any], python: str, threads: int, timeout: float = 600.0) -> None:
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        environment = {**os.environ, **dict.fromkeys(names, str(threads)), "PYTHONPATH": str(ROOT)}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  for as long as the process
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.worker", module, json.dumps(task), str(threads)],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip
        self.ready = self._answer(timeout)

    def ask(self, timeout: float = 600.0, **request: Any) -> dict[str, Any]:
        """Send a request and wait for the answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((json.dumps(request) + "\n").encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._last_words()) from None
        return self._answer(timeout)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _answer(self, timeout: float) -> dict[str, Any]:
        out = self._process.stdout
        assert out is not None
        if not select.select([out], [], [], timeout)[0]:
            self.close()
            raise WorkerError(f"no answer within {timeout:.0f} s")
        line = out.readline()
        if not line:
            raise WorkerError(self._last_words())
        return dict(json.loads(line))

    def _last_words(self) -> str:
        self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else f"ended with code {self._process.returncode}"


class Stopwatch:
    """Seconds since it was made, by the wall clock and of this process's processor time."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Return both."""
        return {"wall": time.perf_counter() - self._wall, "cpu": time.process_time() - self._cpu}


def keep_to_cores(threads: int) -> None:
    """Let this process run on so many cores; JAX sizes its thread pool by them and knows no other setting."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])


def _serve(module: str, task: dict[str, Any], threads: int) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print; answers have the pipe to themselves
    keep_to_cores(threads)
    import torch

    torch.set_num_threads(threads)
    answer: Callable[[dict[str, Any]], dict[str, Any]] = importlib.import_module(module).serve(task)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]))
