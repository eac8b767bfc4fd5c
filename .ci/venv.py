"""Makes the virtual environment of this checkout, or brings an existing one up to date.

    python3 .ci/venv.py .venv --torch torch==2.13.0 --torch-index https://download.pytorch.org/whl/cpu

Standard library only. Prints every pip command and every choice; what is already there is kept. Exit status 1 with one
sentence when something is missing that only the user can install.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import urllib.error
import urllib.request

PROBE_SECONDS = 5
# Of pip's many lines, these show that the work goes on; the rest is printed only if the command fails.
TELLING = re.compile(r"\s*(Collecting |Downloading |Installing collected|Successfully |mxq|\[\d+/\d+\])")


def say(text: str) -> None:
    print(f"venv: {text}", flush=True)


def check_machine() -> None:
    """Stops early, and in words, where the build would stop late and in compiler output."""
    if sys.version_info < (3, 11):  # noqa: UP036  an older Python gets this sentence instead of a failure inside pip
        sys.exit(f"venv: Python {sys.version.split()[0]} is too old; mxq_ext needs 3.11 or later: make PYTHON=python3.12")
    if not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")):
        sys.exit("venv: no C++ compiler found; on Debian: apt install g++")
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    if not os.path.exists(header):
        sys.exit(f"venv: {header} is missing, C++ extensions cannot be built; on Debian: apt install python3-dev")


def version_of(python: str, package: str) -> str | None:
    """Installed version of a package in that environment, None if it is absent."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def make_environment(folder: str) -> str:
    """Path of the environment's Python; makes the environment if there is none that works."""
    python = os.path.join(folder, "bin", "python")
    if os.path.exists(python) and version_of(python, "pip"):
        say(f"using {folder}")
        return python
    say(f"creating {folder} with Python {sys.version.split()[0]}")
    done = subprocess.run([sys.executable, "-m", "venv", "--clear", folder], capture_output=True, text=True)
    if done.returncode != 0:
        # Debian splits ensurepip off into python3-venv. The system's pip can fill a bare environment just as well.
        bare = subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], capture_output=True, text=True)
        fill = bare.returncode or subprocess.call([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "pip"])
        if fill:
            sys.exit(f"venv: cannot make a virtual environment ({(done.stderr or done.stdout).strip().splitlines()[-1:]}); "
                     "on Debian: apt install python3-venv python3-pip")
    return python


def pip(python: str, *args: str) -> None:
    """Runs pip install, showing the telling lines; on failure the end of its output as well."""
    say("pip install " + " ".join(args))
    lines = []
    with subprocess.Popen([python, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "-v", *args],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as process:
        for line in process.stdout:
            lines.append(line)
            if TELLING.match(line):
                print(line.rstrip(), flush=True)
    if process.returncode:
        print("".join(lines[-60:]))
        sys.exit(f"venv: pip install {' '.join(args)} failed with status {process.returncode}; the end of its output is above")


def index_answers(url: str) -> str | None:
    """None if a package index answers within PROBE_SECONDS, else the reason. pip itself would retry for minutes."""
    try:
        with urllib.request.urlopen(url.rstrip("/") + "/torch/", timeout=PROBE_SECONDS) as reply:
            reply.read(1)
        return None
    except (OSError, ValueError, urllib.error.URLError) as error:
        return str(getattr(error, "reason", error))


def install_torch(python: str, requirement: str, index: str) -> None:
    """The pinned torch, as the CPU build where that can be had."""
    wanted = requirement.partition("==")[2]
    have = version_of(python, "torch")
    if have is not None and have.partition("+")[0] == wanted:
        say(f"torch {have} is there already")
        return
    reason = index_answers(index) if index else "none is set"
    if reason is None:
        say(f"torch comes as the CPU build from {index}")
        pip(python, requirement, "--extra-index-url", index)
    else:
        say(f"WARNING: the index of CPU builds {index} cannot be used ({reason}). pip takes what it finds elsewhere, which works as well "
            "but may be the CUDA build of several GB; name a mirror with make TORCH_INDEX=URL")
        pip(python, requirement)


def install_cuda_compiler(python: str) -> None:
    """The compiler wheels of the extra [cuda-build] for the build that follows, unless there is a CUDA toolkit. No failure ends the run."""
    if os.environ.get("MXQ_CUDA") == "0":
        return say("MXQ_CUDA=0: mxq_ext._cuda is not built, its tests are skipped")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            return say(f"nvcc comes from {name}")
    if shutil.which("nvcc"):
        return say(f"nvcc is there already: {shutil.which('nvcc')}")
    import tomllib  # not at the top: an old Python gets its sentence from check_machine()

    with open("pyproject.toml", "rb") as f:
        wheels = tomllib.load(f)["project"]["optional-dependencies"]["cuda-build"]
    command = [python, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet", "--retries", "1", *wheels]
    say("pip install " + " ".join(wheels))
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        say(f"WARNING: these wheels cannot be installed, so mxq_ext._cuda is NOT built and its tests are skipped. pip said: {done.stdout.strip()[-300:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--torch", required=True, help="requirement, for example torch==2.13.0")
    parser.add_argument("--torch-index", default="", help="package index that holds CPU builds of torch")
    parser.add_argument("--cuda-compiler", action="store_true", help="install the compiler of mxq_ext._cuda where there is no CUDA toolkit")
    parser.add_argument("--extras", default="", help="more extras of pyproject.toml, with commas between them")
    args = parser.parse_args()
    check_machine()
    python = make_environment(args.folder)
    install_torch(python, args.torch, args.torch_index)
    if args.cuda_compiler:
        install_cuda_compiler(python)
    pip(python, "-e", f".[{','.join(['dev', 'plot', *filter(None, args.extras.split(','))])}]")
    pip(python, "--no-deps", "-r", "third_party/demo-data.txt")
    say("ready")


if __name__ == "__main__":
    main()
