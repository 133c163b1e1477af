"""`make release-check`: is what we would publish reproducible and complete, and does it work in a fresh environment?

    python release/check.py [core-3.11 core-oldest all-3.11 …]        # the usual ones without a name

1. The distribution is built twice, in folders of different names, and compared byte by byte.
2. twine and check-wheel-contents look at it; every tracked module must be in the wheel, and no test.
3. Each environment is fresh, gets the wheel with one extra at most, and runs `smoke.py`. `all` is the extra of that
   name: every framework, layers, studies and monitor. `oldest` is the lowest version of everything that is allowed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
PACKAGES = ("deqcore", "backends/deqcore_numpy", "backends/deqcore_torch", "backends/deqcore_jax")
KINDS = ("core", "torch", "jax", "all")
USUAL = [*(f"core-{version}" for version in PYTHONS), "core-oldest"]
USUAL += ["torch-3.11", "jax-3.11", "jax-oldest", "all-3.11"]
# Where the package index has no CPU build of torch, its oldest release brings gigabytes along: only when asked for.
ENVIRONMENTS = [f"{kind}-{version}" for kind in KINDS for version in (*PYTHONS, "oldest")]


class Failure(Exception):
    """A fault of the release, as text."""


def run(*words: str | Path, cwd: Path = ROOT, **variables: str) -> str:
    """Run a command; its output is shown if it fails."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run([str(word) for word in words], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failure(f"{' '.join(map(str, words))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def tracked() -> list[str]:
    """Return the files of the commit, with forward slashes."""
    return run("git", "ls-files").splitlines()


def build(folder: Path) -> dict[str, Path]:
    """Build sdist and wheel from a copy of the tracked files."""
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    epoch = run("git", "log", "-1", "--format=%ct").strip()
    run(sys.executable, "-m", "build", "--no-isolation", cwd=folder, SOURCE_DATE_EPOCH=epoch)
    return {path.name: path for path in sorted((folder / "dist").iterdir())}


def reproducible(work: Path) -> tuple[Path, Path]:
    """Build wheel and sdist twice, and require the same bytes."""
    first, second = build(work / "first"), build(work / "a" / "second")
    for name, path in first.items():
        sums = [hashlib.sha256(each.read_bytes()).hexdigest() for each in (path, second[name])]
        if sums[0] != sums[1]:
            raise Failure(f"{name} is not reproducible: {sums[0]} and {sums[1]}")
        print(f"{name}  sha256 {sums[0]}, twice")
    wheel, sdist = sorted(first.values(), key=lambda path: path.suffix != ".whl")
    return wheel, sdist


def well_formed(wheel: Path, sdist: Path) -> None:
    """Run twine and check-wheel-contents."""
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    run(sys.executable, "-m", "check_wheel_contents", "--toplevel", ",".join(Path(p).name for p in PACKAGES), wheel)


def complete(wheel: Path, sdist: Path) -> None:
    """Check that the files hold all that they must, and nothing else."""
    inside = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        name.removeprefix("backends/")
        for name in tracked()
        if name.startswith(tuple(f"{package}/" for package in PACKAGES))
    }
    missing, extra = expected - inside, {name for name in inside - expected if ".dist-info/" not in name}
    if missing or extra:
        raise Failure(f"{wheel.name} lacks {sorted(missing)} and has {sorted(extra)} too much")
    for package in PACKAGES:
        if f"{Path(package).name}/py.typed" not in inside:
            raise Failure(f"{wheel.name}: {package} has no py.typed, so its types are invisible to users")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    unknown = packed - set(tracked()) - {"PKG-INFO", ""}
    lacking = {
        "Makefile",
        "mkdocs.yml",
        "README.ja.md",
        "tests/conftest.py",
        "docs/index.md",
        "release/smoke.py",
    } - packed
    if unknown or lacking:
        raise Failure(f"{sdist.name} has {sorted(unknown)} that no commit has, and lacks {sorted(lacking)}")
    print(f"{wheel.name} has {len(inside)} files, {sdist.name} {len(packed)}: complete")


def oldest(*extras: str) -> list[str]:
    """Return pins of the lowest versions that pyproject.toml allows for the core and these extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted, todo, seen = dict.fromkeys(project["dependencies"]), list(extras), set()
    while todo:
        seen.add(extra := todo.pop())
        for each in project["optional-dependencies"][extra]:
            if named := re.fullmatch(r"deqcore\[(.+)\]", each):
                todo += set(named[1].split(",")) - seen
            else:
                wanted[each] = None
    return [re.sub(r">=([\d.]+).*", r"==\1", each) for each in wanted]


def interpreter(version: str) -> str | None:
    """Find a Python of this version: this one, one on the path, or one of pyenv's."""
    if sys.version.startswith(f"{version}."):
        return sys.executable
    found = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    return shutil.which(f"python{version}") if not found else str(found[-1])


def smoke(name: str, wheel: Path, work: Path) -> None:
    """Test the wheel in a fresh environment with the extras that `name` says."""
    kind, _, version = name.partition("-")
    python = interpreter("3.11" if version == "oldest" else version)
    if python is None:
        print(f"{name}: left out, since Python {version} is not installed on this machine")
        return
    folder = work / name
    run(python, "-m", "venv", folder)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    extras = () if kind == "core" else (kind,)
    # The pin of torch chooses its CPU build where the index has one, as long as torch comes before all else.
    pins = ["-c", ROOT / "constraints.txt"] if version != "oldest" else []
    lowest = oldest(*extras) if version == "oldest" else []
    if kind in ("torch", "all"):
        run(*pip, *pins, *([pin for pin in lowest if pin.startswith("torch==")] or ["torch"]))
    run(*pip, *pins, *lowest, str(wheel) if kind == "core" else f"{wheel}[{kind}]")
    run(folder / "bin" / "python", "-m", "pip", "check")
    print(
        f"{name}: {run(folder / 'bin' / 'python', ROOT / 'release' / 'smoke.py', kind, cwd=work).strip()}", flush=True
    )
    shutil.rmtree(folder)


def main(names: list[str]) -> int:
    """Check everything; 1 if something is wrong."""
    unknown = [name for name in names if name not in ENVIRONMENTS]
    if unknown:
        print(f"Unknown environment {unknown}. Available: {', '.join(ENVIRONMENTS)}.")
        return 2
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        try:
            wheel, sdist = reproducible(work)
            well_formed(wheel, sdist)
            complete(wheel, sdist)
            for name in names or USUAL:
                smoke(name, wheel, work)
        except Failure as failure:
            print(f"The release is not fit: {failure}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
