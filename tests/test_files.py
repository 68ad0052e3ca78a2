# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import ttt_omni
from ttt_omni.files_ttt_omni import new_file, new_folder


# Writes half of `path` as the process 1 of a container, says so, and goes on when it is told to.
WRITER = """
import os, sys
os.getpid = lambda: 1
package, kind, path, content = sys.argv[1:]
sys.path.insert(0, package)
from files_ttt_omni import new_file, new_folder  # without torch

with (new_file if kind == "file" else new_folder)(path) as temporary:
    first = temporary if kind == "file" else temporary / "first"
    first.write_text(content)
    print("half", flush=True)
    sys.stdin.readline()
    with open(first if kind == "file" else temporary / "second", "a") as file:
        file.write(content)
"""


class Writer:
    def __init__(self, kind, path, content):
        self.process = subprocess.Popen(
            [sys.executable, "-c", WRITER, Path(ttt_omni.__file__).parent, kind, path, content],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout.readline() == "half\n"

    def finish(self):
        _, errors = self.process.communicate("\n", timeout=60)
        return self.process.returncode, errors

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


def content_of(path):
    if path.is_dir():
        return {name: content_of(path / name) for name in sorted(os.listdir(path))}
    return path.read_text()


def whole(kind, content):
    return content * 2 if kind == "file" else {"first": content, "second": content}


@pytest.mark.parametrize("place", ["free", "empty folder"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path, kind, place):
    path = tmp_path / "out"
    if place == "empty folder" and kind == "folder":
        path.mkdir()
    for _ in range(2):
        Writer(kind, path, "killed").kill()
    assert content_of(tmp_path) not in ({}, {"out": {}})
    assert Writer(kind, path, "b").finish() == (0, "")
    assert content_of(tmp_path) == {"out": whole(kind, "b")}


def test_what_a_running_neighbour_writes_is_left_alone(tmp_path):
    """Of two runs with the same process id, the second to finish wins a file, and the first a folder."""
    file, other = tmp_path / "file", tmp_path / "folder"
    one, two = Writer("file", file, "a"), Writer("file", file, "b")
    assert two.finish() == (0, "") and content_of(file) == "bb"
    assert one.finish() == (0, "") and content_of(file) == "aa"
    one, two = Writer("folder", other, "a"), Writer("folder", other, "b")
    assert two.finish() == (0, "")
    status, errors = one.finish()
    assert status == 1 and "is not empty" in errors.splitlines()[-1]
    assert content_of(tmp_path) == {"file": "aa", "folder": whole("folder", "b")}


def test_an_empty_folder_that_a_neighbour_fills_is_refused(tmp_path):
    one = Writer("folder", tmp_path, "a")
    with pytest.raises(FileExistsError, match="not empty"), new_folder(tmp_path):
        pass
    assert one.finish() == (0, "")
    assert content_of(tmp_path) == whole("folder", "a")


@pytest.mark.parametrize("make", [new_file, new_folder])
def test_a_failure_leaves_nothing(tmp_path, make):
    with pytest.raises(KeyboardInterrupt), make(tmp_path / "out") as path:
        (path if make is new_file else path / "x").write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "new" / "parents" / "out"):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("make", [new_file, new_folder])
def test_names_as_long_as_file_systems_allow(tmp_path, make):
    for name in ("x" * 255, "ü" * 127 + "x"):
        with make(tmp_path / name) as path:
            (path if make is new_file else path / "x").write_text("")
        assert (tmp_path / name).exists()
    assert len(os.listdir(tmp_path)) == 2


def test_permissions_are_those_of_the_user(tmp_path):
    umask = os.umask(0o027)
    try:
        with new_file(tmp_path / "file") as path:
            path.write_text("")
        with new_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(umask)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "folder")] == [0o640, 0o750]
    (tmp_path / "file").chmod(0o600)
    with new_file(tmp_path / "file") as path:
        path.write_text("again")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600


def test_symbolic_links_are_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "elsewhere").write_text("old")
    (tmp_path / "folder").symlink_to("real")
    (tmp_path / "file").symlink_to("elsewhere")
    with new_folder(tmp_path / "folder") as path:
        (path / "x").mkdir()
        (path / "x" / "y").write_text("z")
    with new_file(tmp_path / "file") as path:
        path.write_text("new")
    assert (tmp_path / "folder").is_symlink() and (tmp_path / "file").is_symlink()
    assert content_of(tmp_path / "real") == {"x": {"y": "z"}}
    assert (tmp_path / "elsewhere").read_text() == "new"


def test_a_mount_point_is_filled(tmp_path, monkeypatch):
    """It can be neither renamed nor replaced, and nothing be moved into it from outside."""
    mount = tmp_path / "mount"
    mount.mkdir()

    def on_one_side(function):
        def checked(source, target, **kwargs):
            assert mount in type(mount)(source).parents and mount in type(mount)(target).parents
            return function(source, target, **kwargs)

        return checked

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, on_one_side(getattr(os, name)))
    inode = mount.stat().st_ino
    with new_folder(mount) as path:
        (path / "x").write_text("y")
    assert content_of(tmp_path) == {"mount": {"x": "y"}} and mount.stat().st_ino == inode


def test_a_failure_while_moving_into_an_empty_folder_leaves_it_empty(tmp_path, monkeypatch):
    rename, names = os.rename, iter(["first", "second"])

    def fail_at_the_second(source, target):
        if next(names, None) == "second":
            raise OSError("Stale file handle")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_at_the_second)
    with pytest.raises(OSError, match="Stale"), new_folder(tmp_path) as path:
        (path / "x").write_text("y")
        (path / "z").write_text("y")
    assert os.listdir(tmp_path) == []


def test_what_is_there_is_not_lost(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("data")
    with pytest.raises(FileExistsError, match="not empty"), new_folder(tmp_path / "full"):
        pass
    with pytest.raises(FileExistsError, match="not a folder"), new_folder(tmp_path / "full" / "precious"):
        pass
    with pytest.raises(FileExistsError, match="not a file"), new_file(tmp_path / "full"):
        pass
    with pytest.raises(FileExistsError, match="not a file"), new_file(os.devnull):
        pass
    with pytest.raises(FileNotFoundError, match="folder .*none does not exist"), new_file(tmp_path / "none" / "x"):
        pass
    with pytest.raises(FileExistsError, match="not empty"), new_folder(tmp_path / "late"):
        (tmp_path / "late").mkdir()
        (tmp_path / "late" / "precious").write_text("data")
    assert content_of(tmp_path) == {"full": {"precious": "data"}, "late": {"precious": "data"}}


def test_without_locks_all_works_but_nothing_is_removed(tmp_path, monkeypatch):
    Writer("file", tmp_path / "out", "killed").kill()
    monkeypatch.setattr("ttt_omni.files_ttt_omni.fcntl", None)
    with new_file(tmp_path / "out") as path:
        path.write_text("x")
    assert (tmp_path / "out").read_text() == "x" and len(os.listdir(tmp_path)) == 2


def test_many_at_once(tmp_path):
    """Starting runs do not take each other's new folders for leftovers."""
    failures = []

    def write(number):
        try:
            for _ in range(30):
                with new_file(tmp_path / "out") as path:
                    path.write_text(str(number) * 100)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and os.listdir(tmp_path) == ["out"]
    assert len(set((tmp_path / "out").read_text())) == 1
